"""The rotation on the CPU, in C: a row at a time, converted, transformed and rounded in cache."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import build
from . import reference
from .matrices import matrix, order
from .rules import factors

_FLOATS_A_THREAD = 1 << 15  # fewer are done before a second thread has woken up
_LANES, _TOGETHER = 16, 4  # as in native.c


class _Rotation(NamedTuple):
    """The matrix of a rule, as C takes it."""

    turned: Tensor
    """Small factors, float32, the leading one first, each transposed."""
    orders: Tensor
    """Orders of the factors, int64."""
    run: int
    """Order of Sylvester's matrix."""
    block: int
    scale: float


def hadamard(x: Tensor, rule: str, transpose: bool) -> Tensor:
    """Q x or Qᵀ x for x [..., n] on the CPU, of x's type; without a compiler, and for float64, by the reference."""
    return rotate(x, rule, x.shape[-1], None, None, x.shape[-1], 1.0, transpose)


def rotate(
    x: Tensor,
    rule: str,
    size: int,
    before: Tensor | None,
    after: Tensor | None,
    length: int,
    factor: float,
    transpose: bool,
) -> Tensor:
    """As `reference.rotate` on the CPU, rounded only once; what C cannot do, by the reference."""
    library, given = _library(), x.shape[-1]
    rotation = _rotation(rule, size, transpose) if _taken(x) and x.numel() else None
    if library is None or rotation is None or not (_taken(before) and _taken(after)):
        return reference.rotate(x, rule, size, before, after, length, factor, transpose)
    x, rows, types = x.contiguous(), x.numel() // given, build.TYPES
    before, after = (None if each is None else each.contiguous() for each in (before, after))
    threads = max(1, min(torch.get_num_threads(), rows, rows * size // _FLOATS_A_THREAD))
    y = torch.empty(*x.shape[:-1], length, dtype=x.dtype, device="cpu")
    scratch = torch.empty(given + length + 2 * threads * size, dtype=torch.float32, device="cpu")
    library.hadamard_rotate(
        *(x.data_ptr(), rows, given, length, types[x.dtype]),
        *((None, 0) if before is None else (before.data_ptr(), types[before.dtype])),
        *((None, 0) if after is None else (after.data_ptr(), types[after.dtype])),
        *(rotation.turned.data_ptr(), rotation.orders.data_ptr(), len(rotation.orders), rotation.run, rotation.block),
        *(size, rotation.scale * factor, scratch.data_ptr(), y.data_ptr(), threads),
    )
    return y


def _taken(tensor: Tensor | None) -> bool:
    """Whether C takes this tensor [...]; none is fine."""
    return tensor is None or (tensor.dtype in build.TYPES and tensor.is_cpu)


@cache
def _rotation(rule: str, size: int, transpose: bool) -> _Rotation | None:
    """None where C cannot do it: what a small factor mixes lies in runs shorter than C's."""
    *small, sylvester = factors(rule, size)
    run, orders = order(sylvester), [order(name) for name in small]
    if small and (run % _LANES or any(each % _TOGETHER for each in orders)):
        return None
    with torch.inference_mode(False), torch.device("cpu"):
        matrices = [matrix(name) if transpose else matrix(name).T for name in small]
        turned = torch.cat([torch.empty(0), *(each.float().flatten() for each in matrices)])
        block = reference.block_size(rule, size)
        return _Rotation(turned, torch.tensor(orders, dtype=torch.int64), run, block, reference.scale(rule, size))


@cache
def _library() -> ctypes.CDLL | None:
    library = build.library("hadamard")
    if library is not None:
        pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.hadamard_rotate.argtypes = [
            *(pointer, long, long, long, number),  # x, rows, given, length, type
            *(pointer, number, pointer, number),  # before, after, and their types
            *(pointer, pointer, long, long, long),  # turned, orders, factors, run, block
            *(long, ctypes.c_float, pointer, pointer, number),  # size, scale, scratch, y, threads
        ]
        library.hadamard_rotate.restype = None
    return library
