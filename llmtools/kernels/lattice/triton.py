"""Lattice decoding and products on a GPU: the tile that the kernels of `triton_common.py` need, and the calls.

    weight = E8P[code] + second[residual] / residual_scale              formed in float32

The table of 65 536 points is half a megabyte; its parts are one kilobyte each and stay in the fastest cache. A point of
E8P is eight nibbles m (arXiv:2402.04396, §4, has the like): its magnitudes in one word, to be combined by exclusive or
with a word for its signs and its shift by ±¼, since in

    value = m / 2 − 15/4 ,    m = 2v + 8 for the half-integer v with its lowest bit telling the shift,

inverting the upper three bits of m negates v. E81B has integers 2·value + 8 for nibbles. Residuals are looked up by
nibble in sixteen float32 levels that have been divided by the scale on the CPU, as the reference has them.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_common
from ..triton_common import number, spread
from . import reference
from .tables import e8p_parts, e81b_table


def dequantize_lattice(codes: Tensor, residual: Tensor | None, residual_scale: float, dtype: torch.dtype) -> Tensor:
    """codes [..., b] int16, residual [..., b] uint8, int16 or None, on a GPU -> [..., 8b] of `dtype`."""
    if dtype not in triton_common.FLOATS:
        return reference.dequantize_lattice(codes, residual, residual_scale, dtype)
    weight = triton_common.dequantize(_weight(codes, residual, residual_scale), dtype)
    return weight.reshape(*codes.shape[:-1], 8 * codes.shape[-1])


def multiply_lattice(
    x: Tensor, codes: Tensor, residual: Tensor | None, residual_scale: float, transposed: bool
) -> Tensor:
    """x [t, 8b] -> [t, out] of x's type, or transposed x [t, out] -> [t, 8b]; codes and residual [out, b], on a GPU."""
    if x.dtype not in triton_common.FLOATS:
        return reference.multiply_lattice(x, codes, residual, residual_scale, transposed)
    product = triton_common.multiply_transposed if transposed else triton_common.multiply
    return product(x, _weight(codes, residual, residual_scale))


def _weight(codes: Tensor, residual: Tensor | None, residual_scale: float) -> triton_common.Weight:
    blocks, device = codes.shape[-1], codes.device
    kind = 0 if residual is None else 1 if residual.dtype == torch.uint8 else 2
    tensors = (codes.contiguous(), residual.contiguous() if residual is not None else None, blocks)
    tables = (*_words(device), _levels(kind, residual_scale, device))
    return triton_common.Weight(_tile, (kind,), tensors + tables, codes.numel() // max(blocks, 1), 8 * blocks, stages=1)


@cache
def _words(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes by the upper byte of a code, signs by the lower, E81B's points: each int32 [256], eight nibbles."""
    with torch.inference_mode(False):
        magnitudes, flips, offsets = (part.to(torch.int64) for part in e8p_parts())  # in quarters: 4v
        shift_up = offsets + flips == 1  # offsets are ±1, and 1 more for negated elements, where flips are −1
        parts = (magnitudes // 2 + 8) & 14, (flips & 14) | shift_up, e81b_table().to(torch.int64) // 2 + 8
        words = [(part << 4 * torch.arange(8, device="cpu")).sum(-1) for part in parts]
        magnitude, sign, point = (torch.where(w >= 1 << 31, w - (1 << 32), w).to(torch.int32).to(device) for w in words)
        return magnitude, sign, point


@cache
def _levels(kind: int, residual_scale: float, device: torch.device) -> Tensor:
    """float32 [16]: what a nibble of the residual adds."""
    with torch.inference_mode(False):
        nibble = torch.arange(16, dtype=torch.float32, device="cpu")
        value = nibble / 2 - (3.75 if kind == 2 else 4.0)
        return (value / torch.tensor(residual_scale, dtype=torch.float32, device="cpu")).to(device)


@triton.jit
def _tile(tensors, rows, live, first, CONFIG: tl.constexpr, COLUMNS: tl.constexpr):
    codes, residual, blocks, magnitudes, signs, points, levels = tensors
    RESIDUAL: tl.constexpr = CONFIG[0]  # 0: none, 1: E81B, 2: E8P
    block = first // 8 + tl.arange(0, COLUMNS // 8)
    ok = live[:, None] & (block < blocks)[None, :]
    place = rows.to(tl.int64)[:, None] * blocks + block[None, :]
    value = 0.5 * number(spread(_e8p(tl.load(codes + place, mask=ok, other=0), magnitudes, signs), 4, 8)) - 3.75
    if RESIDUAL != 0:
        code = tl.load(residual + place, mask=ok, other=0)
        word = (
            _e8p(code, magnitudes, signs)
            if RESIDUAL == 2
            else tl.load(points + code.to(tl.int32)).to(tl.uint32, bitcast=True)
        )
        value += tl.load(levels + spread(word, 4, 8))
    return tl.reshape(value, (rows.shape[0], COLUMNS))


@triton.jit
def _e8p(code, magnitudes, signs):
    """The eight nibbles of a point: int16 [ROWS, n] -> uint32 [ROWS, n]."""
    code = code.to(tl.int32)
    word = tl.load(magnitudes + ((code >> 8) & 255)) ^ tl.load(signs + (code & 255))
    return word.to(tl.uint32, bitcast=True)
