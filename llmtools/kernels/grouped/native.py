"""Groups of codes on the CPU, in C: `decode.h` rows, `multiply.h` products, `integer.h` those by products of bytes.

Where C cannot do it (no library, tensors that are strided within rows or lie elsewhere than in this machine's memory,
float64) the reference does.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from .. import build
from ..bits import words
from ..build import TYPES
from . import reference

BITS = (2, 3, 4, 8)
"""Bits of a code that C knows."""
_SMALL = 2**15  # weights; below, waking other threads costs more than they save


def dequantize_grouped(qweight: Tensor, *weight: Any) -> Tensor:
    """The weight [out, in]; arguments as in the package's docstring, the type last."""
    *tensors, dtype = weight
    given = _weight(qweight, *tensors) if dtype in TYPES else None
    if given is None:
        return reference.dequantize_grouped(qweight, *weight)
    rows, in_features = qweight.shape[0], tensors[-1]
    out = qweight.new_empty((rows, in_features), dtype=dtype)
    threads = torch.get_num_threads() if out.numel() > _SMALL else 1
    library().dequantize(given, rows, TYPES[dtype], out.data_ptr(), threads)
    return out


def multiply_grouped(x: Tensor, qweight: Tensor, *weight: Any) -> Tensor:
    """x [t, in] -> [t, out], or [t, out] -> [t, in]; arguments as in the package's docstring, `transposed` last."""
    *tensors, transposed = weight
    rows, in_features = qweight.shape[0], tensors[-1]
    summed, kept = (rows, in_features) if transposed else (in_features, rows)
    if x.dim() != 2 or x.shape[1] != summed:
        raise InputError(f"a tensor of shape {list(x.shape)} does not fit a weight with {summed} to sum over")
    given = _weight(qweight, *tensors) if x.dtype in TYPES and x.is_cpu else None
    if given is None:
        return reference.multiply_grouped(x, qweight, *weight)
    x, tokens = x.contiguous(), x.shape[0]
    y = x.new_empty((tokens, kept))
    threads = torch.get_num_threads() if rows * in_features * tokens > _SMALL else 1
    product = library().multiply_transposed if transposed else library().multiply
    if not product(given, rows, x.data_ptr(), tokens, TYPES[x.dtype], y.data_ptr(), threads):
        raise MemoryError(f"no memory for {tokens} rows of {summed} activations")
    return y


def multiply_each(x: Tensor, sizes: Sequence[int], weights: Sequence[Any]) -> Tensor | None:
    """As in the package's docstring."""
    if x.dtype not in TYPES or not x.is_cpu or library() is None:
        return None
    given = [_weight(*weight) for weight in weights]
    if None in given:
        return None
    x, rows, kind, threads = x.contiguous(), len(weights[0][0]), TYPES[x.dtype], torch.get_num_threads()
    y = x.new_empty((len(x), rows))
    product, start, stop = library().multiply, x.data_ptr(), y.data_ptr()
    wide, narrow = x.stride(0) * x.element_size(), rows * x.element_size()
    for weight, tokens in zip(given, sizes, strict=True):
        if not product(weight, rows, start, tokens, kind, stop, threads):
            raise MemoryError(f"no memory for {tokens} rows of {x.shape[1]} activations")
        start, stop = start + tokens * wide, stop + tokens * narrow
    return y


def encode_grouped(values: Tensor, *grid: Any) -> Tensor:
    """The codes [out, w] int32 nearest to values [out, in]; arguments as in the package's docstring."""
    scales, zeros, table, bits, group_size, shifted = grid
    given = [each for each in (values, scales, zeros, table) if each is not None]
    if library() is None or bits not in BITS or not all(each.is_cpu and each.dtype == torch.float32 for each in given):
        return reference.encode_grouped(values, *grid)
    values, scales = values.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    midpoints = None if table is None else (table[1:] + table[:-1]) / 2
    (rows, columns), width = values.shape, words(values.shape[1], bits)
    out = torch.empty((rows, width), dtype=torch.int32)
    pointers = [None if each is None else each.data_ptr() for each in (zeros, midpoints)]
    threads = torch.get_num_threads() if values.numel() > _SMALL else 1
    done = library().encode(
        *(values.data_ptr(), rows, columns, scales.data_ptr(), pointers[0], group_size, pointers[1]),
        *(bits, int(shifted), out.data_ptr(), width, threads),
    )
    if not done:
        raise MemoryError(f"no memory for the codes of {columns} columns")
    return out


class _Weight(ctypes.Structure):
    """`Weight` of decode.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("code_stride", ctypes.c_int64),
        ("code_bytes", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("scale_stride", ctypes.c_int64),
        ("scale_type", ctypes.c_int),
        ("zeros", ctypes.c_void_p),
        ("zero_stride", ctypes.c_int64),
        ("zero_bytes", ctypes.c_int64),
        ("zero", ctypes.c_float),
        ("bits", ctypes.c_int),
        ("group", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("levels", ctypes.c_float * 16),
        ("normal", ctypes.c_float),
    )


def _weight(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    table: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> _Weight | None:
    """The weight as C takes it, or None where it cannot. It points into the tensors, and into nothing made here."""
    if library() is None or not qweight.is_cpu or bits not in BITS or scales.dtype not in TYPES:
        return None
    rows, groups = qweight.shape[0], -(-in_features // group_size)
    assert qweight.dtype == torch.int32 and qweight.shape[1] * 32 >= in_features * bits, qweight.shape
    assert scales.shape == (rows, groups), scales.shape
    dense = (qweight.stride(1) == 1 or qweight.shape[1] <= 1) and (scales.stride(1) == 1 or groups <= 1)
    if qzeros is not None:
        assert qzeros.shape[0] == rows and qzeros.shape[1] * 8 >= groups * bits, qzeros.shape
        dense = dense and qzeros.dtype == torch.uint8 and (qzeros.stride(1) == 1 or qzeros.shape[1] <= 1)
    if table is not None:
        assert table.numel() == 2**bits and qzeros is None, "a codebook has 2^bits levels and no zero points"
        dense = dense and bits <= 4 and table.dtype == torch.float32 and table.is_contiguous()
    if not dense:
        return None
    return _Weight(
        qweight.data_ptr(),
        qweight.stride(0) * 4,
        qweight.shape[1] * 4,
        scales.data_ptr(),
        scales.stride(0),
        TYPES[scales.dtype],
        None if qzeros is None else qzeros.data_ptr(),
        0 if qzeros is None else qzeros.stride(0),
        0 if qzeros is None else qzeros.shape[1],
        2.0 ** (bits - 1) if table is None else 0.0,
        bits,
        group_size,
        in_features,
        None if table is None else table.data_ptr(),
    )


@functools.cache
def library() -> Any:
    """The library with its argument types declared, or None."""
    found = build.weight_library("grouped", _Weight)
    if found is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        weight = pointer, size, size, pointer, pointer, size, pointer  # values, rows, columns, …, group, midpoints
        found.encode.argtypes = [*weight, number, number, pointer, size, number]  # bits, shifted, out, words, threads
        found.encode.restype = number
    return found
