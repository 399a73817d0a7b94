"""Affine decoding in plain torch: the specification of the faster routes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..bits import unpack

ROWS = 256  # decoded at a time by the product


def dequantize_affine(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See the package's docstring. `group_size` is resolved (1 ≤ group_size ≤ in_features). Returns [out, in]."""
    codes = unpack(qweight, bits, in_features).to(torch.float32)  # [out, in]
    groups = scales.shape[-1]
    whole = F.pad(codes, (0, groups * group_size - in_features)).unflatten(-1, (groups, group_size))  # [out, G, g]
    zeros = unpack(qzeros, bits, groups).unsqueeze(-1).to(torch.float32) if qzeros is not None else 2.0 ** (bits - 1)
    weight: Tensor = (whole - zeros) * scales.to(torch.float32).unsqueeze(-1)
    return weight.flatten(-2)[..., :in_features].to(dtype)


def multiply_affine(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """x [t, in] @ weight.T -> [t, out], a block of rows at a time."""
    y = x.new_empty((x.shape[0], qweight.shape[0]))
    for start in range(0, qweight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        weight = dequantize_affine(
            qweight[rows],
            scales[rows],
            qzeros if qzeros is None else qzeros[rows],
            bits,
            group_size,
            in_features,
            x.dtype,
        )
        y[:, rows] = F.linear(x, weight)  # [t, in] @ [ROWS, in].T
    return y


def multiply_transposed_affine(
    g: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """g [t, out] @ weight -> [t, in], a block of rows at a time; blocks are added in float32 or wider."""
    sum = g.new_zeros((g.shape[0], in_features), dtype=torch.promote_types(g.dtype, torch.float32))
    for start in range(0, qweight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        weight = dequantize_affine(
            qweight[rows],
            scales[rows],
            qzeros if qzeros is None else qzeros[rows],
            bits,
            group_size,
            in_features,
            g.dtype,
        )
        sum += g[:, rows] @ weight  # [t, ROWS] @ [ROWS, in]
    return sum.to(g.dtype)
