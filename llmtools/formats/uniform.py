"""Layers on uniform grids, whatever quantizer put them there: the common ground of all exports.

Shapes: out, in — features; G — groups in a row.
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
from ..quant import RTN, Quantizer
from ..quant.bases import Permutation
from ..quant.composed import Composed
from ..quant.grids.affine import Affine


class Uniform(NamedTuple):
    """value = scale · (code − zero) of the column's group. Columns are in their natural order."""

    bits: int
    group_size: int
    """resolved: at most in"""
    symmetric: bool
    codes: Tensor
    """[out, in] uint8"""
    scales: Tensor
    """[out, G]"""
    zeros: Tensor
    """[out, G] uint8"""
    group_of: Tensor | None
    """[in], the group of each column; None where groups are runs of columns"""


@dataclass(frozen=True)
class Limits:
    """What a format can hold."""

    bits: tuple[int, ...]
    scale_types: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    whole_groups: bool = False
    """the group size must divide the row"""
    zero_codes: bool = True
    """a zero point may be 0"""
    any_order: bool = True
    """groups may be of columns in any order"""
    whole_rows: bool = False
    """a row has one scale"""
    symmetric_only: bool = False
    """zero points are the middle code"""


class Requantized(NamedTuple):
    """A layer that was re-quantized: where, why, and |W' − W| / |W| of that."""

    path: str
    reason: str
    relative_error: float


def uniform_layers(
    layers: Mapping[str, QuantizedLinear], limits: Limits, *, lossy: bool
) -> tuple[dict[str, Uniform], list[Requantized]]:
    """Every layer as a uniform grid within the limits. Raises InputError for the first that is none, unless lossy."""
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
    """The layer's grid, or why it has none."""
    quantizer, packed = layer.quantizer, layer.packed
    grid, basis = _parts(quantizer)
    if grid is None:
        return f"{quantizer.name} is no uniform grid"
    if grid.float_zeros:
        return "its zero points are no integers"
    if basis is not None and not isinstance(basis, Permutation):
        return f"{quantizer.name} stores weights in another basis"
    n, span = layer.in_features, grid.resolve_group_size(layer.in_features)
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
        group_of = torch.empty_like(perm).scatter_(0, perm, torch.arange(n, device=perm.device) // span)
        if torch.equal(group_of, torch.arange(n, device=perm.device) // span):
            group_of = None
    return Uniform(grid.bits, span, grid.symmetric, codes, scales, zeros, group_of)


def _parts(quantizer: Quantizer) -> tuple[Affine | None, object]:
    if not isinstance(quantizer, Composed) or not isinstance(quantizer.grid, Affine):
        return None, None
    return quantizer.grid, quantizer.basis


def mismatch(layer: Uniform, limits: Limits) -> str | None:
    """Why the format cannot hold this grid exactly; None where it can."""
    in_features = layer.codes.shape[1]
    if layer.bits not in limits.bits:
        return f"the format has no {layer.bits}-bit codes (but {', '.join(map(str, limits.bits))})"
    if layer.scales.dtype not in limits.scale_types:
        return f"the format has no {layer.scales.dtype} scales"
    if limits.whole_groups and in_features % layer.group_size:
        return f"the format wants group_size={layer.group_size} to divide the {in_features} columns"
    if limits.whole_rows and layer.group_size < in_features:
        return "the format has one scale a row: quantize with --group_size -1"
    if limits.symmetric_only and not layer.symmetric:
        return "the format has no zero points: quantize with --options.symmetric true"
    if not limits.any_order and layer.group_of is not None:
        return "its groups are of columns in another order (gptq_v2 has that)"
    if not limits.zero_codes and bool((layer.zeros == 0).any()):
        return "it has zero points of 0, which readers of this format take for different numbers (gptq_v2 has them)"
    return None


def requantized(layer: QuantizedLinear, limits: Limits) -> tuple[Uniform, float]:
    """The layer rounded to nearest on a symmetric grid that every limit allows, and the relative error of that."""
    wanted = getattr(layer.quantizer, "bits", 4)
    bits = wanted if wanted in limits.bits else min(b for b in limits.bits if b >= 4)
    group_size = next((size for size in (32, 64) if layer.in_features % size == 0), -1)
    again = RTN(bits=bits, group_size=group_size, symmetric=True)
    weight = layer.dequantize(dtype=torch.float32)
    rounded = QuantizedLinear(layer.in_features, layer.out_features, again)
    rounded.pack_(again.quantize(weight))
    error = (rounded.dequantize(dtype=torch.float32) - weight).norm() / weight.norm().clamp_min(1e-30)
    uniform = uniform_of(rounded)
    assert isinstance(uniform, Uniform)
    return uniform, float(error)
