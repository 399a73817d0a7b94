"""What glibc is told before training on a CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
from llmtools.train.heap import map_large_blocks
map_large_blocks()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(3):  # freeing one raises the threshold above it, if that was not set
    c.free(c.malloc(20 * 2**20))
line = next(line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]"))
first, last = (int(part, 16) for part in line.split()[0].split("-"))
at = c.malloc(20 * 2**20)
print(first <= at < last)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap is looked up in /proc")
@pytest.mark.parametrize("own, in_heap", [("", "False"), ("33554432", "True")])
def test_large_blocks_stay_out_of_the_heap_unless_the_environment_has_its_own_word(own: str, in_heap: str) -> None:
    environment = {"PATH": "/usr/bin:/bin"} | ({"MALLOC_MMAP_THRESHOLD_": own} if own else {})
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == in_heap
