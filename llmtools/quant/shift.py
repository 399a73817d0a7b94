"""A change of a weight that is constant in each group of columns, which moves zero points or minima and no code.

QA-LoRA (arXiv:2309.14717, section 3.3): where every column of A is the mean of its group, s B A has one value for each
row and group, as have the zero points. On a grid whose zero points are floating numbers such an adapter is merged by
adding to them (`Quantizer.shift`); the rounding to their dtype is all that is lost.

Shapes: r — rows; in — features; G = ceil(in / size) — groups, the last of which may be shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError, where


def group_means(values: Tensor, size: int) -> Tensor:
    """[r, in] float -> [r, G], the mean of each run of `size` columns."""
    whole = values.shape[1] // size * size
    means = values[:, :whole].unflatten(1, (-1, size)).mean(-1)
    return means if whole == values.shape[1] else torch.cat([means, values[:, whole:].mean(1, keepdim=True)], 1)


def pooled(values: Tensor, size: int) -> Tensor:
    """[r, in] float -> [r, in], each column replaced by the mean of its group of `size` columns."""
    return group_means(values, size).repeat_interleave(size, 1)[:, : values.shape[1]]


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero points or minima, rounded to the dtype that they are stored in. Raises InputError where it cannot hold
    them."""
    rounded = values.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise InputError(
            f"{where()}the adapter moves a zero point to {float(values.abs().max()):.3g}, which {dtype} cannot hold; "
            "merge it with --how round, or export --format dense"
        )
    return rounded
