"""Trellis decoding and products on a GPU: the tile that the kernels of `triton_common.py` need, and the calls.

A weight's state is cut from two neighbouring words of its row (the second may be the first of the row after) and made a
value by a few integer instructions; of hyb it is looked up in a table of 2 KB.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_common
from . import reference
from .tables import CODES, ORDERS, TILE


def dequantize_trellis(
    trellis: Tensor,
    table: Tensor | None,
    bits: int,
    state_bits: int,
    code: str,
    order: str,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """trellis [out, k·b] int16 on a GPU -> rows start … stop, [stop − start, 16b] of `dtype`."""
    if dtype not in triton_common.FLOATS:
        return reference.dequantize_trellis(trellis, table, bits, state_bits, code, order, start, stop, dtype)
    return triton_common.dequantize(_weight(trellis, table, bits, state_bits, code, order, start, stop), dtype)


def multiply_trellis(
    x: Tensor,
    trellis: Tensor,
    table: Tensor | None,
    bits: int,
    state_bits: int,
    code: str,
    order: str,
    transposed: bool,
) -> Tensor:
    """x [t, 16b] -> [t, out] of x's type, or transposed x [t, out] -> [t, 16b]; trellis [out, k·b] int16 on a GPU."""
    if x.dtype not in triton_common.FLOATS:
        return reference.multiply_trellis(x, trellis, table, bits, state_bits, code, order, transposed)
    product = triton_common.multiply_transposed if transposed else triton_common.multiply
    return product(x, _weight(trellis, table, bits, state_bits, code, order, 0, len(trellis)))


def _weight(
    trellis: Tensor, table: Tensor | None, bits: int, state_bits: int, code: str, order: str, start: int, stop: int
) -> triton_common.Weight:
    blocks = trellis.shape[1] // bits
    config = (bits, state_bits, CODES.index(code), ORDERS.index(order))
    looked_up = trellis if table is None else table.contiguous()  # read by hyb alone
    tensors = (trellis.contiguous(), looked_up, start, len(trellis), blocks)
    return triton_common.Weight(_tile, config, tensors, stop - start, blocks * TILE, stages=1, most_rows=32)


@triton.jit
def _tile(tensors, rows, live, first, CONFIG: tl.constexpr, COLUMNS: tl.constexpr):
    trellis, table, start, height, blocks = tensors
    BITS: tl.constexpr = CONFIG[0]
    STATE: tl.constexpr = CONFIG[1]
    V: tl.constexpr = 2 if CONFIG[2] == 4 else 1
    row = (rows + start).to(tl.int64)
    column = first + tl.arange(0, COLUMNS)
    block = (column // 16)[None, :]
    ok = live[:, None] & (block < blocks)
    if CONFIG[3] == 0:  # row by row: only the last states reach into another row, the next one or the tile's first
        after = tl.where((row % 16 == 15) | (row == height - 1), row - row % 16, row + 1)
        bit = ((column % 16 - column % 16 % V) * BITS)[None, :]
        word = bit // 16
        own = trellis + (row[:, None] * blocks + block) * BITS + word
        following = tl.where(word + 1 < BITS, own + 1, trellis + (after[:, None] * blocks + block) * BITS)
    else:  # EXL3's order, or that of fragments
        r, c, top = (row % 16)[:, None], (column % 16)[None, :], (row - row % 16)[:, None]
        DOWN: tl.constexpr = 4 if CONFIG[3] == 1 else 2
        bit = BITS * (32 * (r % 8) + 8 * ((c % 8) // 2) + DOWN * (r // 8) + (6 - DOWN) * (c // 8) + c % 2 - c % V)
        word = bit // 16
        after = (word + 1) % (16 * BITS)
        own = trellis + ((top + word // BITS) * blocks + block) * BITS + word % BITS
        following = trellis + ((top + after // BITS) * blocks + block) * BITS + after % BITS
    upper = tl.load(own, mask=ok, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    lower = tl.load(following, mask=ok, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    shift = (32 - STATE - bit % 16).to(tl.uint32)
    state = (((upper << 16) | lower) >> shift) & ((1 << STATE) - 1)
    if CONFIG[2] == 0:
        return (_bytes(state * 34038481 + 76625530) - 510).to(
            tl.float32
        ) * 0.0067658754996955395  # 1 / 147.8… in float32
    elif CONFIG[2] == 1:
        return _halves(state * 89226354 + 64248484)
    elif CONFIG[2] == 2:
        return _halves(state * 0xCBAC1FED)
    elif CONFIG[2] == 4:
        h, second = state * (state + 1), (column % 2)[None, :]
        value = tl.load(table + ((h >> 6) & 511).to(tl.int32) * 2 + second).to(tl.float32)
        return tl.where(((h >> 15) & 1 == 1) & (second == 0), -value, value)
    else:  # two float16 constants: exact in float32 up to the rounding
        value = (1024 + _bytes(state * 0x83DCD12D)).to(tl.float32) * 0.006767272949218750 - 10.3828125
        return value.to(tl.float16).to(tl.float32)


@triton.jit
def _bytes(y):
    """The sum of four bytes, int32."""
    return ((y & 255) + ((y >> 8) & 255) + ((y >> 16) & 255) + (y >> 24)).to(tl.int32)


@triton.jit
def _halves(y):
    """The sum of two float16 that share a word, rounded to float16."""
    y = (y & 0x8FFF8FFF) ^ 0x3B603B60
    high = (y >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    low = (y & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return (high.to(tl.float32) + low.to(tl.float32)).to(tl.float16).to(tl.float32)
