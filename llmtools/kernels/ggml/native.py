"""ggml's blocks on the CPU, in C: `decode.h` decodes blocks, `native.c` rows, and multiplies.

Without the library, and for other types, float64 and rows that are not contiguous, the reference is used.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from .. import build
from ..build import TYPES as FLOATS
from . import reference
from .types import TYPES

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""Names of the types that the C library supports."""
_SMALL = 2**15
"""Number of weights below which more threads are slower."""


def dequantize_ggml(blocks: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] of `dtype`; arguments as in the package's docstring."""
    given = _weight(blocks, kind) if dtype in FLOATS else None
    if given is None:
        return reference.dequantize_ggml(blocks, kind, dtype)
    out = blocks.new_empty((blocks.shape[0], given.columns), dtype=dtype)
    threads = torch.get_num_threads() if out.numel() > _SMALL else 1
    if not library().dequantize(given, blocks.shape[0], FLOATS[dtype], out.data_ptr(), threads):
        raise MemoryError(f"no memory for a row of {given.columns} weights")
    return out


def multiply_ggml(x: Tensor, blocks: Tensor, kind: str, transposed: bool) -> Tensor:
    """x [t, in] -> [t, out], or [t, out] -> [t, in]; arguments as in the package's docstring."""
    rows, columns = blocks.shape[0], blocks.shape[1] // TYPES[kind].bytes * TYPES[kind].weights
    summed, kept = (rows, columns) if transposed else (columns, rows)
    if x.dim() != 2 or x.shape[1] != summed:
        raise InputError(f"activations of shape {list(x.shape)} do not fit a weight; [t, {summed}] is expected")
    given = _weight(blocks, kind) if x.dtype in FLOATS and x.is_cpu else None
    if given is None:
        return reference.multiply_ggml(x, blocks, kind, transposed)
    x, tokens = x.contiguous(), x.shape[0]
    y = x.new_empty((tokens, kept))
    threads = torch.get_num_threads() if rows * columns * tokens > _SMALL else 1
    product = library().multiply_transposed if transposed else library().multiply
    if not product(given, rows, x.data_ptr(), tokens, FLOATS[x.dtype], y.data_ptr(), threads):
        raise MemoryError(f"no memory for {tokens} rows of {summed} activations")
    return y


class _Weight(ctypes.Structure):
    """`Weight` of native.c."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("kind", ctypes.c_int),
    )


def _weight(blocks: Tensor, kind: str) -> _Weight | None:
    """The weight as an argument of the C library; None where that does not support it."""
    if library() is None or kind not in KINDS or not blocks.is_cpu:
        return None
    assert blocks.dtype == torch.uint8 and blocks.shape[1] % TYPES[kind].bytes == 0, (blocks.dtype, blocks.shape)
    if blocks.stride(1) != 1 and blocks.shape[1] > 1:
        return None
    columns = blocks.shape[1] // TYPES[kind].bytes * TYPES[kind].weights
    return _Weight(blocks.data_ptr(), blocks.stride(0), columns, TYPES[kind].number)


@functools.cache
def library() -> Any:
    """The library with its argument types declared, or None."""
    return build.weight_library("ggml", _Weight)
