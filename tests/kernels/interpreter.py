"""Triton's interpreter, with bfloat16 as a GPU has it: for tests of the kernels on the CPU.

The interpreter keeps bfloat16 as 16-bit integers. It cuts the lower bits off where a GPU rounds, and `tl.dot`
multiplies those integers; both are patched here. TRITON_INTERPRET=1 must be set before anything imports Triton.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def patch() -> None:
    """Makes conversions to bfloat16 round to nearest, ties to even, and products of bfloat16 right."""
    builder, cast, dot = (
        interpreter.InterpreterBuilder,
        interpreter._convert_float,
        interpreter.InterpreterBuilder.create_dot,
    )

    def convert(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
        return cast(data, source, target, rounding)

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(side, tl.float32) if side.dtype.scalar == tl.bfloat16 else side for side in (a, b))
        return dot(self, a, b, *rest)

    interpreter._convert_float, builder.create_dot = convert, create_dot
