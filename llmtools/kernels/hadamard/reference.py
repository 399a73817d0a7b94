"""The transform in plain torch: the specification of the faster routes, and the route on every device but the CPU.

A Kronecker product is applied one factor at a time: view the vector as [order, trailing], multiply from the left, go
on with the next factor. Sylvester's matrix is itself a product of smaller ones; pieces of order at most 64 turn its
log2 n passes over memory into two or three matrix products, four times faster than butterflies of single sums when
run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from .matrices import matrix, order
from .rules import factors

_LARGEST_PIECE = 6  # log2


def hadamard(x: Tensor, rule: str, transpose: bool = False) -> Tensor:
    """Q x or Qᵀ x along the last dimension of x [..., n], of any floating type; a new tensor of its shape and type."""
    n = x.shape[-1]
    *small, sylvester = factors(rule, n)
    block = block_size(rule, n)
    y = x.to(accumulator(x.dtype)).reshape(x.numel() // block, block)
    for name in (*small, *_pieces(order(sylvester))):
        y = apply_factor(y, name, transpose)
    return (y * scale(rule, n)).to(x.dtype).reshape(x.shape)


def rotate(
    x: Tensor,
    rule: str,
    size: int,
    before: Tensor | None,
    after: Tensor | None,
    length: int,
    factor: float,
    transpose: bool,
    transform: Callable[[Tensor, str, bool], Tensor] = hadamard,
) -> Tensor:
    """factor · after ∘ Q (before ∘ x) for x [..., k], padded with zeros to `size` features; the first `length` of them.

    The factor goes with the vector that is there, and each step is rounded to x's type.
    """
    if before is not None:
        x = (x * (before * factor)).to(x.dtype)
    y = transform(F.pad(x, (0, size - x.shape[-1])), rule, transpose)[..., :length]
    if after is not None:
        y = y * (after * factor if before is None else after)
    return y.to(x.dtype).contiguous()


def apply_factor(y: Tensor, name: str, transpose: bool) -> Tensor:
    """Multiplies the leading part of each row's axis by M, then moves it last, so that the next factor's part leads.

    y [rows, order · trailing] -> [rows, trailing · order]: after all factors have had their turn, the axes are back
    in place.
    """
    size = order(name)
    turned = y.reshape(len(y), size, y.shape[1] // size).mT  # [rows, trailing, order]
    if turned.shape[1] == 1:  # one product of all rows, where torch would copy the matrix for each of them
        turned = turned.squeeze(1)
    m = factor(name, y.device, y.dtype)
    return (turned @ (m if transpose else m.T)).reshape(y.shape)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums of half-precision numbers are formed in float32."""
    return torch.promote_types(dtype, torch.float32)


@cache
def block_size(rule: str, n: int) -> int:
    """The length of the parts of a vector that are mixed with each other; n, except for block-diagonal rules."""
    size = 1
    for name in factors(rule, n):
        size *= order(name)
    return size


def scale(rule: str, n: int) -> float:
    """What makes the matrix of ±1 orthogonal."""
    return 1 / sqrt(block_size(rule, n))


@cache
def factor(name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The named matrix [K, K] on a device, one copy a process: a buffer would be garbage after loading from meta."""
    with torch.inference_mode(False):
        return matrix(name).to(dtype).to(device)


def _pieces(size: int) -> list[str]:
    """Sylvester matrices of nearly equal order, at most 64, whose Kronecker product has the order `size` = 2^t."""
    t = size.bit_length() - 1
    count = -(-t // _LARGEST_PIECE)
    return [f"sylvester:{1 << (t // count + (i < t % count))}" for i in range(count)]
