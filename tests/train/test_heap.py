"""How glibc's allocator is set before training on a CPU, and trimmed during it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from llmtools.train import heap
from llmtools.train.heap import HeapGuard, guard_heap

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


class Process:
    """A heap with tensors and holes, whose holes are given back by `trim`."""

    def __init__(self) -> None:
        self.tensors, self.holes, self.trims = 0, 0, 0

    def held(self) -> int:
        return self.tensors + self.holes

    def trim(self) -> None:
        self.holes, self.trims = 0, self.trims + 1


def test_holes_are_given_back_only_where_the_process_outgrows_what_it_needed() -> None:
    process = Process()
    guard = HeapGuard(process.held, process.trim, slack=0.1, least=10)

    def at(tensors: int, holes: int) -> tuple[int, int]:
        process.tensors, process.holes = tensors, holes
        guard()
        return process.held(), process.trims

    assert at(10, 0) == (10, 0)  # too little to count
    assert at(1000, 500) == (1000, 1)
    assert at(600, 500) == (1100, 1)  # a tenth more than was needed is let be
    assert at(600, 501) == (600, 2)
    assert at(200, 900) == (1100, 2)  # what was needed once may be held again
    assert at(1300, 100) == (1300, 3)
    assert at(1300, 130) == (1430, 3)


def test_every_linear_of_a_model_is_a_place_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: Iterator[int] = iter(range(2**30, 2**40, 2**30))  # always more
    trims = []
    monkeypatch.setattr(heap, "_held", lambda: lambda: next(numbers))
    monkeypatch.setattr(heap, "_trim", lambda: lambda: trims.append(1))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    guard_heap(model)
    y = model(torch.randn(3, 4))
    forward = len(trims)
    y.sum().backward()
    assert forward == 2 and len(trims) == 4
    monkeypatch.setattr(heap, "_trim", lambda: None)  # another C library
    other = nn.Linear(2, 2)
    guard_heap(other)
    assert not other._forward_hooks


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_the_process_holds_is_what_linux_says() -> None:
    held = heap._held()
    assert held is not None
    before = held()
    kept = torch.ones(2**24)
    assert abs(held() - before - kept.nbytes) < 2**23
