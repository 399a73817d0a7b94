"""Weights in ggml's blocks, as in GGUF files.

A row is a sequence of blocks of 32 or 256 weights with their scales. So a weight [out, in] is one tensor of bytes
[out, in / weights · bytes], and rows decode independently.

    blocks [out, row_bytes] uint8, kind: a name of `TYPES`

`reference.py` is the specification, `native.py` with `native.c` the implementation in C for the CPU (`decode.h` rows,
`integer.h` products by products of bytes), `triton.py` the GPU's kernel. `halves.py` reads and writes the float16
numbers of blocks, `encode.py` chooses codes on given scales.
"""

from __future__ import annotations

import torch

from ..ops import constant_result, define, has_triton
from . import native, reference
from .encode import ENCODINGS, codes_ggml, encode_ggml
from .halves import halves, with_halves
from .types import NUMBERS, TYPES, BlockType

__all__ = [
    "ENCODINGS",
    "NUMBERS",
    "TYPES",
    "BlockType",
    "codes_ggml",
    "decodes",
    "dequantize_ggml",
    "encode_ggml",
    "halves",
    "multiply_ggml",
    "with_halves",
]


def _columns(blocks: torch.Tensor, kind: str) -> int:
    return blocks.shape[1] // TYPES[kind].bytes * TYPES[kind].weights


dequantize_ggml = define(
    "dequantize_ggml(Tensor blocks, str kind, ScalarType dtype) -> Tensor",
    package=__name__,
    reference=reference.dequantize_ggml,
    native=native.dequantize_ggml,
    fake=lambda blocks, kind, dtype: blocks.new_empty((blocks.shape[0], _columns(blocks, kind)), dtype=dtype),
)
"""Weight [out, in] in `dtype`."""
multiply_ggml = define(
    "multiply_ggml(Tensor x, Tensor blocks, str kind, bool transposed) -> Tensor",
    package=__name__,
    reference=reference.multiply_ggml,
    native=native.multiply_ggml,
    fake=lambda x, blocks, kind, transposed: x.new_empty(
        (x.shape[0], _columns(blocks, kind) if transposed else blocks.shape[0])
    ),
)
"""Product x [t, in] @ weight.T -> [t, out] in x's dtype, for decoding, where t is small (GEMV); with `transposed`, its
gradient: x [t, out] @ weight -> [t, in]. Neither is differentiable; both accumulate in float32. On a CPU with byte
products, half-precision x is quantized to int16 with one scale per 32 columns, and summed in integers (`integer.h`)."""


@constant_result
def decodes(device: torch.device, kind: str) -> bool:
    """Whether rows of that type are decoded and multiplied on that device by a kernel of its own."""
    if kind not in native.KINDS:
        return False
    return has_triton(device) if device.type == "cuda" else device.type == "cpu" and native.library() is not None
