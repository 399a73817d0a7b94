"""Error propagation: weights that are quantized make up for the errors of the layers before them.

A quantizer minimises |W x̂ − Ŵ x̂|² on the inputs x̂ that the quantized network gives, so each layer is true to what it
gets, and the errors of all layers before it pass through unchanged. What the network needs is the original's output on
the original's input, W x. The linear layer that gives it best on x̂ is

    W' = argmin E|W x − W' x̂|² = W + W E[(x − x̂) x̂ᵀ] (E[x̂ x̂ᵀ] + λ)⁻¹,

and W' is quantized in place of W, by any quantizer: QEP (arXiv:2504.09629, section 4), of which GPTAQ
(arXiv:2504.02692) is a form for one rounding. A strength α below 1 takes that share of the correction, since the
whole of it fits the calibration text too closely.

For x the original block runs beside the quantized one, on the hidden states of the original network.

Shapes: in, out — features; t — tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import InputError, where
from .blocks import linear_at
from .walk import Calls, Enough, Stream, copied, on_inputs

DAMPING = 0.01
"""Damping λ as a fraction of the mean of the Hessian's diagonal; more where that is not positive definite."""


def check_strength(strength: float, *, tuned: bool) -> None:
    """Raises InputError for a strength that is not from 0 to 1, and beside block tuning."""
    if not 0 <= strength <= 1:
        raise InputError(f"error_propagation={strength}; give a strength from 0 (none) to 1 (full correction)")
    if strength and tuned:
        raise InputError(
            "error propagation and block tuning both make up for the errors of the layers before; choose one of the two"
        )


class OriginalStream:
    """The hidden states of the original network, carried from block to block.

    Where a network computes something between blocks, the hidden states of the blocks behind it are computed from the
    outputs of the quantized blocks before it.
    """

    def __init__(self) -> None:
        self._stream: Stream = []  # what the original network feeds to the next block
        self._segment: object = None

    def advance(self, calls: Calls) -> Iterator[Tensor]:
        """Runs a block of the original network; yields its outputs [b, t, features], which feed the next one."""
        self._enter(calls)
        return calls.advance(self._stream)

    def beside(self, calls: Calls) -> Calls:
        """The calls of a copy of the block, which is still the original one, on what the original network feeds it."""
        self._enter(calls)
        return calls.on(copy.deepcopy(calls.block), copied(self._stream))

    def _enter(self, calls: Calls) -> None:
        if self._segment is not calls.segment:
            self._segment, self._stream = calls.segment, copied(calls.stream)


class ErrorSum:
    """Accumulates Σ (x − x̂) x̂ᵀ over tokens, in float32: how a layer's input differs from the original's."""

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self._tokens = 0
        self._comparable = True

    def add(self, original: Tensor, quantized: Tensor) -> None:
        """Adds x and x̂ [..., in] of any float dtype. Where their shapes differ, as those of an expert do to which
        other tokens were sent, there is no correction."""
        if original.shape != quantized.shape:
            self._comparable = False
            return
        seen = quantized.detach().reshape(-1, quantized.shape[-1]).float()  # [t, in]
        self._sum.addmm_((original.detach().reshape(seen.shape).float() - seen).T, seen)
        self._tokens += len(seen)

    def reduce(self, add_up: Callable[[Tensor], None]) -> None:
        """Adds the sums of other processes; add_up(tensor) replaces a tensor by its sum over all of them."""
        counts = torch.tensor([self._tokens, not self._comparable], device=self._sum.device)
        add_up(self._sum)
        add_up(counts)
        self._tokens, self._comparable = int(counts[0]), not counts[1]

    def correction(self, hessian: Tensor, strength: float) -> Tensor | None:
        """What the weight is multiplied by for its correction: W' = W + W @ correction, [in, in] float32, or None.

        hessian: E[x̂ x̂ᵀ], [in, in] float32, undamped.
        """
        if not (self._comparable and self._tokens):
            return None
        damped, damping = hessian.clone(), DAMPING
        mean = float(hessian.diagonal().mean())
        while damping <= 1:
            damped.diagonal().copy_(hessian.diagonal() + damping * mean)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                # D (H + λ)⁻¹ = ((H + λ)⁻¹ Dᵀ)ᵀ
                found = torch.cholesky_solve(self._sum.T / self._tokens, factor).T * strength
                return found if bool(torch.isfinite(found).all()) else None
            damping *= 10
        return None


@contextmanager
def comparing(
    original: Calls, block: nn.Module, groups: Sequence[Sequence[str]], *, stop: bool = False
) -> Iterator[list[ErrorSum]]:
    """One `ErrorSum` per group of linears (paths within the block), from the inputs of its first one.

    Within the context, each run of `original` on a batch must be followed by one of `block` on the same batch.
    stop: what comes after that linear in the original is not run, see `Calls.run`.
    """
    sums: list[ErrorSum] = []
    watched: list[tuple[nn.Module, Callable[[Tensor], None]]] = []
    for first, *_ in groups:
        linear = linear_at(original.block, first)
        sums.append(ErrorSum(linear.in_features, linear.weight.device))
        keep, compare = _pairing(sums[-1], stop)
        watched += [(linear, keep), (linear_at(block, first), compare)]
    with on_inputs(watched):
        yield sums


def _pairing(total: ErrorSum, stop: bool) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """What takes the original's input, and what adds the pair when it gets the quantized network's."""
    waiting: list[Tensor] = []

    def keep(x: Tensor) -> None:
        waiting.append(x)
        if stop:
            raise Enough

    def compare(x: Tensor) -> None:
        if waiting:
            total.add(waiting.pop(0), x)

    return keep, compare


def corrected(linear: nn.Linear, correction: Tensor) -> nn.Linear:
    """A linear with the weight W + W @ correction, of the same dtype; the bias is shared."""
    weight = linear.weight.detach().float()
    made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    changed = torch.addmm(weight, weight, correction).to(linear.weight.dtype)
    if not torch.isfinite(changed).all():
        raise InputError(
            f"{where()}error propagation leaves the range of {linear.weight.dtype}; choose a lower strength"
        )
    made.weight = nn.Parameter(changed, requires_grad=False)
    made.bias = linear.bias
    return made.train(linear.training)
