"""SIGTERM ends a run as Ctrl-C does, at once or after a step, and everybody's handlers are as they were."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from llmtools.signals import Request, Stopped, deferred, interruptible

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    before = [signal.getsignal(number) for number in ALL]
    yield
    assert [signal.getsignal(number) for number in ALL] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_is_ended_as_by_ctrl_c(number: int) -> None:
    with pytest.raises(KeyboardInterrupt) as ended, interruptible():
        send(number)
    assert isinstance(ended.value, Stopped)
    assert (ended.value.exit_code, str(ended.value)) == (128 + number, "")


@pytest.mark.parametrize("number", ALL)
def test_the_first_waits_and_the_second_does_not(number: int) -> None:
    request, calls = Request(), []
    with interruptible():
        with pytest.raises(Stopped), deferred(request, lambda: calls.append(1)):
            send(number)
            assert (request.number, request.exit_code, calls) == (number, 128 + number, [1])
            send(number)
        if number != signal.SIGINT:
            with pytest.raises(Stopped):  # the outer block's again
                send(number)


def test_handlers_of_others_stay_in_place() -> None:
    seen: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with interruptible(), deferred(request := Request()):
            send(signal.SIGTERM)
        assert (seen, request.number) == ([signal.SIGTERM], None)
    finally:
        signal.signal(signal.SIGTERM, former)


def test_an_ignored_signal_is_still_ignored() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interruptible(), deferred(request := Request()):
            send(signal.SIGHUP)
        assert request.number is None
    finally:
        signal.signal(signal.SIGHUP, former)


def test_another_thread_changes_nothing() -> None:
    found: list[Any] = []

    def run() -> None:
        with interruptible():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
