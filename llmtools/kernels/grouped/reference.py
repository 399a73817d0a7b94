"""Groups of codes decoded in plain torch: the specification of the faster routes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..bits import pack, unpack

ROWS = 256  # decoded at a time by the product


def dequantize_grouped(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    table: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [out, in] of `dtype`; arguments as in the package's docstring."""
    codes, groups = unpack(qweight, bits, in_features), scales.shape[-1]  # [out, in]
    levels = codes.to(torch.float32) if table is None else table.to(torch.float32)[codes.to(torch.int32)]
    weight: Tensor = F.pad(levels, (0, groups * group_size - in_features)).unflatten(
        -1, (groups, group_size)
    )  # [out, G, g]
    if qzeros is not None:
        weight = weight - unpack(qzeros, bits, groups).unsqueeze(-1).to(torch.float32)
    elif table is None:
        weight = weight - 2.0 ** (bits - 1)
    weight = weight * scales.to(torch.float32).unsqueeze(-1)
    return weight.flatten(-2)[..., :in_features].to(dtype)


def encode_grouped(
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    table: Tensor | None,
    bits: int,
    group_size: int,
    shifted: bool,
) -> Tensor:
    """The codes nearest to values, qweight [out, w] int32; arguments as in the package's docstring."""
    columns, groups = values.shape[1], scales.shape[1]
    parts = F.pad(values, (0, groups * group_size - columns)).unflatten(1, (groups, group_size))  # [out, G, g]
    scale = scales[..., None]
    if table is not None:
        normal = parts * torch.where(scale == 0, 0.0, 1 / scale)
        codes = torch.bucketize(normal, (table[1:] + table[:-1]) / 2)
    else:
        assert zeros is not None
        zero = zeros[..., None]
        codes = torch.round(parts / scale + zero) if shifted else torch.round(parts / scale) + zero
        codes = codes.nan_to_num(0).clamp(0, 2**bits - 1)
    return pack(codes.flatten(1)[:, :columns], bits)


def multiply_grouped(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    table: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    transposed: bool,
) -> Tensor:
    """x [t, in] -> [t, out], or [t, out] -> [t, in], a block of rows at a time, added in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros((len(x), in_features), dtype=wide) if transposed else x.new_empty((len(x), len(qweight)))
    for start in range(0, len(qweight), ROWS):
        rows = slice(start, start + ROWS)
        zeros = None if qzeros is None else qzeros[rows]
        weight = dequantize_grouped(qweight[rows], scales[rows], zeros, table, bits, group_size, in_features, x.dtype)
        if transposed:
            y += x[:, rows] @ weight  # [t, ROWS] @ [ROWS, in]
        else:
            y[:, rows] = F.linear(x, weight)  # [t, in] @ [ROWS, in].T
    return y.to(x.dtype)
