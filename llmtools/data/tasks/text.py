"""The user's own data: a text to go on like, questions with answers, or chats.

A ``.txt`` file is learned as it stands. The rows of a table (``.jsonl``, ``.json``, ``.csv``, ``.parquet``) have one
form throughout:

    {"text": "…"}                                                         every token is learned
    {"prompt": "…", "completion": "…"}                                    the completion is learned
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}     a chat

A chat may also be ShareGPT's ``{"conversations": [{"from": "human", "value": "…"}, …]}``, a ``prompt`` and a
``completion`` that are lists of messages, have text in OpenAI's parts, ``"weight": 0`` on answers that are not to be
learned, calls of tools, and their definitions in ``tools`` beside the messages.

Rows with other fields become questions and answers by a template: ``--options.prompt "Q: {question}\\nA:"
--options.completion " {answer}"``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...errors import InputError, did_you_mean
from ..metrics import rouge
from ..text_io import Row, enumerate_rows, existing_file, kind, read_rows
from .base import Task, Template, answer, held_out, tasks

FORMS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
}


BESIDE: dict[str, tuple[str, ...]] = {"messages": ("tools",)}
"""What may stand beside the fields of a form, and is written with it."""


@tasks.register("text")
@dataclass(frozen=True)
class TextTask(Task):
    """Your own .txt or .jsonl file: text, prompt and completion, or chat messages."""

    data: str
    """the file to train on"""
    validation_data: float | str = 0.0
    """a file to validate on, or the share of `data` that is held out for it (0.1 is a tenth)"""
    prompt: str | None = None
    """template of the prompt from a row's fields, such as "Q: {question}\\nA:" """
    completion: str | None = None
    """template of the completion, such as " {answer}" """
    seed: int = 0
    """of the choice of the rows that are held out"""
    max_new_tokens: int = 64
    """tokens of an answer in evaluate"""

    reads_file: ClassVar[bool] = True
    validates_on_data: ClassVar[bool] = True

    def train(self) -> list[Row]:
        if (halves := self._halves()) is not None:
            return [halves[0]]
        rows = self._rows(self.data)
        held_out = self._held_out(len(rows))
        return [row for index, row in enumerate(rows) if index not in held_out]

    def validation(self) -> list[Row]:
        if isinstance(self.validation_data, str):
            return self._rows(self.validation_data)
        if (halves := self._halves()) is not None:
            return [halves[1]]
        rows = self._rows(self.data)
        return [rows[index] for index in sorted(self._held_out(len(rows)))]

    def _rows(self, path: str) -> list[Row]:
        if (self.prompt is None) != (self.completion is None):
            raise InputError("a template has two halves: give both prompt and completion, or neither")
        if self.prompt is not None and self.completion is not None:
            template = Template(self.prompt, self.completion)
            file = existing_file(path)
            if kind(file) == "txt":
                raise InputError(f"{file}: a template fills in the fields of .jsonl rows; a text file has none")
            return [template.fill(row, f"{file}:{number}") for number, row in enumerate_rows(file)]
        return rows_of_one_form(path)

    def _halves(self) -> tuple[Row, Row] | None:
        """One long text, cut at the end of a line: its end is held out. None for anything else."""
        share = self.validation_data
        if isinstance(share, str) or not 0 < share < 1 or kind(existing_file(self.data)) != "txt":
            return None
        rows = self._rows(self.data)
        if len(rows) > 1:
            return None
        text = str(rows[0]["text"])
        cut = text.find("\n", int(len(text) * (1 - share))) + 1
        return ({"text": text[:cut]}, {"text": text[cut:]}) if text[:cut].strip() and text[cut:].strip() else None

    def _held_out(self, count: int) -> set[int]:
        if isinstance(self.validation_data, str):
            return set()
        return held_out(count, self.validation_data, self.seed)


@tasks.register("chat")
@dataclass(frozen=True)
class ChatTask(TextTask):
    """Chats (messages) in the tokenizer's own template; the last answer is scored by ROUGE."""

    max_new_tokens: int = 256
    """tokens of an answer in evaluate"""

    def _rows(self, path: str) -> list[Row]:
        rows = super()._rows(path)
        if "messages" not in rows[0]:
            raise InputError(f'{path}: rows of "messages" are expected for chats; --task text takes other forms')
        return rows

    def score(self, outputs: list[str], rows: list[Row]) -> dict[str, float]:
        return rouge(outputs, [answer(row) for row in rows])


