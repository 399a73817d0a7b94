"""The user's own data: plain text, prompts with completions, or chats.

A ``.txt`` file is plain text. The rows of a table (``.jsonl``, ``.json``, ``.csv``, ``.parquet``) have one record
format throughout:

    {"text": "…"}                                                         loss on every token
    {"prompt": "…", "completion": "…"}                                    loss on the completion
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}     a chat

A chat may also be in ShareGPT's format, ``{"conversations": [{"from": "human", "value": "…"}, …]}``, or a ``prompt``
and a ``completion`` that are lists of messages. It may have content in OpenAI's parts, ``"weight": 0`` on answers to
exclude from the loss, tool calls, and the tools' definitions in ``tools`` beside the messages.

Rows with other fields become prompts and completions by a template: ``--options.prompt "Q: {question}\\nA:"
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

RECORD_FORMATS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
}
"""Record format → its fields."""

OPTIONAL_FIELDS: dict[str, tuple[str, ...]] = {"messages": ("tools",)}
"""Record format → optional fields, which are kept."""


@tasks.register("text")
@dataclass(frozen=True)
class TextTask(Task):
    """Your own .txt or .jsonl file: text, prompt and completion, or chat messages."""

    data: str
    """Training file."""
    validation_data: float | str = 0.0
    """Validation file, or the fraction of `data` to hold out (0.1 is a tenth)."""
    prompt: str | None = None
    """Prompt template over a row's fields, such as "Q: {question}\\nA:"."""
    completion: str | None = None
    """Completion template, such as " {answer}"."""
    seed: int = 0
    """Random seed of the choice of the held-out rows."""
    max_new_tokens: int = 64
    """Maximum number of tokens of an answer."""

    reads_file: ClassVar[bool] = True
    validates_on_data: ClassVar[bool] = True

    def train(self) -> list[Row]:
        if (parts := self._split_text()) is not None:
            return [parts[0]]
        rows = self._rows(self.data)
        held_out = self._held_out(len(rows))
        return [row for index, row in enumerate(rows) if index not in held_out]

    def validation(self) -> list[Row]:
        if isinstance(self.validation_data, str):
            return self._rows(self.validation_data)
        if (parts := self._split_text()) is not None:
            return [parts[1]]
        rows = self._rows(self.data)
        return [rows[index] for index in sorted(self._held_out(len(rows)))]

    def _rows(self, path: str) -> list[Row]:
        if (self.prompt is None) != (self.completion is None):
            raise InputError("a template has two parts: give both prompt and completion, or neither")
        if self.prompt is not None and self.completion is not None:
            template = Template(self.prompt, self.completion)
            file = existing_file(path)
            if kind(file) == "txt":
                raise InputError(f"{file}: a template needs rows with fields, such as .jsonl; a text file has none")
            return [template.fill(row, f"{file}:{number}") for number, row in enumerate_rows(file)]
        return rows_of_one_format(path)

    def _split_text(self) -> tuple[Row, Row] | None:
        """(training, validation) of one long text, split at the end of a line; None for anything else."""
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
    """Maximum number of tokens of an answer."""

    def _rows(self, path: str) -> list[Row]:
        rows = super()._rows(path)
        if "messages" not in rows[0]:
            raise InputError(f'{path}: rows of "messages" are expected for chats; --task text takes other formats')
        return rows

    def score(self, outputs: list[str], rows: list[Row]) -> dict[str, float]:
        return rouge(outputs, [answer(row) for row in rows])


def rows_of_one_format(path: str | Path) -> list[Row]:
    """The rows of a file with the fields of their record format alone, which is that of the first row.

    Raises InputError, with file and line, for a row of no record format or of another one.
    """
    file = existing_file(path)
    if kind(file) == "txt":
        return read_rows(file)
    rows: list[Row] = []
    record_format = ""
    for number, row in enumerate_rows(file):
        where = f"{file}:{number}"
        row = as_messages(row, where)
        found = record_format_of(row, where)
        if record_format and found != record_format:
            raise InputError(
                f"{where}: a row of the format {found!r} among rows of the format {record_format!r}; use one format"
            )
        record_format = found
        _check(row, found, where)
        rows.append({key: row[key] for key in (*RECORD_FORMATS[found], *OPTIONAL_FIELDS.get(found, ())) if key in row})
    if not rows:
        raise InputError(f"{file} is empty; one JSON object per line is expected")
    return rows


