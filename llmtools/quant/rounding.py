"""How the code of each weight is chosen: to the nearest value, or with the error of earlier columns fed forward.

There is one data-driven rounding. GPTQ's loop (arXiv:2210.17323, algorithm 1) and LDLQ (QuIP, arXiv:2307.13304,
section 3; block form in QuIP#, arXiv:2402.04396, section 4.1) choose the same codes: with H + λI = M D Mᵀ, M unit upper
triangular, column j is rounded after adding Σ_{i<j} E_i M_ij, where E = W − Ŵ are the errors made so far.

Once all codes are there, iterations of coordinate descent may change one column (or block) at a time for the better,
all others fixed (QuIP#, section 4.1): tr(E H Eᵀ) falls with every step.

Without groups, chunks and act-order the sweep is a few lines (`tests/quant/test_rounding.py` holds the fast one to it):

    update = factor(lambda: H.double().clone(), 1, damping=0.01).update     # M
    params, error, codes = grid.fit(W), W.clone(), []
    for j in range(W.shape[1]):
        target = W[:, j:j+1] + (error[:, :j] @ update[:j, j:j+1])           # W_j + Σ_{i<j} E_i M_ij
        codes.append(grid.quantize_values(target, params))
        error[:, j:j+1] = W[:, j:j+1] - grid.dequantize_codes(codes[-1], params)

The rows can be swept, too. What an error costs the whole network depends on the other errors of its column: the loss
is tr(G E H Eᵀ), G the second moment of the gradients in the layer's outputs (YAQA, arXiv:2505.22988). With G + λI =
N B Nᵀ in strips of rows, strip R is rounded by the sweep above after adding Σ_{S<R} N_SRᵀ E_S; written out, that is the
feedback from both sides, W + Nᵀ E M − E.

Shapes: out, in — features; h, w — the grid's height and width; G — groups in a row; p — parameters of a group. Where w
does not divide `in`, or h `out`, weights are padded with zeros that no input sees and no output shows.
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
STRIPS = 32
"""Most strips of rows with feedback between them, each a sweep by itself."""
LEAST_ROWS = 16
"""Fewest rows of a strip."""
ROW_DAMPING = 0.01
"""Damping added to the diagonal of the outputs' moment, as a fraction of its mean."""


