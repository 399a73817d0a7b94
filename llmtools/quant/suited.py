"""Two numbers that a rotated weight chooses for free: its size on the grid, and the size of each row that is decoded.

A lattice codebook covers a ball. Gaussian weights fit it best at a known standard deviation (1.03 at 2 bits), and
rotation makes most weights Gaussian, but not all: where one singular value outweighs the others, as in the query and
key projections of small models, the rotated weight is nearly a product of two Gaussian vectors, and the ball cuts off
its tails. `suited_share` therefore tries a few sizes on some of the rows and takes the one with the least proxy loss
tr(E H Eᵀ) of nearest rounding; with feedback the choice is the same but for the odd layer, and needs a factor of H.

When the codes are chosen, `row_gains` gives each row of the *unrotated* weight the factor that brings it closest to the
original, g = ⟨w, ŵ⟩ / ⟨ŵ, ŵ⟩ with ⟨a, b⟩ = a H bᵀ. It is stored in the basis' vector of signs, which is there anyway.

Shapes: out, in — features; r — rows tried.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grids.base import Grid
from .hessian import proxy_loss
from .rounding import Nearest

SHARES = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)
"""Sizes to try, as shares of the one for Gaussian weights."""
ROWS = 128
"""Rows to try them on; rotated rows are much alike."""


def suited_share(weight: Tensor, hessian: Tensor, grid: Grid) -> float:
    """The share of its size at which a rotated weight [out, in] fits the grid best, under its rotated H [in, in]."""
    rows = weight[:: max(1, len(weight) // ROWS)][:ROWS]  # [r, in]
    losses = []
    for share in SHARES:
        codes, params = Nearest()(rows * share, None, grid)
        values = grid.dequantize(grid.pack(codes, params, weight.shape[1]), dtype=weight.dtype)
        losses.append(proxy_loss(rows, values[:, : weight.shape[1]] / share, hessian))
    return SHARES[losses.index(min(losses))]


def row_gains(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """g [out]: the factor of each row of the approximation [out, in] that brings it closest to the weight's."""
    gains = torch.ones(len(weight), dtype=weight.dtype, device=weight.device)
    hessian = hessian.to(weight)
    for start in range(0, len(weight), 64):
        rows = slice(start, start + 64)
        seen = approximation[rows] @ hessian
        power, shared = (seen * approximation[rows]).sum(1), (seen * weight[rows]).sum(1)
        gains[rows] = torch.where(power > 0, shared / power, 1).clamp(0.5, 2)
    return gains
