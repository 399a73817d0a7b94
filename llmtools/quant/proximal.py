"""Zero points that make the largest errors not matter: half-quadratic quantization, without data.

HQQ (Badri & Shaji 2023, mobiusml.github.io/hqq_blog) asks for the zero point z of each group that makes the error
small in the norm Σ|w − ŵ|^p with p < 1, which forgives a few outliers. Splitting the error e off as a variable of its
own leaves two steps, each in closed form and repeated in turn:

    e ← shrink(w − ŵ),   shrink(x) = sign(x) · max(0, |x| − |x|^(p−1) / β)
    z ← mean(q − (w − e) / s) over the group,   q = clamp(round(w / s + z), 0, 2^bits − 1),  ŵ = s · (q − z)

The scale s is that of the group's extremes and stays. Scales and zero points are rounded to what is stored before a
code is chosen. The iteration ends when the mean of |w − ŵ| over the whole weight no longer falls; the best is kept
(HQQ's code keeps the one after).

Shapes: out, in — features; G — groups in a row; n — groups in all; c — columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .grids.affine import Affine
from .grids.base import Grid
from .grids.scalar import SCALE_TYPES, scale_range
from .rounding import Rounding, split

_P, _BETA = 0.7, 10.0


@dataclass(frozen=True)
class Proximal(Rounding):
    """For `Affine` grids with `float_zeros`."""

    iterations: int = 20

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise InputError(f"iterations={self.iterations}; give 0 or a positive number")

    def __call__(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        assert isinstance(grid, Affine) and grid.float_zeros
        parts = split(weight, grid.resolve_group_size(weight.shape[1]))  # each [out, G, c]
        groups = [part.flatten(0, 1) for part in parts]
        trial = [_extremes(group, grid) for group in groups]
        best, least = trial, _distance(groups, trial, grid)
        for _ in range(self.iterations):
            trial = [_step(group, params, grid) for group, params in zip(groups, trial, strict=True)]
            distance = _distance(groups, trial, grid)
            if distance >= least:
                break
            best, least = trial, distance
        codes, params = [], []
        for part, group, fitted in zip(parts, groups, best, strict=True):
            codes.append(grid.quantize_values(group, fitted).unflatten(0, part.shape[:2]).flatten(1))
            params.append(fitted.unflatten(0, part.shape[:2]))
        return torch.cat(codes, 1), torch.cat(params, 1)


def _extremes(group: Tensor, grid: Affine) -> Tensor:
    """group [n, c] -> (scale, zero) [n, 2] of its range, which need not contain 0."""
    low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
    largest = torch.maximum(high, -low)
    # A narrow range far from zero needs a large zero point, and float16 tells apart quarters up to 512.
    scale = torch.maximum((high - low) / (2**grid.bits - 1), largest / 512)
    scale = _stored(torch.where(largest == 0, 1.0, scale).clamp_min(scale_range(SCALE_TYPES[grid.scale_type])[0]), grid)
    return torch.cat([scale, _stored(-low / scale, grid)], -1)


def _step(group: Tensor, params: Tensor, grid: Affine) -> Tensor:
    """One turn of both steps: the same scales, new zero points."""
    scale = params[:, :1]
    codes = grid.quantize_values(group, params)
    error = group - grid.dequantize_codes(codes, params)
    size = error.abs()
    error = error.sign() * (size - size.pow(_P - 1) / _BETA).clamp_min(0)
    zero = (codes - (group - error) / scale).mean(-1, keepdim=True)
    return torch.cat([scale, _stored(zero, grid)], -1)


def _stored(x: Tensor, grid: Affine) -> Tensor:
    """x as it comes back from storage."""
    dtype = SCALE_TYPES[grid.scale_type]
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).to(x.dtype)


def _distance(groups: list[Tensor], params: list[Tensor], grid: Affine) -> float:
    """Σ|w − ŵ|."""
    return sum(
        float(
            (group - grid.dequantize_codes(grid.quantize_values(group, fitted), fitted)).abs().sum(dtype=torch.float64)
        )
        for group, fitted in zip(groups, params, strict=True)
    )
