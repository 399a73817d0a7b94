"""Prompts: from the line or a file, in the words that the adapter was trained with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llmtools.errors import InputError
from llmtools.recipes.generate import Generate, _in_words, _prompts


def test_prompts_come_from_the_line_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert _prompts(Generate(prompt="one")) == ["one"]
    assert _prompts(Generate(prompts=str(tmp_path / "a.txt"))) == ["one", "two"]
    with pytest.raises(InputError, match=r"a\.jsonl:2"):
        _prompts(Generate(prompts=str(tmp_path / "a.jsonl")))
    with pytest.raises(InputError, match="one of the two"):
        _prompts(Generate(prompt="one", prompts="a.txt"))


def test_a_prompt_is_put_in_the_words_of_training() -> None:
    chat = SimpleNamespace(
        chat_template="a template",
        apply_chat_template=lambda turns, **options: f"<{turns[0]['role']}>{turns[0]['content']}",
    )
    assert _in_words("Hi", {"form": "messages"}, chat) == "<user>Hi"
    template = {"form": "prompt", "template": {"prompt": "Q: {question}\nA:", "completion": " {answer}"}}
    assert _in_words("Why?", template, chat) == "Q: Why?\nA:"
    assert _in_words("Hi", {"form": "prompt", "template": None}, chat) == "Hi"
    assert _in_words("Hi", {}, chat) == "Hi"
