"""Tasks over the records of a published data set: its splits, and how a record becomes a prompt with an answer.

A new one declares where the data set is, a prompt template, and a score:

    @tasks.register("samsum")
    @dataclass(frozen=True)
    class Samsum(DataTask):
        \"""Summaries of chats, scored by ROUGE.\"""

        source_tokens: int | None = 255
        hub: ClassVar[str] = "knkarthick/samsum"
        template: ClassVar[Template] = Template("### Summarize this: {dialogue}\\n ### Output:", " {summary}")
        shorten: ClassVar[tuple[str, ...]] = ("dialogue",)

        def score(self, outputs, rows):
            return rouge(outputs, [row["summary"] for row in rows])

In a prompt that is too long, the end of the fields in `shorten` is truncated. The separator before the answer and the
whole answer stay (the published scripts truncate the end of the prompt, separator included).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ...errors import InputError
from ..text_io import Row, read_rows
from .base import NullField, Task, Template, held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Where a split is, in a folder and on the hub."""

    files: str
    """Pattern of its files' names in a folder."""
    hub: str
    """Name on the hub."""


@dataclass(frozen=True)
class DataTask(Task):
    """A task over records. A single file is its training and its test split; folders and the hub have each."""

    data: str
    """Data set: a .json or .jsonl file (.gz, .xz too), a folder with a file for each split, or a name on the hub (the
    task's own name for the published one)."""
    validation_data: float | str = 0.0
    """Validation data: a file, or the fraction of the training records to hold out; 0 for the data set's own split."""
    seed: int = 0
    """Random seed of the choice of the held-out records."""
    source_tokens: int | None = None
    """Maximum number of tokens of a prompt; in longer ones the end of the long field is truncated."""
    max_new_tokens: int = 64
    """Maximum number of tokens of an answer; with source_tokens, it limits the length of a training example."""

    hub: ClassVar[str]
    """Name of the published data set on the hub."""
    template: ClassVar[Template]
    """Prompt template of a record."""
    splits: ClassVar[dict[str, Split]] = {
        "train": Split("train*", "train"),
        "validation": Split("val*", "validation"),
        "test": Split("test*", "test"),
    }
    """Splits of the data set, by our names."""
    shorten: ClassVar[tuple[str, ...]] = ()
    """Fields whose end is truncated in a long prompt, in this order."""

    def train(self) -> list[Row]:
        rows = self.rows("train")
        held = held_out(len(rows), self._share(), self.seed)
        return [row for index, row in enumerate(rows) if index not in held]

    def validation(self) -> list[Row]:
        if isinstance(self.validation_data, str):
            return self._filled(read_rows(self.validation_data), self.validation_data)
        if self.validation_data:
            rows = self.rows("train")
            return [rows[index] for index in sorted(held_out(len(rows), self._share(), self.seed))]
        return self.rows("validation")

    def test(self) -> list[Row]:
        if "test" not in self.splits and not self._is_file():
            raise InputError(
                f"task {self.name!r} has no test split: name a file of records to evaluate on, with --data"
            )
        return self.rows("test")

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, each with the record's own fields beside prompt and completion."""
        return self._filled(self.records(split), self.data)

    def records(self, split: str) -> list[Row]:
        """The records of a split as the data set has them; none if it has no such split."""
        if self._is_file():
            return read_rows(self.data) if split != "validation" else []
        if split not in self.splits:
            return []
        if Path(self.data).expanduser().is_dir():
            return [record for file in self._files(split) for record in read_rows(file)]
        return hub_rows(self.hub if self.data == self.name else self.data, self.splits[split].hub)

    def row(self, record: Row, where: str = "row") -> Row:
        """A record with its prompt and completion."""
        return {**record, **self.template.fill(record, where)}

    def fitted(self, row: Row, tokenizer: PreTrainedTokenizerBase, room: int | None = None) -> Row:
        limits = [limit for limit in (self.source_tokens, room and room - 1) if limit is not None]  # 1: a start token
        if not limits or not self.shorten:
            return row

        def excess(row: Row) -> int:
            return len(tokenizer(row["prompt"], add_special_tokens=False, verbose=False)["input_ids"]) - min(limits)

        for field in self.shorten:
            if (over := excess(row)) <= 0:
                return row
            text = str(row.get(field) or "")
            kept = beginning(text, over, tokenizer)
            while kept and excess(self.row({**row, field: text[:kept]})) > 0:  # tokens differ where text is cut
                kept -= 1
            row = self.row({**row, field: text[:kept]})
        if excess(row) > 0:
            raise InputError(
                f"task {self.name!r}: a prompt has more than {min(limits)} tokens even without its "
                f"{' and '.join(self.shorten)}; raise --options.source_tokens, or take a model with more positions"
            )
        return row

    def max_length(self) -> int | None:  # 2: the start and the end token of a text
        return None if self.source_tokens is None else self.source_tokens + self.max_new_tokens + 2

    def _filled(self, records: list[Row], where: str) -> list[Row]:
        rows, skipped = [], []
        for number, record in enumerate(records, start=1):
            try:
                row = self.row(record, f"{where}, record {number}")
            except NullField:
                skipped.append(number)
                continue
            if str(row.get("completion", "?")).strip():
                rows.append(row)
            else:
                skipped.append(number)
        if skipped:
            more = ", …" if len(skipped) > 3 else ""
            log.warning(
                "%s: %d of %d records have null or an empty answer and are left out: %s%s",
                where,
                len(skipped),
                len(records),
                ", ".join(map(str, skipped[:3])),
                more,
            )
        if records and not rows:
            raise InputError(f"{where}: every record has null or an empty answer; nothing is left")
        return rows

    def _share(self) -> float:
        return 0.0 if isinstance(self.validation_data, str) else self.validation_data

    def _is_file(self) -> bool:
        path = Path(self.data).expanduser()
        return not path.is_dir() and (path.exists() or _looks_like_a_file(path))

    def _files(self, split: str) -> list[Path]:
        folder = Path(self.data).expanduser()
        pattern = self.splits[split].files
        files = sorted(file for file in folder.iterdir() if fnmatch(file.name, pattern) and _looks_like_a_file(file))
        if not files and split != "validation":
            raise InputError(
                f"{folder} holds no {pattern} file (.json or .jsonl, .gz and .xz too) for its {split} split"
            )
        return files


