"""Reading of data files: documents for calibration and perplexity, rows for finetuning.

Text and tables are read, plain or compressed (``.gz``, ``.xz``). A ``.txt`` is text; a line ``<|endoftext|>`` separates
documents, and without such lines the file is one document. A ``.jsonl`` holds one JSON object per line, a ``.json`` an
array of objects (or one per line, too), a ``.csv`` or ``.tsv`` one row per line below a header, a ``.parquet`` a table.
Every error names the file and the line number (in an array, the number of the object).
"""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError

Row = dict[str, Any]

SEPARATOR = "<|endoftext|>"
"""A line of its own that ends a document in a ``.txt`` file, as TinyStories and many other dumps write it."""


def read_documents(path: str | Path) -> list[str]:
    """The documents of a ``.txt`` or ``.jsonl`` file, in order; empty ones are left out.

    The document of a JSONL row is its ``text``, or the concatenation of ``prompt`` and ``completion``.

    Raises InputError if the file is missing, of another kind, not UTF-8, or holds no text.
    """
    path = existing_file(path)
    if kind(path) == "txt":
        documents = list(_split(path))
    else:
        documents = [_as_document(path, number, row) for number, row in enumerate_rows(path)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"{path} holds no text")
    return documents


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a table, or one ``{"text": …}`` for each document of a ``.txt`` file.

    Raises InputError if the file is missing, of another kind, damaged, or empty.
    """
    path = existing_file(path)
    if kind(path) == "txt":
        return [{"text": document} for document in read_documents(path)]
    rows = [row for _, row in enumerate_rows(path)]
    if not rows:
        raise InputError(f"{path} is empty; one JSON object per line is expected")
    return rows


def enumerate_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(number from 1, row) of each row of a table: a line of JSONL or CSV, an object of a JSON array, a Parquet row.

    Raises InputError, led by file and number, for a row that cannot be read.
    """
    kind_of_file = kind(path)
    if kind_of_file == "json" and _begins_with_bracket(path):
        rows = _enumerate_array(path)
    elif kind_of_file in ("csv", "tsv"):
        rows = _enumerate_csv(path, "," if kind_of_file == "csv" else "\t")
    elif kind_of_file == "parquet":
        rows = _enumerate_parquet(path)
    else:
        rows = _enumerate_lines(path)
    for number, row in rows:
        _check_encodable(row, f"{path}:{number}")
        yield number, row


def _enumerate_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{number}: this line is not JSON ({error.msg} at column {error.colno}); "
                f"one JSON object per line is expected, it begins with {_shortened(line)}"
            ) from error
        except (RecursionError, ValueError) as error:
            raise InputError(f"{path}:{number}: this line cannot be read ({error})") from error
        if not isinstance(row, dict):
            raise InputError(
                f'{path}:{number}: a JSON object is expected, such as {{"text": "…"}}, not {_shortened(line)}'
            )
        yield number, row


def _enumerate_array(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        rows = json.loads("".join(lines_of(path)))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: this file is not JSON ({error.msg})") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: this file cannot be read ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: an array of JSON objects is expected")
    yield from enumerate(rows, start=1)


def _begins_with_bracket(path: Path) -> bool:
    """Whether a .json file is an array; many hold one object per line."""
    return next((line.lstrip()[:1] == "[" for line in lines_of(path) if line.strip()), True)


def _enumerate_csv(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """The rows under a CSV file's header, every value a string."""
    reader = csv.DictReader(lines_of(path), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}:{reader.line_num}: this row does not have the {len(reader.fieldnames or ())} columns of "
                    f"the header ({', '.join(reader.fieldnames or ())})"
                )
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: this is not CSV ({error})") from error


def _enumerate_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path}: Parquet is read by pyarrow ({error}): pip install 'llmtools[train]'") from error
    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} is not a complete Parquet file: {error}") from error


def _check_encodable(value: Any, where: str) -> None:
    """Raises InputError for an unpaired surrogate, as truncated texts have: no tokenizer accepts it."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: {_shortened(value)} holds half a character ({error.reason}); correct the text"
            ) from error
    elif isinstance(value, dict):
        for inner in value.values():
            _check_encodable(inner, where)
    elif isinstance(value, list):
        for inner in value:
            _check_encodable(inner, where)


def existing_file(path: str | Path) -> Path:
    """`path` as a Path, if there is a file; InputError otherwise."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise InputError(f"{path} is a folder; a file is expected, such as .jsonl or .txt")
    if not path.exists():
        raise InputError(f"there is no file {path} (looked in {Path.cwd()})")
    kind(path)
    return path


def kind(path: Path) -> str:
    """``"txt"``, ``"jsonl"``, ``"json"``, ``"csv"``, ``"tsv"`` or ``"parquet"``, by the name without ``.gz``."""
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in (".gz", ".xz")]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in (".csv", ".tsv", ".parquet"):
        return suffix[1:]
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".json":
        return "json"
    if suffix in (".txt", ".raw", ".tokens", ".text", ".md"):
        return "txt"
    raise InputError(
        f"{path}: the name should end in .txt, .jsonl, .json, .csv, .tsv or .parquet (or .gz, .xz of these), "
        f"not {suffix!r}"
    )


def _split(path: Path) -> Iterator[str]:
    document: list[str] = []
    for line in lines_of(path):
        if line.strip() == SEPARATOR:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def _as_document(path: Path, number: int, row: Row) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return str(row["prompt"] + row["completion"])
    raise InputError(
        f'{path}:{number}: the row has neither "text" nor "prompt" and "completion" as strings '
        f"(its keys: {', '.join(map(str, row)) or 'none'})"
    )


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file, decompressed, each with its newline. Raises InputError for a damaged file."""
    try:
        with _open(path) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path} is not a complete {path.suffix[1:].replace('gz', 'gzip')} file: {error}") from error


def _open(path: Path) -> TextIO:
    """Opens a file, decompressed, without the byte order mark that Windows programs write."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.suffix.lower() == ".xz":
        return lzma.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _shortened(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 40 else line[:40] + "…")
