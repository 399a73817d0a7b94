"""Pages of memory: which are those of files, and the hints that the kernel gets for them.

A page of a mapped file is in memory as long as there is room, and is read from the file again when it is touched: on a
CPU the page cache is what streams a model that does not fit. Two hints (madvise(2)) make it stream ahead: WILLNEED
starts reading, and COLD (Linux 5.4) lets go of pages first when memory is wanted. COLD and not DONTNEED, which would
lose what was written into a private mapping. Where a hint is unknown nothing is said, and pages come and go on demand.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import mmap
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

_WILLNEED: int | None = getattr(mmap, "MADV_WILLNEED", None)
_COLD = 20 if sys.platform == "linux" else None  # of asm-generic/mman-common.h; Python has no name for it
_NORESERVE = 0x4000  # of asm-generic/mman.h; without it Linux refuses a private mapping larger than the memory
_IN_MEMORY = ("/dev/", "/memfd:", "/SYSV")
"""Beginnings of the names of mappings that have a path and no file."""
_GAP = 2**16
"""Largest gap between spans that are advised as one, in bytes."""


class Span(NamedTuple):
    """Bytes of memory at an address."""

    start: int
    stop: int


class FilePages:
    """The addresses of mapped files, as they are now."""

    def __init__(self, maps: str) -> None:
        """maps: the text of ``/proc/PID/maps``."""
        found = []
        for line in maps.splitlines():
            fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
            if len(fields) == 6 and fields[5].startswith("/") and not fields[5].startswith(_IN_MEMORY):
                start, stop = (int(number, 16) for number in fields[0].split("-"))
                found.append(Span(start, stop))
        self._spans = joined(found, gap=0)

    def hold(self, span: Span) -> bool:
        """Whether all of a span is mapped from files."""
        at = bisect.bisect_right(self._spans, (span.start, sys.maxsize)) - 1
        return at >= 0 and span.stop <= self._spans[at].stop


def file_pages() -> FilePages | None:
    """The mapped files of this process; None where the system does not list them."""
    try:
        return FilePages(Path("/proc/self/maps").read_text(errors="replace"))
    except OSError:
        return None


def mapped(path: str | Path) -> mmap.mmap:
    """A file's bytes, writable: what is written is seen here alone. They count for no limit of memory until then."""
    with Path(path).open("rb") as file:
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flags, rights = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=rights)


def ask_for(spans: Iterable[Span]) -> None:
    """Has the kernel begin to read the spans' pages."""
    _advise(spans, _WILLNEED)


def let_go(spans: Iterable[Span]) -> None:
    """Has the kernel take the spans' pages first when memory is wanted. Their contents stay what they are."""
    _advise(spans, _COLD)


def joined(spans: Iterable[Span], gap: int = _GAP) -> list[Span]:
    """The spans in order, those at most `gap` bytes apart as one."""
    found: list[Span] = []
    for span in sorted(spans):
        if found and span.start <= found[-1].stop + gap:
            found[-1] = Span(found[-1].start, max(found[-1].stop, span.stop))
        else:
            found.append(span)
    return found


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that programs may still allocate, a container's limit included; None where the system does not say."""
    try:
        meminfo = (root / "proc/meminfo").read_text()
        free = int(re.findall(r"^MemAvailable:\s+(\d+) kB", meminfo, flags=re.MULTILINE)[0]) * 1024
    except (OSError, IndexError):
        return None
    try:
        group = root / "sys/fs/cgroup"
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return free
    return min(free, limit)


def _advise(spans: Iterable[Span], advice: int | None) -> None:
    madvise = _madvise()
    if madvise is None or advice is None:
        return
    for span in spans:
        start = span.start - span.start % mmap.PAGESIZE
        madvise(start, span.stop - start, advice)  # a hint: what it returns changes nothing


@functools.cache
def _madvise() -> Callable[[int, int, int], Any] | None:
    """madvise(address, bytes, advice) of the C library; None on systems without it."""
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library of this name
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda start, size, advice: function(start, size, advice)
