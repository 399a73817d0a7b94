"""The C library's allocator, for training on a CPU.

What a step frees is not always given back: between tensors that stay (activations, gradients) the heap has holes, and a
hole that a smaller tensor was put into is no room for a larger one any more. Two of glibc's functions (malloc.h) help:
`mallopt` keeps the largest tensors out of the heap, and `malloc_trim` gives the pages of all holes back, which costs
time for each page that is used again. So it is called only where the process is about to hold more than it has needed
so far (`HeapGuard`): in a first step several times, later hardly ever.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ..nn.packed import PackedWeight

_M_MMAP_THRESHOLD = -3  # of malloc.h
_BYTES = 8 * 2**20
SLACK, LEAST = 1 / 50, 16 * 2**20
"""How much more than the most that was needed a `HeapGuard` lets be: a share of it, and bytes."""


def map_large_blocks() -> None:
    """Makes glibc allocate tensors of 8 MB and more by mmap, and return them to the system when they are freed.

    By default its threshold grows to 32 MB: larger and larger blocks come from one heap, which long-lived tensors
    (gradients, activations) fragment. With this a step of a 160M model, 4 × 512 tokens, held a fifth less beside the
    model, at 2 to 5 % more CPU time (docs/results/speed.md). MALLOC_MMAP_THRESHOLD_ in the environment has precedence.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _BYTES)


class HeapGuard:
    """Has the allocator give its holes back when the process would hold more memory than it has needed before.

    Needed is what was left after the holes were given back. A hole that is used again grows nothing, so that a step
    like the former one is left alone.
    """

    def __init__(
        self,
        held: Callable[[], int],
        trim: Callable[[], object],
        *,
        slack: float = SLACK,
        least: int = LEAST,
    ) -> None:
        """held: bytes of the process. trim: gives holes back. slack, least: how much more than the most that was needed
        is let be, as a share of it and in bytes."""
        self._held, self._trim, self._slack, self._least = held, trim, slack, least
        self._needed = 0

    def __call__(self, *_: Any) -> None:
        if self._held() > self._needed + max(self._least, int(self._slack * self._needed)):
            self._trim()
            self._needed = max(self._needed, self._held())


def guard_heap(model: nn.Module) -> None:
    """Calls a `HeapGuard` after the forward and before the backward of the model's linears, on a CPU under glibc."""
    trim, held = _trim(), _held()
    if trim is None or held is None or next(model.parameters()).device.type != "cpu":
        return
    guard = HeapGuard(held, trim)

    def after(_: nn.Module, args: Any, output: Any) -> None:
        guard()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(guard)

    for module in model.modules():
        if isinstance(module, nn.Linear | PackedWeight):
            module.register_forward_hook(after)


@functools.cache
def _trim() -> Callable[[], int] | None:
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library; TypeError: Windows has none of this name
        return None
    return lambda: int(function(0))


@functools.cache
def _held() -> Callable[[], int] | None:
    """Bytes of the process that are no pages of files, RssAnon."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None

    def read() -> int:
        fields = os.pread(file, 128, 0).split()
        return mmap.PAGESIZE * (int(fields[1]) - int(fields[2]))  # resident, and of that shared with files

    return read
