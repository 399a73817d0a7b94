"""The orders that ship are those that their generator writes, and what is held out is held out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def orders(repository: Path) -> Path:
    return repository / "demo" / "assets" / "orders"


@pytest.fixture
def generator(orders: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("orders_generate", orders / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_generator_writes_the_files_that_ship(generator: ModuleType, orders: Path, tmp_path: Path) -> None:
    generator.main(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (orders / name).read_bytes()


def test_the_words_of_the_test_rows_occur_in_no_training_row(generator: ModuleType, orders: Path) -> None:
    train, test = (rows_of(orders / f"{name}.jsonl") for name in ("train", "test"))
    learned = " ".join(row["messages"][1]["content"] for row in train).lower()
    for row in test:
        record = json.loads(row["messages"][2]["content"])
        assert record["item"].lower() not in learned and record["city"].lower() not in learned
    sentences = [{line.strip() for line in words.sentences.splitlines()} for words in (generator.TRAIN, generator.TEST)]
    assert not sentences[0] & sentences[1]


def test_every_record_is_what_its_message_says(generator: ModuleType, orders: Path) -> None:
    for row in rows_of(orders / "train.jsonl") + rows_of(orders / "test.jsonl"):
        message, record = row["messages"][1]["content"], json.loads(row["messages"][2]["content"])
        assert all(record[key] in message or record[key].capitalize() in message for key in ("item", "city", "day"))
        said = [words for words, count in generator.COUNTS.items() if count == record["count"]]
        assert any(f" {words} " in f" {message.lower()} " for words in [*said, "an"])
