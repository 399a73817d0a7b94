"""The sum of a Hessian: Σ x xᵀ over the rows of bfloat16 activations, summed in float32.

    add_gram: total [n, n] float32, x [t, n] bfloat16 -> total += xᵀ x in its upper triangle, in place

A product of two bfloat16 numbers fits float32 exactly, so products of pairs of bfloat16 (AVX-512 BF16) sum what float32
products would: nothing is lost, and only half of a symmetric matrix is computed. Subnormal numbers count as zero. Torch
has no product of bfloat16 matrices with a float32 result on a CPU; the specification is ``total.addmm_(x.T, x)`` in
float32.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from .. import build


def has_gram(total: Tensor, x: Tensor) -> bool:
    """Whether `add_gram` is there for these: bfloat16 activations on a CPU with AVX-512 BF16, and a compiler."""
    plain = type(x) is Tensor and x.is_cpu and x.dtype == torch.bfloat16 and total.is_cpu
    return plain and _library() is not None


def add_gram(total: Tensor, x: Tensor) -> bool:
    """Adds xᵀ x for x [t, n] to the upper triangle of total [n, n]; False, with nothing added, where memory lacks.

    Entries below the diagonal may be changed as well; they have no meaning.
    """
    library = _library()
    assert library is not None and total.is_contiguous() and total.shape == (x.shape[1], x.shape[1])
    x = x.contiguous()
    return bool(library.add_gram(total.data_ptr(), x.data_ptr(), *x.shape, torch.get_num_threads()))


@cache
def _library() -> ctypes.CDLL | None:
    if "avx512_bf16" not in build.features():
        return None
    library = build.library("gram")
    if library is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.add_gram.argtypes = [pointer, pointer, size, size, number]
        library.add_gram.restype = number
        library.gram_is_there.restype = number
        return library if library.gram_is_there() else None
    return None
