"""The C behind `affine` and `codebook`: rows of weights stored as small codes in groups.

    weight = (level[code] − zero) · scale                             (formed in float32, rounded once)

A uniform grid is the case level[k] = k, a codebook the case zero = 0. Both functions return None where C cannot do it
(no library, tensors elsewhere than in this machine's memory), and their callers then use the reference.

Shapes: out, in — features; G = ceil(in / group_size); w = ceil(in·bits / 32); t — tokens.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InputError
from .. import gpu
from ..compiling import constant_result
from ..native import TYPES, Op, library

WIDTHS = (2, 3, 4, 8)
"""Bits of a code that C knows."""
_SMALL = 2**15  # weights; below, waking other threads costs more than they save


class Codes(NamedTuple):
    """A weight as its packed tensors: the arguments that the two functions share."""

    qweight: Tensor
    """[out, w] int32"""
    scales: Tensor
    """[out, G]"""
    qzeros: Tensor | None
    """[out, ceil(G·bits / 8)] uint8, or None where `zero` holds for all"""
    zero: float
    table: Tensor | None
    """[2^bits] float32, or None where the level is the code"""
    bits: int
    group_size: int
    in_features: int


def dequantize(codes: Codes, dtype: torch.dtype) -> Tensor | None:
    """The weight [out, in] of `dtype`."""
    library, weight = _ready(codes, dtype)
    if weight is None:
        return None
    rows = codes.qweight.shape[0]
    out = codes.qweight.new_empty((rows, codes.in_features), dtype=dtype)
    library.dequantize(weight, rows, TYPES[dtype], out.data_ptr(), _threads(out.numel()))
    return out


def multiply(x: Tensor, codes: Codes) -> Tensor | None:
    """x [t, in] @ weight.T -> [t, out] of x's type; each packed weight is read once.

    Summed in float32, or, for x of half precision where the processor multiplies bytes, in integers, with x rounded to
    16 bits beside the largest activation of its group (`integer.h`).
    """
    return _product("multiply", x, codes, codes.in_features, codes.qweight.shape[0])


def multiply_transposed(g: Tensor, codes: Codes) -> Tensor | None:
    """g [t, out] @ weight -> [t, in] of g's type, summed in float32; each packed weight is read once."""
    return _product("multiply_transposed", g, codes, codes.qweight.shape[0], codes.in_features)


def _product(function: str, x: Tensor, codes: Codes, summed: int, kept: int) -> Tensor | None:
    """x [t, summed] -> [t, kept]."""
    if x.dim() != 2 or x.shape[1] != summed:
        raise InputError(f"a tensor of shape {list(x.shape)} does not fit a weight with {summed} to sum over")
    library, weight = _ready(codes, x.dtype)
    if weight is None or not x.is_cpu:
        return None
    tokens, rows = x.shape[0], codes.qweight.shape[0]
    x = x.contiguous()
    y = x.new_empty((tokens, kept))
    threads = _threads(rows * codes.in_features * tokens)
    call = getattr(library, function)
    if not call(weight, rows, x.data_ptr(), tokens, TYPES[x.dtype], y.data_ptr(), threads):
        raise MemoryError(f"no memory for {tokens} rows of {summed} numbers")
    return y


def or_reference(product: Callable[[Tensor, Codes], Tensor | None], codes: Callable[..., Codes], reference: Op) -> Op:
    """An op's CPU implementation: `product` of x and the weight's tensors, or the reference's where C cannot do it."""

    def run(x: Tensor, *weight: Any) -> Tensor:
        found = product(x, codes(*weight))
        result: Tensor = reference(x, *weight) if found is None else found
        return result

    return run


def define(schema: str, *, reference: Op, fake: Op, cpu: Op | None = None, cuda: Op | None = None) -> None:
    """The op ``llmtools::<schema>``. The reference serves devices that get no implementation of their own."""
    name = f"llmtools::{schema[: schema.index('(')]}"
    torch.library.define(name, schema[schema.index("(") :], tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", reference)
    for device, implementation in (("cpu", cpu), ("cuda", cuda)):
        if implementation is not None:
            torch.library.impl(name, device, implementation)
    torch.library.register_fake(name, fake)


@constant_result
def decodes(device: torch.device, bits: int) -> bool:
    """Whether rows are decoded on that device without memory beside the result's."""
    if device.type == "cuda":
        return gpu.usable(device)
    return device.type == "cpu" and bits in WIDTHS and _functions() is not None


@constant_result
def multiplies(device: torch.device, bits: int) -> bool:
    """Whether that device has products for few tokens."""
    return device.type == "cuda" or decodes(device, bits)


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


@functools.cache
def _functions() -> Any:
    """The library with its argument types declared, or None."""
    found = library("grouped")
    if found is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        weight = ctypes.POINTER(_Weight)
        found.dequantize.argtypes = [weight, size, number, pointer, number]
        found.multiply.argtypes = [weight, size, pointer, size, number, pointer, number]
        found.multiply_transposed.argtypes = found.multiply.argtypes
        found.dequantize.restype, found.multiply.restype, found.multiply_transposed.restype = None, number, number
    return found


def _ready(codes: Codes, dtype: torch.dtype) -> tuple[Any, _Weight | None]:
    """The library and the weight as C takes it, or None in its place."""
    functions = _functions()
    qweight, scales, qzeros, zero, table, bits, group_size, in_features = codes
    if functions is None or not qweight.is_cpu or bits not in WIDTHS:
        return functions, None
    if dtype not in TYPES or scales.dtype not in TYPES or (qzeros is not None and qzeros.dtype != torch.uint8):
        return functions, None
    rows, groups = qweight.shape[0], -(-in_features // group_size)
    assert qweight.dtype == torch.int32 and qweight.shape[1] * 32 >= in_features * bits, qweight.shape
    assert scales.shape == (rows, groups), scales.shape
    assert table is None or (table.dtype == torch.float32 and table.numel() == 2**bits and table.is_contiguous())
    if not (_dense_rows(qweight) and _dense_rows(scales)):
        return functions, None
    if qzeros is not None:
        assert qzeros.shape[0] == rows and qzeros.shape[1] * 8 >= groups * bits, qzeros.shape
        if not _dense_rows(qzeros):
            return functions, None
    return functions, _Weight(
        qweight.data_ptr(),
        qweight.stride(0) * 4,
        qweight.shape[1] * 4,
        scales.data_ptr(),
        scales.stride(0),
        TYPES[scales.dtype],
        None if qzeros is None else qzeros.data_ptr(),
        0 if qzeros is None else qzeros.stride(0),
        0 if qzeros is None else qzeros.shape[1],
        zero,
        bits,
        group_size,
        in_features,
        None if table is None else table.data_ptr(),
    )


def _dense_rows(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1 or tensor.shape[1] <= 1


def _threads(work: int) -> int:
    return torch.get_num_threads() if work > _SMALL else 1
