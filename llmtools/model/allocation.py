"""Bits where they matter: a width for each linear, so that the whole model loses least at a given size.

The loss of quantizing one linear is estimated to second order. With E the error of its weight, x its inputs and g the
gradient of the model's log-likelihood in its outputs, the Kullback–Leibler divergence from the original grows by

    ½ E[(gᵀ E x)²]  ≈  ½ · E[|g|²] / out · tr(E H Eᵀ),        H = E[x xᵀ]

for g and x independent and g of no preferred direction (HAWQ, arXiv:1911.03852, and OPTQ's proxy loss,
arXiv:2210.17323, weighted by the Fisher information). E[|g|²] comes from a backward pass with tokens sampled from the
model's own distribution, H from a walk through its blocks, and E from the quantizer itself at every width, for up to
256 rows at equal distances, since the loss is a sum over rows. Widths are then bought where a stored bit lowers the sum
most (`allocate`): the Lagrangian of the integer programme, exact on the lower convex hull of each linear's choices.

Shapes: out, in — features of a linear; b, t — sequences and tokens of a batch.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..document import plain_table, table
from ..errors import InputError, within
from ..quant import Quantizer, proxy_loss
from ..quant.base import BlockLearner, layout_bytes
from ..quant.base import quantizer as named_quantizer
from .blocks import Block, linear_at
from .fisher import backward_of_samples
from .mixtures import with_linear_experts
from .quantize import accumulating
from .storage import Storage
from .targets import Overrides, Plan, any_index
from .walk import Batch, Calls, OnStep, walk

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
"""Bits that a linear may get, of those that the quantizer has."""
SEQUENCES = 16
"""Most sequences of the calibration text that the gradients are measured on."""
ROWS = 256
"""Most rows of a weight that are quantized at every width, for the estimate."""


class Choice(NamedTuple):
    """One width of a linear."""

    bits: int
    """Bits per code."""
    stored: float
    """Stored bits per weight, scales included."""
    cost: float
    """Estimated KL divergence in nats per token."""


class Allocation(NamedTuple):
    """The width of each linear, and what it was chosen from."""

    bits: dict[str, int]
    """Path → bits per code."""
    bits_per_weight: float
    """Stored bits per weight of all linears together."""
    cost: float
    """Estimated KL divergence in nats per token, of all linears together."""
    choices: dict[str, list[Choice]]
    """Path → its choices, by rising bits."""

    @property
    def overrides(self) -> dict[str, dict[str, int]]:
        """The widths as the `overrides` of `llmtools.quantize`."""
        return {path: {"bits": bits} for path, bits in self.bits.items()}

    def table(self) -> str:
        """How many linears of each kind got which width."""
        widths = sorted(set(self.bits.values()))
        kinds: dict[str, list[int]] = {}
        for path, bits in self.bits.items():
            kinds.setdefault(any_index(path), []).append(bits)
        rows = [[kind, *(str(found.count(width)) for width in widths)] for kind, found in kinds.items()]
        shown = plain_table(table(["linears", *(f"{width} bits" for width in widths)], rows))
        return f"{shown}\n{self.bits_per_weight:.3f} bits per weight, estimated KL {self.cost:.4f}"


@with_linear_experts
def choose_bits(
    model: nn.Module,
    quantizer: Quantizer,
    calibration: Sequence[Batch],
    bits_per_weight: float,
    *,
    overrides: Overrides | None = None,
    skip: Sequence[str] | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
    storage: Storage | None = None,
) -> Allocation:
    """The width of each linear of `model` for which the estimated loss is least, within `bits_per_weight` stored bits.

    calibration: token ids [b, t] each. Linears that `overrides` name keep what they say, and do not count. The model
    is not changed. storage: where the weights are; by default in memory.

    Raises InputError for a quantizer without `bits`, and for a size that no choice of widths meets.
    """
    variants = _variants(quantizer)
    inside = chosen_among(model, quantizer, overrides, skip)
    weights = {path: linear_at(model, path).weight.numel() for path in inside}
    if not inside:
        raise InputError("bits_per_weight: no linear within the blocks is left to choose for")
    size = math.fsum(weights.values())
    stored = {path: [_stored(each, linear_at(model, path)) for each in variants] for path in inside}
    least = sum(min(stored[path]) * weights[path] for path in inside) / size
    if bits_per_weight < least:
        raise InputError(
            f"bits_per_weight={bits_per_weight}: {quantizer.name} needs at least {least:.3f} with its scales"
        )
    storage = storage or Storage()
    with storage.whole():
        gradients = output_gradients(model, calibration[:SEQUENCES], inside, seed=seed)
    losses = _proxy_losses(model, calibration, inside, variants, on_step, storage)
    choices = {
        path: [
            Choice(each.bits, stored[path][index], 0.5 * gradients[path] * losses[path][index])  # type: ignore[attr-defined]
            for index, each in enumerate(variants)
        ]
        for path in inside
    }
    bits = allocate(choices, weights, bits_per_weight)
    picked = {path: next(c for c in choices[path] if c.bits == bits[path]) for path in inside}
    return Allocation(
        bits,
        sum(picked[path].stored * weights[path] for path in inside) / size,
        sum(each.cost for each in picked.values()),
        choices,
    )


def chosen_among(
    model: nn.Module, quantizer: Quantizer, overrides: Overrides | None = None, skip: Sequence[str] | None = None
) -> list[str]:
    """The paths of the linears that `choose_bits` chooses for."""
    plan = Plan.of(model, quantizer, overrides or {}, skip)
    blocks = tuple(f"{block}." for block in plan.blocks)
    return [path for path, each in plan.quantizers.items() if each == quantizer and path.startswith(blocks)]


def allocate(choices: Mapping[str, Sequence[Choice]], weights: Mapping[str, int], budget: float) -> dict[str, int]:
    """The width of each linear, of the least total cost with at most `budget` stored bits per weight.

    From the fewest bits upwards, the step along a linear's lower convex hull that lowers the cost most per stored bit
    is taken as long as it fits. Optimal where the last step meets the budget; otherwise within that one step.
    """
    hulls = {path: _hull(each) for path, each in choices.items()}
    at = dict.fromkeys(hulls, 0)
    left = budget * math.fsum(weights.values()) - sum(hull[0].stored * weights[path] for path, hull in hulls.items())

    def step(path: str) -> tuple[float, str] | None:
        hull, index = hulls[path], at[path]
        if index + 1 == len(hull):
            return None
        return -(hull[index].cost - hull[index + 1].cost) / (
            weights[path] * (hull[index + 1].stored - hull[index].stored)
        ), path

    steps = [found for path in hulls if (found := step(path)) is not None]
    heapq.heapify(steps)
    while steps:
        _, path = heapq.heappop(steps)
        price = weights[path] * (hulls[path][at[path] + 1].stored - hulls[path][at[path]].stored)
        if price <= left * (1 + 1e-12):
            left -= price
            at[path] += 1
            if (found := step(path)) is not None:
                heapq.heappush(steps, found)
    return {path: hull[at[path]].bits for path, hull in hulls.items()}


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of (stored bits, cost), from the fewest bits to the least cost."""
    hull: list[Choice] = []
    for each in sorted(choices, key=lambda choice: (choice.stored, choice.cost)):
        if hull and each.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], each):
            hull.pop()
        hull.append(each)
    return hull


