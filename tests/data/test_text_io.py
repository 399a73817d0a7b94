"""Files of text: documents, rows, and what is said about a line that is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from llmtools.data.text_io import read_documents, read_rows
from llmtools.errors import InputError


def test_a_text_file_is_one_document_until_a_separator_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n", encoding="utf-8")
    assert read_documents(path) == ["one\ntwo\n"]
    path.write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n", encoding="utf-8")
    assert read_documents(path) == ["one\n", "two\n"]


def test_gzipped_files_read_like_plain_ones(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": "één"}) + "\n\n" + json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert read_documents(tmp_path / "a.jsonl.gz") == ["één", "ab"]
    assert len(read_rows(tmp_path / "a.jsonl.gz")) == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: .*not JSON"),
        ("a.jsonl", '{"text": "x"}\n\n[1]\n', r"a\.jsonl:3: a JSON object"),
        ("a.jsonl", '{"txt": "x"}\n', r"a\.jsonl:1: .*txt"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", " \n", "holds no text"),
        ("a.doc", "x", r"\.txt, \.jsonl"),
        ("a.txt.gz", "no gzip", "gzip"),
    ],
    ids=["no JSON", "no object", "no field", "empty jsonl", "empty text", "another kind", "no gzip"],
)
def test_a_wrong_file_is_said_with_its_place(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        read_documents(tmp_path / name)


def test_missing_files_folders_and_other_encodings_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        read_documents(tmp_path / "a.txt")
    with pytest.raises(InputError, match="is a folder"):
        read_documents(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_documents(tmp_path / "a.txt")


def test_an_empty_file_of_rows_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="is empty"):
        read_rows(tmp_path / "a.jsonl")
