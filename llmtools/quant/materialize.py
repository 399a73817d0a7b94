"""y = x Wᵀ where W exists only while it is being used (ModuLoRA, arXiv:2309.16119, sections 3.2 and 3.3).

Forward and backward decode the weight a block of rows at a time and drop each block after its product, so a layer
needs its packed tensors and one block of scratch, whatever its size. Nothing dense is kept for backward: the packed
tensors are saved, neither x nor W, because the weight is frozen and only the gradient of x is wanted.

Shapes: out, in — features; t — tokens; r — rows in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

DEFAULT_MATERIALIZE_BYTES = 32 * 2**20
"""Scratch for one block of rows; `python -m benchmarks.materialize` measures the choice."""

_budget = DEFAULT_MATERIALIZE_BYTES


class Rows(Protocol):
    """Anything that gives rows of a weight: a quantizer, or a grid in its own coordinates."""

    @property
    def scratch_bytes(self) -> int: ...
    def out_features(self, packed: dict[str, Tensor]) -> int: ...
    def dequantize(self, packed: dict[str, Tensor], rows: slice = ..., dtype: torch.dtype = ...) -> Tensor: ...


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


def materialized_linear(x: Tensor, source: Rows, packed: dict[str, Tensor]) -> Tensor:
    """x [..., in] @ W.T -> [..., out], W = source.dequantize(packed), differentiable in x; autocast is honoured."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    result: Tensor = Materialize.apply(x, source, _budget, tuple(packed), *packed.values())
    return result


class Materialize(torch.autograd.Function):
    """The product and its gradient in x. The budget of forward holds for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Rows, budget: int, names: tuple[str, ...], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        packed = dict(zip(names, tensors, strict=True))
        out_features, in_features = source.out_features(packed), x.shape[-1]
        ctx.source, ctx.budget, ctx.names, ctx.in_features = source, budget, names, in_features
        step = _rows_per_block(source, in_features, budget)
        if step >= out_features:
            return F.linear(x, source.dequantize(packed, slice(0, out_features), x.dtype))
        y = x.new_empty(*x.shape[:-1], out_features)
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            y[..., rows] = F.linear(x, source.dequantize(packed, rows, x.dtype))  # [t, in] @ [r, in].T
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if not ctx.needs_input_grad[0]:
            return (None,) * (4 + len(ctx.names))
        source, packed = ctx.source, dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        out_features, in_features = grad.shape[-1], ctx.in_features
        step = _rows_per_block(source, in_features, ctx.budget)
        if step >= out_features:
            weight = source.dequantize(packed, slice(0, out_features), grad.dtype)
            return (grad @ weight, *(None,) * (3 + len(ctx.names)))
        # Blocks are summed in float32 at least, so that the number of blocks does not show in bf16 gradients.
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_x = grad.new_zeros(*grad.shape[:-1], in_features, dtype=wide)
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            grad_x += grad[..., rows] @ source.dequantize(packed, rows, grad.dtype)  # [t, r] @ [r, in]
        return (grad_x.to(grad.dtype), *(None,) * (3 + len(ctx.names)))


def _rows_per_block(source: Rows, in_features: int, budget: int) -> int:
    rows = max(1, budget // (in_features * source.scratch_bytes))
    return rows if rows < 16 else rows - rows % 16