class Rounding(ABC):
    """How codes are chosen for a whole weight on a grid."""

    @abstractmethod
    def __call__(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        """weight [out, in], hessian [in, in] -> codes [ceil(out / h), ceil(in / w)], params [out, G, p].

        The weight is float32 or wider, codes are integers or whole floats, params have the weight's type. Raises
        InputError where the rounding needs a Hessian and there is none.
        """


@dataclass(frozen=True)
class Nearest(Rounding):
    """Each weight to the nearest value of its group's grid ("RTN"); no data."""

    def __call__(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        out_features, weight = len(weight), _padded(weight, grid)
        codes, params = [], []
        for groups in split(weight, grid.resolve_group_size(weight.shape[1])):  # [out, G, c]
            # Rows that share a code stay neighbours: group by group of columns, h rows at a time.
            height = 1 if grid.ragged else grid.height  # of one group, all rows are neighbours
            strips = groups.unflatten(0, (-1, height)).transpose(1, 2)  # [out / h, G, h, c]
            flat = strips.flatten(0, 2)
            fitted = grid.fit(flat)
            codes.append(grid.quantize_values(flat, fitted).unflatten(0, strips.shape[:2]).flatten(1, 2))
            params.append(fitted.unflatten(0, strips.shape[:3]).transpose(1, 2).flatten(0, 1))
        return torch.cat(codes, 1), torch.cat(params, 1)[:out_features]


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
        assert grid.width == grid.height == 1
        hessian, group_size = hessian.to(weight), grid.resolve_group_size(weight.shape[1])
        codes, params = [], []
        for start in range(0, weight.shape[1], group_size):
            columns = slice(start, start + group_size)
            group, seen = weight[:, columns], hessian[columns, columns]
            best, least = grid.fit(group), weight.new_full((len(weight), 1), torch.inf)
            for step in range(10):
                limit = group.abs().amax(1, keepdim=True) * (1 - step / 20)
                fitted = grid.fit(group.clamp(-limit, limit))
                error = group - grid.dequantize_codes(grid.quantize_values(group, fitted), fitted)
                loss = ((error @ seen) * error).sum(1, keepdim=True)
                best, least = torch.where(loss < least, fitted, best), torch.minimum(loss, least)
            codes.append(grid.quantize_values(group, best))
            params.append(best)
        return torch.cat(codes, 1), torch.stack(params, 1)


@dataclass(frozen=True)
class Sequential(Rounding):
    """One sweep over the columns with linear feedback: GPTQ, OPTQ, LDLQ and block-LDLQ.

    A group's grid is fitted when the sweep reaches it, to weights that carry the feedback of *all* earlier columns
    (GPTQ's own code leaves out those of the current block of 128, which is worse for smaller groups). With H + λI =
    M D Mᵀ the loss is Σ_j D_jj e_j² in the errors e of rounding alone: what a grid's search for a range should weigh.
    With the second moment of the outputs' gradients the rows have feedback, too.
    """

    damping: float = 0.01
    """Damping added to the diagonal of H, as a fraction of its mean."""
    order: bool = False
    """Whether columns are swept by falling diagonal of H ("act-order"), with natural groups that are fitted first."""
    static_groups: bool = False
    """Whether every group is fitted before the sweep, to the original weights."""
    passes: int = 0
    """Largest number of coordinate-descent iterations after the sweep."""

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(
                f"damping={self.damping}; give a positive fraction of the Hessian's mean diagonal, as 0.01"
            )
        if self.passes < 0:
            raise InputError(f"passes={self.passes}; give 0 or a positive number of passes")

    def __call__(
        self, weight: Tensor, hessian: Tensor | None, grid: Grid, outputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if hessian is None:
            raise InputError(f"{where()}this rounding needs calibration data: pass a Hessian")
        weight, seen = clear_dead(weight, hessian.to(weight.device))
        return self.sweep(weight.clone(), lambda: seen.to(torch.float64, copy=True), grid, outputs)

    def sweep(
        self, weight: Tensor, hessian: Callable[[], Tensor], grid: Grid, outputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As a call, for large weights: W [out, in] becomes W − Ŵ, and H is made when it is needed.

        `hessian` gives a new copy each time, [in, in], in the precision to work in. So three matrices of the weight's
        size are never in memory at once. outputs: E[g gᵀ] [out, out] of the gradients in the layer's outputs, for
        feedback between rows, too; None, or a diagonal matrix: there is none.
        """
        out_features, weight = len(weight), _padded(weight, grid)

        def moment() -> Tensor:
            own = hessian()
            own.diagonal().masked_fill_(own.diagonal() == 0, 1)
            return _padded_hessian(own, grid.width)

        perm = torch.argsort(moment().diagonal(), descending=True, stable=True) if self.order else None
        factors = factor(moment if perm is None else lambda: moment()[perm][:, perm], grid.width, self.damping)
        if factors is None:
            codes, params = Nearest()(weight, None, grid)
            return codes, params[:out_features]
        update, cost, damping = factors.update.to(weight.dtype), factors.cost.to(weight.dtype), factors.damping
        del factors
        seen = moment().to(weight.dtype) if self.passes else None
        if seen is not None:
            seen.diagonal().add_(damping * seen.diagonal().mean())

        def rounded(error: Tensor) -> tuple[Tensor, Tensor]:
            if self.static_groups or perm is not None:
                codes, params = _sweep_static(error, update, grid, perm)
            else:
                codes, params = _sweep(error, update, cost, grid)
            if seen is not None:
                codes = _descend(error, seen, grid, codes, params, self.passes)
            return codes, params

        codes, params = _by_strips(weight, outputs, grid, rounded)
        return codes, params[:out_features]


def _by_strips(
    error: Tensor, outputs: Tensor | None, grid: Grid, rounded: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Rounds strips of rows one after the other, each with the feedback of those before it; or all of them at once.

    error [out, in] is W and becomes W − Ŵ, as `rounded` does it with some rows; outputs [out, out] float. With one
    strip only, or where no row of `outputs` has to do with another, the result is `rounded` of the whole.
    """
    height = -(-len(error) // (STRIPS * grid.height)) * grid.height
    height = max(height, -(-LEAST_ROWS // grid.height) * grid.height)
    if outputs is None or len(error) <= height:
        return rounded(error)

    def moment() -> Tensor:
        own = outputs.to(device=error.device, dtype=torch.float64, copy=True)
        return _padded_hessian(_padded_hessian(own, grid.height) if not grid.ragged else own, height)

    factors = factor(moment, height, ROW_DAMPING, otherwise="its rows are rounded without regard to one another")
    if factors is None or not factors.update.triu(1).any():
        return rounded(error)
    feedback = factors.update.to(error.dtype)  # N
    del factors
    parts = []
    for start in range(0, len(error), height):
        rows = slice(start, min(start + height, len(error)))
        shift = feedback[:start, rows].mT @ error[:start]  # Σ_{S<R} N_SRᵀ E_S
        strip = error[rows] + shift
        parts.append(rounded(strip))
        error[rows] = strip - shift
    codes, params = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(params)


def _sweep(error: Tensor, update: Tensor, cost: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Groups fitted on the way. error [out, in] is W and becomes W − Ŵ; update [in, in], cost [in] are of `factor`."""
    group_size, width = grid.resolve_group_size(error.shape[1]), grid.width
    codes, params = [], []
    for first in range(0, error.shape[1], group_size):
        last = min(first + group_size, error.shape[1])
        # The grid of the group: for its weights with the feedback of all columns before, as it settles within.
        fed = error[:, :first] @ update[:first, first:last] if first else None  # Σ_{i<first} E_i M_ij
        group = error[:, first:last]
        if fed is not None:
            group = group + _steady_state(fed, update[first:last, first:last])
        params.append(grid.fit(group, cost[first:last]))
        # Its columns, a chunk at a time: one product takes in the errors of the group's chunks before.
        for start in range(first, last, _CHUNK):
            stop = min(start + _CHUNK, last)
            target = error[:, start:stop] + error[:, first:start] @ update[first:start, start:stop]
            if fed is not None:
                target += fed[:, start - first : stop - first]
            # Within a chunk block after block, each after the errors of those before it.
            chunk = slice(start, stop)
            if (swept := grid.sweep(target, error[:, chunk], update[chunk, chunk], params[-1])) is not None:
                codes.append(swept)
                continue
            for j in range(start, stop, width):
                column = slice(j, j + width)
                x = target[:, j - start : j - start + width] + error[:, start:j] @ update[start:j, column]
                codes.append(grid.quantize_values(x, params[-1]))
                error[:, column] -= grid.dequantize_codes(codes[-1], params[-1])
    return torch.cat(codes, 1), torch.stack(params, 1)


def _steady_state(fed: Tensor, within: Tensor) -> Tensor:
    """The feedback [out, g] that a group of g columns ends up with if its own were stored without error.

    A column passes on what it was fed: its E_i is then minus its own feedback. So the steady state u has
    u_j = fed_j − Σ_{i<j} u_i M_ij, that is u = fed · M⁻¹, with the group's own part of M [g, g].
    """
    steady: Tensor = torch.linalg.solve_triangular(within, fed, upper=True, left=False, unitriangular=True)
    return steady


def _sweep_static(weight: Tensor, update: Tensor, grid: Grid, perm: Tensor | None) -> tuple[Tensor, Tensor]:
    """Groups fitted before, to the weights as they are; with perm [in], columns take that order. Grids of width 1.

    weight [out, in] becomes W − Ŵ, in its own order of columns; update [in, in] is in the order of the sweep.
    """
    assert grid.width == 1
    # The grids of all groups, and which of them each column of the sweep belongs to.
    _, params = Nearest()(weight, None, grid)
    group = torch.arange(weight.shape[1], device=weight.device) // grid.resolve_group_size(weight.shape[1])
    error = weight
    if perm is not None:
        error, group = weight[:, perm], group[perm]
    codes: list[Tensor] = []
    of_column = group.tolist()
    # As in `_sweep`: one product for all columns before a chunk, then column after column.
    for start in range(0, error.shape[1], _CHUNK):
        stop = min(start + _CHUNK, error.shape[1])
        target = error[:, start:stop] + error[:, :start] @ update[:start, start:stop]
        for j in range(start, stop):
            x = target[:, j - start, None] + error[:, start:j] @ update[start:j, j, None]
            fitted = params[:, of_column[j]]
            codes.append(grid.quantize_values(x, fitted))
            error[:, j, None] -= grid.dequantize_codes(codes[-1], fitted)
    # Back to the order of the weight.
    swept = torch.cat(codes, 1)
    if perm is None:
        return swept, params
    weight[:, perm] = error
    return torch.empty_like(swept).index_copy_(1, perm, swept), params


def _descend(error: Tensor, hessian: Tensor, grid: Grid, codes: Tensor, params: Tensor, iterations: int) -> Tensor:
    """Codes [out / h, in / w] after coordinate descent over the columns, last to first, all others fixed at each.

    With G = E H the loss as a function of the values v of block k is least at v + G_k H_kk⁻¹; the code nearest to that
    is taken in the rows (strips of h rows) where it lowers the loss, which in a block of one weight it always does. The
    error [out, in] is changed in place; the Hessian [in, in] is damped; params [out, G, p].
    """
    width, height, group_size = grid.width, grid.height, grid.resolve_group_size(error.shape[1])
    codes = codes.clone()
    blocks = [hessian[j : j + width, j : j + width] for j in range(0, len(hessian), width)]
    inverses = torch.linalg.inv(torch.stack(blocks))  # H_kk⁻¹
    for _ in range(iterations):
        changed = torch.zeros((), dtype=torch.bool, device=error.device)
        for start in reversed(range(0, error.shape[1], _CHUNK)):
            # G for a chunk of columns by one product; the chunk's own changes are taken off it as they happen.
            chunk = slice(start, min(start + _CHUNK, error.shape[1]))
            within = hessian[chunk, chunk]
            slope = error @ hessian[:, chunk]  # G, [out, chunk]
            for j in reversed(range(start, chunk.stop, width)):
                # The best values of the block, and the codes nearest to them.
                here, column, k = slice(j - start, j - start + width), slice(j, j + width), j // width
                fitted = params[:, j // group_size]
                values = grid.dequantize_codes(codes[:, k, None], fitted)  # [out, w]
                best = values + slope[:, here] @ inverses[k]
                proposed = grid.quantize_values(best, fitted).to(codes.dtype)  # [out / h, 1]
                step = grid.dequantize_codes(proposed, fitted) - values  # the error becomes error − step
                # What the step lowers the loss by, for all rows that share a code; only then it is taken.
                gain = (step * (2 * slope[:, here] - step @ blocks[k])).sum(1, keepdim=True)  # [out, 1]
                if height > 1:
                    gain = _of_strips(gain, height).repeat_interleave(height, 0)[: len(gain)]
                better = gain > 0  # nowhere where the code stays: the step is zero there
                of_codes = better if len(codes) == len(better) else better[::height]  # [out / h, 1]
                codes[:, k] = torch.where(of_codes.reshape(-1, *[1] * (codes.dim() - 2)), proposed[:, 0], codes[:, k])
                step = torch.where(better, step, 0)
                error[:, column] -= step
                slope -= step @ within[here]
                changed |= better.any()
        if not changed:
            break
    return codes


def _of_strips(gain: Tensor, height: int) -> Tensor:
    """Sums over strips of so many rows: [out, 1] -> [ceil(out / height), 1]."""
    sums: Tensor = F.pad(gain, (0, 0, 0, -len(gain) % height)).unflatten(0, (-1, height)).sum(1)
    return sums


def _padded(weight: Tensor, grid: Grid) -> Tensor:
    """weight [out, in] with zeros up to the next multiples of the grid's height and width; itself where they fit."""
    rows, columns = 0 if grid.ragged else -weight.shape[0] % grid.height, -weight.shape[1] % grid.width
    return F.pad(weight, (0, columns, 0, rows)) if rows or columns else weight


def _padded_hessian(hessian: Tensor, width: int) -> Tensor:
    """The Hessian [in, in] of a weight with so many more columns: inputs of common size that depend on no other."""
    extra = -hessian.shape[0] % width
    if not extra:
        return hessian
    padded = F.pad(hessian, (0, extra, 0, extra))
    padded.diagonal()[-extra:] = hessian.diagonal().mean()
    return padded


def split(weight: Tensor, group_size: int) -> list[Tensor]:
    """weight [out, in] by groups of columns: [out, G, group_size] and, where the last one is shorter, [out, 1,
    rest]."""
    whole = weight.shape[1] // group_size * group_size
    parts = [weight[:, :whole].unflatten(1, (-1, group_size))] if whole else []
    if whole < weight.shape[1]:
        parts.append(weight[:, None, whole:])
    return parts
