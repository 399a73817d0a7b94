"""Codebook decoding and products on a GPU: the tile that the kernels of `tiles.py` need, and the calls.

    weight = table[code] · scale            formed in float32, so that rounding it gives the reference's bits

The table's sixteen values lie in one line of the cache, where a warp looks up 32 at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..tiles import fields
from . import reference


def dequantize_codebook(
    qweight: Tensor, scales: Tensor, table: Tensor, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """See the package's docstring."""
    if dtype not in tiles.FLOATS:
        return reference.dequantize_codebook(qweight, scales, table, group_size, in_features, dtype)
    return tiles.dequantize(_weight(qweight, scales, table, group_size, in_features), dtype)


def multiply_codebook(
    x: Tensor, qweight: Tensor, scales: Tensor, table: Tensor, group_size: int, in_features: int
) -> Tensor:
    """See the package's docstring."""
    if x.dtype not in tiles.FLOATS:
        return reference.multiply_codebook(x, qweight, scales, table, group_size, in_features)
    return tiles.multiply(x, _weight(qweight, scales, table, group_size, in_features))


def multiply_transposed_codebook(
    g: Tensor, qweight: Tensor, scales: Tensor, table: Tensor, group_size: int, in_features: int
) -> Tensor:
    """See the package's docstring."""
    if g.dtype not in tiles.FLOATS:
        return reference.multiply_transposed_codebook(g, qweight, scales, table, group_size, in_features)
    return tiles.multiply_transposed(g, _weight(qweight, scales, table, group_size, in_features))


def _weight(qweight: Tensor, scales: Tensor, table: Tensor, group_size: int, in_features: int) -> tiles.Weight:
    qweight, scales, table = qweight.contiguous(), scales.contiguous(), table.to(torch.float32).contiguous()
    tensors = (qweight, qweight.shape[1], scales, scales.shape[1], table)
    return tiles.Weight(_tile, (group_size,), tensors, qweight.shape[0], in_features, stages=1)


@triton.jit
def _tile(tensors, rows, live, first, CONFIG: tl.constexpr, COLUMNS: tl.constexpr):
    qweight, words, scales, groups, table = tensors
    GROUP: tl.constexpr = CONFIG[0]
    code = fields(qweight, words, words, rows, live, first, 4, COLUMNS)  # [ROWS, n, 8]
    if GROUP % 8 == 0:  # one scale for the eight, [ROWS, n, 1]
        group = ((first + tl.arange(0, COLUMNS // 8) * 8) // GROUP)[None, :, None]
    else:
        group = ((first + tl.reshape(tl.arange(0, COLUMNS), (COLUMNS // 8, 8))) // GROUP)[None, :, :]
    ok = live[:, None, None] & (group < groups)
    scale = tl.load(scales + rows.to(tl.int64)[:, None, None] * groups + group, mask=ok, other=0).to(tl.float32)
    return tl.reshape(tl.load(table + code) * scale, (rows.shape[0], COLUMNS))
