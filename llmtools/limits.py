"""Time and memory limits for evaluating a file's text, such as its regular expressions and templates."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SPARE_BYTES = 2 * 2**30
"""Memory that a bounded block may allocate beyond the process's current use, in bytes."""

TEMPLATE_SECONDS, PATTERN_SECONDS = 10.0, 5.0
"""Time limits, in seconds, of a chat template for one chat, and of a regular expression for all modules of a model."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Ends the block with TimeoutError after `seconds`, and with MemoryError where it takes `SPARE_BYTES` more.

    For Python code and regular expressions, both of which check for signals while they run. Outside the main thread,
    and on systems without signals and limits, nothing is bounded. An alarm that is already set stays in force.
    """
    with _limited_memory(), _alarm(seconds):
        yield


def match(pattern: str, text: str, seconds: float) -> bool:
    """Whether a file's regular expression matches the beginning of a text, as `matching`."""
    return bool(matching(pattern, [text], seconds))


def matching(pattern: str, texts: Iterable[str], seconds: float) -> list[str]:
    """The texts whose beginning a file's regular expression matches. Raises re.error, or TimeoutError.

    By Python's own engine where it can be interrupted, else by that of the package `regex`, which has a time limit.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        with bounded(seconds):
            return [text for text in texts if re.match(pattern, text)]
    import regex

    end = time.monotonic() + seconds
    try:
        return [text for text in texts if regex.match(pattern, text, timeout=max(1e-3, end - time.monotonic()))]
    except regex.error as error:
        raise re.error(str(error)) from error


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    if signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done in {seconds:g} seconds")

    former = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


@contextmanager
def _limited_memory() -> Iterator[None]:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            present = int(file.read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError, ValueError):
        yield
        return
    limit: Any = present + SPARE_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
