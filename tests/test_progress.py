"""Progress: a log line now and then where there is no terminal, with an estimate."""

from __future__ import annotations

import io
import sys

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


def test_what_an_earlier_run_did_is_no_part_of_the_estimate(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 20.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    with caplog.at_level("INFO", logger="llmtools"), progress("work", done=90) as step:
        step(92, 100)  # 2 in 20 s, 8 left
    assert "92 of 100 steps, about 1 min 20 s left" in caplog.text


def test_durations_read_well() -> None:
    assert [duration(seconds) for seconds in (1.23, 42, 200, 7500)] == ["1.2 s", "42 s", "3 min 20 s", "2 h 05 min"]


def test_brief_work_is_silent_unless_it_is_long(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level("INFO", logger="llmtools"):
        with progress("validation", brief=True) as step:
            step(1, 2), step(2, 2)
        assert caplog.records == []
        monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
        with progress("validation", brief=True) as step:
            step(1, 2), step(2, 2)
    assert [record.message.split(",")[0].split(" in ")[0] for record in caplog.records] == [
        "validation: 1 of 2 steps", "validation: 2 of 2 steps",
    ]  # fmt: skip


def test_a_bar_within_a_bar_goes_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    titles = lambda: [task.description for task in module._display.get().tasks]  # noqa: E731
    with progress("finetune") as outer:
        outer(1, 4)
        with progress("validation", unit="batches", brief=True) as inner:
            inner(1, 3)
            assert titles() == ["finetune", "validation"]
        assert titles() == ["finetune"]
        outer(2, 4)
    assert module._display.get() is None
    assert "finetune" in sys.stderr.getvalue()


def test_of_several_processes_the_first_alone_shows_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level("INFO", logger="llmtools"), progress("work") as step:
        step(1, 1, "note")
    assert caplog.records == []
