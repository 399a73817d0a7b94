"""The C library's memory, for training on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # of malloc.h
_BYTES = 8 * 2**20


def keep_large_blocks_apart() -> None:
    """Has glibc take tensors of 8 MB and more from the system one by one, and give them back when they are freed.

    Left to itself it soon keeps blocks of up to 32 MB in one heap, where what stays (gradients, activations) pins the
    holes between. A step of a 160M model, 4 × 512 tokens, then held a fifth less beside the model, at 2 to 5 % more of
    the processor's time (docs/results/speed.md). MALLOC_MMAP_THRESHOLD_ in the environment has precedence.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _BYTES)