_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
"""Role in ShareGPT's and similar files → role in chat templates."""


def as_messages(row: Row, where: str = "row") -> Row:
    """A row with its chat, if it has one in another format, as messages; other rows as they are."""
    if "messages" not in row and isinstance(row.get("conversations"), list):
        row = {**row, "messages": [_from_sharegpt(turn, where) for turn in row["conversations"]]}
    elif isinstance(row.get("prompt"), list):
        completion = row.get("completion")
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if not isinstance(answer, list):
            raise InputError(f'{where}: a "prompt" of messages needs a "completion", a string or messages')
        before = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in row["prompt"]]
        row = {"messages": [*before, *answer], **{key: row[key] for key in OPTIONAL_FIELDS["messages"] if key in row}}
    if not isinstance(row.get("messages"), list):
        return row
    return {**row, "messages": [_with_text(message, where) for message in row["messages"]]}


def _from_sharegpt(turn: object, where: str) -> object:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = _ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise InputError(f"{where}: unknown speaker {turn['from']!r}; {did_you_mean(str(turn['from']), _ROLES)}")
    return {"role": role, "content": turn.get("value")}


def _with_text(message: object, where: str) -> object:
    """A message with the content of OpenAI's parts joined. Raises InputError for a part that is not text."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = message["content"]
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where}: only parts of text are read, not {str(part)[:60]!r}")
    return {**message, "content": "".join(part["text"] for part in parts)}


def record_format_of(row: Row, where: str = "row") -> str:
    """``"text"``, ``"prompt"`` or ``"messages"``, by the row's fields. Raises InputError for other rows."""
    for record_format in ("messages", "prompt", "text"):
        if all(key in row for key in RECORD_FORMATS[record_format]):
            return record_format
    known = ["text", "prompt", "completion", "messages", "conversations"]
    misspelt = next((key for key in row if difflib.get_close_matches(key, known, n=1, cutoff=0.75)), None)
    if misspelt is not None and misspelt not in known:
        hint = f"{misspelt!r}: {did_you_mean(misspelt, known)}"
    elif {"instruction", "output"} <= set(row):
        hint = "Alpaca's fields are read by --task alpaca"
    elif len(row) >= 2:
        first, second = list(row)[:2]
        hint = f'give a prompt template: --options.prompt "{{{first}}}" --options.completion " {{{second}}}"'
    else:
        hint = did_you_mean(next(iter(row), ""), known)
    raise InputError(
        f'{where}: a row needs "text", or "prompt" and "completion", or "messages"; this one has '
        f"{', '.join(map(repr, row)) or 'nothing'}; {hint}"
    )


def _check(row: Row, record_format: str, where: str) -> None:
    if record_format == "messages":
        _check_messages(row["messages"], where)
        return
    for key in RECORD_FORMATS[record_format]:
        if not isinstance(row[key], str):
            raise InputError(f"{where}: {key!r} should be a string, not {type(row[key]).__name__}")
    last = RECORD_FORMATS[record_format][-1]
    if not row[last].strip():
        raise InputError(f"{where}: {last!r} is empty, there is nothing to train on")


def _check_messages(messages: object, where: str) -> None:
    well_formed = isinstance(messages, list) and messages and all(_is_message(message) for message in messages)
    if not well_formed:
        raise InputError(
            f'{where}: "messages" should be a list of {{"role": …, "content": …}} with strings, and not be empty'
        )
    assert isinstance(messages, list)
    if not any(is_learned(message) for message in messages[1:]):
        raise InputError(
            f"{where}: no message of the role 'assistant' after another one, there is no answer to train on"
        )


def is_learned(message: Row) -> bool:
    """Whether a message is an answer that its weight does not exclude from the loss (OpenAI's format)."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _is_message(message: object) -> bool:
    """A role and a text; an answer that only calls tools may have none."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str) or (
        message.get("content") is None and bool(message.get("tool_calls"))
    )
