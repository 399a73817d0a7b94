"""AutoAWQ's two layouts, packed here by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmtools
from llmtools import CheckpointError
from tests.formats.writers import assert_same, dense, draw, stream, write

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def interleaved(rows: Tensor) -> Tensor:
    """[r, m] -> int32 [r, m/8], nibble i of a word from column ORDER[i] of its eight."""
    return stream(rows.unflatten(1, (-1, 8))[:, :, ORDER].flatten(1), 4)


def gemm(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, zeros = draw(path, 4, out, n // 32, n)
    tensors = {"qweight": interleaved(codes.T), "qzeros": interleaved(zeros.T), "scales": scales.T}
    return tensors, dense(codes, scales, zeros, torch.arange(n) // 32)


def gemv(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, zeros = draw(path, 4, out, n // 32, n)
    room = -(-n // 32 // 8 // 4) * 4 or 4  # words of zeros, a multiple of 4 at group size 32
    padded = torch.nn.functional.pad(scales, (0, 8 * room - scales.shape[1]))
    zero_words = stream(torch.nn.functional.pad(zeros, (0, 8 * room - zeros.shape[1])), 4)
    tensors = {"qweight": stream(codes, 4), "qzeros": zero_words, "scales": padded}
    return tensors, dense(codes, scales, zeros, torch.arange(n) // 32)


def config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", **more}


@pytest.mark.parametrize(("writer", "version"), [(gemm, "gemm"), (gemv, "gemv")], ids=["gemm", "gemv"])
def test_both_layouts(writer: Any, version: str, tmp_path: Path) -> None:
    assert_same(tmp_path / "q", write(tmp_path / "q", writer, config(version=version)))


def test_the_old_config_file(tmp_path: Path) -> None:
    told = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    assert_same(tmp_path / "q", write(tmp_path / "q", gemm, told, side="quant_config.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"version": "gemv_fast"}, "not read"), ({"bits": 3}, "3 bits"), ({"group_size": 40}, "no multiple")],
)
def test_what_cannot_be_read_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "q", gemm, config(**changes))
    with pytest.raises(CheckpointError, match=message):
        llmtools.load(tmp_path / "q")
