"""Content hashes of files, to detect whether an input is still the same, independent of paths and dates.

A data file is hashed as a whole. Files of weights are large: above `WHOLE` bytes the hash is over the header, which
names every tensor with its dtype and shape, and over samples of every tensor. A model that was trained further,
quantized in another way, or replaced differs in each of its tensors; a change of a few values in one large tensor may
be missed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .files import safetensors_header, sha256

WHOLE = 1 << 28
"""Size, in bytes, up to which a file of weights is hashed as a whole."""
PIECE, PIECES = 4096, 16
"""Size of a sample, in bytes, and number of samples per tensor."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_TOKENIZER = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "spiece",
    "sentencepiece",
)
_CONFIG = ("config.json", "generation_config.json", "quantize_config.json", "adapter_config.json")


class FileState(NamedTuple):
    """What of a file changes when it is written again or replaced."""

    inode: int
    size: int
    modified: int
    """Time of the last change, in nanoseconds."""


def file_state(file: str | os.PathLike[str]) -> FileState | None:
    """The state of a file; None where there is none."""
    with suppress(OSError):
        found = os.stat(file)
        return FileState(found.st_ino, found.st_size, found.st_mtime_ns)
    return None


def content(path: str | os.PathLike[str]) -> str | None:
    """The hash of a file, or of a folder's files with their names; None where neither exists."""
    path = Path(os.path.expanduser(path))
    if os.path.isfile(path):
        return _file(path)
    if os.path.isdir(path):
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        return _joined((file.relative_to(path).as_posix(), _file(file)) for file in files)
    return None


def model_content(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The hashes of a model's configuration, weights and tokenizer, by these names; {} where `folder` is none.

    Model cards, metadata and other files are ignored.
    """
    folder = Path(os.path.expanduser(folder))
    parts: dict[str, list[Path]] = {"model's configuration": [], "model's weights": [], "tokenizer": []}
    for file in sorted(folder.iterdir()) if os.path.isdir(folder) else ():
        if file.is_file() and (part := _part(file.name)) is not None:
            parts[part].append(file)
    return {part: _joined((file.name, _file(file)) for file in files) for part, files in parts.items() if files}


def tensors_content(folder: str | os.PathLike[str]) -> str | None:
    """The hash of a model's tensors, however many files they are in; None where no .safetensors file can be read."""
    found: dict[str, str] = {}
    files = sorted(Path(os.path.expanduser(folder)).glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith((".", "adapter_", "lora_"))]
    whole = sum(file.stat().st_size for file in files) <= WHOLE
    for path in files:
        with path.open("rb") as file:
            try:
                begin, header = _header(file)
                spans = {name: (entry, *entry.pop("data_offsets")) for name, entry in header.items()}
            except _NO_HEADER:
                return None
            for name, (entry, first, last) in spans.items():
                piece = hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
                for at in [begin + first] if whole else _pieces(begin + first, begin + last):
                    file.seek(at)
                    piece.update(file.read(last - first if whole else min(PIECE, begin + last - at)))
                found[name] = piece.hexdigest()
    return _joined(sorted(found.items())) if found else None


def rows_content(rows: Iterable[Any]) -> str:
    """The hash of rows of data, one after the other, whatever file they came from."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return f"sha256:{found.hexdigest()}"


def _part(name: str) -> str | None:
    """The part of a model that a file belongs to."""
    if name.startswith(_TOKENIZER) or name.endswith((".model", ".tiktoken")):
        return "tokenizer"
    if name in _CONFIG or name.endswith(".py"):
        return "model's configuration"
    return "model's weights" if name.endswith(_WEIGHTS) else None


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _joined(named: Iterable[tuple[str, str]]) -> str:
    found = hashlib.sha256()
    for name, each in named:
        found.update(f"{name}\0{each}\n".encode())
    return f"sha256:{found.hexdigest()}"


def _file(path: Path) -> str:
    size = path.stat().st_size
    if size <= WHOLE or not path.name.endswith(_WEIGHTS):
        return f"sha256:{sha256(path)}"
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for begin, end in _spans(file, size):
            for at in _pieces(begin, end):
                file.seek(at)
                found.update(file.read(min(PIECE, end - at)))
    return f"sampled:{found.hexdigest()}"


def _spans(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of parts of a file: the header and each tensor of a .safetensors, else the whole in 4096 parts."""
    try:
        behind, header = _header(file)
        offsets = sorted(entry["data_offsets"] for entry in header.values())
    except _NO_HEADER:
        step = max(size // 4096, PIECE)
        yield from ((at, min(at + step, size)) for at in range(0, size, step))
        return
    yield from ((at, min(at + PIECE, behind)) for at in range(0, behind, PIECE))
    yield from ((behind + begin, behind + end) for begin, end in offsets)


_NO_HEADER = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""Exceptions from parsing another file as a .safetensors header."""


def _header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """(the offset behind the header of a .safetensors file, tensor → its entry in the header)."""
    text = safetensors_header(file)
    return 8 + len(text), {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}


def _pieces(begin: int, end: int) -> Iterator[int]:
    """Offsets of the samples between two offsets: the first, the last, and evenly spaced ones between them."""
    last = max(begin, end - PIECE)
    yield from dict.fromkeys(begin + (last - begin) * index // (PIECES - 1) for index in range(PIECES))
