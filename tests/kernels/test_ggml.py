"""ggml's blocks: decoded as the package gguf decodes them, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtools.kernels.ggml import NUMBERS, TYPES, dequantize_ggml


def blocks(kind: str, rows: int, columns: int, *, finite: bool = True) -> Tensor:
    """Random bytes [rows, row_bytes]; with `finite`, all float16 numbers among them are moderate."""
    each = TYPES[kind]
    found = torch.randint(0, 256, (rows * columns // each.weights, each.bytes), dtype=torch.uint8)
    if finite:
        for at in each.halves:
            found[:, at + 1] = found[:, at + 1] & 0x83 | 0x2C
        if not each.halves:
            found[:, 55] = found[:, 55] & 0x8F | 0x20
            found[:, 53] = found[:, 53] & 0x0F | 0xC0
    return found.reshape(rows, -1)


@pytest.mark.parametrize("kind", TYPES)
def test_rows_are_those_of_the_package_gguf(kind: str) -> None:
    gguf: Any = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    assert NUMBERS[int(number)] == kind and gguf.GGML_QUANT_SIZES[number] == TYPES[kind][1:3]
    for finite in (True, False):
        packed = blocks(kind, 12, 1024, finite=finite)
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), number))
        got = dequantize_ggml(packed, kind)
        assert not finite or bool(torch.isfinite(got).all())
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit() | got.isnan(), expected.signbit() | expected.isnan())
