"""How a long step says where it is: a bar with an estimate on a terminal, a log line now and then elsewhere.

Work is done by functions that know nothing of this; they take an `on_step(done, total)` callback:

    with progress("perplexity", unit="windows") as step:
        perplexity(model, ids, context=512, on_step=step)
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

Step = Callable[..., None]

QUIET_SECONDS = 10.0
"""Between two log lines, where there is no terminal."""


@contextmanager
def progress(title: str, unit: str = "steps") -> Iterator[Step]:
    """Yields ``step(done, total, note="")``, to be called as work gets done; `note` is a word on what was just done."""
    if sys.stderr.isatty():
        with _bar(title, unit) as step:
            yield step
    else:
        yield _lines(title, unit)


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Step]:
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
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, note="", *rest: bar.update(task, completed=done, total=total, note=str(note))


def _lines(title: str, unit: str) -> Step:
    began = said = time.monotonic()

    def step(done: int, total: int, note: object = "", *rest: object) -> None:
        nonlocal said
        now = time.monotonic()
        if done < total and now - said < QUIET_SECONDS:
            return
        said = now
        left = (now - began) / max(done, 1) * (total - done)
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
