"""Learned rounding: its gradients, its start, that it is no worse than OPTQ, and that what is measured is stored."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from llmtools.errors import InputError
from llmtools.quant import OPTQ, RTN, SignRound, proxy_loss
from llmtools.quant.laws import check, problems

FEW = SignRound(bits=2, group_size=20, iterations=20)


def draw() -> tuple[Tensor, Tensor]:
    """The weight [24, 96] and Hessian of a law."""
    _, (_, weight, hessian), *_ = problems()
    return weight, hessian


def test_learned_rounding_keeps_the_laws_with_other_options() -> None:
    odd = SignRound(bits=3, group_size=20, symmetric=True, iterations=4, learning_rate=0.1)
    assert not [outcome for outcome in check(odd, every=4) if outcome.error]


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_pass_straight_through_the_rounding(symmetric: bool) -> None:
    weight, hessian = draw()
    learner = dataclasses.replace(FEW, symmetric=symmetric).learner(weight, hessian)
    offset, alpha, beta = learner.learned
    with torch.no_grad():
        offset.uniform_(-0.5, 0.5)
        alpha.uniform_(0.5, 1.5)
        beta.uniform_(0.5, 1.5)
    grad = torch.randn(24, 96)
    expected = plain(learner._weight, learner._low, learner._high, offset, alpha, beta, symmetric)
    torch.testing.assert_close(learner.weight(), expected.flatten(1)[:, :96])
    (expected.flatten(1)[:, :96] * grad).sum().backward()
    wanted = [each.grad for each in learner.learned]
    for each in learner.learned:
        each.grad = None
    (learner.weight() * grad).sum().backward()
    for each, want in zip(learner.learned, wanted, strict=True):
        if symmetric and each is beta:
            assert each.grad is None
        else:
            torch.testing.assert_close(each.grad, want)


def plain(w: Tensor, low: Tensor, high: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, symmetric: bool) -> Tensor:
    """The formula of the docstring at 2 bits, left to autograd."""

    def through(x: Tensor, rounded: Tensor) -> Tensor:
        return x + (rounded - x).detach()

    scale = ((alpha if symmetric else beta) * high - alpha * low) / 3
    scale = through(scale, scale.half().float())
    zero = -alpha * low / scale
    zero = torch.full_like(zero, 2.0) if symmetric else through(zero, zero.round()).clamp(0, 3)
    steps = w / scale + v
    return scale * ((through(steps, steps.round()) + zero).clamp(0, 3) - zero)


def test_on_a_block_it_starts_from_the_nearest_values() -> None:
    weight, hessian = draw()
    packed = FEW.learner(weight, hessian).packed()
    expected = RTN(bits=2, group_size=20, clip=True).quantize(weight)
    assert all(torch.equal(packed[name], expected[name]) for name in expected)


def test_what_is_packed_is_what_was_measured() -> None:
    learner = FEW.learner(*draw())
    for step in range(3):
        learner.weight().square().sum().backward()
        learner.step(step / 3)
        assert torch.equal(FEW.dequantize(learner.packed()), learner.weight())


def test_no_row_ends_worse_than_with_optq() -> None:
    for bits in (2, 3):
        gains = []
        for what, weight, hessian in problems():
            if "dead" in what:  # there OPTQ clears columns, and both are free to
                continue
            learned = SignRound(bits=bits, iterations=30)
            start = OPTQ(bits=bits, group_size=64)
            ours, theirs = (losses(weight.float(), each.dequantize(each.quantize(weight, hessian)), hessian)
                            for each in (learned, start))  # fmt: skip
            assert (ours <= theirs * 1.001 + 1e-9).all()
            gains.append(float(ours.sum() / theirs.sum()))
        assert sum(gains) / len(gains) < 0.97


def losses(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """The proxy loss row by row."""
    error = weight - approximation
    assert proxy_loss(weight, approximation, hessian) == pytest.approx(
        float(((error @ hessian) * error).sum()), rel=1e-3
    )
    return ((error @ hessian) * error).sum(1)


def test_rows_are_kept_one_by_one() -> None:
    learner = FEW.learner(*draw())
    first = learner.weight().detach().clone()
    learner.weight().square().sum().backward()
    learner.step(0.0)
    second = learner.weight().detach().clone()
    rows = torch.arange(24) % 2 == 0
    learner.keep(rows)
    learner.weight().square().sum().backward()
    learner.step(0.0)
    learner.restore()
    assert torch.equal(learner.weight(), torch.where(rows[:, None], second, first))


def test_the_rate_falls_to_zero_and_offsets_stay_within_half() -> None:
    learner = SignRound(bits=2, iterations=10, learning_rate=1.0).learner(*draw())
    learner.weight().sum().backward()
    learner.step(1.0)
    assert not learner.learned[0].any()
    learner.weight().sum().backward()
    learner.step(0.0)
    assert 0 < learner.learned[0].abs().max() <= 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"iterations": 0}, "iterations=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"batch": 0}, "batch=0"),
        ({"damping": 0.0}, "damping=0.0"),
    ],
    ids=lambda value: str(value),
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SignRound(**options)  # type: ignore[arg-type]
