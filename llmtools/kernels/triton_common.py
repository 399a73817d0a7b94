"""GPU kernels for packed weights of any format: decode, multiply, and multiply by the transpose.

A format brings one Triton function, its *tile*: it decodes a rectangle of the weight into registers. The three kernels
below call it, so that a format costs one function and a weight is never written to memory unless asked for:

    dequantize              W                  decode, round, store
    multiply                x Wᵀ               x [t, in] -> [t, out]; GEMV
    multiply_transposed     g W                g [t, out] -> [t, in]; GEMV

The products read each packed weight once. They are for decoding (GEMV), where reading the weight dominates the time;
for more tokens, decoding blocks of rows for the vendor's matrix product is
faster. One token is multiplied and summed by ordinary instructions in float32; several are padded to a power of two for
the tensor cores, which take the weight rounded to x's type and sum in float32. Where the output has too few tiles to
occupy the GPU, the summed dimension is split and the float32 parts are added in a second step: in a fixed order, hence
with the same bits each time. Nothing synchronises with the host, so all of it can be captured in a CUDA graph.

The sizes of tiles were chosen by the registers, spills and instructions of the machine code for Ampere and Hopper, not
by a clock; `python -m benchmarks.gpu` has the clock.

Shapes: out, in — features; t — tokens; a tile has ROWS × COLUMNS weights, both powers of two.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import InputError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels read and write."""
MOST_TOKENS = 64
"""Largest number of rows of x in one launch of a product."""


class Weight(NamedTuple):
    """Arguments of the kernels for a packed weight."""

    tile: Any
    """Triton function (tensors, rows, live, first, CONFIG, COLUMNS) -> float32 [ROWS, COLUMNS]: the weights of these
    rows, where they are `live`, from column `first` on; anything finite elsewhere."""
    config: tuple[int, ...]
    """Compile-time constants of the tile."""
    tensors: tuple[Any, ...]
    """Runtime arguments of the tile: tensors, strides, sizes."""
    rows: int
    """Number of rows of the weight, out."""
    columns: int
    """Number of columns of the weight, in."""
    stages: int = 3
    """Number of pipeline stages of a product. Their loads go through shared memory, and so would look-ups in tables,
    needlessly: tiles with look-ups set 1."""
    most_rows: int = 64
    """Rows of a product's tile with several tokens; fewer for tiles that need many registers."""


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], rounded once to `dtype`."""
    out = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.tensors[0].device)
    rows, columns = 16, min(256, _power(weight.columns))
    if out.numel():
        grid = (_blocks(weight.rows, rows), _blocks(weight.columns, columns))
        _dequantize[grid](
            out,
            weight.tensors,
            weight.rows,
            weight.columns,
            weight.tile,
            weight.config,
            rows,
            columns,
            num_warps=4,
            enable_fp_fusion=False,  # contracting a·b + c to a fused operation would round once, not twice
        )
    return out


def multiply(x: Tensor, weight: Weight) -> Tensor:
    """x [t, in] -> [t, out] of x's type."""
    return _product(x, weight, _multiply, weight.rows, weight.columns)


def multiply_transposed(g: Tensor, weight: Weight) -> Tensor:
    """g [t, out] -> [t, in] of g's type."""
    return _product(g, weight, _multiply_transposed, weight.columns, weight.rows)


def _product(x: Tensor, weight: Weight, kernel: Any, kept: int, summed: int) -> Tensor:
    """x [t, summed] -> [t, kept]."""
    if x.dim() != 2 or x.shape[1] != summed:
        raise InputError(f"a tensor of shape {list(x.shape)} does not fit a weight with {summed} to sum over")
    if x.shape[0] > MOST_TOKENS:
        return torch.cat([_product(part, weight, kernel, kept, summed) for part in x.split(MOST_TOKENS)])
    x, tokens = x.contiguous(), x.shape[0]
    if not (tokens and kept and summed):
        return x.new_zeros(tokens, kept)
    padded = 1 if tokens == 1 else _power(tokens)
    along_rows = kernel is _multiply
    if padded == 1:
        rows, columns = (4, 1024) if along_rows else (16, 256)
    elif x.dtype == torch.float32:  # no tensor cores; a thread holds whole rows of its operands
        rows, columns = 32, 32
    else:  # look-ups need more registers
        rows, columns = weight.most_rows, 64 if weight.stages == 1 else 128
    columns = min(columns, _power(weight.columns))
    keep, step = (rows, columns) if along_rows else (columns, rows)
    tiles, steps = _blocks(kept, keep), _blocks(summed, step)
    splits = min(steps, _blocks(_programs(x.device), tiles), 32)
    span = _blocks(steps, splits) * step
    splits = _blocks(summed, span)
    parts = x.new_empty(splits, tokens, kept, dtype=x.dtype if splits == 1 else torch.float32)
    kernel[(tiles, splits)](
        parts, x, weight.tensors, tokens, kept, summed, span, weight.tile, weight.config, padded, rows, columns,
        num_warps=4, num_stages=weight.stages,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0).to(x.dtype)


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that a launch should have, so that each multiprocessor holds four."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _power(n: int) -> int:
    """The least power of two that is at least n, and at least 16, below which tensor cores cannot be used."""
    return max(16, 1 << (n - 1).bit_length())


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


