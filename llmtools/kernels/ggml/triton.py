"""ggml's blocks on a GPU: the tile that the kernels of `triton_common.py` need, and the calls.

Each column's code, scale and minimum are read by themselves: neighbouring columns share them, from the cache. All is
formed in float32 by the operations of `reference.py` in their order, so that decoding gives the reference's bits. Types
without a function here, as without one in `decode.h`, use the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_common
from ..triton_common import number
from . import reference
from .native import KINDS
from .tables import iq4_levels
from .types import TYPES


def dequantize_ggml(blocks: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] of `dtype`; arguments as in the package's docstring."""
    if dtype not in triton_common.FLOATS or kind not in KINDS:
        return reference.dequantize_ggml(blocks, kind, dtype)
    return triton_common.dequantize(_weight(blocks, kind), dtype)


def multiply_ggml(x: Tensor, blocks: Tensor, kind: str, transposed: bool) -> Tensor:
    """x [t, in] -> [t, out], or [t, out] -> [t, in]; arguments as in the package's docstring."""
    if x.dtype not in triton_common.FLOATS or kind not in KINDS:
        return reference.multiply_ggml(x, blocks, kind, transposed)
    product = triton_common.multiply_transposed if transposed else triton_common.multiply
    return product(x, _weight(blocks, kind))


def _weight(blocks: Tensor, kind: str) -> triton_common.Weight:
    each, blocks = TYPES[kind], blocks.contiguous()
    if blocks.data_ptr() % 2:  # a view into other bytes; all offsets of float16 numbers are even
        blocks = blocks.clone()
    rows, size = blocks.shape
    tensors: tuple[Any, ...] = (blocks, blocks.view(torch.float16), size, iq4_levels(blocks.device))
    config = (each.number, each.weights, each.bytes)
    columns, most_rows = size // each.bytes * each.weights, 16 if each.weights == 256 else 64
    return triton_common.Weight(_tile, config, tensors, rows, columns, stages=1, most_rows=most_rows)


