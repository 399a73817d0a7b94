"""Lattice codes on the CPU, in C: over a million vectors encoded a second and core, the same bits as the reference."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from ...errors import InputError
from .. import build
from . import reference
from .tables import e8p_magnitudes, e8p_parts, e81b_table

_CHUNK = 64  # codes; as in native.c
_ENCODED_A_THREAD, _DECODED_A_THREAD = 64, 1 << 12  # fewer vectors are done before a second thread has woken up


def dequantize_lattice(codes: Tensor, residual: Tensor | None, residual_scale: float, dtype: torch.dtype) -> Tensor:
    """codes [..., b] int16, residual [..., b] uint8, int16 or None, on the CPU -> [..., 8b] of `dtype`.

    Without a compiler, and for float64, by the reference.
    """
    library = _library()
    if library is None or dtype not in build.TYPES:
        return reference.dequantize_lattice(codes, residual, residual_scale, dtype)
    codes, residual = codes.contiguous(), residual.contiguous() if residual is not None else None
    out = torch.empty(*codes.shape[:-1], 8 * codes.shape[-1], dtype=dtype, device="cpu")
    library.lattice_decode(
        codes.data_ptr(),
        residual.data_ptr() if residual is not None else None,
        residual_scale,
        codes.numel(),
        *_tables(residual),
        build.TYPES[dtype],
        out.data_ptr(),
        _threads(codes.numel(), _DECODED_A_THREAD),
    )
    return out


def multiply_lattice(
    x: Tensor, codes: Tensor, residual: Tensor | None, residual_scale: float, transposed: bool
) -> Tensor:
    """x [t, 8b] -> [t, out] of x's type, or transposed x [t, out] -> [t, 8b]; codes and residual [out, b].

    In C for half precision and not transposed; else, and where x is not finite, by the reference. Raises InputError
    for an x of another width.
    """
    library = _library()
    if library is None or transposed or x.dtype not in (torch.bfloat16, torch.float16):
        return reference.multiply_lattice(x, codes, residual, residual_scale, transposed)
    rows, blocks, tokens = *codes.shape, x.shape[0]
    if x.dim() != 2 or x.shape[1] != 8 * blocks:
        raise InputError(f"activations of shape {list(x.shape)} do not fit a weight with {8 * blocks} inputs")
    wide, codes = x.to(torch.float32).contiguous(), codes.contiguous()
    residual = residual.contiguous() if residual is not None else None
    quantized = torch.empty(tokens, 8 * blocks, dtype=torch.int16, device="cpu")
    scales = torch.empty(tokens, -(-blocks // _CHUNK), dtype=torch.float32, device="cpu")
    y = torch.empty(tokens, rows, dtype=torch.float32, device="cpu")
    finite = library.lattice_multiply(
        codes.data_ptr(),
        residual.data_ptr() if residual is not None else None,
        residual_scale,
        rows,
        blocks,
        *_tables(residual),
        wide.data_ptr(),
        tokens,
        quantized.data_ptr(),
        scales.data_ptr(),
        y.data_ptr(),
        _threads(codes.numel() * tokens, _DECODED_A_THREAD),
    )
    return y.to(x.dtype) if finite else reference.multiply_lattice(x, codes, residual, residual_scale, transposed)


def encode_e8p(x: Tensor) -> Tensor:
    """x [n, 8] float32, contiguous, on any device -> codes [n] int16."""
    library = _library()
    if library is None or x.device.type != "cpu":
        return reference.encode_e8p(x)
    codes = torch.empty(len(x), dtype=torch.int16, device="cpu")
    threads = _threads(len(x), _ENCODED_A_THREAD)
    library.lattice_encode_e8p(x.data_ptr(), len(x), e8p_magnitudes().data_ptr(), codes.data_ptr(), threads)
    return codes


def encode_e81b(x: Tensor) -> Tensor:
    """x [n, 8] float32, contiguous, on any device -> codes [n] uint8."""
    library = _library()
    if library is None or x.device.type != "cpu":
        return reference.encode_e81b(x)
    codes = torch.empty(len(x), dtype=torch.uint8, device="cpu")
    threads = _threads(len(x), _ENCODED_A_THREAD)
    library.lattice_encode_e81b(x.data_ptr(), len(x), e81b_table().data_ptr(), codes.data_ptr(), threads)
    return codes


def usable(device: torch.device) -> bool:
    """Whether C decodes there."""
    return device.type == "cpu" and _library() is not None


def _tables(residual: Tensor | None) -> tuple[int | None, ...]:
    """Where e8p_parts() lie, and e81b_table() or None."""
    magnitudes, flips, offsets = e8p_parts()
    second = e81b_table().data_ptr() if residual is not None and residual.dtype == torch.uint8 else None
    return magnitudes.data_ptr(), flips.data_ptr(), offsets.data_ptr(), second


def _threads(vectors: int, vectors_a_thread: int) -> int:
    return max(1, min(torch.get_num_threads(), vectors // vectors_a_thread))


@cache
def _library() -> ctypes.CDLL | None:
    library = build.library("lattice")
    if library is not None:
        pointer, long, real, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
        library.lattice_encode_e8p.argtypes = [pointer, long, pointer, pointer, number]
        library.lattice_encode_e81b.argtypes = [pointer, long, pointer, pointer, number]
        library.lattice_decode.argtypes = [
            *(pointer, pointer, real, long),  # codes, residual, residual_scale, n
            *(pointer, pointer, pointer, pointer),  # magnitudes, flips, offsets, table
            *(number, pointer, number),  # type, out, threads
        ]
        library.lattice_multiply.argtypes = [
            *(pointer, pointer, real, long, long),  # codes, residual, residual_scale, rows, blocks
            *(pointer, pointer, pointer, pointer),  # magnitudes, flips, offsets, table
            *(pointer, long, pointer, pointer, pointer, number),  # x, tokens, quantized, scales, y, threads
        ]
        library.lattice_multiply.restype = number
        for function in (library.lattice_encode_e8p, library.lattice_encode_e81b, library.lattice_decode):
            function.restype = None
    return library