# ---- the kernels ----


@triton.jit
def _dequantize(
    out, tensors, height, width, TILE: tl.constexpr, CONFIG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows, first = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS
    live, column = rows < height, first + tl.arange(0, COLUMNS)
    weight = TILE(tensors, rows, live, first, CONFIG, COLUMNS)
    place = out + rows.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(place, weight.to(out.dtype.element_ty), mask=live[:, None] & (column < width)[None, :])


@triton.jit
def _multiply(
    parts, x, tensors, tokens, height, width, span, TILE: tl.constexpr, CONFIG: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """parts[split, t, row] = Σ over the split's columns of x[t, column] · W[row, column]."""
    rows, split = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    live, token = rows < height, tl.arange(0, TOKENS)
    total = tl.zeros((ROWS, COLUMNS if TOKENS == 1 else TOKENS), tl.float32)
    for first in range(split * span, tl.minimum(split * span + span, width), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        weight = TILE(tensors, rows, live, first, CONFIG, COLUMNS)
        if TOKENS == 1:
            total += weight * tl.load(x + column, mask=column < width, other=0).to(tl.float32)[None, :]
        else:
            ok = (column < width)[:, None] & (token < tokens)[None, :]
            part = tl.load(x + column[:, None] + token[None, :] * width, mask=ok, other=0)  # [COLUMNS, TOKENS]
            total = tl.dot(weight.to(part.dtype), part, total, input_precision="ieee")
    place = parts + split.to(tl.int64) * tokens * height + rows
    if TOKENS == 1:
        tl.store(place, tl.sum(total, 1).to(parts.dtype.element_ty), mask=live)
    else:
        ok = live[:, None] & (token < tokens)[None, :]
        tl.store(place[:, None] + token[None, :] * height, total.to(parts.dtype.element_ty), mask=ok)


@triton.jit
def _multiply_transposed(
    parts, g, tensors, tokens, width, height, span, TILE: tl.constexpr, CONFIG: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """parts[split, t, column] = Σ over the split's rows of g[t, row] · W[row, column]."""
    first, split = tl.program_id(0) * COLUMNS, tl.program_id(1)
    column, token = first + tl.arange(0, COLUMNS), tl.arange(0, TOKENS)
    total = tl.zeros((ROWS if TOKENS == 1 else TOKENS, COLUMNS), tl.float32)
    end = tl.minimum(split * span + span, height)
    for start in range(split * span, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows < height
        weight = TILE(tensors, rows, live, first, CONFIG, COLUMNS)
        if TOKENS == 1:
            total += weight * tl.load(g + rows, mask=live, other=0).to(tl.float32)[:, None]
        else:
            ok = (token < tokens)[:, None] & live[None, :]
            part = tl.load(g + token[:, None] * height + rows[None, :], mask=ok, other=0)  # [TOKENS, ROWS]
            total = tl.dot(part, weight.to(part.dtype), total, input_precision="ieee")
    place = parts + split.to(tl.int64) * tokens * width + column
    if TOKENS == 1:
        tl.store(place, tl.sum(total, 0).to(parts.dtype.element_ty), mask=column < width)
    else:
        ok = (token < tokens)[:, None] & (column < width)[None, :]
        tl.store(place[None, :] + token[:, None] * width, total.to(parts.dtype.element_ty), mask=ok)


# ---- what tiles are made of ----


@triton.jit
def fields(stream, stride, words, rows, live, first, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes from column `first` on, a multiple of 8, of rows of a bit stream (kernels/bits): uint32 [ROWS, n, 8 or 4].

    A thread takes the codes that lie next to each other in a word, or across two where BITS does not divide 32.
    """
    RUN: tl.constexpr = 8 if BITS <= 4 else 4  # codes taken together, RUN · BITS ≤ 32
    bit = (first // RUN + tl.arange(0, COLUMNS // RUN)) * (RUN * BITS)
    word, shift = bit >> 5, (bit & 31).to(tl.uint32)[None, :]
    place = stream + rows.to(tl.int64)[:, None] * stride + word[None, :]
    field = tl.load(place, mask=live[:, None] & (word < words)[None, :], other=0).to(tl.uint32, bitcast=True)
    if RUN * BITS < 32:
        field = field >> shift
    if 32 % (RUN * BITS) != 0:
        after = tl.load(place + 1, mask=live[:, None] & (word + 1 < words)[None, :], other=0)
        field = field | ((after.to(tl.uint32, bitcast=True) << 1) << (31 - shift))
    return spread(field, BITS, RUN)


@triton.jit
def spread(field, BITS: tl.constexpr, RUN: tl.constexpr):
    """The fields of a word, lowest first: uint32 [ROWS, n] -> uint32 [ROWS, n, RUN]."""
    shift = (tl.arange(0, RUN) * BITS).to(tl.uint32)
    return (field[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)


@triton.jit
def number(code):
    """A code below 2^23 as float32. Placed in the mantissa of 2^23 it needs no conversion, which GPUs are slow at."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
