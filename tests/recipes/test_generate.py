"""Prompts: from the line or a file, in the words that the adapter was trained with."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from llmtools.errors import InputError
from llmtools.recipes.generate import Generate, _in_template, _prompts, generate


def test_prompts_come_from_the_line_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert _prompts(Generate(prompt="one")) == ["one"]
    assert _prompts(Generate(prompts=str(tmp_path / "a.txt"))) == ["one", "two"]
    with pytest.raises(InputError, match=r"a\.jsonl:2"):
        _prompts(Generate(prompts=str(tmp_path / "a.jsonl")))
    with pytest.raises(InputError, match="one of the two"):
        _prompts(Generate(prompt="one", prompts="a.txt"))


def test_a_prompt_is_put_in_the_template_of_training() -> None:
    template = {"form": "prompt", "template": {"prompt": "Q: {question}\nA:", "completion": " {answer}"}}
    assert _in_template("Why?", template) == "Q: Why?\nA:"
    assert _in_template("Hi", {"form": "prompt", "template": None}) == "Hi"
    assert _in_template("Hi", {}) == "Hi"


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The stories model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(stories, folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return str(folder)


def test_a_chat_model_is_asked_in_its_template_unless_raw(chat_model: str, stories: Path) -> None:
    asked = {"prompt": "Hi", "max_new_tokens": 3}
    (chat,) = generate(Generate(model=chat_model, **asked)).completions
    assert chat.prompt == "<user>Hi</s>\n<assistant>" and chat.chat
    assert str(generate(Generate(model=chat_model, **asked))) == chat.completion
    (system,) = generate(Generate(model=chat_model, system="Be kind.", **asked)).completions
    assert system.prompt == "<system>Be kind.</s>\n<user>Hi</s>\n<assistant>"
    (raw,) = generate(Generate(model=chat_model, raw=True, **asked)).completions
    (plain,) = generate(Generate(model=str(stories), **asked)).completions
    assert raw == plain and not raw.chat and raw.prompt == "Hi"
    with pytest.raises(InputError, match="--system goes with a chat template"):
        generate(Generate(model=str(stories), system="Be kind.", **asked))


def test_tokens_are_counted_and_an_empty_answer_is_said(
    chat_model: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtools.data import generation

    with caplog.at_level(logging.INFO, "llmtools"):
        (one,) = generate(Generate(model=chat_model, prompt="Once upon a time", max_new_tokens=5)).completions
    assert 1 <= one.tokens <= 5 and f"{one.tokens} token" in caplog.text
    monkeypatch.setattr(generation, "_ends_of_text", lambda *_: list(range(512)))  # whatever comes first ends the text
    with caplog.at_level(logging.WARNING, "llmtools"):
        (none,) = generate(Generate(model=chat_model, prompt="Hi", raw=True, max_new_tokens=5)).completions
    assert none.tokens == 1


def test_the_system_prompt_of_training_is_used_and_another_one_is_said(
    chat_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("trl")
    from llmtools.recipes.finetune import Finetune, finetune

    chat = [
        {"role": role, "content": text} for role, text in (("system", "Be kind."), ("user", "a"), ("assistant", "b"))
    ]
    (tmp_path / "c.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 2)
    adapter = str(tmp_path / "a")
    finetune(Finetune(model=chat_model, data=str(tmp_path / "c.jsonl"), out=adapter, training={"max_steps": 1}))
    (one,) = generate(Generate(adapter=adapter, prompt="Hi", max_new_tokens=1)).completions
    assert one.prompt.startswith("<system>Be kind.</s>")
    with caplog.at_level(logging.WARNING, "llmtools"):
        generate(Generate(adapter=adapter, prompt="Hi", system="Be rude.", max_new_tokens=1))
    assert "trained with another system prompt: 'Be kind.'" in caplog.text


def test_a_system_prompt_or_a_chat_template_that_training_had_not_is_said(
    chat_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("trl")
    from llmtools.recipes.finetune import Finetune, finetune

    chat = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"))]
    (tmp_path / "c.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 2)
    adapter = str(tmp_path / "a")
    finetune(Finetune(model=chat_model, data=str(tmp_path / "c.jsonl"), out=adapter, training={"max_steps": 1}))
    with caplog.at_level(logging.WARNING, "llmtools"):
        generate(Generate(adapter=adapter, prompt="Hi", max_new_tokens=1))
        assert "trained" not in caplog.text
        generate(Generate(adapter=adapter, prompt="Hi", system="Be kind.", max_new_tokens=1))
        assert "trained without a system prompt" in caplog.text
        assert "another chat template" not in caplog.text
        other = Path(shutil.copytree(chat_model, tmp_path / "other"))
        template = other / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
        generate(Generate(model=str(other), adapter=adapter, prompt="Hi", max_new_tokens=1))
        assert "another chat template" in caplog.text