def beginning(text: str, less: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of characters of a text's tokens without the last `less`; an estimate for a tokenizer without offsets."""
    if tokenizer.is_fast:
        ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return int(ends[-less - 1][1]) if less < len(ends) else 0
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return len(text) * max(tokens - less, 0) // max(tokens, 1)


def stripped(record: Row, *names: str) -> Row:
    """The record with these fields, where present, stripped of white space; null becomes the empty string."""
    texts = {name: record[name] for name in names if name in record}
    return {**record, **{name: "" if text is None else str(text).strip() for name, text in texts.items()}}


def hub_rows(name: str, split: str, config: str | None = None) -> list[Row]:
    """The rows of a split of a data set on the hub, class labels as integers."""
    options: dict[str, Any] = {} if config is None else {"name": config}
    with _asking_the_hub(name) as datasets:
        return [dict(row) for row in datasets.load_dataset(name, split=split, **options)]


def hub_configs(name: str) -> list[str]:
    """The names of the configurations of a data set on the hub."""
    with _asking_the_hub(name) as datasets:
        return sorted(datasets.get_dataset_config_names(name))


@contextmanager
def _asking_the_hub(name: str) -> Iterator[Any]:
    """Yields the module `datasets`; whatever it raises becomes an InputError."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{name!r} is read with datasets: pip install 'llmtools[train]', or give a file") from error
    try:
        yield datasets
    except Exception as error:  # the hub's client raises many types, all meaning that nothing was read
        raise InputError(
            f"there is no file or folder {name}, and no such data set could be read from the hub ({error}); "
            f"give a .json or .jsonl file, or a folder of them"
        ) from error


def _looks_like_a_file(path: Path) -> bool:
    known = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
    return any(suffix.lower() in known for suffix in path.suffixes)
