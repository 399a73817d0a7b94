"""Continuing prompts: greedy is repeatable, sampling depends on the seed alone, and the prompt is not in the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtools.data.generation import complete
from llmtools.errors import InputError


@pytest.fixture(scope="module")
def pair(stories: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)


def test_an_answer_does_not_depend_on_its_neighbours(pair: tuple[Any, Any]) -> None:
    prompts = ["Once upon a time", "The dog"]
    together = complete(*pair, prompts, max_new_tokens=8)
    assert together == [complete(*pair, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert together[0].startswith(", there was")


def test_sampling_depends_on_the_seed_alone(pair: tuple[Any, Any]) -> None:
    def sample(seed: int) -> list[str]:
        return complete(*pair, ["Once"], max_new_tokens=12, temperature=1.0, seed=seed)

    state = torch.get_rng_state()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_than_the_models_positions_is_said(pair: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="512 positions"):
        complete(*pair, ["Once"], max_new_tokens=512)
