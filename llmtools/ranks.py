"""Which of a run's processes this one is. torchrun and accelerate start several and tell each by its environment.

All of them do the same work on other rows; the first alone writes files and speaks.
"""

from __future__ import annotations

import os


def rank() -> int:
    """This process's number in the run, from 0."""
    return _number("RANK", 0)


def is_first() -> bool:
    """Whether this is the only process of the run, or the first."""
    return rank() == 0


def processes() -> int:
    """How many there are."""
    return _number("WORLD_SIZE", 1)


def on_one_machine() -> bool:
    """Whether all processes of the run see the same files."""
    return _number("LOCAL_WORLD_SIZE", processes()) == processes()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
