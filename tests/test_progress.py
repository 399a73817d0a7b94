"""Progress: a log line now and then where there is no terminal, with an estimate."""

from __future__ import annotations

import pytest

from llmtools import progress as module
from llmtools.progress import duration, progress


def test_the_end_is_always_said_and_the_way_only_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="llmtools"), progress("work", unit="pieces") as step:
        for done in range(1, 101):
            step(done, 100)
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["work: 100 of 100 pieces"]


def test_an_estimate_is_given(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    with caplog.at_level("INFO", logger="llmtools"), progress("work") as step:
        step(1, 2, "model.layers.0")
    assert "about" in caplog.text
    assert "left (model.layers.0)" in caplog.text


def test_durations_read_well() -> None:
    assert [duration(seconds) for seconds in (1.23, 42, 200, 7500)] == ["1.2 s", "42 s", "3 min 20 s", "2 h 05 min"]
