"""Calibration of a mixture's experts: which are measured together, and what stands in where an expert sees little text.

A router sends an expert a small and uneven part of the text: with 128 experts and 8 of them a token, one sixteenth on
average, and some see none. The Hessian of so little text is nearly singular, and feedback by it moves errors
into directions that were merely not seen. So an expert's own sum is continued with tokens of the average expert of its
layer, `PSEUDO_TOKENS` for each input feature:

    H_e = (Σ_e x xᵀ + p · S) / (n_e + p),   S = Σ_e Σ x xᵀ / Σ_e n_e,   p = PSEUDO_TOKENS · in

An expert with many tokens keeps its own Hessian, one with none gets S, the layer's second moment over all tokens (for
gate and up exactly: every token goes to the same number of experts). GPTQModel's remedy is to send every token to every
expert while calibrating; `nn.experts.route_all` does that, at E / k times the work.

The gate and up projections of all experts are measured in one run over the text, and their down projections in a
second one, however many experts there are.

Shapes: in — input features; n — tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..nn.experts import DOWN, unfused_experts, unfused_within
from ..quant import HessianSum
from .blocks import Block, Group, linear_at

_P = ParamSpec("_P")
_T = TypeVar("_T")

PSEUDO_TOKENS = 0.25
"""Tokens of the layer's shared second moment in an expert's Hessian, for each input feature
(`python -m benchmarks.experts calibration --text FILE`: least or next to it, whatever the expert saw)."""
STAGE_BYTES = 4 * 2**30
"""Memory for the Hessians of experts that are measured together, in bytes."""


def with_linear_experts(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """While `function` is at work, fused experts of its model are linears; those left dense are fused again."""

    @wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        model: Any = args[0] if args else kwargs["model"]
        storage: Any = kwargs.get("storage")
        with unfused_within(model) as parts:
            if storage is not None:
                storage.unfused(parts)
            return function(*args, **kwargs)

    return wrapped


@dataclass(frozen=True)
class ExpertStage:
    """One projection of all experts of a layer, or two that read one input: their Hessians are measured together."""

    groups: list[list[str]]
    """Paths of the linears of each expert that read one input."""
    group_bytes: int
    """Size of one Hessian, in bytes."""

    @property
    def paths(self) -> list[str]:
        return [path for group in self.groups for path in group]

    def chunks(self, shared: bool = False) -> Iterator[list[list[str]]]:
        """The groups, as many at a time as `STAGE_BYTES` allow. shared: all read one input, and are one group."""
        if shared:
            yield [self.paths]
            return
        count = max(1, STAGE_BYTES // self.group_bytes)
        for start in range(0, len(self.groups), count):
            yield self.groups[start : start + count]


def expert_stages(model: nn.Module, block: Block, planned: Container[str]) -> list[ExpertStage]:
    """The stages of a block's mixtures, with those of their linears that are `planned` (paths in the model)."""
    stages = []
    for path, module in unfused_experts(block.module).items():
        experts = f"{block.path}.{path}" if path else block.path
        for last in (False, True):
            groups = []
            for index in range(module.num_experts):  # type: ignore[arg-type]
                names = module._modules[str(index)]._modules  # type: ignore[union-attr]
                paths = [f"{experts}.{index}.{name}" for name in names if (name == DOWN) == last]
                groups.append([each for each in paths if each in planned])
            if groups := [group for group in groups if group]:
                size = 4 * linear_at(model, groups[0][0]).in_features ** 2
                stages.append(ExpertStage(groups, size))
    return stages


def reads_shared_input(stage: ExpertStage) -> bool:
    """Whether a stage is that of gate and up, whose experts read one tensor where every token goes to all of them."""
    return not stage.groups[0][0].endswith(f".{DOWN}")


def in_order(
    block: Block, stages: Sequence[list[Group]], mixtures: Sequence[ExpertStage]
) -> list[list[Group] | ExpertStage]:
    """Stages of linears and of experts in the order in which the block calls them first; what is never called last."""
    calls = [path for group in block.groups for path in group.paths]
    first = {path: number for number, path in reversed(list(enumerate(calls)))}

    def called(stage: list[Group] | ExpertStage) -> int:
        paths = stage.paths if isinstance(stage, ExpertStage) else [path for group in stage for path in group.paths]
        return min((first.get(path, len(calls)) for path in paths), default=len(calls))

    return sorted([*stages, *mixtures], key=called)


class PooledSum:
    """The `HessianSum` of one expert, continued with the second moment of all."""

    def __init__(self, own: HessianSum, shared: Tensor | None) -> None:
        self._own, self._shared = own, shared

    @property
    def tokens(self) -> int:
        """Number of tokens that the expert itself saw."""
        return self._own.tokens

    @property
    def measured(self) -> bool:
        return self._own.measured or self._shared is not None

    def value(self) -> Tensor:
        """H [in, in] float32."""
        if self._shared is None or not self._own.tokens:
            return self._own.value() if self._shared is None else self._shared
        more = PSEUDO_TOKENS * len(self._shared)
        return torch.lerp(self._own.value(), self._shared, more / (self._own.tokens + more))


def pool(sums: Sequence[HessianSum]) -> Tensor | None:
    """The second moment [in, in] of all experts' inputs together; None where no expert saw a token."""
    total = HessianSum.of_all(sums)
    return total.value() if total.measured else None


FEW_TOKENS = 1 / 8
"""Tokens of an expert for each input feature below which `route_all` gives better weights, by the same measurement."""


def tokens_per_expert(rows: Sequence[tuple[str, int | None, int]]) -> str | None:
    """A line about the tokens that experts saw; None without experts. rows: path, tokens and inputs of each linear."""
    experts = [(tokens, inputs) for path, tokens, inputs in rows if path.endswith(f".{DOWN}") and tokens is not None]
    if not experts:
        return None
    seen = sorted(tokens for tokens, _ in experts)
    few = sum(tokens < FEW_TOKENS * inputs for tokens, inputs in experts)
    line = f"tokens per expert: {seen[0]} at least, {seen[len(seen) // 2]} in the middle, {seen[-1]} at most"
    if few:
        line += f"; {few} of {len(seen)} experts saw too few, under 1/8 for each input: more text, or route_all, helps"
    return line
