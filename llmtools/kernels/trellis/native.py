"""Trellis codes on the CPU, in C: the same bits as the reference."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from ...errors import InputError
from .. import build
from . import reference
from .tables import CODES, ORDERS, TILE, dimension, values

_DECODED_A_THREAD = 1 << 15  # fewer weights are done before a second thread has woken up


class _Weight(ctypes.Structure):
    """As in native.c."""

    _fields_ = (
        ("trellis", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("bits", ctypes.c_int),
        ("state_bits", ctypes.c_int),
        ("code", ctypes.c_int),
        ("order", ctypes.c_int),
    )


def dequantize_trellis(
    trellis: Tensor,
    table: Tensor | None,
    bits: int,
    state_bits: int,
    code: str,
    order: str,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """trellis [out, k·b] int16 on the CPU -> rows start … stop, [stop − start, 16b] of `dtype`.

    Without a compiler, and for float64, by the reference.
    """
    library = _library()
    if library is None or dtype not in build.TYPES:
        return reference.dequantize_trellis(trellis, table, bits, state_bits, code, order, start, stop, dtype)
    trellis, table = trellis.contiguous(), _wide(table)
    out = torch.empty(stop - start, trellis.shape[1] // bits * TILE, dtype=dtype, device="cpu")
    weight = _weight(trellis, table, bits, state_bits, code, order)
    library.trellis_decode(weight, start, stop, build.TYPES[dtype], out.data_ptr(), _threads(out.numel()))
    return out


def multiply_trellis(
    x: Tensor,
    trellis: Tensor,
    table: Tensor | None,
    bits: int,
    state_bits: int,
    code: str,
    order: str,
    transposed: bool,
) -> Tensor:
    """x [t, 16b] -> [t, out] of x's type, or transposed x [t, out] -> [t, 16b]; trellis [out, k·b] int16.

    In C, and for float64 by the reference. Raises InputError for an x of another width.
    """
    library = _library()
    if library is None or x.dtype not in build.TYPES:
        return reference.multiply_trellis(x, trellis, table, bits, state_bits, code, order, transposed)
    columns = trellis.shape[1] // bits * TILE
    summed, kept = (len(trellis), columns) if transposed else (columns, len(trellis))
    if x.dim() != 2 or x.shape[1] != summed:
        raise InputError(f"activations of shape {list(x.shape)} do not fit a weight with {summed} to sum over")
    wide, trellis, table = x.to(torch.float32).contiguous(), trellis.contiguous(), _wide(table)
    y = torch.empty(len(x), kept, dtype=torch.float32, device="cpu")
    multiply = library.trellis_multiply_transposed if transposed else library.trellis_multiply
    weight = _weight(trellis, table, bits, state_bits, code, order)
    multiply(weight, wide.data_ptr(), len(x), y.data_ptr(), _threads(len(trellis) * columns))
    return y.to(x.dtype)


def encode_trellis(weight: Tensor, table: Tensor | None, bits: int, state_bits: int, code: str) -> Tensor:
    """weight [out, 16b] float32, contiguous, on any device -> trellis [out, k·b] int16."""
    library = _library()
    if library is None or weight.device.type != "cpu":
        return reference.encode_trellis(weight, table, bits, state_bits, code)
    rows, blocks = len(weight), weight.shape[1] // TILE
    trellis = torch.empty(rows, blocks * bits, dtype=torch.int16, device="cpu")
    worth = values(code, table, state_bits, torch.device("cpu"), torch.float32).T.contiguous()  # [v, 2^L]
    threads = max(1, min(torch.get_num_threads(), -(-rows // TILE) * blocks))
    complete = library.trellis_encode(
        weight.data_ptr(),
        rows,
        blocks,
        worth.data_ptr(),
        dimension(code),
        bits,
        state_bits,
        trellis.data_ptr(),
        threads,
    )
    if not complete:
        raise MemoryError(f"no memory for the search over 2^{state_bits} states")
    return trellis


def usable(device: torch.device) -> bool:
    """Whether C decodes there."""
    return device.type == "cpu" and _library() is not None


def _weight(trellis: Tensor, table: Tensor | None, bits: int, state_bits: int, code: str, order: str) -> _Weight:
    """A view: the tensors, contiguous, the table float32, must be kept while it is used."""
    pointers = trellis.data_ptr(), None if table is None else table.data_ptr()
    sizes = len(trellis), trellis.shape[1] // bits, bits, state_bits
    return _Weight(*pointers, *sizes, CODES.index(code), ORDERS.index(order))


def _wide(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.to(torch.float32).contiguous()


def _threads(weights: int) -> int:
    return max(1, min(torch.get_num_threads(), weights // _DECODED_A_THREAD))


@cache
def _library() -> ctypes.CDLL | None:
    library = build.library("trellis")
    if library is not None:
        pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        weight = ctypes.POINTER(_Weight)
        library.trellis_encode.argtypes = [pointer, long, long, pointer, *(3 * [number]), pointer, number]
        library.trellis_encode.restype = number
        library.trellis_decode.argtypes = [weight, long, long, number, pointer, number]
        library.trellis_multiply.argtypes = [weight, pointer, long, pointer, number]
        library.trellis_multiply_transposed.argtypes = library.trellis_multiply.argtypes
        for each in (library.trellis_decode, library.trellis_multiply, library.trellis_multiply_transposed):
            each.restype = None
    return library
