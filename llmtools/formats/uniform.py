"""Layers on uniform grids, of any quantizer: the common representation of all exports.

Shapes: out, in — features; G — groups per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.bits import unpack
from ..nn.linear import QuantizedLinear
from ..quant import RTN, Packed, Quantizer
from ..quant.bases import Permutation
from ..quant.composed import Composed
from ..quant.grids.affine import Affine
from ..quant.grids.scalar import columns


class Uniform(NamedTuple):
    """A weight on a uniform grid: value = scale · (code − zero) of the column's group, columns in natural order."""

    bits: int
    """Bits per code."""
    group_size: int
    """Number of columns in a group, at most in."""
    symmetric: bool
    """Whether all zero points are 2^(bits − 1)."""
    codes: Tensor
    """Codes, uint8 [out, in]."""
    scales: Tensor
    """Scales, float16, bfloat16 or float32 [out, G]."""
    zeros: Tensor
    """Zero points, uint8 [out, G]."""
    group_of: Tensor | None
    """Group of each column, int64 [in]; None where groups are consecutive columns."""


@dataclass(frozen=True)
class Limits:
    """The uniform grids that a format can hold."""

    bits: tuple[int, ...]
    """Supported bits per code."""
    scale_types: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    """Supported types of scales."""
    whole_groups: bool = False
    """Whether the group size must divide the number of columns."""
    zero_codes: bool = True
    """Whether a zero point may be 0."""
    any_order: bool = True
    """Whether groups may be of reordered columns (act-order)."""
    whole_rows: bool = False
    """Whether a row has exactly one scale."""
    symmetric_only: bool = False
    """Whether all zero points must be 2^(bits − 1)."""


class Requantized(NamedTuple):
    """A layer that was re-quantized."""

    path: str
    """Path of the layer."""
    reason: str
    """Reason why the format cannot hold it exactly."""
    relative_error: float
    """Relative error of the re-quantization, |W' − W| / |W|."""


def uniform_layers(
    layers: Mapping[str, QuantizedLinear], limits: Limits, *, lossy: bool
) -> tuple[dict[str, Uniform], list[Requantized]]:
    """(path → the layer as a uniform grid within the limits, the re-quantized layers).

    Raises InputError for the first layer that is not within the limits, unless lossy.
    """
    found: dict[str, Uniform] = {}
    changed: list[Requantized] = []
    for path, layer in layers.items():
        uniform = uniform_of(layer)
        reason = uniform if isinstance(uniform, str) else mismatch(uniform, limits)
        if reason is None:
            assert isinstance(uniform, Uniform)
            found[path] = uniform
            continue
        if not lossy:
            raise InputError(f"{path}: {reason}; nothing was written. --lossy (lossy=True) re-quantizes such layers")
        found[path], error = requantized(layer, limits)
        changed.append(Requantized(path, reason, error))
    return found, changed


def uniform_of(layer: QuantizedLinear) -> Uniform | str:
    """The layer's uniform grid, or the reason why it has none."""
    quantizer, packed = layer.quantizer, layer.packed
    grid, basis = _parts(quantizer)
    if grid is None:
        return f"{quantizer.name} is not a uniform grid"
    if grid.float_zeros:
        return "its zero points are not integers"
    if basis is not None and not isinstance(basis, Permutation):
        return f"{quantizer.name} stores weights in another basis"
    n, group_size = layer.in_features, grid.resolve_group_size(layer.in_features)
    scales = packed["scales"].detach()
    groups = scales.shape[1]
    codes = unpack(packed["qweight"].detach(), grid.bits, n)
    if grid.symmetric:
        zeros = torch.full_like(scales, 2 ** (grid.bits - 1), dtype=torch.uint8)
    else:
        zeros = unpack(packed["qzeros"].detach(), grid.bits, groups)
    group_of = None
    if basis is not None:
        perm = packed["perm"].detach().long()
        codes = basis.inverse_transform(codes, packed)
        group_of = torch.empty_like(perm).scatter_(0, perm, torch.arange(n, device=perm.device) // group_size)
        if torch.equal(group_of, torch.arange(n, device=perm.device) // group_size):
            group_of = None
    return Uniform(grid.bits, group_size, grid.symmetric, codes, scales, zeros, group_of)


def natural_codes(quantizer: Quantizer, packed: Packed) -> Tensor:
    """The codes of a uniform grid, [out, in] uint8, columns in natural order."""
    grid, basis = _parts(quantizer)
    assert grid is not None and (basis is None or isinstance(basis, Permutation)), quantizer
    codes = unpack(packed["qweight"], grid.bits, columns(packed, grid.bits))
    return codes if basis is None else basis.inverse_transform(codes, packed)


def _parts(quantizer: Quantizer) -> tuple[Affine | None, object]:
    if not isinstance(quantizer, Composed) or not isinstance(quantizer.grid, Affine):
        return None, None
    return quantizer.grid, quantizer.basis


def mismatch(layer: Uniform, limits: Limits) -> str | None:
    """The reason why a format with these limits cannot hold this grid exactly; None where it can."""
    in_features = layer.codes.shape[1]
    if layer.bits not in limits.bits:
        return f"the format has no {layer.bits}-bit codes (it has {', '.join(map(str, limits.bits))})"
    if layer.scales.dtype not in limits.scale_types:
        return f"the format has no {layer.scales.dtype} scales"
    if limits.whole_groups and in_features % layer.group_size:
        return f"the format requires group_size={layer.group_size} to divide the {in_features} columns"
    if limits.whole_rows and layer.group_size < in_features:
        return "the format has one scale per row: quantize with --group_size -1"
    if limits.symmetric_only and not layer.symmetric:
        return "the format has no zero points: quantize with --options.symmetric true"
    if not limits.any_order and layer.group_of is not None:
        return "its groups are of reordered columns (gptq_v2 supports them)"
    if not limits.zero_codes and bool((layer.zeros == 0).any()):
        return "it has zero points of 0, which readers of this format decode differently (gptq_v2 supports them)"
    return None


def requantized(layer: QuantizedLinear, limits: Limits) -> tuple[Uniform, float]:
    """(the layer, rounded to nearest on a symmetric grid within all limits; the relative error |W' − W| / |W|)."""
    own = getattr(layer.quantizer, "bits", 4)
    bits = own if own in limits.bits else min(b for b in limits.bits if b >= 4)
    group_size = next((size for size in (32, 64) if layer.in_features % size == 0), -1)
    rtn = RTN(bits=bits, group_size=group_size, symmetric=True)
    weight = layer.dequantize(dtype=torch.float32)
    rounded = QuantizedLinear(layer.in_features, layer.out_features, rtn)
    rounded.pack_(rtn.quantize(weight))
    error = (rounded.dequantize(dtype=torch.float32) - weight).norm() / weight.norm().clamp_min(1e-30)
    uniform = uniform_of(rounded)
    assert isinstance(uniform, Uniform)
    return uniform, float(error)
