"""The transform on a GPU: one kernel for M ⊗ S, a factor of any order and Sylvester's matrix, read once, written once.

    y = (M ⊗ S) x / √n :      y[k', j'] = Σ_j S[j', j] Σ_k M[k', k] x[k, j] / √n

A program has ROWS of the indices k' and VECTORS whole runs of j. M comes first: it and x are exact in x's type, so the
tensor cores multiply them exactly, and sum in float32. Then S takes log2 steps of sums and differences between
neighbours; each step moves the pair's halves apart, so that all steps are alike (Pease's constant geometry, JACM 1968),
which lets the compiler keep most of them within a thread. The result is scaled and rounded once.

Rules of several factors, vectors too long for the registers of a multiprocessor, and float64 go to the reference.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_common
from . import reference
from .matrices import order
from .rules import factors

_LONGEST = 32768
"""Numbers that a program holds at most."""
_USUAL = 2048
"""Numbers that a program has where it can choose."""


def hadamard(x: Tensor, rule: str, transpose: bool) -> Tensor:
    """Q x or Qᵀ x for x [..., n] on a GPU, of x's type; what no program can hold, by the reference."""
    n = x.shape[-1]
    *small, sylvester = factors(rule, n)
    run, k = order(sylvester), order(small[0]) if small else 1
    rows = min(64, max(16, 1 << (k - 1).bit_length())) if small else 1
    while rows > 16 and rows * run > _LONGEST // 2:
        rows //= 2
    if len(small) > 1 or rows * run > _LONGEST or x.dtype not in triton_common.FLOATS or x.numel() == 0:
        return reference.hadamard(x, rule, transpose)
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    vectors = x.numel() // (k * run)
    together = max(1, 16 // run, _USUAL // (rows * run))
    together = min(together, max(16 // run, 1 << (vectors - 1).bit_length()))
    m = reference.factor(small[0], x.device, x.dtype) if small else x  # x stands in where there is none
    strides = (m.stride(1), m.stride(0)) if transpose else (m.stride(0), m.stride(1))
    warps = min(16, max(4, rows * run * together // 1024))
    _hadamard[(-(-vectors // together), -(-k // rows))](
        x, out, m, *(strides if small else (0, 0)), vectors, k, reference.scale(rule, n), together, run,
        run.bit_length() - 1, rows, 32, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return out


rotate = partial(reference.rotate, transform=hadamard)
"""As `reference.rotate`, with this transform."""


@triton.jit
def _hadamard(
    x, out, m, stride_row, stride_column, vectors, k, scale, VECTORS: tl.constexpr, RUN: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = VECTORS * RUN
    column = tl.arange(0, WIDTH)
    vector = tl.program_id(0) * VECTORS + column // RUN
    live, place = vector < vectors, vector.to(tl.int64) * (k * RUN) + column % RUN
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    if ROWS == 1:
        y = tl.load(x + place, mask=live, other=0).to(tl.float32)[None, :]
    else:
        y = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, k, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            ok = (rows < k)[:, None] & (depth < k)[None, :]
            left = tl.load(m + rows[:, None] * stride_row + depth[None, :] * stride_column, mask=ok, other=0)
            ok = (depth < k)[:, None] & live[None, :]
            right = tl.load(x + place[None, :] + depth[:, None] * RUN, mask=ok, other=0)
            y = tl.dot(left, right, y, input_precision="ieee")
    y = tl.reshape(y, (ROWS * VECTORS, RUN))
    for _ in tl.static_range(STEPS):
        even, odd = tl.split(tl.reshape(y, (ROWS * VECTORS, RUN // 2, 2)))
        halves = tl.permute(tl.join(even + odd, even - odd), (0, 2, 1))
        y = tl.reshape(halves, (ROWS * VECTORS, RUN))
    y = tl.reshape(y, (ROWS, WIDTH)) * scale
    ok = (rows < k)[:, None] & live[None, :]
    tl.store(out + place[None, :] + rows[:, None] * RUN, y.to(out.dtype.element_ty), mask=ok)
