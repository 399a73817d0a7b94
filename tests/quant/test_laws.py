"""Every registered quantizer keeps every law, whatever its options; and a quantizer that breaks one is found out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtools.quant import ALL, Packed, Quantizer, TensorSpec, quantizer, quantizers
from llmtools.quant.laws import LAWS, check, problems

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "rtn": [
        {"bits": 2, "group_size": 16},
        {"bits": 3, "symmetric": True},
        {"bits": 8, "group_size": -1, "clip": False},
        {"bits": 4, "group_size": 5, "clip": False},
    ],
    "nf4": [{"group_size": -1}, {"group_size": 24, "double_quantization": True}],
    "optq": [
        {"bits": 2, "group_size": 16, "clip": False},
        {"bits": 3, "group_size": -1, "act_order": True, "clip": False},
        {"bits": 3, "group_size": 20, "act_order": True, "static_groups": True, "clip": False},
        {"bits": 4, "group_size": 7, "symmetric": True, "clip": False, "damping": 0.1},
        {"bits": 2, "group_size": 32, "static_groups": True},
        {"bits": 3, "group_size": 16, "clip": False, "act_order": True, "static_groups": True, "passes": 2},
    ],
    "hqq": [{"bits": 2, "group_size": 24}, {"bits": 3, "group_size": 7}, {"bits": 8, "group_size": -1}],
    "awq": [{"bits": 2, "group_size": 16, "clip": False}, {"bits": 3, "group_size": 20, "symmetric": True}],
    "quip": [
        {"bits": 2, "passes": 0},
        {"bits": 3, "group_size": 16, "clip": False, "passes": 2, "seed": 5},
        {"bits": 2, "mid_rise": True, "passes": 0},
    ],
    "quip_sharp": [
        {"bits": 2, "passes": 0, "scale": 0.9},
        {"bits": 3, "passes": 1, "seed": 3},
        {"bits": 4, "passes": 0, "residual_scale": 3.0},
    ],
    "qtip": [
        {"bits": 2, "state_bits": 9, "seed": 3},
        {"bits": 3, "state_bits": 8, "passes": 2, "code": "1mad"},
        {"bits": 4, "state_bits": 10, "scale": 1.0},
        {"bits": 6, "state_bits": 10},
        {"bits": 2, "state_bits": 8, "code": "hyb"},
        {"bits": 1, "state_bits": 9, "code": "hyb", "seed": 1},
        {"bits": 3, "state_bits": 10, "code": "hyb", "passes": 1},
        {"bits": 4, "state_bits": 11, "code": "hyb", "scale": 0.9},
    ],
    "gguf": [{"type": "Q4_0"}, {"type": "Q4_1"}, {"type": "Q5_0"}, {"type": "Q5_1"}],
}
"""Beside each one's defaults."""

QUICK: dict[str, dict[str, Any]] = {
    "quip": {"passes": 2},
    "quip_sharp": {"passes": 2},
    "signround": {"iterations": 5},
    "exl3": {"bits": 2, "state_bits": 8},
    "qtip_hybrid": {"state_bits": 9},
}
"""In place of the defaults, where those take many rounds."""

BUILT_IN = [name for name in quantizers.names() if quantizers.known(name).__module__.startswith("llmtools.")]
CASES = [(name, options) for name in BUILT_IN for options in [QUICK.get(name, {}), *OPTIONS.get(name, [])]]


@pytest.mark.parametrize(
    ("name", "options", "seed"),
    [(name, options, seed) for seed, (name, options) in enumerate(CASES)],
    ids=["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in CASES],
)
def test_quantizers_keep_the_laws(name: str, options: dict[str, Any], seed: int) -> None:
    broken = [outcome for outcome in check(quantizer(name, **options), seed, every=4) if outcome.error]
    assert not broken


def test_every_problem_is_drawn_by_some_seed() -> None:
    assert len(CASES) >= 4 and len(list(problems())) % 4 == 0


# ---- the laws have teeth -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain(Quantizer):
    """float16 rows: keeps every law. `broken` names the one that is not kept."""

    name = "plain"
    broken: str = ""

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        columns = in_features + (self.broken == "layout")
        return {"values": TensorSpec((out_features, columns), torch.float16)}

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        values = weight.to(torch.float16)
        if self.broken == "determinism":
            values = values + 1e-2 * torch.rand(values.shape).to(torch.float16)
        if self.broken == "degenerate" and not values.any():
            values = values + 1
        return {"values": values}

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        values = packed["values"]
        if self.broken == "rows" and rows != ALL:
            return (values[rows] * 1.001).to(dtype)
        if self.broken == "trained" and rows != ALL and rows.start:
            values = values.detach() + 0 * values
        return values[rows].to(dtype)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        y = super().linear(x, packed)
        if self.broken == "in_place":
            return Halves.apply(x, self.dequantize(packed).T)
        return y * 1.0001 if self.broken == "linear" else y


class Halves(torch.autograd.Function):
    """x @ w, given as a view that was made within the function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return (x @ w).flatten().view(*x.shape[:-1], w.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.saved_tensors[0].T, None


def test_a_sound_third_party_quantizer_keeps_them() -> None:
    assert not [outcome for outcome in check(Plain(), every=3) if outcome.error]


@pytest.mark.parametrize("law", ["layout", "rows", "determinism", "linear", "trained", "in_place", "degenerate"])
def test_a_broken_law_is_reported_with_the_problem(law: str) -> None:
    outcomes = [outcome for outcome in check(Plain(broken=law), every=4) if outcome.law == law]
    assert any(outcome.error and outcome.problem for outcome in outcomes)


def test_an_exception_of_a_quantizer_is_an_outcome_not_a_crash() -> None:
    class Raises(Plain):
        def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
            raise RuntimeError("no")

    errors = {outcome.error for outcome in check(Raises(), every=8)}
    assert errors == {"RuntimeError: no"} or errors == {"RuntimeError: no", ""}


def test_the_laws_are_the_architectures() -> None:
    assert set(LAWS) == {
        "layout", "rows", "determinism", "meta", "linear", "trained", "in_place", "requantized", "updated", "shifted",
        "round_trip", "calibration_helps", "two_sides_help", "monotone", "degenerate",
    }  # fmt: skip
