"""Damage to the files of a checkpoint or an adapter: one function a kind, each deterministic in its generator."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 10**6, 10**12, 2**70, 1e308, float("nan"), float("inf"), "", "x", "4",
    "../../etc/passwd", [], {}, [1], [[]], {"a": {}}, "a" * 10_000, "([a-z._0-9]+)+!", "{{ x }}", [None] * 50, "\u0000",
)  # fmt: skip


def change_json(file: Path, random: Random) -> str:
    """Another value, a missing or a renamed key somewhere in a JSON file."""
    value = json.loads(file.read_text(encoding="utf-8"))
    places = list(_places(value))
    if not places:
        file.write_text(json.dumps(random.choice(ODD)), encoding="utf-8")
        return "whole file"
    holder, key = random.choice(places)
    kind = random.choice(["odd", "odd", "odd", "near", "delete", "rename", "swap"])
    if kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == "near" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] += random.choice([-1, 1, 7])
    elif kind == "swap":
        other, name = random.choice(places)
        if key in (holder if isinstance(holder, dict) else range(len(holder))) and other is holder:
            holder[key], other[name] = other[name], holder[key]
        else:
            holder[key] = random.choice(ODD)
    else:
        holder[key] = random.choice(ODD)
    file.write_text(json.dumps(value), encoding="utf-8")
    return f"{kind} at {str(key)[:40]}"


def _places(value: Any, deep: int = 0) -> Any:
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(min(len(value), 20)))
    else:
        return
    if len(keys) > 60:  # vocabularies: a few of their words are enough
        keys = keys[:30] + keys[-30:]
    for key in keys:
        yield value, key
        if deep < 6:
            yield from _places(value[key], deep + 1)


def change_text(file: Path, random: Random) -> str:
    """Bytes that are no longer what they were: cut, flipped, nested, in another encoding, empty, or no file at all."""
    data = file.read_bytes()
    kind = random.choice(["cut", "flip", "insert", "empty", "deep", "latin", "bom", "folder", "gone", "array", "long"])
    at = random.randrange(max(1, len(data)))
    if kind == "cut":
        data = data[:at]
    elif kind == "flip":
        data = data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    elif kind == "insert":
        data = data[:at] + random.choice([b"{", b"]", b'"', b"\x00", b"\xff\xfe", b"NaN", b"1e999"]) + data[at:]
    elif kind == "empty":
        data = b""
    elif kind == "deep":
        data = b'{"a":' * 100_000
    elif kind == "latin":
        data = b"\xe9" + data
    elif kind == "bom":
        data = b"\xef\xbb\xbf" + data
    elif kind == "array":
        data = b"[" + data + b"]"
    elif kind == "long":
        data = data[:at] + b"9" * 5000 + data[at:]
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind != "gone":
        file.write_bytes(data)
    return kind


def change_header(file: Path, random: Random) -> str:
    """The table at the head of a safetensors file: names, types, shapes, places."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header[name]
    kind = random.choice(["dtype", "shape", "offsets", "rename", "delete", "swap", "extra", "length", "flip", "cut"])
    if kind == "dtype":
        entry["dtype"] = random.choice(["F32", "F16", "BF16", "I32", "U8", "I8", "F64", "X9", "BOOL"])
    elif kind == "shape":
        entry["shape"] = random.choice([[], [2**62, 4], entry["shape"][::-1], [*entry["shape"], 1], [-1], [0]])
    elif kind == "offsets":
        first, last = entry["data_offsets"]
        entry["data_offsets"] = random.choice([[first + 1, last], [last, first], [0, 2**63], [first, last + 4]])
    elif kind == "rename":
        header[random.choice([f"{name}x", name.replace("0", "1"), "", "a" * 300, f"{name}.weight"])] = header.pop(name)
    elif kind == "delete":
        del header[name]
    elif kind == "swap":
        other = random.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind == "extra":
        header[random.choice([f"{name}.extra", name.rpartition(".")[0] + ".qzeros2", "model.layers.9.x.weight"])] = {
            "dtype": "U8",
            "shape": [0],
            "data_offsets": [len(body), len(body)],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if kind == "flip":
        at = random.randrange(len(text))
        text = text[:at] + bytes([text[at] ^ 1 << random.randrange(8)]) + text[at + 1 :]
    length = random.choice([0, 1, 2**40, 2**64 - 1, len(text) - 8]) if kind == "length" else len(text)
    whole = struct.pack("<Q", length) + text + body
    file.write_bytes(whole[: random.randrange(len(whole))] if kind == "cut" else whole)
    return kind


def change_tensors(file: Path, random: Random) -> str:
    """Numbers: NaN and infinity in small tensors, permutations that are none. No header changes."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    small = [
        name
        for name, tensor in tensors.items()
        if tensor.numel() and (tensor.is_floating_point() or name.endswith(".perm"))
        if tensor.ndim <= 1 or name.rpartition(".")[2] in _SIDE_TENSORS or "lora_" in name
    ]
    name = random.choice(sorted(small or tensors))
    flat = tensors[name].clone().flatten()
    if flat.is_floating_point():
        flat[random.randrange(len(flat))] = random.choice([float("nan"), float("inf"), -float("inf")])
    else:
        flat[random.randrange(len(flat))] = random.choice([-1, 2**31 - 1, len(flat), int(flat[-1]), int(flat[0])])
        if torch.equal(flat, tensors[name].flatten()):
            flat[0] = -1
    tensors[name] = flat.reshape(tensors[name].shape)
    save_file(tensors, file, metadata={"format": "pt"})
    return name.rpartition(".")[2]


_SIDE_TENSORS = ("scales", "zeros", "su", "sv", "nested_scales", "nested_offset", "input_scales", "perm", "bias")


def flip_data(file: Path, random: Random) -> str:
    """A bit of tensor data: what only a checksum can tell."""
    data = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    at = random.randrange(8 + size, len(data))
    data[at] ^= 1 << random.randrange(8)
    file.write_bytes(bytes(data))
    return "bit"


Mutation = Callable[[Path, Random], str]


def mutate(folder: Path, random: Random) -> tuple[str, bool]:
    """Damages one file of the folder. ("file: kind: place", whether only tensor data were touched)."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != "README.md")
    file = random.choice([*files, *(file for file in files if file.suffix == ".safetensors" or "config" in file.name)])
    kinds: list[Mutation]
    if file.suffix == ".safetensors":
        kinds = [change_header, change_header, change_tensors, flip_data, change_text]
    elif file.suffix == ".json":
        kinds = [change_json, change_json, change_json, change_text]
    else:
        kinds = [change_text]
    kind = random.choice(kinds)
    header = _header(file)
    damage = kind(file, random)
    data_only = header is not None and kind is not change_tensors and file.is_file() and _header(file) == header
    return f"{file.name}: {kind.__name__}: {damage}", data_only


def _header(file: Path) -> tuple[int, bytes] | None:
    """The size of a safetensors file and its table; None for other files."""
    if file.suffix != ".safetensors":
        return None
    data = file.read_bytes()
    return len(data), data[: 8 + struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0]]
