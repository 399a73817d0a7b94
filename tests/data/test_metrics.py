"""Perplexity: the published protocol, written out plainly beside ours."""

from __future__ import annotations

import math

import pytest
import torch

from llmtools.data.metrics import perplexity
from llmtools.errors import InputError
from tests.models import tiny_model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model("llama").eval()


def test_it_is_the_published_protocol(model: torch.nn.Module) -> None:
    ids = torch.randint(3, 500, (1, 150))
    context, total = 32, 0.0
    for start in range(0, 150 - context + 1, context):  # windows that do not overlap; the tail is dropped
        window = ids[:, start : start + context]
        with torch.no_grad():
            loss = model(input_ids=window, labels=window).loss  # mean over context − 1 predictions
        total += float(loss) * context
    expected = math.exp(total / (4 * context))
    result = perplexity(model, ids, context=context)
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert (result.tokens, result.context) == (128, 32)


def test_long_windows_are_summed_in_pieces_to_the_same_value(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(3, 500, (1, 128))
    whole = perplexity(model, ids, context=64)
    monkeypatch.setattr("llmtools.data.metrics.CHUNK", 7)
    assert perplexity(model, ids, context=64).value == pytest.approx(whole.value, rel=1e-6)


def test_a_uniform_model_has_the_perplexity_of_the_vocabulary() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, torch.randint(3, 500, (1, 128)), context=64).value == pytest.approx(512, rel=1e-5)


def test_steps_are_told_and_the_mode_is_kept(model: torch.nn.Module) -> None:
    steps: list[tuple[int, int]] = []
    model.train()
    perplexity(
        model, torch.randint(3, 500, (1, 100)), context=32, on_step=lambda done, total: steps.append((done, total))
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("tokens", "context", "says"),
    [(100, 129, "128 positions"), (10, 32, "10 tokens"), (10, 1, "at least 2")],
    ids=["longer than the model", "longer than the text", "no prediction"],
)
def test_a_context_that_cannot_be_is_said(model: torch.nn.Module, tokens: int, context: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        perplexity(model, torch.randint(3, 500, (1, tokens)), context=context)


def test_a_broken_model_is_said() -> None:
    model = tiny_model("llama").eval()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        perplexity(model, torch.randint(3, 500, (1, 64)), context=32)
