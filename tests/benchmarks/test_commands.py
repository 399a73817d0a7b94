"""Whole commands are timed, one process each, and a failing one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import commands


def test_a_command_is_timed_and_its_row_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    assert commands.main(["quantize", "--only", "rtn", "--append", str(rows)]) == 0
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert (row["problem"], row["candidate"], row["model"]) == ("rtn 4 bits", "now", "stories260K")
    assert row["median_cpu_seconds"] > 0 and row["torch"]
    assert "rtn 4 bits" in capsys.readouterr().out


def test_a_command_that_fails_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="quantize: nowhere: "):
        commands.main(["quantize", "--only", "rtn", "--model", "nowhere"])
