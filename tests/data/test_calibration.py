"""Calibration windows: exact length, inside a document where possible, the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtools.data.calibration import calibration, text_ids
from llmtools.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories)


def test_windows_have_exactly_the_tokens_asked_for(tokenizer: Any, tinystories: Path) -> None:
    windows = calibration(tinystories / "held_out.txt", tokenizer, samples=5, tokens=33)
    assert [tuple(window.shape) for window in windows] == [(1, 33)] * 5
    assert {window.dtype for window in windows} == {torch.int64}


def test_the_seed_decides(tokenizer: Any, tinystories: Path) -> None:
    def draw(seed: int) -> torch.Tensor:
        return torch.cat(calibration(tinystories / "held_out.txt", tokenizer, samples=3, tokens=16, seed=seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_each_window_lies_in_a_document_of_its_own_when_they_are_long_enough(tokenizer: Any) -> None:
    documents = [f"{letter} " * 60 for letter in "abcd"] + ["short"]
    windows = calibration(documents, tokenizer, samples=4, tokens=32)
    texts = [set(tokenizer.decode(window[0], skip_special_tokens=True).split()) for window in windows]
    assert sorted(map(sorted, texts)) == [["a"], ["b"], ["c"], ["d"]]


def test_short_documents_are_read_one_after_the_other(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="llmtools"):
        windows = calibration([f"story {number}" for number in range(40)], tokenizer, samples=3, tokens=64)
    assert all(window.shape == (1, 64) for window in windows)
    assert "out of" in caplog.text


def test_too_short_a_text_says_how_many_tokens_there_are(tokenizer: Any) -> None:
    count = len(tokenizer("Once upon a time")["input_ids"])
    with pytest.raises(InputError, match=f"{count} tokens, fewer than one window of tokens=512"):
        calibration(["Once upon a time"], tokenizer, samples=2, tokens=512)


def test_nothing_to_read_is_said(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no text"):
        calibration([" "], tokenizer)
    with pytest.raises(InputError, match="at least 1"):
        calibration(["a"], tokenizer, samples=0)


def test_a_known_name_that_cannot_be_had_is_one_clear_error(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"give a \.txt or \.jsonl file"):
        calibration("wikitext2", tokenizer)


def test_a_text_to_evaluate_on_is_tokenized_once_and_verbatim(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert text_ids(tmp_path / "a.txt", tokenizer).tolist() == [tokenizer("one\n\ntwo\n")["input_ids"]]
