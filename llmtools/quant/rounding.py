"""How the code of each weight is chosen: to the nearest value, or with the error of earlier columns fed forward.

There is one data-driven rounding. GPTQ's loop (arXiv:2210.17323, algorithm 1) and LDLQ (QuIP, arXiv:2307.13304,
section 3; block form in QuIP#, arXiv:2402.04396, section 4.1) choose the same codes: with H + λI = M D Mᵀ, M unit upper
triangular, column j is rounded after adding Σ_{i<j} E_i M_ij, where E = W − Ŵ are the errors made so far.

Once all codes are there, passes of coordinate descent may change one column (or block) at a time for the better, all
others fixed (QuIP#, section 4.1): tr(E H Eᵀ) falls with every step.

Shapes: out, in — features; w — the grid's width; G — groups in a row; p — parameters of a group. Where w does not
divide `in`, weights are filled up with zeros that no input sees, and codes are of the filled weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, where
from .grids.base import Grid
from .hessian import clear_dead, factor

_CHUNK = 128  # columns between two products with all earlier errors


class Rounding(ABC):
    @abstractmethod
    def __call__(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        """weight [out, in], hessian [in, in] -> codes [out, in / w], params [out, G, p]."""


@dataclass(frozen=True)
class Nearest(Rounding):
    """Each weight to the nearest value of its group's grid ("RTN"); no data."""

    def __call__(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        weight = _filled(weight, grid.width)
        codes, params = [], []
        for groups in split(weight, grid.span(weight.shape[1])):  # [out, G, c]
            flat = groups.flatten(0, 1)
            fitted = grid.fit(flat)
            codes.append(grid.nearest(flat, fitted).unflatten(0, groups.shape[:2]).flatten(1))
            params.append(fitted.unflatten(0, groups.shape[:2]))
        return torch.cat(codes, 1), torch.cat(params, 1)


@dataclass(frozen=True)
class Clipped(Rounding):
    """To nearest, with each group's range shrunk to what loses least at the layer's output (AWQ, arXiv:2306.00978).

    Of a group's weights g and the part H_g of the Hessian that belongs to its columns the loss is (g − ĝ) H_g (g − ĝ)ᵀ:
    the mean squared error of the group's share of the output, which AWQ's code measures on sampled activations.
    Candidates are ±max|g| · (1 − i/20), i = 0 … 9.
    """

    def __call__(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        if hessian is None:
            raise InputError(f"{where()}this rounding needs calibration data: pass a Hessian")
        assert grid.width == 1
        hessian, span = hessian.to(weight), grid.span(weight.shape[1])
        codes, params = [], []
        for start in range(0, weight.shape[1], span):
            group, seen = weight[:, start : start + span], hessian[start : start + span, start : start + span]
            best, least = grid.fit(group), weight.new_full((len(weight), 1), torch.inf)
            for step in range(10):
                limit = group.abs().amax(1, keepdim=True) * (1 - step / 20)
                fitted = grid.fit(group.clamp(-limit, limit))
                error = group - grid.value(grid.nearest(group, fitted), fitted)
                loss = ((error @ seen) * error).sum(1, keepdim=True)
                best, least = torch.where(loss < least, fitted, best), torch.minimum(loss, least)
            codes.append(grid.nearest(group, best))
            params.append(best)
        return torch.cat(codes, 1), torch.stack(params, 1)


@dataclass(frozen=True)
class Sequential(Rounding):
    """One sweep over the columns with linear feedback: GPTQ, OPTQ, LDLQ and block-LDLQ.

    A group's grid is fitted when the sweep reaches it, to weights that carry the feedback of *all* earlier columns
    (GPTQ's own code leaves out those of the current block of 128, which is worse for smaller groups). With H + λI =
    M D Mᵀ the loss is Σ_j D_jj e_j² in the errors e of rounding alone: what a grid's search for a range should weigh.
    """

    damping: float = 0.01
    """Added to the diagonal of H, as a fraction of its mean."""
    order: bool = False
    """Sweep columns by falling diagonal of H ("act-order") while groups stay where they are and are fitted first."""
    static_groups: bool = False
    """Fit every group before the sweep, to the original weights."""
    passes: int = 0
    """Passes of coordinate descent after the sweep."""

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(
                f"damping={self.damping}; give a positive fraction of the Hessian's mean diagonal, as 0.01"
            )
        if self.passes < 0:
            raise InputError(f"passes={self.passes}; give 0 or a positive number of passes")

    def __call__(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        if hessian is None:
            raise InputError(f"{where()}this rounding needs calibration data: pass a Hessian")
        weight, seen = clear_dead(weight, hessian.to(weight.device))
        return self.sweep(weight.clone(), lambda: seen.to(torch.float64, copy=True), grid)

    def sweep(self, weight: Tensor, hessian: Callable[[], Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
        """As a call, for large weights: W [out, in] becomes W − Ŵ, and H is made when it is needed.

        `hessian` gives a new copy each time, [in, in], in the precision to work in. So three matrices of the weight's
        size are never in memory at once.
        """
        weight = _filled(weight, grid.width)

        def moment() -> Tensor:
            own = hessian()
            own.diagonal().masked_fill_(own.diagonal() == 0, 1)
            return _filled_hessian(own, grid.width)

        perm = torch.argsort(moment().diagonal(), descending=True, stable=True) if self.order else None
        factors = factor(moment if perm is None else lambda: moment()[perm][:, perm], grid.width, self.damping)
        if factors is None:
            return Nearest()(weight, None, grid)
        update, cost, damping = factors.update.to(weight.dtype), factors.cost.to(weight.dtype), factors.damping
        del factors
        if self.static_groups or perm is not None:
            codes, params = _sweep_static(weight, update, grid, perm)
        else:
            codes, params = _sweep(weight, update, cost, grid)
        del update
        if self.passes:
            codes = _descend(weight, moment().to(weight.dtype), damping, grid, codes, params, self.passes)
        return codes, params


def _sweep(error: Tensor, update: Tensor, cost: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Groups fitted on the way. update and cost are of `factor`; columns of W become those of W − Ŵ when done."""
    span, width = grid.span(error.shape[1]), grid.width
    codes, params = [], []
    for first in range(0, error.shape[1], span):
        last = min(first + span, error.shape[1])
        fed = error[:, :first] @ update[:first, first:last] if first else None
        group = error[:, first:last]
        if fed is not None:
            group = group + _settled(fed, update[first:last, first:last])
        params.append(grid.fit(group, cost[first:last]))
        for start in range(first, last, _CHUNK):
            stop = min(start + _CHUNK, last)
            target = error[:, start:stop] + error[:, first:start] @ update[first:start, start:stop]
            if fed is not None:
                target += fed[:, start - first : stop - first]
            for j in range(start, stop, width):
                column = slice(j, j + width)
                x = target[:, j - start : j - start + width] + error[:, start:j] @ update[start:j, column]
                codes.append(grid.nearest(x, params[-1]))
                error[:, column] -= grid.value(codes[-1], params[-1])
    return torch.cat(codes, 1), torch.stack(params, 1)


def _settled(fed: Tensor, within: Tensor) -> Tensor:
    """The feedback [out, span] that a group ends up with if its own columns were stored without error.

    A column passes on what it was fed: its E_i is then minus its own feedback. So the feedback u that settles is
    u_j = fed_j − Σ_{i<j} u_i M_ij, that is u = fed · M⁻¹, with the group's own part of M [span, span].
    """
    settled: Tensor = torch.linalg.solve_triangular(within, fed, upper=True, left=False, unitriangular=True)
    return settled


def _sweep_static(weight: Tensor, update: Tensor, grid: Grid, perm: Tensor | None) -> tuple[Tensor, Tensor]:
    """Groups fitted before, to the weights as they are; with perm [in], columns take that order. Grids of width 1."""
    assert grid.width == 1
    _, params = Nearest()(weight, None, grid)
    group = torch.arange(weight.shape[1], device=weight.device) // grid.span(weight.shape[1])
    error = weight
    if perm is not None:
        error, group = weight[:, perm], group[perm]
    codes: list[Tensor] = []
    of_column = group.tolist()
    for start in range(0, error.shape[1], _CHUNK):
        stop = min(start + _CHUNK, error.shape[1])
        target = error[:, start:stop] + error[:, :start] @ update[:start, start:stop]
        for j in range(start, stop):
            x = target[:, j - start, None] + error[:, start:j] @ update[start:j, j, None]
            fitted = params[:, of_column[j]]
            codes.append(grid.nearest(x, fitted))
            error[:, j, None] -= grid.value(codes[-1], fitted)
    swept = torch.cat(codes, 1)
    if perm is None:
        return swept, params
    weight[:, perm] = error
    return torch.empty_like(swept).index_copy_(1, perm, swept), params


def _descend(
    error: Tensor, hessian: Tensor, damping: float, grid: Grid, codes: Tensor, params: Tensor, passes: int
) -> Tensor:
    """Codes after passes over the columns, last to first; each chooses anew with all others fixed.

    With G = E (H + λI) the loss as a function of the values v of block k is least at v + G_k H_kk⁻¹; the code nearest
    to that is taken in the rows where it lowers the loss, which in a block of one column it always does. The error
    [out, in] and the Hessian, here damped, are changed in place.
    """
    width, span = grid.width, grid.span(error.shape[1])
    codes = codes.clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    blocks = [hessian[j : j + width, j : j + width] for j in range(0, len(hessian), width)]
    inverses = torch.linalg.inv(torch.stack(blocks))  # H_kk⁻¹
    for _ in range(passes):
        changed = torch.zeros((), dtype=torch.bool, device=error.device)
        for start in reversed(range(0, error.shape[1], _CHUNK)):
            chunk = slice(start, min(start + _CHUNK, error.shape[1]))
            inner = hessian[chunk, chunk]
            slope = error @ hessian[:, chunk]  # G, [out, chunk]
            for j in reversed(range(start, chunk.stop, width)):
                here, column, k = slice(j - start, j - start + width), slice(j, j + width), j // width
                fitted = params[:, j // span]
                values = grid.value(codes[:, k, None], fitted)
                wish = values + slope[:, here] @ inverses[k]
                proposed = grid.nearest(wish, fitted).to(codes.dtype)
                step = grid.value(proposed, fitted) - values  # the error becomes error − step
                gain = (step * (2 * slope[:, here] - step @ blocks[k])).sum(1, keepdim=True)
                better = (gain > 0) & (proposed != codes[:, k, None])
                step = torch.where(better, step, 0)
                codes[:, k, None] = torch.where(better, proposed, codes[:, k, None])
                error[:, column] -= step
                slope -= step @ inner[here]
                changed |= better.any()
        if not changed:
            break
    return codes


def _filled(weight: Tensor, width: int) -> Tensor:
    """weight [out, in] with columns of zeros up to the next multiple of width."""
    extra = -weight.shape[1] % width
    return F.pad(weight, (0, extra)) if extra else weight


def _filled_hessian(hessian: Tensor, width: int) -> Tensor:
    """The Hessian of such a weight: inputs of common size that depend on no other."""
    extra = -hessian.shape[0] % width
    if not extra:
        return hessian
    filled = F.pad(hessian, (0, extra, 0, extra))
    filled.diagonal()[-extra:] = hessian.diagonal().mean()
    return filled


def split(weight: Tensor, span: int) -> list[Tensor]:
    """weight [out, in] in groups of columns: [out, G, span] and, where span does not divide in, [out, 1, rest]."""
    whole = weight.shape[1] // span * span
    parts = [weight[:, :whole].unflatten(1, (-1, span))] if whole else []
    if whole < weight.shape[1]:
        parts.append(weight[:, None, whole:])
    return parts
