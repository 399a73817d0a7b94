"""QuIP# (arXiv:2402.04396): a rotated weight on a lattice, with a scale search and a scale correction.

A lattice codebook covers a ball. Gaussian weights fit it best at a known standard deviation (1.03 at 2 bits), and
rotation makes most weights Gaussian, but not all: where one singular value outweighs the others, as in the query and
key projections of small models, the rotated weight is nearly a product of two Gaussian vectors, and the ball cuts off
its tails. The *scale search* therefore tries a few sizes on some of the rows and takes the one with the least proxy
loss tr(E H Eᵀ) of nearest rounding; with feedback the choice is the same but for the odd layer, and needs a factor of
H.

When the codes are chosen, a *scale correction* gives each row of the *unrotated* weight the factor that brings it
closest to the original, g = ⟨w, ŵ⟩ / ⟨ŵ, ŵ⟩ with ⟨a, b⟩ = a H bᵀ. It is stored in the basis' vector of signs, which is
there anyway.

Neither is in the paper; both cost no bit. QTIP's trellis is used in the same way (`qtip.py`).

Shapes: out, in — features; r — rows tried; h — rows that share a code of the grid.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from .base import Packed, later, quantizers
from .bases import SignedHadamard
from .composed import Composed
from .grids.base import Grid
from .grids.lattice import SCALE, Lattice
from .hessian import proxy_loss
from .rounding import ROW_DAMPING, Nearest, Sequential

SCALES = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)
"""Scales that are tried, relative to the one for Gaussian weights."""
ROWS = 128
"""Number of rows that they are tried on; rotated rows are much alike."""


class Rotated(Composed):
    """A grid that holds no scales, in the basis `SignedHadamard`: the size of the rotated weight is searched, and the
    rows' corrected."""

    scale: float | None
    """Standard deviation of the weights on the grid; None: searched for each layer."""
    damping: float
    """Damping added to the Hessian's diagonal, as a fraction of its mean."""
    passes: int
    """Largest number of coordinate-descent iterations after the sweep."""
    seed: int
    """Seed of the random signs, which are stored."""
    hadamard: int
    """Version of the rules that say which Hadamard matrix belongs to a size."""
    rows_tried: ClassVar[int] = ROWS
    """Number of rows that scales are tried on."""

    @property
    @abstractmethod
    def fitting_scale(self) -> float:
        """The standard deviation of Gaussian weights that fit the grid best."""

    def __post_init__(self) -> None:
        """Raises InputError for options out of range: grid, rounding and basis check their own."""
        _ = self.grid, self.rounding, self.basis

    @property
    def rounding(self) -> Sequential:
        return Sequential(self.damping, passes=self.passes)

    @cached_property
    def basis(self) -> SignedHadamard:
        scale = self.fitting_scale if self.scale is None else self.scale
        return SignedHadamard(self.seed, scale, self.grid.width, self.hadamard, self.scale_type)

    def _quantize(self, weight: Tensor, hessian: Tensor | None, outputs: Tensor | None) -> Packed:
        weight = self._checked(weight, hessian)
        assert hessian is not None
        hessian, basis = hessian.to(weight.device), self.basis
        state = basis.init(weight, hessian)
        rotated, _ = basis.transform(weight, None, state)
        if self.scale is None:
            scale = search_scale(rotated, basis.second_moment(hessian, state), self.grid, self.rows_tried)
            rotated *= scale
            state["sv"] = basis.stored(state["sv"].float() / scale)
        moment = None if outputs is None else basis.output_moment(outputs, state)
        codes, params = self.rounding.sweep(rotated, lambda: basis.second_moment(hessian, state), self.grid, moment)
        del moment
        columns = rotated.shape[1]
        del rotated
        packed = self.grid.pack(codes, params, columns) | state
        corrections = row_corrections(weight, self.dequantize(packed, dtype=weight.dtype), hessian, outputs)
        packed["sv"] = basis.stored(packed["sv"].to(corrections) * corrections)
        return packed

    def _scales(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
        return norms / (weight.shape[1] ** 0.5 * self.fitting_scale), norms


@quantizers.register("quip_sharp")
@dataclass(frozen=True)
class QuIPSharp(Rotated):
    """QuIP# (arXiv:2402.04396): rotated weights, eight at a time on the lattice E8; the choice for 2 bits.

    2, 3 or 4 bits per weight and nothing per group: two float16 vectors are all that is stored beside the codes.
    """

    needs_hessian: ClassVar[bool] = True

    bits: int = 2
    """Bits per weight, 2, 3 or 4."""
    scale: float | None = None
    """Standard deviation of the weights on the grid. By default searched for each layer, from what suits Gaussian
    weights best, 1.03, 0.98 or 1.03, downwards."""
    residual_scale: float | None = None
    """Factor on the error of the first two bits in the residual code; by default 2.04 at 3 bits, 3.45 at 4."""
    damping: float = 0.01
    """Damping added to the Hessian's diagonal, as a fraction of its mean."""
    passes: int = 2
    """Largest number of coordinate-descent iterations after the sweep; each takes about as long as the sweep, and the
    first two bring all but 1 to 3 % of what ten bring."""
    seed: int = 0
    """Seed of the random signs, which are stored."""
    hadamard: int = 1
    """Version of the rules that say which Hadamard matrix belongs to a size."""
    scale_type: str = later("float16")
    """Type of the scales of rows: float16, bfloat16 or float32; float32 anyway where float16 is too narrow."""

    def __post_init__(self) -> None:
        if self.bits not in SCALE or isinstance(self.bits, bool):
            raise InputError(f"{self.name}: bits={self.bits!r}; choose 2, 3 or 4")
        super().__post_init__()

    @property
    def fitting_scale(self) -> float:
        return SCALE[self.bits]

    @cached_property
    def grid(self) -> Grid:
        return Lattice(self.bits, self.residual_scale)


def search_scale(weight: Tensor, hessian: Tensor, grid: Grid, most: int = ROWS) -> float:
    """What a rotated weight [out, in] is multiplied by to fit the grid best, under its rotated H [in, in]; of `SCALES`.

    At most about `most` rows are tried, in strips of the grid's height, evenly spread: rows that share a code stay
    together.
    """
    strips = -(-len(weight) // grid.height)
    count = max(1, most // grid.height)
    first = torch.arange(0, strips, max(1, strips // count), device=weight.device)[:count] * grid.height
    rows = (first[:, None] + torch.arange(grid.height, device=weight.device)).flatten()
    some = weight[rows[rows < len(weight)]]  # [r, in]
    losses = []
    for scale in SCALES:
        codes, params = Nearest()(some * scale, None, grid)
        values = grid.dequantize(grid.pack(codes, params, weight.shape[1]), dtype=weight.dtype)
        losses.append(proxy_loss(some, values[:, : weight.shape[1]] / scale, hessian))
    return SCALES[losses.index(min(losses))]


def row_corrections(weight: Tensor, approximation: Tensor, hessian: Tensor, outputs: Tensor | None = None) -> Tensor:
    """g [out]: the factor of each row of the approximation [out, in] that brings it closest to the weight's.

    Closest under the Hessian [in, in] of the weight's own coordinates, and with `outputs` [out, out] under the second
    moment of the gradients there, too; in the weight's type, between ½ and 2.
    """
    hessian = hessian.to(weight)
    if outputs is not None:
        return _joint_corrections(weight, approximation, hessian, outputs.to(weight.device))
    corrections = torch.ones(len(weight), dtype=weight.dtype, device=weight.device)
    for start in range(0, len(weight), 64):
        rows = slice(start, start + 64)
        seen = approximation[rows] @ hessian
        power, shared = (seen * approximation[rows]).sum(1), (seen * weight[rows]).sum(1)
        corrections[rows] = torch.where(power > 0, shared / power, 1).clamp(0.5, 2)
    return corrections


def _joint_corrections(weight: Tensor, approximation: Tensor, hessian: Tensor, outputs: Tensor) -> Tensor:
    """g [out] of the least tr(G (W − diag(g) Ŵ) H (W − diag(g) Ŵ)ᵀ): (G ∘ Ŵ H Ŵᵀ) g = (G ∘ Ŵ H Wᵀ) 1.

    Solved for g − 1, so that rows that cost nothing stay as they are.
    """
    seen = approximation @ hessian
    matrix = (outputs * (seen @ approximation.mT)).double()
    slope = (outputs * (seen @ (weight - approximation).mT)).double().sum(1)
    matrix.diagonal().mul_(1 + ROW_DAMPING).masked_fill_(matrix.diagonal() == 0, 1)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return torch.ones(len(weight), dtype=weight.dtype, device=weight.device)
    return (1 + torch.cholesky_solve(slope[:, None], factor)[:, 0]).to(weight.dtype).clamp(0.5, 2)
