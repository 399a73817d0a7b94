"""bitsandbytes' 4-bit tensors, packed here by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmtools
from llmtools import CheckpointError
from llmtools.quant.grids.codebook import DYNAMIC
from tests.formats.writers import assert_same, write

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
TABLES = {"nf4": NF4, "fp4": FP4 + [-value for value in FP4], "own": sorted(torch.linspace(-1, 0.9, 16).tolist())}


def writer(kind: str, block: int = 32, nested: str = "", storage: torch.dtype = torch.uint8) -> Any:
    def write_linear(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(sum(map(ord, path)))
        codes = torch.randint(16, (out * n,), generator=generator, dtype=torch.uint8)
        blocks = -(-out * n // block)
        maxima = torch.rand(blocks, generator=generator) * 0.3
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [out, n]}
        more: dict[str, Tensor] = {"weight.absmax": maxima}
        if nested:
            table = torch.tensor(DYNAMIC) if nested == "usual" else torch.linspace(-1, 1, 256)
            scales = torch.rand(-(-blocks // 256), generator=generator) * 0.2
            fine = torch.randint(256, (blocks,), generator=generator, dtype=torch.uint8)
            offset = 0.1234567761659622
            maxima = table[fine.long()] * scales.repeat_interleave(256)[:blocks] + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            more = {"weight.absmax": fine, "weight.nested_absmax": scales, "weight.nested_quant_map": table}
        table = torch.tensor(TABLES[kind])
        weight = table[codes.long()] * maxima.repeat_interleave(block)[: out * n]
        label = "fp4" if kind == "fp4" else "nf4"
        tensors = more | {
            "weight": (codes[0::2] << 4 | codes[1::2]).view(storage)[:, None],
            "weight.quant_map": table,
            f"weight.quant_state.bitsandbytes__{label}": torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            ),
        }
        return tensors, weight.reshape(out, n)

    return write_linear


CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "_load_in_4bit": True}


@pytest.mark.parametrize("kind", ["nf4", "fp4", "own"])
@pytest.mark.parametrize("nested", ["", "usual", "other"], ids=["flat", "nested", "another nested map"])
def test_tables_and_maxima(kind: str, nested: str, tmp_path: Path) -> None:
    model = assert_same(tmp_path / "q", write(tmp_path / "q", writer(kind, 32, nested), CONFIG))
    assert model.model.layers[0].mlp.up_proj.quantizer.double_quantization == (nested == "usual")


@pytest.mark.parametrize("nested", ["", "usual"], ids=["flat", "nested"])
def test_blocks_that_run_over_the_ends_of_rows(nested: str, tmp_path: Path) -> None:
    """Rows of 64 and 96 in blocks of 128 and 64: some share blocks."""
    for block in (64, 128):
        folder = tmp_path / str(block)
        assert_same(folder, write(folder, writer("nf4", block, nested), CONFIG))


def test_bytes_stored_as_another_type(tmp_path: Path) -> None:
    assert_same(tmp_path / "q", write(tmp_path / "q", writer("nf4", storage=torch.bfloat16), CONFIG))


def test_a_missing_state_is_an_error(tmp_path: Path) -> None:
    def without(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
        tensors, weight = writer("nf4")(path, out, n)
        return {name: tensor for name, tensor in tensors.items() if "quant_state" not in name}, weight

    write(tmp_path / "q", without, CONFIG)
    with pytest.raises(CheckpointError, match=r"bitsandbytes__nf4 \(or fp4\) is missing"):
        llmtools.load(tmp_path / "q")
