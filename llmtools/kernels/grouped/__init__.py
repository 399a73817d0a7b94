"""Rows of a weight stored as small codes in groups: uniform grids and codebooks are one op.

    weight = (level[code] − zero) · scale                             (formed in float32, rounded once)

A uniform grid is the case level[k] = k, a codebook the case zero = 0. Codes are a bit stream along the inputs
(`kernels/bits`); scale and zero belong to a group of consecutive inputs, of which the last may be short.

Shapes: out, in — features; G = ceil(in / group_size); w = ceil(in·bits / 32); t — tokens.

    qweight  [out, w] int32                   codes of `bits` bits, 1 to 8
    scales   [out, G] float16, bfloat16 or float32
    qzeros   [out, ceil(G·bits / 8)] uint8    a bit stream of zero points along the groups; None: 2^(bits−1) for all
    table    [2^bits] float32, or None        the levels of a codebook, which has no qzeros; level[k] = k without

`reference.py` is the specification; `native.py` with `*.h` is the CPU's C, `triton.py` the GPU's kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import constant_result, define, has_triton
from . import native, reference

__all__ = [
    "Weight",
    "decodes",
    "dequantize_grouped",
    "encode_grouped",
    "multiplies",
    "multiply_each",
    "multiply_grouped",
]


Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int, int]
"""Arguments of a packed weight: qweight, scales, qzeros, table, bits, group_size, in_features."""


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
    """The weight [out, in] of `dtype`; 1 ≤ group_size ≤ in_features. Differentiable in scales."""
    if scales.requires_grad and torch.is_grad_enabled():  # block tuning trains them
        return reference.dequantize_grouped(qweight, scales, qzeros, table, bits, group_size, in_features, dtype)
    return _dequantize(qweight, scales, qzeros, table, bits, group_size, in_features, dtype)


_WEIGHT = "Tensor qweight, Tensor scales, Tensor? qzeros, Tensor? table, int bits, int group_size, int in_features"
_dequantize = define(
    f"dequantize_grouped({_WEIGHT}, ScalarType dtype) -> Tensor",
    package=__name__,
    reference=reference.dequantize_grouped,
    native=native.dequantize_grouped,
    fake=lambda qweight, *weight: qweight.new_empty((qweight.shape[0], weight[-2]), dtype=weight[-1]),
)
multiply_grouped = define(
    f"multiply_grouped(Tensor x, {_WEIGHT}, bool transposed) -> Tensor",
    package=__name__,
    reference=reference.multiply_grouped,
    native=native.multiply_grouped,
    fake=lambda x, qweight, *weight: x.new_empty((x.shape[0], weight[-2] if weight[-1] else qweight.shape[0])),
)
"""Product x [t, in] @ weight.T -> [t, out] of x's type, for decoding, where t is small (GEMV); each code is read once.

With `transposed`, its gradient: x [t, out] @ weight -> [t, in]. Neither is differentiable. Sums are float32; on a CPU
with byte products, half-precision x is quantized to int16 with one scale per group, and summed in integers
(`integer.h`). Raises InputError for an x of another width."""


@constant_result
def decodes(device: torch.device, bits: int) -> bool:
    """Whether rows are decoded on that device without memory beside the result's."""
    return has_triton(device) if device.type == "cuda" else multiplies(device, bits)


@constant_result
def multiplies(device: torch.device, bits: int) -> bool:
    """Whether `multiply_grouped` is a kernel of its own on that device."""
    return device.type == "cuda" or (device.type == "cpu" and bits in native.BITS and native.library() is not None)


def multiply_each(x: Tensor, sizes: Sequence[int], weights: Sequence[Weight]) -> Tensor | None:
    """`multiply_grouped` of several weights [out, in], as a mixture's experts are: x [Σ t, in], rows that belong to one
    weight after the other, as many as `sizes` says -> [Σ t, out].

    For a token each it takes half the time of as many calls. On the CPU, of `ops.plain` tensors; None where there is no
    kernel.
    """
    return native.multiply_each(x, sizes, weights)


def encode_grouped(values: Tensor, *grid: Any) -> Tensor:
    """The codes nearest to the values [out, in] float32 on the grids of their groups, packed: qweight [out, w] int32.

    grid: scales [out, G] float32, zeros likewise or None with a table, the table as in a packed weight, bits, group
    size, and whether zero points are *shifted*: no integers, and added before rounding. A value half-way between two
    codes of a uniform grid gets the even one before the zero point is added, one of a codebook the lower.
    """
    return native.encode_grouped(values, *grid)
