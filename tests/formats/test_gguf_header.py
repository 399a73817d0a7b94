"""The header of a GGUF file is read with suspicion: what is wrong with it is one line, at once, in little memory."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtools import CheckpointError
from llmtools.formats.gguf_header import read_header

HEAD = b"GGUF" + struct.pack("<I", 3)


def text(value: str | bytes) -> bytes:
    encoded = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = pair("general.architecture", 8, text("llama"))


def tensor(name: str = "w", shape: tuple[int, ...] = (4, 32), kind: int = 8, offset: int = 0, **odd: Any) -> bytes:
    dimensions = odd.get("dimensions", len(shape))
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", dimensions, *reversed(shape), kind, offset)


def file(
    tensors: list[bytes] | None = None,
    pairs: list[bytes] | None = None,
    counts: tuple[int | None, int | None] = (None, None),
    data: int = 160,
) -> bytes:
    tensors, pairs = [tensor()] if tensors is None else tensors, [ARCHITECTURE] if pairs is None else pairs
    counted = [len(each) if count is None else count for each, count in zip((tensors, pairs), counts, strict=True)]
    head = HEAD + struct.pack("<QQ", *counted) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    pairs = [ARCHITECTURE, pair("n", 4, struct.pack("<I", 7)), pair("t", 9, struct.pack("<IQ", 8, 2) + text("a") * 2)]
    pairs.append(pair("f", 9, struct.pack("<IQ2f", 6, 2, 0.5, -1.0)))
    tensors = [tensor("a", (4, 32), 8, 0), tensor("b", (3,), 0, 160)]
    written = bytearray(file(tensors, pairs, data=172))
    written[-12:] = struct.pack("<3f", 1, 2, 3)
    (tmp_path / "m.gguf").write_bytes(written)
    found = read_header(tmp_path / "m.gguf")
    assert found.metadata == {"general.architecture": "llama", "n": 7, "t": 2, "f": [0.5, -1.0]}
    assert found.tensors["a"].shape == (4, 32) and found.read("a").shape == (4, 34)
    assert torch.equal(found.read("b"), torch.tensor([1.0, 2.0, 3.0]))


BILLION = 10**9
DAMAGED = {
    "empty": (b"", "does not begin with GGUF|cannot be read"),
    "magic": (b"GGML" + file()[4:], "does not begin with GGUF"),
    "version": (b"GGUF" + struct.pack("<I", 9) + file()[8:], "GGUF version 9; versions 2 and 3"),
    "byte order": (b"GGUF" + struct.pack(">I", 3) + file()[8:], "the other byte order"),
    "billion tensors": (file(counts=(BILLION, None)), "claims 1000000000 tensors"),
    "most tensors": (file(counts=(2**64 - 1, None)), f"claims {2**64 - 1} tensors"),
    "billion keys": (file(counts=(None, BILLION)), "claims 1000000000 keys"),
    "more tensors than there are": (file(counts=(60_000, None)), "dimensions|ends within|bytes"),
    "a huge key": (HEAD + struct.pack("<QQQ", 0, 1, 2**60), "a key has .* bytes"),
    "a huge text": (file(pairs=[ARCHITECTURE, pair("x", 8, struct.pack("<Q", 2**62))]), "the value of x has"),
    "a long text": (file(pairs=[ARCHITECTURE, pair("x", 8, struct.pack("<Q", 2**20))]), "ends within the value of x"),
    "a huge array": (file(pairs=[ARCHITECTURE, pair("x", 9, struct.pack("<IQ", 5, 2**61))]), "x has .* elements"),
    "a long array": (file(pairs=[ARCHITECTURE, pair("x", 9, struct.pack("<IQ", 5, 2**20))]), "ends within the values"),
    "many texts": (file(pairs=[ARCHITECTURE, pair("x", 9, struct.pack("<IQ", 8, 2**40))]), "x has .* elements"),
    "a text in an array": (
        file(pairs=[ARCHITECTURE, pair("x", 9, struct.pack("<IQQ", 8, 1, 2**63))]),
        "a string of x of .* bytes is beyond its end",
    ),
    "an array of arrays": (file(pairs=[ARCHITECTURE, pair("x", 9, struct.pack("<IQ", 9, 1))]), "an array of type 9"),
    "a type of values": (file(pairs=[ARCHITECTURE, pair("x", 77, b"")]), "of type 77, which does not exist"),
    "no architecture": (file(pairs=[]), "no general.architecture"),
    "a number for one": (file(pairs=[pair("general.architecture", 4, bytes(4))]), "no general.architecture"),
    "no UTF-8": (file(pairs=[pair("general.architecture", 8, text(b"\xff\xfe"))]), "is not UTF-8"),
    "a key twice": (file(pairs=[ARCHITECTURE, ARCHITECTURE]), "is duplicated"),
    "no alignment": (
        file(pairs=[ARCHITECTURE, pair("general.alignment", 4, bytes(4))]),
        "general.alignment=0; a number of bytes",
    ),
    "a tensor twice": (file([tensor(), tensor(offset=160)], data=320), "the tensor w is duplicated"),
    "an unknown type": (file([tensor(kind=99)]), "w is of ggml's type 99, which is not supported .*llama-quantize"),
    "a removed type": (file([tensor(kind=4)]), "w is of ggml's type 4"),
    "an offset beyond": (file([tensor(offset=2**40)]), "w has 136 bytes at offset 1099511627776, but the data has 160"),
    "a size beyond": (file([tensor(shape=(2**20, 32))]), "w has 35651584 bytes at offset 0"),
    "sizes that overflow": (file([tensor(shape=(2**62, 2**62))]), r"w has \d+ bytes at offset 0"),
    "an odd offset": (file([tensor(offset=8)]), "w has 136 bytes at offset 8"),
    "one over another": (file([tensor("a"), tensor("b", offset=32)], data=320), "b overlaps another tensor"),
    "a part of a block": (
        file([tensor(shape=(4, 33))]),
        "rows of 33 weights, not a multiple of the 32 of Q8_0's blocks",
    ),
    "no dimensions": (file([tensor(dimensions=0)]), "w has 0 dimensions"),
    "many dimensions": (file([tensor(dimensions=2**31)]), "w has 2147483648 dimensions"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(name: str, tmp_path: Path) -> None:
    contents, message = DAMAGED[name]
    (tmp_path / "m.gguf").write_bytes(contents)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as raised:
        read_header(tmp_path / "m.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(raised.value) and "m.gguf" in str(raised.value)
    assert peak < 2**23


def test_every_truncation_is_one_line(tmp_path: Path) -> None:
    whole = file([tensor("a"), tensor("b", offset=160)], [ARCHITECTURE, pair("n", 4, bytes(4))], data=296)
    for size in range(len(whole)):
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            read_header(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(whole)
    read_header(tmp_path / "m.gguf")


def test_any_byte_changed_is_read_or_one_line(tmp_path: Path) -> None:
    whole = file([tensor("a"), tensor("b", offset=160)], [ARCHITECTURE, pair("n", 4, bytes(4))], data=320)
    for at in range(len(whole) - 320):
        for value in (0, 1, 0x7F, 0x80, 0xFF):
            changed = bytearray(whole)
            changed[at] = value
            (tmp_path / "m.gguf").write_bytes(changed)
            try:
                read_header(tmp_path / "m.gguf")
            except CheckpointError:
                continue
