"""Validation of the header of a GGUF file, before any other reader opens the file.

A file is: magic, version, counts; key-value pairs; a table of tensors; data, aligned. Counts and lengths are 64 bits
that a damaged or malicious file may set to any value, and readers that trust them exhaust the memory. So they are all
compared with the rest of the file, and with the limits below, which are far above those of any real model.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.ggml import NUMBERS, TYPES

MAX_TENSORS, MAX_KEYS = 2**16, 2**16
MAX_NAME, MAX_STRING = 2**10, 2**24
"""Largest sizes of a key or a tensor's name, and of any other string, in bytes; a chat template has some thousand."""
MAX_ARRAY = 2**21
"""Largest number of elements of an array, and of all string arrays together; the largest vocabularies have some
300,000 tokens."""
MAX_HEADER = 2**28
"""Largest size of everything before the tensors, in bytes."""
MAX_ALIGNMENT = 2**16
_LONG = 2**13
"""Size, in bytes, above which an array concerns only the vocabulary."""

FLOATS = {
    0: ("F32", torch.float32),
    1: ("F16", torch.float16),
    30: ("BF16", torch.bfloat16),
    28: ("F64", torch.float64),
}
"""Name and torch dtype of each unquantized type, by number in files."""
_DTYPES = dict(FLOATS.values())
_KNOWN = {number: name for number, (name, _) in FLOATS.items()} | NUMBERS

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


class StoredTensor(NamedTuple):
    """Location of a tensor in the file."""

    name: str
    shape: tuple[int, ...]
    """Shape in torch's order: the last dimension is contiguous."""
    kind: str
    """Type: F32, F16, BF16, F64, or a name of `kernels.ggml.TYPES`."""
    start: int
    """Offset from the beginning of the file, in bytes."""
    size: int
    """Size, in bytes."""


class GGUFFile(NamedTuple):
    """A GGUF file with a valid header: all tensors are within the file and do not overlap."""

    path: Path
    metadata: dict[str, Any]
    """Values by key; of string arrays only their length."""
    tensors: dict[str, StoredTensor]
    spans: dict[str, tuple[int, int]]
    """Offsets of the beginning and end of each key-value pair, by key."""

    @property
    def architecture(self) -> str:
        """``general.architecture``, such as "llama"."""
        return str(self.metadata["general.architecture"])

    def outline(self) -> bytes:
        """The bytes of a GGUF file with the same tensor names and metadata, without tensor values and long arrays.

        Readers that create an object per element of an array (such as the package gguf) take seconds and hundreds of
        megabytes for a vocabulary; this is for reading anything else with them.
        """
        with self.path.open("rb") as file:
            pairs = [self._bytes(file, key) for key, value in self.metadata.items() if not self._is_long(value, key)]
        vocabulary = f"{self.architecture}.vocab_size"
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if vocabulary not in self.metadata and isinstance(tokens, int):
            pairs.append(_text(vocabulary) + struct.pack("<II", 4, tokens))
        table = [
            _text(name) + struct.pack("<IQIQ", 1, 1, 0, 32 * index) for index, name in enumerate(self.tensors)
        ]  # one F32 each
        head = b"GGUF" + struct.pack("<IQQ", 3, len(table), len(pairs)) + b"".join(pairs) + b"".join(table)
        return head + bytes(-len(head) % 32) + bytes(32 * len(table))

    def _bytes(self, file: BinaryIO, key: str) -> bytes:
        start, end = self.spans[key]
        file.seek(start)
        return file.read(end - start)

    def _is_long(self, value: Any, key: str) -> bool:
        start, end = self.spans[key]
        return key == "general.alignment" or (not isinstance(value, str) and end - start > _LONG)

    def read(self, name: str, mapping: mmap.mmap | None = None) -> Tensor:
        """A tensor as it is stored: floats of its shape, or bytes [..., row_bytes] uint8 of a block type.

        mapping: the mapped file, for a view of it; by default the tensor is read into memory.
        """
        tensor = self.tensors[name]
        if mapping is None:
            data = np.fromfile(self.path, dtype=np.uint8, count=tensor.size, offset=tensor.start)
        else:
            data = np.frombuffer(mapping, dtype=np.uint8)[tensor.start : tensor.start + tensor.size]
        if len(data) != tensor.size:
            raise CheckpointError(f"{self.path} was truncated while it was read; copy or download it again")
        stored = torch.from_numpy(data)
        if tensor.kind in TYPES:
            return stored.reshape(*tensor.shape[:-1], -1)
        return stored.view(_DTYPES[tensor.kind]).reshape(tensor.shape)


