"""Trellis decoding and products on a GPU: the tile that the kernels of `triton_common.py` need, and the calls.

A weight's state is cut from two neighbouring words of its row (the second may be the first of the row after) and made a
value by a few integer instructions: there are no tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_common
from . import reference
from .tables import CODES


def dequantize_trellis(
    trellis: Tensor, bits: int, state_bits: int, code: str, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """trellis [out, k·b] int16 on a GPU -> rows start … stop, [stop − start, 16b] of `dtype`."""
    if dtype not in triton_common.FLOATS:
        return reference.dequantize_trellis(trellis, bits, state_bits, code, start, stop, dtype)
    return triton_common.dequantize(_weight(trellis, bits, state_bits, code, start, stop), dtype)


def multiply_trellis(x: Tensor, trellis: Tensor, bits: int, state_bits: int, code: str, transposed: bool) -> Tensor:
    """x [t, 16b] -> [t, out] of x's type, or transposed x [t, out] -> [t, 16b]; trellis [out, k·b] int16 on a GPU."""
    if x.dtype not in triton_common.FLOATS:
        return reference.multiply_trellis(x, trellis, bits, state_bits, code, transposed)
    product = triton_common.multiply_transposed if transposed else triton_common.multiply
    return product(x, _weight(trellis, bits, state_bits, code, 0, len(trellis)))


def _weight(trellis: Tensor, bits: int, state_bits: int, code: str, start: int, stop: int) -> triton_common.Weight:
    blocks = trellis.shape[1] // bits
    config = (bits, state_bits, CODES.index(code))
    tensors = (trellis.contiguous(), start, len(trellis), blocks)
    return triton_common.Weight(_tile, config, tensors, stop - start, blocks * reference.TILE, stages=1, most_rows=32)


@triton.jit
def _tile(tensors, rows, live, first, CONFIG: tl.constexpr, COLUMNS: tl.constexpr):
    trellis, start, height, blocks = tensors
    BITS: tl.constexpr = CONFIG[0]
    STATE: tl.constexpr = CONFIG[1]
    row = (rows + start).to(tl.int64)
    after = tl.where((row % 16 == 15) | (row == height - 1), row - row % 16, row + 1)
    column = first + tl.arange(0, COLUMNS)
    block, bit = (column // 16)[None, :], ((column % 16) * BITS)[None, :]
    word, ok = bit // 16, live[:, None] & (block < blocks)
    own = trellis + (row[:, None] * blocks + block) * BITS
    following = tl.where(word + 1 < BITS, own + word + 1, trellis + (after[:, None] * blocks + block) * BITS)
    upper = tl.load(own + word, mask=ok, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    lower = tl.load(following, mask=ok, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    shift = (32 - STATE - bit % 16).to(tl.uint32)
    state = (((upper << 16) | lower) >> shift) & ((1 << STATE) - 1)
    return _mad(state) if CONFIG[2] == 0 else _inst(state)


@triton.jit
def _mad(state):
    """1mad: the sum of four bytes, moved to zero and times a constant."""
    y = state * 34038481 + 76625530
    total = (y & 255) + ((y >> 8) & 255) + ((y >> 16) & 255) + (y >> 24)
    return (total.to(tl.int32) - 510).to(tl.float32) * 0.0067658754996955395  # 1 / 147.8… in float32


@triton.jit
def _inst(state):
    """3inst: the sum of two float16 that share a word, rounded to float16."""
    y = ((state * 89226354 + 64248484) & 0x8FFF8FFF) ^ 0x3B603B60
    high = (y >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    low = (y & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return (high.to(tl.float32) + low.to(tl.float32)).to(tl.float16).to(tl.float32)
