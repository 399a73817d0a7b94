"""How the code of each weight is chosen: to the nearest value, or with the error of earlier columns fed forward.

There is one data-driven rounding. GPTQ's loop (arXiv:2210.17323, algorithm 1) and LDLQ (QuIP, arXiv:2307.13304,
section 3; block form in QuIP#, arXiv:2402.04396, section 4.1) choose the same codes: with H + λI = M D Mᵀ, M unit upper
triangular, column j is rounded after adding Σ_{i<j} E_i M_ij, where E = W − Ŵ are the errors made so far.

Shapes: out, in — features; w — the grid's width; G — groups in a row; p — parameters of a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, where
from .grids.base import Grid
from .hessian import clear_dead, feedback

_CHUNK = 128  # columns between two products with all earlier errors


class Rounding(ABC):
    @abstractmethod
    def __call__(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        """weight [out, in], hessian [in, in] -> codes [out, in / w], params [out, G, p]."""


@dataclass(frozen=True)
class Nearest(Rounding):
    """Each weight to the nearest value of its group's grid ("RTN"); no data."""

    def __call__(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        codes, params = [], []
        for groups in _split(weight, grid.span(weight.shape[1])):  # [out, G, c]
            flat = groups.flatten(0, 1)
            fitted = grid.fit(flat)
            codes.append(grid.nearest(flat, fitted).unflatten(0, groups.shape[:2]).flatten(1))
            params.append(fitted.unflatten(0, groups.shape[:2]))
        return torch.cat(codes, 1), torch.cat(params, 1)


@dataclass(frozen=True)
class Sequential(Rounding):
    """One sweep over the columns with linear feedback: GPTQ, OPTQ, LDLQ and block-LDLQ.

    A group's grid is fitted when the sweep reaches it, to weights that carry the feedback of *all* earlier columns
    (GPTQ's own code leaves out those of the current block of 128, which is worse for smaller groups).
    """

    damping: float = 0.01
    """Added to the diagonal of H, as a fraction of its mean."""
    order: bool = False
    """Sweep columns by falling diagonal of H ("act-order") while groups stay where they are and are fitted first."""
    static_groups: bool = False
    """Fit every group before the sweep, to the original weights."""

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(
                f"damping={self.damping}; give a positive fraction of the Hessian's mean diagonal, as 0.01"
            )

    def __call__(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        if hessian is None:
            raise InputError(f"{where()}this rounding needs calibration data: pass a Hessian")
        weight, hessian = clear_dead(weight, hessian.to(weight.device))
        in_features = weight.shape[1]
        perm = torch.argsort(hessian.diagonal(), descending=True, stable=True) if self.order else None
        if perm is not None:
            hessian = hessian[perm][:, perm]
        update = feedback(hessian, grid.width, self.damping)
        if update is None:
            return Nearest()(weight, None, grid)
        update = update.to(weight.dtype)
        if self.static_groups or self.order:
            _, params = Nearest()(weight, None, grid)
            group = torch.arange(in_features, device=weight.device) // grid.span(in_features)
            if perm is None:
                return _sweep_static(weight, update, grid, params, group), params
            codes = torch.empty_like(weight)
            codes[:, perm] = _sweep_static(weight[:, perm], update, grid, params, group[perm])
            return codes, params
        return _sweep(weight, update, grid)


def _sweep(weight: Tensor, update: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Groups fitted on the way. update is M of `feedback`, [in, in]."""
    span, width = grid.span(weight.shape[1]), grid.width
    error = torch.zeros_like(weight)  # W − Ŵ of the columns done
    codes, params = [], []
    for first in range(0, weight.shape[1], span):
        group = slice(first, first + span)
        fresh = weight[:, group] + error[:, :first] @ update[:first, group]
        params.append(grid.fit(fresh))
        for start in range(first, min(first + span, weight.shape[1]), _CHUNK):
            stop = min(start + _CHUNK, first + span, weight.shape[1])
            target = fresh[:, start - first : stop - first]
            target = target + error[:, first:start] @ update[first:start, start:stop]
            for j in range(start, stop, width):
                column = slice(j, j + width)
                x = target[:, j - start : j - start + width] + error[:, start:j] @ update[start:j, column]
                codes.append(grid.nearest(x, params[-1]))
                error[:, column] = weight[:, column] - grid.value(codes[-1], params[-1])
    return torch.cat(codes, 1), torch.stack(params, 1)


def _sweep_static(weight: Tensor, update: Tensor, grid: Grid, params: Tensor, group: Tensor) -> Tensor:
    """Groups known before: column j has params[:, group[j]]. Grids of width 1."""
    assert grid.width == 1
    error = torch.zeros_like(weight)
    codes = torch.empty_like(weight)
    of_column = group.tolist()
    for start in range(0, weight.shape[1], _CHUNK):
        stop = min(start + _CHUNK, weight.shape[1])
        target = weight[:, start:stop] + error[:, :start] @ update[:start, start:stop]
        for j in range(start, stop):
            x = target[:, j - start, None] + error[:, start:j] @ update[start:j, j, None]
            fitted = params[:, of_column[j]]
            codes[:, j, None] = grid.nearest(x, fitted).to(codes.dtype)
            error[:, j, None] = weight[:, j, None] - grid.value(codes[:, j, None].to(codes.dtype), fitted)
    return codes


def _split(weight: Tensor, span: int) -> list[Tensor]:
    """weight [out, in] in groups of columns: [out, G, span] and, where span does not divide in, [out, 1, rest]."""
    whole = weight.shape[1] // span * span
    parts = [weight[:, :whole].unflatten(1, (-1, span))] if whole else []
    if whole < weight.shape[1]:
        parts.append(weight[:, None, whole:])
    return parts
