"""The memory benchmark's own code, on a shape that takes no time."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

from benchmarks import llama_memory


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_memory, "PUBLISHED", {"tiny": 1.0})
    monkeypatch.setattr(llama_memory, "AIMS", {"tiny": 1.0})
    monkeypatch.setattr(llama_memory, "ROWS", llama_memory.ROWS[:1])


def test_the_table_has_a_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    llama_memory.table(["tiny"], as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["GB", "published,", "aim,", "quip_sharp", "16-bit"]


def test_a_step_is_measured_on_the_bytes_that_were_planned() -> None:
    found = llama_memory.measure("tiny", 2)
    options = {"bits": 2, "group_size": 128}
    memory, _, _ = llama_memory.planned("tiny", "rtn", options, "all-linear", "adamw_torch", "cpu")
    assert memory.packed == found["packed_bytes"]
    assert found["peak_bytes"] >= 0 and found["loss"] > 0
