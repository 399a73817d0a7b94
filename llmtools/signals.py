"""Signals that end a run: SIGTERM and SIGHUP do what Ctrl-C does, and all of them can wait for the end of a step.

Schedulers, containers and closed terminals end a process by SIGTERM or SIGHUP, which kill it where it stands. Here they
raise `Stopped`, a KeyboardInterrupt, so what is cleaned up after Ctrl-C is cleaned up after them. Handlers are put in
place by the main thread only, only over the system's own (a program that uses this library may have its own plans), and
only for the length of a block.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
"""what ends a process that has no handler of its own"""


class Stopped(KeyboardInterrupt):
    """A run that a signal ended; its text, if there is one, says how to go on."""

    def __init__(self, text: str = "", exit_code: int = 128 + signal.SIGINT) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        """128 + the signal's number, as shells say it"""

    def __str__(self) -> str:
        return str(self.args[0])


class Request:
    """Whether a signal has asked for the end, and which."""

    number: int | None = None

    @property
    def exit_code(self) -> int:
        return 128 + (self.number or signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[None]:
    """In this block SIGTERM and SIGHUP raise `Stopped`, wherever the main thread is."""

    def stop(number: int) -> None:
        raise Stopped(exit_code=128 + number)

    with _handled(ENDING, stop):
        yield


@contextmanager
def put_off(request: Request, notify: Callable[[], None] = lambda: None) -> Iterator[None]:
    """In this block a first Ctrl-C, SIGTERM or SIGHUP is noted in `request`, `notify` called; a second one raises."""

    def note(number: int) -> None:
        if request.number is not None:
            raise Stopped(exit_code=128 + number)
        request.number = number
        notify()

    with _handled([signal.SIGINT, *ENDING], note):
        yield


_ours: set[Any] = set()
"""handlers of ours, which another block of ours may replace"""


@contextmanager
def _handled(numbers: list[signal.Signals], act: Callable[[int], None]) -> Iterator[None]:
    """Has `act` called with the number of a signal, where nobody else's handler is in place."""
    owner = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a child that a library forked: it dies as it would without us
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        act(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    free = {signal.SIG_DFL, signal.default_int_handler, *_ours}
    former = {number: found for number in numbers if (found := signal.getsignal(number)) in free}
    _ours.add(handler)
    for number in former:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, found in former.items():
            signal.signal(number, found)
        _ours.discard(handler)
