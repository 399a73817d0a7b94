"""Progress of a long step: a bar with an estimate on a terminal, occasional log lines elsewhere.

The functions that do the work are independent of this; they take an `on_step(done, total)` callback:

    with progress("perplexity", unit="windows") as step:
        perplexity(model, ids, context=512, on_step=step)
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from .ranks import is_first

log = logging.getLogger(__name__)

Step = Callable[..., None]

QUIET_SECONDS = 10.0
"""Least time between two log lines, in seconds, without a terminal."""


@contextmanager
def progress(title: str, unit: str = "steps", *, brief: bool = False, done: int = 0) -> Iterator[Step]:
    """Yields ``step(done, total, note="")``, to be called as work gets done; `note` describes the last item.

    brief: a step within another one. Its bar is under the other one and removed at its end; without a terminal it is
    only logged if it is long. done: what an earlier run did, which says nothing about the time left.
    """
    if not is_first():
        yield lambda *args: None
    elif sys.stderr.isatty():
        with _bar(title, unit, brief, done) as step:
            yield step
    else:
        yield _lines(title, unit, brief, done)


_display: ContextVar[Any] = ContextVar("display", default=None)
"""The terminal's only display, to which bars are added."""


@contextmanager
def _bar(title: str, unit: str, brief: bool, done: int) -> Iterator[Step]:
    shown = _display.get()
    with nullcontext(shown) if shown is not None else _new_display() as display:
        token = _display.set(display)
        task = display.add_task(title, total=None, completed=done, note="", unit=unit)
        try:
            yield lambda done, total, note="", *rest: display.update(task, completed=done, total=total, note=str(note))
        finally:
            _display.reset(token)
            if brief:
                display.remove_task(task)


def _new_display() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=Console(stderr=True))


def _lines(title: str, unit: str, brief: bool, before: int) -> Step:
    began = said = time.monotonic()

    def step(done: int, total: int, note: object = "", *rest: object) -> None:
        nonlocal said
        now = time.monotonic()
        if now - (began if done >= total else said) < QUIET_SECONDS and (brief or done < total):
            return
        said = now
        left = (now - began) / max(done - before, 1) * (total - done)
        tail = f", about {duration(left)} left" if done < total else f" in {duration(now - began)}"
        log.info("%s: %d of %d %s%s%s", title, done, total, unit, tail, f" ({note})" if note else "")

    return step


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
