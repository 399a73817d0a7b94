"""The diagnosis: its rows agree with quantizing outright, are not made twice, and become a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtools
from benchmarks import diagnosis, quality
from benchmarks.quality import ASSETS
from llmtools.model.recover import Targets, mean_kl_divergence

torch.set_num_threads(1)
MODEL, TEXT = ASSETS / "stories260K", ASSETS / "tinystories"
COMMAND = [
    "propagate", "--model", str(MODEL), "--text", f"stories={TEXT / 'held_out.txt'}",
    "--calibration", f"stories={TEXT / 'train.txt'}", f"wiki={ASSETS / 'wikitext2' / 'train.txt'}",
    "--quantizers", "rtn 2", "--samples", "2", "--tokens", "64", "--sizes", "2", "--windows", "2", "--context", "64",
    "--group_size", "32",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("diagnosis") / "rows.jsonl"
    assert quality.main([*COMMAND, "--out", str(out)]) == 0
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_last_prefix_is_the_quantized_model(made: Path, tmp_path: Path) -> None:
    found = {row["block"]: row["kl"] for row in rows(made) if row["experiment"] == "prefix"}
    model, tokenizer = llmtools.load(MODEL)
    assert sorted(found) == list(range(model.config.num_hidden_layers))
    ids = tokenizer((TEXT / "held_out.txt").read_text(), return_tensors="pt").input_ids[0]
    windows = list(diagnosis.spread_windows(tokenizer, [(TEXT / "held_out.txt").read_text()], 2, 64).split(1))
    assert torch.equal(windows[0][0], ids[:64])
    targets = Targets.of(model, windows, tmp_path, diagnosis.KEPT)
    llmtools.quantize(model, "rtn", bits=2, group_size=32)
    whole = mean_kl_divergence(model, windows, targets)
    assert found[max(found)] == pytest.approx(whole, rel=1e-4)
    assert found[0] < found[max(found)]


def test_kinds_divide_the_weights(made: Path) -> None:
    found = [row for row in rows(made) if row["experiment"] == "kind"]
    parts = {(row["kind"], row["only"]): row for row in found}
    assert {kind for kind, _ in parts} == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    total = sum(row["parameters"] for row in found if row["only"])
    assert {parts[kind, True]["parameters"] + parts[kind, False]["parameters"] for kind, _ in parts} == {total}
    assert {row["text"] for row in rows(made) if row["experiment"] == "calibration"} == {"stories", "wiki"}


def test_a_finished_checkpoint_stands_for_its_own_calibration_only(made: Path, tmp_path: Path) -> None:
    model, tokenizer = llmtools.load(MODEL)
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    llmtools.save(model, tokenizer, tmp_path / "q")
    out = tmp_path / "rows.jsonl"
    quality.main([*COMMAND, "--out", str(out), "--every", "9", "--checkpoints", f"rtn 2-bit={tmp_path / 'q'}"])
    found, former = ({diagnosis.identity(row): row for row in rows(each)} for each in (out, made))
    for key, row in found.items():
        assert (row["kl"] == former[key]["kl"]) == (row["experiment"] not in ("prefix", "kind")), row
        assert row.get("checkpoint", False) == (row["experiment"] in ("prefix", "kind"))


def test_rows_are_not_made_twice_and_become_a_page(made: Path, tmp_path: Path) -> None:
    before = made.read_text()
    lines = before.splitlines()
    made.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    quality.main([*COMMAND, "--out", str(made)])
    again = rows(made)
    assert len(again) == len(lines)
    assert again[-1]["kl"] == json.loads(lines[2])["kl"]  # the row that was missing
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- prefix -->\nold\n<!-- end -->\n<!-- kind -->\n<!-- end -->\n<!-- embedding -->\n<!-- end -->\n"
    )
    quality.main(["propagate", "--table", "--out", str(made), "--page", str(page)])
    text = page.read_text()
    assert "old" not in text and "| 0 … 4 |" in text and "| v_proj |" in text and "Q4_1" in text
