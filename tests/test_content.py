"""Hashes of inputs: of what files hold, not of where they lie or when they were written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmtools import content as module
from llmtools.content import content, model_content, rows_content


def test_a_place_and_a_time_do_not_matter_and_every_byte_does(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "sub" / "other.txt"
    other.parent.mkdir()
    one.write_text("the same")
    other.write_text("the same")
    assert content(one) == content(other) == content(str(one))
    os.utime(one, (1, 1))
    assert content(one) == content(other)
    other.write_text("the sane")  # as long
    os.utime(other, (1, 1))
    assert content(one) != content(other)
    assert content(tmp_path / "none") is content("owner/name") is content("x" * 5000) is content("a\0b") is None


def test_a_folder_is_its_files_and_their_names(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub" / "train.jsonl").write_text("rows")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    (tmp_path / "b" / ".cache").touch()
    assert content(tmp_path / "a") == content(tmp_path / "b")
    (tmp_path / "b" / "sub" / "train.jsonl").rename(tmp_path / "b" / "sub" / "test.jsonl")
    assert content(tmp_path / "a") != content(tmp_path / "b")


@pytest.mark.parametrize("whole", [1 << 28, 0], ids=["whole", "in pieces"])
def test_a_change_of_any_tensor_is_seen(whole: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE", whole)
    tensors = {f"layer.{n}": torch.randn(50_000 * n + 7) for n in range(4)}
    file = tmp_path / "model.safetensors"

    def written(changed: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> str | None:
        save_file({name: tensor.to(dtype) for name, tensor in changed.items()}, file)
        return content(file)

    found = [written(tensors), *(written({**tensors, name: tensors[name] * 1.001}) for name in tensors)]
    found += [written(tensors, torch.float64), written({f"x{name}": tensor for name, tensor in tensors.items()})]
    assert len({*found}) == len(found)
    assert written(tensors) == found[0]


@pytest.mark.parametrize("begin", [b"", b"\xff" * 8, b"\2" + b"\0" * 7 + b"[]", b"\4" + b"\0" * 7 + b'{"":'], ids=repr)
def test_large_files_of_other_kinds_are_read_in_pieces_too(
    begin: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WHOLE", 0)
    file = tmp_path / "model.safetensors"
    file.write_bytes(begin)
    assert content(file) == content(file)
    file.write_bytes(begin + b"\0" * 100_000)
    zeros = content(file)
    file.write_bytes(begin + b"\0" * 99_999 + b"\1")
    assert content(file) != zeros


def test_a_model_is_its_configuration_weights_and_tokenizer(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "run.json", "thesis.tex"):
        (tmp_path / name).write_text(name)
    before = model_content(tmp_path)
    assert before.keys() == {"model's configuration", "model's weights", "tokenizer"}
    for name, part in (
        ("config.json", "model's configuration"),
        ("modeling_own.py", "model's configuration"),
        ("model.safetensors", "model's weights"),
        ("model-00002-of-00002.safetensors", "model's weights"),
        ("chat_template.jinja", "tokenizer"),
        ("README.md", None),
        ("run.json", None),
        ("llmtools.json", None),
        ("thesis.tex", None),
    ):
        (tmp_path / name).write_text("changed")
        after = model_content(tmp_path)
        assert [key for key in after if after[key] != before.get(key)] == ([part] if part else []), name
        before = after
    assert model_content("owner/name") == {}


def test_rows_are_what_they_say(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "ü"}]
    assert rows_content(rows) == rows_content([dict(reversed(row.items())) for row in rows])
    others = [rows[::-1], rows[:1], [], [{"prompt": "ab", "completion": ""}, rows[1]], [{**rows[0], "x": 1}, rows[1]]]
    assert len({rows_content(each) for each in (rows, *others)}) == 6
