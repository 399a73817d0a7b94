"""y = x Wᵀ where W exists only while it is being used (ModuLoRA, arXiv:2309.16119, sections 3.2 and 3.3).

Forward and backward decode the weight a block of rows at a time and drop each block after its product, so a layer
needs its packed tensors and one block of scratch, whatever its size. Nothing dense is kept for backward: the packed
tensors are saved, neither x nor W, because the weight is frozen and only the gradient of x is wanted.

Where a floating tensor of the weight (scales, zero points) requires a gradient, x is saved as well, and that gradient
is summed block by block: a block of the weight's own gradient, r rows of gradᵀ x, goes back through the decoding of its
rows and is dropped.

On a CPU a block stays in the processor's cache, so memory is read packed, once a pass; and half-precision inputs are
multiplied in float32 where the processor does that faster, so W is not rounded at all. For decoding there may be
a matrix-vector kernel (GEMV) that needs no blocks and decodes in registers (`Rows.multiply`).

Shapes: out, in — features; t — tokens; r — rows in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..kernels.build import features
from ..kernels.ops import constant_result

if TYPE_CHECKING:
    from .base import Packed, Rows

DEFAULT_MATERIALIZE_BYTES = 4 * 2**20
"""Scratch memory for one block of rows on a CPU, in bytes. Of 1, 2, 4 … 64 MB, 2 to 8 were best for three shapes and 64
to 512 tokens, within the noise; 1 MB cost up to 15 % more, 32 MB up to 100 % (`python -m benchmarks.materialize`)."""
DEVICE_MATERIALIZE_BYTES = 32 * 2**20
"""Scratch memory on other devices, in bytes, where a block should fill the device."""
GEMV_TOKENS = {"cpu": 32, "cuda": 16}
"""Largest number of tokens for `Rows.multiply`, by type of device. On a CPU with products of bytes (AVX-512 VNNI) it
was faster than blocks at 16 tokens, even at 32 and slower at 64, forward and backward. Other CPUs were not measured;
beside matrix units for half precision (AMX) it is `_GEMV_BESIDE_MATRIX_UNITS`, a guess, as is the GPU's."""
_GEMV_BESIDE_MATRIX_UNITS = 4

_HALVES = (torch.bfloat16, torch.float16)

_budget: int | None = None
_gemv_tokens: int | None = None


@contextmanager
def materialize_budget(max_bytes: int) -> Iterator[None]:
    """Within this context, a layer's forward materialises at most about `max_bytes` at a time; its backward as well."""
    global _budget
    if max_bytes < 1:
        raise ValueError(
            f"materialize_budget is {max_bytes} bytes; give at least 1 (one row is the least that is used)"
        )
    before, _budget = _budget, max_bytes
    try:
        yield
    finally:
        _budget = before


@contextmanager
def gemv_tokens(limit: int) -> Iterator[None]:
    """Within this context, GEMV kernels serve up to `limit` tokens instead of `GEMV_TOKENS`; 0: none."""
    global _gemv_tokens
    before, _gemv_tokens = _gemv_tokens, limit
    try:
        yield
    finally:
        _gemv_tokens = before


