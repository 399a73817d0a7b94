"""Rows of a weight stored in ggml's blocks, as GGUF files have them.

A row is blocks of 32 or 256 weights, each with its scales in it, one after the other; rows are independent. So a weight
[out, in] is one tensor of bytes [out, in / weights · bytes], and any rows of it decode by themselves.

    blocks [out, row_bytes] uint8, kind: a name of `TYPES`

`reference.py` is the specification; `native.py` with `native.c` the CPU's C. Other devices have the reference.
"""

from __future__ import annotations

import torch

from ..ops import constant_result, define
from . import native, reference
from .reference import iq1_m_scale
from .types import NUMBERS, TYPES, BlockType

__all__ = ["NUMBERS", "TYPES", "BlockType", "decodes", "dequantize_ggml", "iq1_m_scale", "multiply_ggml"]


def _columns(blocks: torch.Tensor, kind: str) -> int:
    return blocks.shape[1] // TYPES[kind].bytes * TYPES[kind].weights


dequantize_ggml = define(
    "dequantize_ggml(Tensor blocks, str kind, ScalarType dtype) -> Tensor",
    package=__name__,
    reference=reference.dequantize_ggml,
    native=native.dequantize_ggml,
    fake=lambda blocks, kind, dtype: blocks.new_empty((blocks.shape[0], _columns(blocks, kind)), dtype=dtype),
)
"""The weight [out, in] of a type."""
multiply_ggml = define(
    "multiply_ggml(Tensor x, Tensor blocks, str kind, bool transposed) -> Tensor",
    package=__name__,
    reference=reference.multiply_ggml,
    native=native.multiply_ggml,
    fake=lambda x, blocks, kind, transposed: x.new_empty(
        (x.shape[0], _columns(blocks, kind) if transposed else blocks.shape[0])
    ),
)
"""x [t, in] @ weight.T -> [t, out] of x's type, for decoding, where t is small (GEMV); with `transposed`, its gradient:
x [t, out] @ weight -> [t, in]. Neither is differentiable; sums are float32."""


@constant_result
def decodes(device: torch.device, kind: str) -> bool:
    """Whether C decodes rows of that type on that device, and multiplies by them."""
    return device.type == "cpu" and kind in native.KINDS and native.library() is not None
