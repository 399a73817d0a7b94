"""The rank of this process. torchrun and accelerate start several, and set each one's environment.

All of them do the same work on different rows; only rank 0 writes files and logs.
"""

from __future__ import annotations

import os


def rank() -> int:
    """This process's rank in the run, from 0."""
    return _number("RANK", 0)


def is_first() -> bool:
    """Whether this is the only process of the run, or rank 0."""
    return rank() == 0


def processes() -> int:
    """Number of processes (world size)."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return _number("LOCAL_RANK", 0)


def processes_here() -> int:
    """Number of processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", processes())


def on_one_machine() -> bool:
    """Whether all processes of the run are on one machine, and so share its files."""
    return processes_here() == processes()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
