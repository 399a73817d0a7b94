"""Rows of a weight on uniform grids: value = scale · (code − zero), group by group along the inputs.

Shapes: out, in — features; G = ceil(in / group_size), the last group may be short; w = ceil(in·bits / 32); t — tokens.

    dequantize_affine: qweight [out, w] int32, scales [out, G], qzeros [out, ceil(G·bits / 8)] uint8 -> [out, in]
    multiply_affine:             x [t, in] and the same -> x @ weight.T [t, out], for few tokens
    multiply_transposed_affine:  g [t, out] and the same -> g @ weight [t, in], for few tokens

`qzeros` is the bit stream of the zero points along the groups, or None for the symmetric grid, zero = 2^(bits−1).
The product is formed in float32 and rounded once, to `dtype`. The products sum in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, grouped
from ..native import direct
from . import reference

__all__ = ["dequantize_affine", "multiply_affine", "multiply_transposed_affine"]


def dequantize_affine(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [out, in] of `dtype`; 1 ≤ group_size ≤ in_features."""
    if scales.requires_grad and torch.is_grad_enabled():  # block tuning trains them
        return reference.dequantize_affine(qweight, scales, qzeros, bits, group_size, in_features, dtype)
    call = direct(_dequantize, qweight) or torch.ops.llmtools.dequantize_affine
    result: Tensor = call(qweight, scales, qzeros, bits, group_size, in_features, dtype)
    return result


def multiply_affine(
    x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    """x [t, in] @ weight.T -> [t, out] of x's type. Not differentiable."""
    call = direct(_multiply, x) or torch.ops.llmtools.multiply_affine
    result: Tensor = call(x, qweight, scales, qzeros, bits, group_size, in_features)
    return result


def multiply_transposed_affine(
    g: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    """g [t, out] @ weight -> [t, in] of g's type: the gradient of `multiply_affine`. Not differentiable."""
    call = direct(_multiply_transposed, g) or torch.ops.llmtools.multiply_transposed_affine
    result: Tensor = call(g, qweight, scales, qzeros, bits, group_size, in_features)
    return result


def _codes(
    qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> grouped.Codes:
    return grouped.Codes(qweight, scales, qzeros, 2.0 ** (bits - 1), None, bits, group_size, in_features)


def _dequantize(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = grouped.dequantize(_codes(qweight, scales, qzeros, bits, group_size, in_features), dtype)
    if weight is None:
        return reference.dequantize_affine(qweight, scales, qzeros, bits, group_size, in_features, dtype)
    return weight


_multiply = grouped.or_reference(grouped.multiply, _codes, reference.multiply_affine)
_multiply_transposed = grouped.or_reference(grouped.multiply_transposed, _codes, reference.multiply_transposed_affine)


def _dequantize_fake(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return qweight.new_empty((qweight.shape[0], in_features), dtype=dtype)


def _multiply_fake(
    x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    return x.new_empty((x.shape[0], qweight.shape[0]))


def _multiply_transposed_fake(
    g: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    return g.new_empty((g.shape[0], in_features))


_WEIGHT = "Tensor qweight, Tensor scales, Tensor? qzeros, int bits, int group_size, int in_features"
grouped.define(
    f"dequantize_affine({_WEIGHT}, ScalarType dtype) -> Tensor",
    reference=reference.dequantize_affine,
    cuda=gpu.kernel(__name__, reference.dequantize_affine),
    cpu=_dequantize,
    fake=_dequantize_fake,
)
grouped.define(
    f"multiply_affine(Tensor x, {_WEIGHT}) -> Tensor",
    reference=reference.multiply_affine,
    cuda=gpu.kernel(__name__, reference.multiply_affine),
    cpu=_multiply,
    fake=_multiply_fake,
)
grouped.define(
    f"multiply_transposed_affine(Tensor g, {_WEIGHT}) -> Tensor",
    reference=reference.multiply_transposed_affine,
    cpu=_multiply_transposed,
    cuda=gpu.kernel(__name__, reference.multiply_transposed_affine),
    fake=_multiply_transposed_fake,
)
