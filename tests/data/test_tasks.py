"""Tasks: rows of one record format, a template, a score; a third-party task in a few lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from llmtools.data.tasks import Task, Template, make_task, tasks
from llmtools.data.tasks.text import TextTask
from llmtools.data.text_io import Row
from llmtools.errors import InputError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_keep_the_fields_of_their_record_format(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {"prompt": "1+1=", "completion": " 2", "id": 7})
    assert TextTask(data).train() == [{"prompt": "1+1=", "completion": " 2"}]
    assert TextTask(write(tmp_path / "b.jsonl", {"messages": CHAT})).train() == [{"messages": CHAT}]
    (tmp_path / "c.txt").write_text("Once.", encoding="utf-8")
    assert TextTask(str(tmp_path / "c.txt")).train() == [{"text": "Once."}]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], r"a\.jsonl:2: .*'prompt' among .*'text'"),
        ([{"promt": "a", "completion": "b"}], r"a\.jsonl:1: .*did you mean 'prompt'"),
        ([{"prompt": "a", "completion": 3}], "'completion' should be a string"),
        ([{"prompt": "a", "completion": " "}], "nothing to train on"),
        ([{"messages": "hi"}], "list of"),
        ([{"messages": CHAT[:1]}], "no answer to train on"),
    ],
    ids=["two formats", "misspelt", "no string", "empty", "no chat", "no answer"],
)
def test_a_wrong_row_is_said_with_its_line(tmp_path: Path, rows: list[Row], says: str) -> None:
    with pytest.raises(InputError, match=says):
        TextTask(write(tmp_path / "a.jsonl", *rows)).train()


def test_a_share_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", *({"text": str(number)} for number in range(20)))
    task = TextTask(data, validation_data=0.25)
    held_out = [row["text"] for row in task.validation()]
    assert len(held_out) == 5
    assert sorted(held_out + [row["text"] for row in task.train()], key=int) == [str(number) for number in range(20)]
    with pytest.raises(InputError, match="both are needed"):
        TextTask(data, validation_data=0.001).train()


def test_of_one_long_text_the_end_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    task = TextTask(str(tmp_path / "a.txt"), validation_data=0.1)
    train, held_out = task.train()[0]["text"], task.validation()[0]["text"]
    assert train + held_out == text
    assert held_out.startswith("line 9")


def test_a_template_makes_prompts_of_any_fields(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {"q": "1+1", "a": 2})
    assert TextTask(data, prompt="Q: {q}\nA:", completion=" {a}").train() == [
        {"prompt": "Q: 1+1\nA:", "completion": " 2"}
    ]
    with pytest.raises(InputError, match=r"a\.jsonl:1: no field 'question'"):
        TextTask(data, prompt="{question}", completion=" {a}").train()
    with pytest.raises(InputError, match="two parts"):
        TextTask(data, prompt="{q}").train()


def test_unknown_tasks_and_options_are_said() -> None:
    with pytest.raises(InputError, match="did you mean 'perplexity'"):
        make_task("perplexty", data="a.txt")
    with pytest.raises(InputError, match="did you mean 'context'"):
        make_task("perplexity", data="a.txt", contxt=3)
    with pytest.raises(InputError, match="needs 'data'"):
        make_task("perplexity")


@dataclass(frozen=True)
class Sums(Task):
    """Sums of two digits, scored by exact match."""

    count: int = 3
    name: ClassVar[str] = "sums"
    template: ClassVar[Template] = Template("{a}+{b}=", "{c}")

    def validation(self) -> list[Row]:
        return [self.template.fill({"a": a, "b": 1, "c": a + 1}) for a in range(self.count)]


def test_a_third_party_task_is_a_few_lines() -> None:
    task = make_task(f"{__name__}:Sums", count=4)
    rows = task.validation()
    assert rows[0] == {"prompt": "0+1=", "completion": "1"}
    assert task.score([row["completion"] for row in rows], rows) == {"exact_match": 1.0}
    assert task.score(["1"] * 4, rows) == {"exact_match": 0.25}
    with pytest.raises(InputError, match="nothing to train on"):
        task.train()


def test_a_task_is_evaluated_by_generating(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(stories)
    monkeypatch.setattr(Task, "max_new_tokens", 3)
    result = Sums(2).evaluate(model, AutoTokenizer.from_pretrained(stories))
    assert result == {"exact_match": 0.0, "examples": 2}


def test_answers_to_ones_own_questions_may_be_longer(stories: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write(tmp_path / "a.jsonl", {"prompt": "Once", "completion": " upon a time"})
    pair = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    written: list[str] = []
    for tokens in (2, 80):
        task = make_task("text", data=data, validation_data=data, max_new_tokens=tokens)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                TextTask, "score", lambda self, outputs, rows: written.extend(outputs) or {"exact_match": 0.0}
            )
            task.evaluate(*pair)
    short, long = (len(pair[1](text, add_special_tokens=False)["input_ids"]) for text in written)
    assert short <= 4
    assert long > 64


def test_the_tasks_are_known_by_name() -> None:
    assert {"perplexity", "text"} <= set(tasks.names())