def read_header(path: str | Path) -> GGUFFile:
    """The header of a GGUF file. Raises CheckpointError for an invalid or unsupported one."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path} is no GGUF file: it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).whole()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error


class _Reader:
    """Reader of a header with bounds checks."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 4
        self.texts = 0

    def whole(self) -> GGUFFile:
        version = self.number("I")
        if version not in (2, 3):
            other = " (of the other byte order)" if version & 0xFFFF == 0 and version else ""
            raise CheckpointError(f"{self.path} is GGUF version {version}{other}; versions 2 and 3 are supported")
        tensors, keys = self.number("Q"), self.number("Q")
        for count, most, what in ((tensors, MAX_TENSORS, "tensors"), (keys, MAX_KEYS, "keys")):
            if count > most:
                self.damaged(f"it claims {count} {what}; at most {most} are supported")
        metadata: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(keys):
            start = self.position
            key = self.text(MAX_NAME, "a key")
            if key in metadata:
                self.damaged(f"the key {key!r} is duplicated")
            metadata[key] = self.value(self.number("I"), key)
            spans[key] = start, self.position
        if not isinstance(metadata.get("general.architecture"), str):
            self.damaged("it has no general.architecture")
        table = [self.entry() for _ in range(tensors)]
        return GGUFFile(self.path, metadata, self.placed(table, metadata.get("general.alignment", 32)), spans)

    def damaged(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path} is damaged: {reason}; copy or download it again")

    def take(self, size: int, what: str) -> int:
        """Advances by `size` bytes; returns the former position."""
        start = self.position
        if size > len(self.data) - start:
            self.damaged(f"it ends within {what}" if size < 2**32 else f"{what} of {size} bytes is beyond its end")
        if start + size > MAX_HEADER:
            self.damaged(f"its header has more than {MAX_HEADER} bytes")
        self.position += size
        return start

    def number(self, kind: str) -> Any:
        start = self.take(struct.calcsize(f"<{kind}"), "its header")
        return struct.unpack_from(f"<{kind}", self.data, start)[0]

    def text(self, most: int, what: str) -> str:
        size = self.number("Q")
        if size > most:
            self.damaged(f"{what} has {size} bytes; at most {most} are supported")
        start = self.take(size, what)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            self.damaged(f"{what} is not UTF-8")

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text(MAX_STRING, f"the value of {key}")
        if kind != _ARRAY:
            self.damaged(f"the value of {key} is of type {kind}, which does not exist")
        inner, count = self.number("I"), self.number("Q")
        if count > MAX_ARRAY:
            self.damaged(f"{key} has {count} elements; at most {MAX_ARRAY} are supported")
        if inner in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[inner]}")
            start = self.take(count * size, f"the values of {key}")
            return list(struct.unpack_from(f"<{count}{_SCALARS[inner]}", self.data, start))
        if inner != _TEXT:
            self.damaged(f"{key} is an array of type {inner}, which is not supported")
        self.texts += count
        if self.texts > MAX_ARRAY:
            self.damaged(f"its arrays have more than {MAX_ARRAY} strings")
        for _ in range(count):
            self.take(self.number("Q"), f"a string of {key}")
        return count

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape in torch's order, number of the type, offset in the data) of the next tensor of the table."""
        name = self.text(MAX_NAME, "a tensor's name")
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            self.damaged(f"{name} has {dimensions} dimensions, 1 to 4 are expected")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self.number("I"), self.number("Q")

    def placed(self, table: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> dict[str, StoredTensor]:
        """The tensors by name. Raises CheckpointError unless all are in the file, aligned, and do not overlap."""
        if isinstance(alignment, bool) or not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT:
            self.damaged(f"general.alignment={alignment!r}; a number of bytes is expected")
        first = -(-self.position // alignment) * alignment
        found: dict[str, StoredTensor] = {}
        for name, shape, number, offset in table:
            if name in found:
                self.damaged(f"the tensor {name} is duplicated")
            if number not in _KNOWN:
                raise CheckpointError(
                    f"{self.path}: {name} is of ggml's type {number}, which is not supported "
                    f"({', '.join(_KNOWN.values())} are); convert the file with llama.cpp's llama-quantize"
                )
            size = self.size_of(name, shape, _KNOWN[number])
            if offset % alignment or first + offset + size > len(self.data):
                self.damaged(
                    f"{name} has {size} bytes at offset {offset}, but the data has {max(len(self.data) - first, 0)}"
                )
            found[name] = StoredTensor(name, shape, _KNOWN[number], first + offset, size)
        end = 0
        for tensor in sorted(found.values(), key=lambda each: each.start):
            if tensor.start < end:
                self.damaged(f"{tensor.name} overlaps another tensor")
            end = tensor.start + tensor.size
        return found

    def size_of(self, name: str, shape: tuple[int, ...], kind: str) -> int:
        """Size of a tensor, in bytes."""
        if kind not in TYPES:
            return math.prod(shape) * _DTYPES[kind].itemsize
        block = TYPES[kind]
        if shape[-1] % block.weights:
            self.damaged(
                f"{name} has rows of {shape[-1]} weights, not a multiple of the {block.weights} of {kind}'s blocks"
            )
        return math.prod(shape) // block.weights * block.bytes


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
