"""The transform on the CPU: Sylvester's part in C, in place, the small factors as matrix products."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from .. import build
from . import reference
from .matrices import order
from .rules import factors

_FLOATS_A_THREAD = 1 << 15  # fewer are done before a second thread has woken up


def hadamard(x: Tensor, rule: str, transpose: bool) -> Tensor:
    """Q x or Qᵀ x for x [..., n] on the CPU, of x's type; without a compiler, and for float64, by the reference."""
    library = _library()
    if library is None or reference.accumulator(x.dtype) != torch.float32 or x.numel() == 0:
        return reference.hadamard(x, rule, transpose)
    n = x.shape[-1]
    *small, sylvester = factors(rule, n)
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
    threads = max(1, min(torch.get_num_threads(), y.numel() // _FLOATS_A_THREAD))
    size = order(sylvester)
    library.hadamard_walsh(y.data_ptr(), y.numel() // size, size, reference.scale(rule, n), threads)
    trailing = reference.block_size(rule, n)
    for name in small:
        m, trailing = reference.factor(name, y.device, y.dtype), trailing // order(name)
        m = m.T if transpose else m
        # A product of two matrices, where there can be one: a batch of small ones is several times slower.
        y = y.reshape(-1, order(name)) @ m.T if trailing == 1 else m @ y.reshape(-1, order(name), trailing)
    return y.reshape(x.shape).to(x.dtype)


@cache
def _library() -> ctypes.CDLL | None:
    library = build.library("hadamard")
    if library is not None:
        long = ctypes.c_int64
        library.hadamard_walsh.argtypes = [ctypes.c_void_p, long, long, ctypes.c_float, ctypes.c_int]
        library.hadamard_walsh.restype = None
    return library