def materialized_linear(x: Tensor, source: Rows, packed: Packed) -> Tensor:
    """x [..., in] @ W.T -> [..., out], W = source.dequantize(packed); autocast is honoured.

    x and the result have x's type, or autocast's. Differentiable in x, and in the floating tensors of `packed` that
    require a gradient, which may have a wider dtype than in the layout; InputError where decoding does not depend on
    one differentiably.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in packed.values())):
        result: Tensor = Materialize.apply(x, source, _limits(x), tuple(packed), *packed.values())
        return result
    return _forward(x, source, packed, _limits(x))  # generating text: autograd would take some 10 µs


def product(x: Tensor, source: Rows, packed: Packed) -> Tensor:
    """x [t, in] @ W.T -> [t, out], without autograd and autocast."""
    with torch.no_grad():
        return _forward(x, source, packed, _limits(x))


def gradient(grad: Tensor, source: Rows, packed: Packed, in_features: int) -> Tensor:
    """grad [t, out] @ W -> [t, in], likewise."""
    with torch.no_grad():
        return _gradient(grad, source, packed, in_features, _limits(grad))


def _limits(x: Tensor) -> tuple[int, int]:
    """Bytes of a block, and up to how many tokens a GEMV kernel is used."""
    cpu = x.device.type == "cpu"
    budget = DEFAULT_MATERIALIZE_BYTES if cpu else DEVICE_MATERIALIZE_BYTES
    tokens = GEMV_TOKENS.get(x.device.type, 0)
    if cpu and x.dtype in _HALVES and _multiplies(x.dtype):
        tokens = _GEMV_BESIDE_MATRIX_UNITS
    return _budget if _budget is not None else budget, _gemv_tokens if _gemv_tokens is not None else tokens


class Materialize(torch.autograd.Function):
    """The product and its gradient in x. The budget and the limit of GEMV kernels hold for the backward, too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, source: Rows, limits: tuple[int, int], names: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors, *([x] if any(ctx.needs_input_grad[4:]) else []))
        ctx.source, ctx.limits, ctx.names, ctx.in_features = source, limits, names, x.shape[-1]
        return _forward(x, source, dict(zip(names, tensors, strict=True)), limits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        packed = dict(zip(ctx.names, ctx.saved_tensors, strict=False))
        trained = [name for name, needed in zip(ctx.names, ctx.needs_input_grad[4:], strict=True) if needed]
        floats: Packed = {}
        if trained:
            floats = _float_gradients(grad, ctx.saved_tensors[-1], ctx.source, packed, trained, ctx.limits[0])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _gradient(grad, ctx.source, packed, ctx.in_features, ctx.limits)
        return grad_x, None, None, None, *(floats.get(name) for name in ctx.names)


def _forward(x: Tensor, source: Rows, packed: Packed, limits: tuple[int, int]) -> Tensor:
    """x [..., in] @ W.T -> [..., out]."""
    if torch.is_autocast_enabled(x.device.type):  # x is cast already; autocast must not change the products within
        with torch.autocast(x.device.type, enabled=False):
            return _forward(x, source, packed, limits)
    budget, gemv_limit = limits
    rows = x.reshape(-1, x.shape[-1])  # [t, in]
    y = source.multiply(rows, packed) if rows.shape[0] <= gemv_limit else None
    if y is None:
        y = _product(rows, source, packed, budget)
    # Detached, since autograd forbids modifying views that a function returns in place.
    return y.reshape(*x.shape[:-1], y.shape[-1]).detach()


def _product(x: Tensor, source: Rows, packed: Packed, budget: int) -> Tensor:
    """x [t, in] @ W.T -> [t, out], a block of W's rows at a time."""
    out_features, dtype, inputs = source.out_features(packed), x.dtype, x.to(product_type(x))
    step = _rows_per_block(source, x.shape[1], budget, inputs)
    if step >= out_features:
        return F.linear(inputs, source.dequantize(packed, slice(0, out_features), inputs.dtype)).to(dtype)
    y = x.new_empty(x.shape[0], out_features)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        y[:, rows] = F.linear(inputs, source.dequantize(packed, rows, inputs.dtype))  # [t, in] @ [r, in].T
    return y


def _gradient(grad: Tensor, source: Rows, packed: Packed, in_features: int, limits: tuple[int, int]) -> Tensor:
    """grad [..., out] @ W -> [..., in]."""
    if torch.is_autocast_enabled(grad.device.type):
        with torch.autocast(grad.device.type, enabled=False):
            return _gradient(grad, source, packed, in_features, limits)
    budget, gemv_limit = limits
    rows = grad.reshape(-1, grad.shape[-1])  # [t, out]
    grad_x = source.multiply(rows, packed, transposed=True) if rows.shape[0] <= gemv_limit else None
    if grad_x is None:
        grad_x = _product_transposed(rows, source, packed, in_features, budget)
    return grad_x.reshape(*grad.shape[:-1], in_features)


def _product_transposed(grad: Tensor, source: Rows, packed: Packed, in_features: int, budget: int) -> Tensor:
    """grad [t, out] @ W -> [t, in], a block of W's rows at a time."""
    (tokens, out_features), dtype = grad.shape, product_type(grad)
    step = _rows_per_block(source, in_features, budget, grad.new_empty(0, dtype=dtype))
    if step >= out_features:
        return (grad.to(dtype) @ source.dequantize(packed, slice(0, out_features), dtype)).to(grad.dtype)
    # Blocks are summed in float32 at least, so that the number of blocks does not show in bf16 gradients.
    wide = torch.promote_types(dtype, torch.float32)
    grad_x = grad.new_zeros(tokens, in_features, dtype=wide)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        part = grad[:, rows].to(dtype)  # a block of W gets no name: it must be gone before the next is made
        if dtype == wide:
            grad_x.addmm_(part, source.dequantize(packed, rows, dtype))  # [t, r] @ [r, in]
        else:
            grad_x += part @ source.dequantize(packed, rows, dtype)
    return grad_x.to(grad.dtype)


def _float_gradients(grad: Tensor, x: Tensor, source: Rows, packed: Packed, trained: list[str], budget: int) -> Packed:
    """The gradients of floating tensors of the weight, from grad [..., out] and x [..., in], in their own dtypes."""
    out_features, inputs = source.out_features(packed), x.reshape(-1, x.shape[-1]).to(product_type(x))
    grad = grad.reshape(-1, grad.shape[-1]).to(inputs.dtype)
    leaves = {name: packed[name].detach().requires_grad_() for name in trained}
    sums = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    step = max(1, budget // (16 * inputs.shape[1]))  # the rows, their gradient and what autograd keeps between, float32
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            outer = (grad[:, rows].mT @ inputs).float()  # [r, t] @ [t, in]
            with torch.enable_grad():
                weight = source.dequantize(packed | leaves, rows, torch.float32)
            if not weight.requires_grad:
                raise InputError(f"{source}: its rows are not differentiable in {', '.join(trained)}")
            parts = torch.autograd.grad(weight, list(leaves.values()), outer, allow_unused=True)
            for name, part in zip(leaves, parts, strict=True):
                if part is not None:
                    sums[name] += part
    return sums


def product_type(x: Tensor) -> torch.dtype:
    """The type in which x [..., in] is multiplied: its own, or float32 where the processor is faster in that."""
    return torch.float32 if x.dtype in _HALVES and x.device.type == "cpu" and not _multiplies(x.dtype) else x.dtype


@constant_result
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of that half-precision type faster than float32.

    Intel's AVX-512 has bfloat16 products, but without AMX they are slower than float32's (Sapphire Rapids, torch 2.13;
    `python -m benchmarks.run layers` has both).
    """
    has = features()
    if dtype == torch.float16:
        return bool(has & {"amx_fp16", "avx512_fp16"})
    return bool(has & {"amx_bf16", "bf16"}) or ("avx512_bf16" in has and "GenuineIntel" not in has)


def _rows_per_block(source: Rows, in_features: int, budget: int, inputs: Tensor) -> int:
    rows = max(1, budget // (in_features * source.scratch_bytes(inputs.device, inputs.dtype)))
    return rows if rows < 16 else rows - rows % 16
