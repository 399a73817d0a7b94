"""Errors caused by an input; the message names the value, what was expected, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class InputError(ValueError):
    """Invalid input; the message names it and the remedy. Shown without a traceback."""


class CheckpointError(InputError):
    """A folder on disk is not the checkpoint that it should be: missing, misshapen, truncated, too new."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The closing half of an error about an unknown name.

    >>> did_you_mean("bit", ["bits", "group_size"])
    "did you mean 'bits'? (there are: bits, group_size)"
    """
    choices = sorted(choices)
    listing = f"(there are: {', '.join(choices)})" if choices else "(there are none)"
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? {listing}" if near else listing


@contextmanager
def opening(what: str, remedy: str = "", error: type[InputError] = CheckpointError) -> Iterator[None]:
    """Converts what another library raises over a damaged file to `error`, in one line that begins with `what`.

    A library that parses a file may raise any type, including a panic of compiled code. InputErrors, interrupts and
    out-of-memory errors of a device pass through; the cause stays attached, for --debug.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as cause:
        kind = type(cause).__name__
        if kind == "OutOfMemoryError" or not (isinstance(cause, Exception) or kind == "PanicException"):
            raise
        message = " ".join(str(cause).split()) or kind
        message = message if len(message) <= 300 else f"{message[:300]}…"
        reason = message if isinstance(cause, OSError | ValueError) else f"{kind}: {message}"
        raise error(f"{what}: {reason}{f'; {remedy}' if remedy else ''}") from cause


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where there is no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


_where: ContextVar[str] = ContextVar("where", default="")


@contextmanager
def within(path: str) -> Iterator[None]:
    """Errors and log messages within the context are prefixed with the module's `path`."""
    token = _where.set(path)
    try:
        yield
    finally:
        _where.reset(token)


def where() -> str:
    """``"model.layers.0.mlp.up_proj: "`` inside `within`, else empty: the prefix of a message."""
    path = _where.get()
    return f"{path}: " if path else ""
