"""Affine decoding and products on a GPU: the tile that the kernels of `tiles.py` need, and the calls.

    weight = (code − zero) · scale          formed in float32, so that rounding it gives the reference's bits

A thread decodes eight neighbouring codes at 2 to 4 bits, which one or two words hold and, usually, one scale serves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..tiles import fields, number
from . import reference


def dequantize_affine(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """See the package's docstring."""
    if dtype not in tiles.FLOATS:
        return reference.dequantize_affine(qweight, scales, qzeros, bits, group_size, in_features, dtype)
    return tiles.dequantize(_weight(qweight, scales, qzeros, bits, group_size, in_features), dtype)


def multiply_affine(
    x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    """See the package's docstring."""
    if x.dtype not in tiles.FLOATS:
        return reference.multiply_affine(x, qweight, scales, qzeros, bits, group_size, in_features)
    return tiles.multiply(x, _weight(qweight, scales, qzeros, bits, group_size, in_features))


def multiply_transposed_affine(
    g: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    """See the package's docstring."""
    if g.dtype not in tiles.FLOATS:
        return reference.multiply_transposed_affine(g, qweight, scales, qzeros, bits, group_size, in_features)
    return tiles.multiply_transposed(g, _weight(qweight, scales, qzeros, bits, group_size, in_features))


def _weight(
    qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> tiles.Weight:
    qweight, scales = qweight.contiguous(), scales.contiguous()
    zeros = (qzeros.contiguous(), qzeros.shape[1]) if qzeros is not None else (None, 0)
    tensors = (qweight, qweight.shape[1], scales, scales.shape[1], *zeros)
    return tiles.Weight(_tile, (bits, group_size), tensors, qweight.shape[0], in_features)


@triton.jit
def _tile(tensors, rows, live, first, CONFIG: tl.constexpr, COLUMNS: tl.constexpr):
    qweight, words, scales, groups, zeros, octets = tensors
    BITS: tl.constexpr = CONFIG[0]
    GROUP: tl.constexpr = CONFIG[1]
    code = number(fields(qweight, words, words, rows, live, first, BITS, COLUMNS))  # [ROWS, n, RUN]
    RUN: tl.constexpr = 8 if BITS <= 4 else 4
    if GROUP % RUN == 0:  # one scale for the run, [ROWS, n, 1]
        group = ((first + tl.arange(0, COLUMNS // RUN) * RUN) // GROUP)[None, :, None]
    else:
        group = ((first + tl.reshape(tl.arange(0, COLUMNS), (COLUMNS // RUN, RUN))) // GROUP)[None, :, :]
    row, ok = rows.to(tl.int64)[:, None, None], live[:, None, None] & (group < groups)
    scale = tl.load(scales + row * groups + group, mask=ok, other=0).to(tl.float32)
    if zeros is None:
        zero = 2.0 ** (BITS - 1)
    else:
        octet, shift = (group * BITS) >> 3, ((group * BITS) & 7).to(tl.uint32)
        place = zeros + row * octets + octet
        field = tl.load(place, mask=ok, other=0).to(tl.uint32)
        if 8 % BITS != 0:  # it may go on in the next byte
            field = field | (tl.load(place + 1, mask=ok & (octet + 1 < octets), other=0).to(tl.uint32) << 8)
        zero = number((field >> shift) & ((1 << BITS) - 1))
    return tl.reshape((code - zero) * scale, (rows.shape[0], COLUMNS))
