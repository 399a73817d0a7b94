"""We export GGUF; llama.cpp itself (in the build of xllamacpp) opens it and computes what the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmtools
from llmtools.formats.writing import export
from tests.interop.peers import LlamaCpp, assert_as_likely
from tests.models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.fixture
def tokenizer(stories: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"bits": 3, "group_size": 32}, {"bits": 8, "symmetric": True}], ids=str
)
def test_the_next_tokens_are_as_likely(family: str, options: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(family, hidden_size=128, intermediate_size=256)
    llmtools.quantize(model, "rtn", **options)
    export(model, tokenizer, tmp_path / "out", "gguf", reader="llama.cpp")
    assert_as_likely(LlamaCpp(tmp_path / "out"), model)


def test_a_trained_model_tells_the_same_story(stories: Path, tmp_path: Path) -> None:
    """From the text on: the tokenizer in the file is tried as well."""
    model, tokenizer = llmtools.load(stories)
    llmtools.quantize(model, "rtn", bits=4, group_size=32, skip=["lm_head", "*down_proj"])
    export(model, tokenizer, tmp_path / "out", "gguf", lossy=True)
    text = "Once upon a time, there was a little girl"
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert LlamaCpp(tmp_path / "out").greedy(text, 12) == expected
