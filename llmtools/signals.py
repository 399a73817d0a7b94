"""Signals that end a run: SIGTERM and SIGHUP act like Ctrl-C, and all of them can be deferred to the end of a step.

Schedulers, containers and closed terminals end a process by SIGTERM or SIGHUP, which kill it immediately. Here they
raise `Stopped`, a KeyboardInterrupt, with the same clean-up as after Ctrl-C. Handlers are installed by the main thread
only, only over the default ones (a program that uses this library may have its own), and only within a block.
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
"""Signals that end a process without a handler."""


class Stopped(KeyboardInterrupt):
    """A run was ended by a signal; the message, if there is one, says how to resume it."""

    def __init__(self, text: str = "", exit_code: int = 128 + signal.SIGINT) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        """Exit code: 128 + the signal's number, as in shells."""

    def __str__(self) -> str:
        return str(self.args[0])


class Request:
    """A signal that was received, if there was one."""

    number: int | None = None
    """Number of the signal; None if there was none."""

    @property
    def exit_code(self) -> int:
        return 128 + (self.number or signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[Request]:
    """In this block SIGTERM and SIGHUP are recorded and raise `Stopped`, wherever the main thread is."""
    request = Request()

    def stop(number: int) -> None:
        request.number = number
        raise Stopped(exit_code=128 + number)

    with _handled(ENDING, stop):
        yield request


@contextmanager
def deferred(request: Request, notify: Callable[[], None] = lambda: None) -> Iterator[None]:
    """In this block a first Ctrl-C, SIGTERM or SIGHUP is recorded in `request` and `notify` called; a second one
    raises."""

    def record(number: int) -> None:
        if request.number is not None:
            raise Stopped(exit_code=128 + number)
        request.number = number
        notify()

    with _handled([signal.SIGINT, *ENDING], record):
        yield


_ours: set[Any] = set()
"""Handlers of this module, which another block may replace."""


@contextmanager
def _handled(numbers: list[signal.Signals], act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act` with the number of a signal, where no other handler is installed."""
    owner = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked child of a library: the default action
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