def rows_of_one_form(path: str | Path) -> list[Row]:
    """The rows of a file with nothing but the fields of their form, which is that of the first row.

    Raises InputError, with file and line, for a row of no form or of another.
    """
    file = existing_file(path)
    if kind(file) == "txt":
        return read_rows(file)
    rows: list[Row] = []
    form = ""
    for number, row in enumerate_rows(file):
        where = f"{file}:{number}"
        row = as_messages(row, where)
        found = form_of(row, where)
        if form and found != form:
            raise InputError(f"{where}: a row of the form {found!r} among rows of the form {form!r}; keep to one")
        form = found
        _check(row, form, where)
        rows.append({key: row[key] for key in (*FORMS[form], *BESIDE.get(form, ())) if key in row})
    if not rows:
        raise InputError(f"{file} is empty; one JSON object a line is expected")
    return rows


_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
"""What ShareGPT's files and their kin call a role → what chat templates call it."""


def as_messages(row: Row, where: str = "row") -> Row:
    """A row with its chat as plain messages, if it is one in another spelling; other rows as they are."""
    if "messages" not in row and isinstance(row.get("conversations"), list):
        row = {**row, "messages": [_from_sharegpt(turn, where) for turn in row["conversations"]]}
    elif isinstance(row.get("prompt"), list):
        completion = row.get("completion")
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if not isinstance(answer, list):
            raise InputError(f'{where}: a "prompt" of messages needs a "completion", a string or messages')
        before = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in row["prompt"]]
        row = {"messages": [*before, *answer], **{key: row[key] for key in BESIDE["messages"] if key in row}}
    if not isinstance(row.get("messages"), list):
        return row
    return {**row, "messages": [_with_text(message, where) for message in row["messages"]]}


def _from_sharegpt(turn: object, where: str) -> object:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = _ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise InputError(f"{where}: nobody knows a speaker {turn['from']!r}; {did_you_mean(str(turn['from']), _ROLES)}")
    return {"role": role, "content": turn.get("value")}


def _with_text(message: object, where: str) -> object:
    """A message whose content, in OpenAI's parts, is joined; what is no text is refused."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = message["content"]
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where}: only parts of text are read, not {str(part)[:60]!r}")
    return {**message, "content": "".join(part["text"] for part in parts)}


def form_of(row: Row, where: str = "row") -> str:
    """``"text"``, ``"prompt"`` or ``"messages"``, by the fields that are there."""
    for form in ("messages", "prompt", "text"):
        if all(key in row for key in FORMS[form]):
            return form
    known = ["text", "prompt", "completion", "messages", "conversations"]
    misspelt = next((key for key in row if difflib.get_close_matches(key, known, n=1, cutoff=0.75)), None)
    if misspelt is not None and misspelt not in known:
        hint = f"{misspelt!r}: {did_you_mean(misspelt, known)}"
    elif {"instruction", "output"} <= set(row):
        hint = "Alpaca's fields are read by --task alpaca"
    elif len(row) >= 2:
        first, second = list(row)[:2]
        hint = f'say which are asked and learned: --options.prompt "{{{first}}}" --options.completion " {{{second}}}"'
    else:
        hint = did_you_mean(next(iter(row), ""), known)
    raise InputError(
        f'{where}: a row needs "text", or "prompt" and "completion", or "messages"; this one has '
        f"{', '.join(map(repr, row)) or 'nothing'}; {hint}"
    )


def _check(row: Row, form: str, where: str) -> None:
    if form == "messages":
        _check_messages(row["messages"], where)
        return
    for key in FORMS[form]:
        if not isinstance(row[key], str):
            raise InputError(f"{where}: {key!r} should be a string, not {type(row[key]).__name__}")
    if not row[FORMS[form][-1]].strip():
        raise InputError(f"{where}: {FORMS[form][-1]!r} is empty, there is nothing to learn")


def _check_messages(messages: object, where: str) -> None:
    well_formed = isinstance(messages, list) and messages and all(_is_message(message) for message in messages)
    if not well_formed:
        raise InputError(
            f'{where}: "messages" should be a list of {{"role": …, "content": …}} with strings, and not be empty'
        )
    assert isinstance(messages, list)
    if not any(is_learned(message) for message in messages[1:]):
        raise InputError(f"{where}: no message of the role 'assistant' after another one, there is no answer to learn")


def is_learned(message: Row) -> bool:
    """Whether a message is an answer, and not one that its weight takes out of the loss (OpenAI's format)."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _is_message(message: object) -> bool:
    """A role and a text; an answer that only calls tools may have none."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str) or (
        message.get("content") is None and bool(message.get("tool_calls"))
    )
