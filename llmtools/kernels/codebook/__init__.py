"""Rows of a weight on a small table of values: value = scale · table[code], group by group along the inputs.

Shapes: out, in — features; G = ceil(in / group_size); w = ceil(in·4 / 32); tables have 16 entries; t — tokens.

    dequantize_codebook: qweight [out, w] int32, scales [out, G], table [16] -> [out, in]
    multiply_codebook:             x [t, in] and the same -> x @ weight.T [t, out], for few tokens
    multiply_transposed_codebook:  g [t, out] and the same -> g @ weight [t, in], for few tokens

The product is formed in float32 and rounded once, to `dtype`. The products sum in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, grouped
from ..native import direct
from . import reference

__all__ = ["dequantize_codebook", "multiply_codebook", "multiply_transposed_codebook"]


def dequantize_codebook(
    qweight: Tensor,
    scales: Tensor,
    table: Tensor,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [out, in] of `dtype`; 1 ≤ group_size ≤ in_features."""
    if scales.requires_grad and torch.is_grad_enabled():  # block tuning trains them
        return reference.dequantize_codebook(qweight, scales, table, group_size, in_features, dtype)
    call = direct(_dequantize, qweight) or torch.ops.llmtools.dequantize_codebook
    result: Tensor = call(qweight, scales, table, group_size, in_features, dtype)
    return result


def multiply_codebook(
    x: Tensor, qweight: Tensor, scales: Tensor, table: Tensor, group_size: int, in_features: int
) -> Tensor:
    """x [t, in] @ weight.T -> [t, out] of x's type. Not differentiable."""
    call = direct(_multiply, x) or torch.ops.llmtools.multiply_codebook
    result: Tensor = call(x, qweight, scales, table, group_size, in_features)
    return result


def multiply_transposed_codebook(
    g: Tensor, qweight: Tensor, scales: Tensor, table: Tensor, group_size: int, in_features: int
) -> Tensor:
    """g [t, out] @ weight -> [t, in] of g's type: the gradient of `multiply_codebook`. Not differentiable."""
    call = direct(_multiply_transposed, g) or torch.ops.llmtools.multiply_transposed_codebook
    result: Tensor = call(g, qweight, scales, table, group_size, in_features)
    return result


def _codes(qweight: Tensor, scales: Tensor, table: Tensor, group_size: int, in_features: int) -> grouped.Codes:
    table = table.to(torch.float32).contiguous()
    return grouped.Codes(qweight, scales, None, 0.0, table, 4, group_size, in_features)


def _dequantize(
    qweight: Tensor, scales: Tensor, table: Tensor, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    weight = grouped.dequantize(_codes(qweight, scales, table, group_size, in_features), dtype)
    if weight is None:
        return reference.dequantize_codebook(qweight, scales, table, group_size, in_features, dtype)
    return weight


_multiply = grouped.or_reference(grouped.multiply, _codes, reference.multiply_codebook)
_multiply_transposed = grouped.or_reference(grouped.multiply_transposed, _codes, reference.multiply_transposed_codebook)


def _dequantize_fake(
    qweight: Tensor, scales: Tensor, table: Tensor, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return qweight.new_empty((qweight.shape[0], in_features), dtype=dtype)


def _multiply_fake(
    x: Tensor, qweight: Tensor, scales: Tensor, table: Tensor, group_size: int, in_features: int
) -> Tensor:
    return x.new_empty((x.shape[0], qweight.shape[0]))


def _multiply_transposed_fake(
    g: Tensor, qweight: Tensor, scales: Tensor, table: Tensor, group_size: int, in_features: int
) -> Tensor:
    return g.new_empty((g.shape[0], in_features))


_WEIGHT = "Tensor qweight, Tensor scales, Tensor table, int group_size, int in_features"
grouped.define(
    f"dequantize_codebook({_WEIGHT}, ScalarType dtype) -> Tensor",
    reference=reference.dequantize_codebook,
    cuda=gpu.kernel(__name__, reference.dequantize_codebook),
    cpu=_dequantize,
    fake=_dequantize_fake,
)
grouped.define(
    f"multiply_codebook(Tensor x, {_WEIGHT}) -> Tensor",
    reference=reference.multiply_codebook,
    cuda=gpu.kernel(__name__, reference.multiply_codebook),
    cpu=_multiply,
    fake=_multiply_fake,
)
grouped.define(
    f"multiply_transposed_codebook(Tensor g, {_WEIGHT}) -> Tensor",
    reference=reference.multiply_transposed_codebook,
    cpu=_multiply_transposed,
    cuda=gpu.kernel(__name__, reference.multiply_transposed_codebook),
    fake=_multiply_transposed_fake,
)