def _slope(one: Choice, other: Choice) -> float:
    return (other.cost - one.cost) / (other.stored - one.stored)


def output_gradients(
    model: nn.Module, sequences: Sequence[Batch], paths: Sequence[str], *, seed: int = 0
) -> dict[str, float]:
    """E[|g|²] / out of each linear: g the gradient of −log p of a sequence in its outputs at one token.

    The tokens are sampled from the model's own distribution, so that E[g gᵀ] is the Fisher information.
    """
    sums, counts = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0)

    def collect(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            grad = outputs[0]
            if grad is not None:
                sums[path] += float(grad.float().square().sum())
                counts[path] += grad.numel()

        return hook

    with ExitStack() as stack:
        for path in paths:
            stack.callback(linear_at(model, path).register_full_backward_hook(collect(path)).remove)
        backward_of_samples(model, enumerate(sequences, seed))
    idle = [path for path in paths if not counts[path]]
    reached = [sums[path] / counts[path] for path in paths if counts[path]]
    mean = sum(reached) / max(1, len(reached))
    return {path: mean if path in idle else sums[path] / counts[path] for path in paths}


def _proxy_losses(
    model: nn.Module,
    calibration: Sequence[Batch],
    paths: Sequence[str],
    variants: Sequence[Quantizer],
    on_step: OnStep | None,
    storage: Storage,
) -> dict[str, list[float]]:
    """tr(E H Eᵀ) of each linear at each width, with H of the unquantized network."""
    wanted, found = set(paths), dict[str, list[float]]()

    def visit(block: Block, calls: Calls) -> None:
        groups = [group.paths for group in block.groups_among(wanted)]
        with accumulating(model, groups) as sums:
            calls.run()
        for group, total in zip(groups, sums, strict=True):
            measure(group, total.value())
        measure([path for path in block.idle if path in wanted], None)

    def measure(group: Sequence[str], hessian: Tensor | None) -> None:
        for path in group:
            weight = linear_at(model, path).weight.detach()
            whole, weight = len(weight), weight[:: math.ceil(len(weight) / ROWS)]
            moment = torch.eye(weight.shape[1], device=weight.device) if hessian is None else hessian
            with within(path):
                found[path] = [_loss(each, weight, moment) * whole / len(weight) for each in variants]
            if on_step is not None:
                on_step(len(found), len(paths), path)

    walk(model, calibration, visit, storage=storage)
    return found


def _loss(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> float:
    packed = quantizer.quantize(weight, hessian if quantizer.needs_hessian else None)
    return proxy_loss(weight, quantizer.dequantize(packed), hessian)


def _variants(quantizer: Quantizer) -> list[Quantizer]:
    """The quantizer at each width that it has, as quick as it can be; learned rounding is stood in for by `optq`."""
    fields = {each.name for each in dataclasses.fields(quantizer)}  # type: ignore[arg-type]
    if "bits" not in fields:
        raise InputError(f"bits_per_weight: {quantizer.name} has no option bits; use optq, rtn, quip_sharp or another")
    if isinstance(quantizer, BlockLearner):
        kept = {name: getattr(quantizer, name) for name in ("group_size", "symmetric") if name in fields}
        quantizer, fields = named_quantizer("optq", **kept), {"bits", "passes"}
    found: list[Quantizer] = []
    for bits in WIDTHS:
        try:
            quick = {"passes": 0} if "passes" in fields else {}
            found.append(dataclasses.replace(quantizer, bits=bits, **quick))  # type: ignore[type-var]
        except InputError:
            continue
    return found


def _stored(quantizer: Quantizer, linear: nn.Linear) -> float:
    return 8 * stored_bytes(quantizer, linear) / (linear.out_features * linear.in_features)


def stored_bytes(quantizer: Quantizer, linear: nn.Linear) -> int:
    """Bytes of a linear's packed weight."""
    return layout_bytes(quantizer.layout(linear.out_features, linear.in_features))