@triton.jit
def _tile(tensors, rows, live, first, CONFIG: tl.constexpr, COLUMNS: tl.constexpr):
    octets, halves, size, levels = tensors
    KIND: tl.constexpr = CONFIG[0]  # number of the type in files
    WEIGHTS: tl.constexpr = CONFIG[1]
    BYTES: tl.constexpr = CONFIG[2]
    column = first + tl.arange(0, COLUMNS)
    b, i = (column // WEIGHTS * BYTES)[None, :], (column % WEIGHTS)[None, :]  # where its block begins; its place there
    ok = live[:, None] & (b < size)
    row = rows.to(tl.int64)[:, None] * size  # added to pointers once, so that offsets are those of columns
    octets, halves = octets + row, halves + row // 2
    if KIND == 2:  # Q4_0
        value = _half(halves, b, ok) * (number(_nibble(octets, b + 2, i, ok)) - 8)
    elif KIND == 3:  # Q4_1
        value = _half(halves, b, ok) * number(_nibble(octets, b + 4, i, ok)) + _half(halves, b + 2, ok)
    elif KIND == 6:  # Q5_0
        value = _half(halves, b, ok) * (number(_five(octets, b + 2, i, ok)) - 16)
    elif KIND == 7:  # Q5_1
        value = _half(halves, b, ok) * number(_five(octets, b + 4, i, ok)) + _half(halves, b + 2, ok)
    elif KIND == 8:  # Q8_0
        value = _half(halves, b, ok) * _signed(octets, b + 2 + i, ok)
    elif KIND == 20:  # IQ4_NL
        value = _half(halves, b, ok) * tl.load(levels + _nibble(octets, b + 2, i, ok))
    elif KIND == 10:  # Q2_K
        both = _byte(octets, b + i // 16, ok)
        scale, least = _half(halves, b + 80, ok) * number(both & 15), _half(halves, b + 82, ok) * number(both >> 4)
        value = scale * number(_plane(octets, b + 16, i, 2, ok)) - least
    elif KIND == 11:  # Q3_K
        g = i // 16
        low = (_byte(octets, b + 96 + g % 8, ok) >> (4 * (g // 8)).to(tl.uint32)) & 15
        high = (_byte(octets, b + 104 + g % 4, ok) >> (2 * (g // 4)).to(tl.uint32)) & 3
        scale = _half(halves, b + 108, ok) * (number(low | (high << 4)) - 32)
        code = _plane(octets, b + 32, i, 2, ok) | (_plane(octets, b, i, 1, ok) << 2)
        value = scale * (number(code) - 4)
    elif KIND == 12:  # Q4_K
        value = _shifted(octets, halves, b, i, _plane(octets, b + 16, i, 4, ok), ok)
    elif KIND == 13:  # Q5_K
        code = _plane(octets, b + 48, i, 4, ok) | (_plane(octets, b + 16, i, 1, ok) << 4)
        value = _shifted(octets, halves, b, i, code, ok)
    elif KIND == 14:  # Q6_K
        low = _byte(octets, b + i // 128 * 64 + i % 64, ok) >> (4 * (i % 128 // 64)).to(tl.uint32)
        code = (low & 15) | (_plane(octets, b + 128, i, 2, ok) << 4)
        value = _half(halves, b + 208, ok) * _signed(octets, b + 192 + i // 16, ok) * (number(code) - 32)
    else:  # IQ4_XS
        g = i // 32
        low = (_byte(octets, b + 4 + g // 2, ok) >> (4 * (g % 2)).to(tl.uint32)) & 15
        high = (_byte(octets, b + 2 + g // 4, ok) >> (2 * (g % 4)).to(tl.uint32)) & 3
        scale = _half(halves, b, ok) * (number(low | (high << 4)) - 32)
        value = scale * tl.load(levels + _nibble(octets, b + 8 + 16 * g, i % 32, ok))
    return value


@triton.jit
def _byte(octets, at, ok):
    return tl.load(octets + at, mask=ok, other=0).to(tl.uint32)


@triton.jit
def _signed(octets, at, ok):
    """A byte as a signed number, float32."""
    return number(_byte(octets, at, ok) ^ 128) - 128


@triton.jit
def _half(halves, at, ok):
    """The float16 at byte `at`, as float32."""
    return tl.load(halves + at // 2, mask=ok, other=0).to(tl.float32)


@triton.jit
def _nibble(octets, at, i, ok):
    """Code i of 32: the low nibbles of 16 bytes, then the high ones."""
    return (_byte(octets, at + i % 16, ok) >> (4 * (i // 16)).to(tl.uint32)) & 15


@triton.jit
def _five(octets, at, i, ok):
    """Code i of 32, of 5 bits: the top ones in 4 bytes, then nibbles."""
    top = (_byte(octets, at + i // 8, ok) >> (i % 8).to(tl.uint32)) & 1
    return _nibble(octets, at + 4, i, ok) | (top << 4)


@triton.jit
def _plane(octets, at, i, BITS: tl.constexpr, ok):
    """Code i of 256, a few bits. 32 bytes hold the first codes, 32 of them in their lowest bits, and so on."""
    RUN: tl.constexpr = 32 * (8 // BITS)
    shift = (BITS * (i % RUN // 32)).to(tl.uint32)
    return (_byte(octets, at + i // RUN * 32 + i % 32, ok) >> shift) & ((1 << BITS) - 1)


@triton.jit
def _shifted(octets, halves, b, i, code, ok):
    """The value of a code of Q4_K or Q5_K: its scale and minimum have 6 bits (`_sixes` of reference.py)."""
    g = i // 32
    first, second, third = (
        _byte(octets, b + 4 + g % 4, ok),
        _byte(octets, b + 8 + g % 4, ok),
        _byte(octets, b + 12 + g % 4, ok),
    )
    scale = tl.where(g < 4, first & 63, (third & 15) | ((first >> 6) << 4))
    least = tl.where(g < 4, second & 63, (third >> 4) | ((second >> 6) << 4))
    return _half(halves, b, ok) * number(scale) * number(code) - _half(halves, b + 2, ok) * number(least)
