"""The quality benchmark: rows are written and read again, and what cannot be measured says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import baselines, quality, quality_table

torch.set_num_threads(1)


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_lattice_has_the_published_error_and_an_exact_encoder(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert quality.main(["mse", "--vectors", "20000", "--checked", "500", "--out", str(out)]) == 0
    *books, encoder = rows_of(out)
    for row in books:
        assert abs(row["mse"] - row["published"]) < 0.01 * row["published"] + 3 * row["standard_error"]  # type: ignore
    assert encoder["distinct_values"] == 65536 and encoder["encoder_farther_than_brute_force"] == 0
    assert {"versions", "commit", "machine", "time"} <= set(encoder)


def test_layers_are_compared_by_everything_registered(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    quality.main(["layers", "--limit", "1", "--bits", "2", "--only", "rtn", "--out", str(out)])
    layer, mean = rows_of(out)
    assert (
        layer["relative_proxy_loss"] == mean["relative_proxy_loss"] == pytest.approx({"rtn 2-bit g64": 0.026}, rel=0.1)
    )


def test_perplexity_rows_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "WINDOWS", 4)
    monkeypatch.setattr(quality, "SAMPLES", 4)
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    quality.main(["perplexity", "--bits", "2", "--group_sizes", "64", "--only", "llmtools rtn", "--out", str(out)])
    dense, rtn = rows_of(out)
    assert len(dense["nlls"]) == 4 and rtn["perplexity"] > dense["perplexity"]  # type: ignore
    assert rtn["bits_per_weight"] == pytest.approx(2.34, abs=0.05)
    page.write_text("before\n<!-- perplexity2 -->\nold\n<!-- end -->\nafter\n")
    quality_table.write(out, page)
    text = page.read_text()
    assert "llmtools rtn 2-bit g64" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")


def test_a_row_that_fails_says_why() -> None:
    def make(source: baselines.Source) -> baselines.Made:
        raise ValueError("sizes must be multiples of 32")

    case = baselines.Case("other", "method", 2, 64, {"order": False}, make)
    row = quality._row(case, baselines.Source(Path("model"), []), lambda made: {})
    assert row["failed"] == "ValueError: sizes must be multiples of 32"
    assert row["label"] == "other method 2-bit g64, no order"


def test_the_newest_of_equal_rows_counts() -> None:
    rows = [{"section": "mse", "codebook": "E8P", "mse": value} for value in (1.0, 2.0)]
    assert [row["mse"] for row in quality_table.newest(rows)] == [2.0]


def test_differences_are_paired_by_window() -> None:
    mean, error = quality_table.difference({"nlls": [1.0, 5.0, 3.0]}, {"nlls": [0.5, 4.5, 2.5]})
    assert mean == pytest.approx(0.5) and error == pytest.approx(0)
