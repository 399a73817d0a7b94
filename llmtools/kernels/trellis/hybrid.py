"""A table for QTIP's hybrid code (arXiv:2406.11235, section 3.2), fitted to Gaussian weights of standard deviation one.

QTIP takes the centres of clusters of Gaussian pairs, k-means, made symmetric. The best path seldom takes the nearest
entry for a pair, though, since a state has a choice of few. So here it is the search that assigns drawn pairs to
entries, and each entry becomes the mean of its own, round after round.

Which entries can follow each other depends on the number of states, so each has a table of its own. It is made in a
fraction of a second up to 2^12 states, and in seconds from there on, where encoding a layer takes longer. Whatever
table a weight was encoded with is stored with it.

Shapes: table [512, 2]; the first of a pair has its sign from the state, and is positive in the table but for some near
zero.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import native, reference
from .tables import PAIRS, entries, places

ROWS, COLUMNS = 256, 256
"""Size of the weight that is drawn in each round."""


@cache
def fitted_table(bits: int, state_bits: int) -> Tensor:
    """The table [512, 2] float16 on the CPU for so many bits per weight and of state; not to be changed."""
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(1)
        table = _drawn_pairs(generator) * (0.9 + 0.075 * bits)  # with more bits the entries lie farther out
        for _ in range(16 if state_bits <= 12 else 8):
            weight = torch.randn(ROWS, COLUMNS, generator=generator, device="cpu")
            table = _means(weight, table, bits, state_bits)
        return table.to(torch.float16)


def _drawn_pairs(generator: torch.Generator) -> Tensor:
    """Gaussian pairs of mean square one, the first not negative, [512, 2] float64."""
    table = torch.randn(PAIRS, 2, generator=generator, device="cpu").double()
    table[:, 0].abs_()
    return table / table.square().mean().sqrt()


def _means(weight: Tensor, table: Tensor, bits: int, state_bits: int) -> Tensor:
    """The mean of the pairs of a weight [out, 16b] that the nearest path takes each entry for; an entry counts as one
    of them. table [512, 2] float64."""
    trellis = native.encode_trellis(weight, table.float(), bits, state_bits, "hyb")
    begins = bits * places("rows", weight.device)
    state = reference._states(trellis, bits, state_bits, begins, 0, len(weight))[..., ::2]  # [out, b, 8]
    entry = entries(state).flatten()
    pairs = weight.double().view(-1, 2)
    pairs = torch.stack([torch.where(entry < PAIRS, pairs[:, 0], -pairs[:, 0]), pairs[:, 1]], 1)
    sums = table.clone().index_add_(0, entry % PAIRS, pairs)
    return sums / (1 + torch.bincount(entry % PAIRS, minlength=PAIRS))[:, None]
