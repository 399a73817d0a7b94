"""We export GGUF; llama.cpp itself (in the build of xllamacpp) opens it and computes what the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmtools
from llmtools.model.export import export
from tests.interop.peers import LlamaCpp
from tests.models import tiny_ids, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.fixture
def tokenizer(stories: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"bits": 3, "group_size": 32}, {"bits": 8, "symmetric": True}], ids=str
)
def test_the_next_tokens_are_as_likely(family: str, options: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits a block where it multiplies, so its probabilities are near, not equal."""
    model = tiny_model(family, hidden_size=128, intermediate_size=256)
    llmtools.quantize(model, "rtn", **options)
    export(model, tokenizer, tmp_path / "out", "gguf", reader="llama.cpp")
    ids = tiny_ids(1, 12)[0].tolist()
    tokens, steps = LlamaCpp(tmp_path / "out").greedy(ids, 6)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].float()
    for ours, theirs, chosen in zip(logits.log_softmax(-1), steps, tokens, strict=True):
        assert len(theirs) >= 5 and max(theirs, key=theirs.__getitem__) == chosen
        for token, value in theirs.items():
            assert value == pytest.approx(ours[token].item(), abs=0.1)
        assert ours[chosen] > ours.max() - 0.1


def test_a_trained_model_tells_the_same_story(stories: Path, tmp_path: Path) -> None:
    """From the text on: the tokenizer in the file is tried as well."""
    model, tokenizer = llmtools.load(stories)
    llmtools.quantize(model, "rtn", bits=4, group_size=32, skip=["lm_head", "*down_proj"])
    export(model, tokenizer, tmp_path / "out", "gguf", lossy=True)
    text = "Once upon a time, there was a little girl"
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    tokens, _ = LlamaCpp(tmp_path / "out").greedy(text, 12)
    assert tokens == expected
