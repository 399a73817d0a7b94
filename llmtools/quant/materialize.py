"""y = x Wᵀ where W exists only while it is being used (ModuLoRA, arXiv:2309.16119, sections 3.2 and 3.3).

Forward and backward decode the weight a block of rows at a time and drop each block after its product, so a layer
needs its packed tensors and one block of scratch, whatever its size. Nothing dense is kept for backward: the packed
tensors are saved, neither x nor W, because the weight is frozen and only the gradient of x is wanted.

Where a floating tensor of the weight (scales, zero points) requires a gradient, x is saved as well, and that gradient
is summed block by block: a block of the weight's own gradient, r rows of gradᵀ x, goes back through the decoding of its
rows and is dropped.

On a CPU a block stays in the processor's cache, so memory is read packed, once a pass; and half-precision inputs are
multiplied in float32 where the processor does that faster, so W is not rounded at all. There may be a kernel that needs
no blocks and multiplies while it decodes (`Rows.multiply`): for decoding (GEMV), and some for any number of tokens.
Which way is taken on a CPU is measured (`products.py`).

Shapes: out, in — features; t — tokens; r — rows in a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..kernels.ops import plain
from .products import DEFAULT_BLOCK_BYTES, HALVES, Choice, Way, choice, chosen

if TYPE_CHECKING:
    from .base import Packed, Rows

DEFAULT_MATERIALIZE_BYTES = DEFAULT_BLOCK_BYTES
DEVICE_MATERIALIZE_BYTES = 32 * 2**20
"""Scratch memory on other devices than a CPU, in bytes, where a block should fill the device."""
LARGEST_BLOCK_BYTES = 31 * 2**20
"""Scratch memory that many tokens may bring a block on a CPU to: glibc takes more than 32 MiB from the kernel, page by
page, each time."""
DEVICE_GEMV_TOKENS = 16
"""Largest number of tokens for `Rows.multiply` on a GPU, a guess."""
MULTIPLE = 8
"""Numbers of tokens that are no multiple of this are rounded up in products of half precision on a CPU. torch's library
for them (oneDNN) compiles a kernel for each shape, half a millisecond's work and half a megabyte, and keeps a
thousand; the experts of a mixture see any number of tokens."""

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
    """Within this context, GEMV kernels serve up to `limit` tokens instead of what `products.py` chose; 0: none."""
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
        result: Tensor = Materialize.apply(x, source, _ways(x, source, packed), tuple(packed), *packed.values())
        return result
    return _forward(
        x, source, packed, _ways(x, source, packed).forward
    )  # generating text: autograd would take some 10 µs


def products_of_each(x: Tensor, sizes: Sequence[int], source: Rows, packed: Sequence[Packed]) -> Tensor | None:
    """`materialized_linear` of several weights of one shape without gradients, where `Rows.multiply_each` is the way;
    else None. Arguments as there, x [Σ t, in]."""
    if torch.is_grad_enabled() or not plain(x):
        return None
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    way, most = _ways(x, source, packed[0]).forward, max(sizes)
    if most > way.few or most > source.multiply_tokens or (x.dtype in HALVES and not way.bytes):
        return None
    return source.multiply_each(x, sizes, packed)


def product(x: Tensor, source: Rows, packed: Packed) -> Tensor:
    """x [t, in] @ W.T -> [t, out], without autograd and autocast."""
    with torch.no_grad():
        return _forward(x, source, packed, _ways(x, source, packed).forward)


def gradient(grad: Tensor, source: Rows, packed: Packed, in_features: int) -> Tensor:
    """grad [t, out] @ W -> [t, in], likewise."""
    with torch.no_grad():
        return _gradient(grad, source, packed, in_features, _ways(grad, source, packed).transposed)


def multiply_by(way: Way, x: Tensor, source: Rows, packed: Packed, transposed: bool) -> Tensor:
    """x [t, in] @ W.T -> [t, out], or x [t, out] @ W -> [t, in] of a square W, in that way."""
    return _gradient(x, source, packed, x.shape[1], way) if transposed else _forward(x, source, packed, way)


def _ways(x: Tensor, source: Rows, packed: Packed) -> Choice:
    """How both products are computed, for inputs or gradients x [..., in or out]."""
    if x.is_cpu:
        out_features = source.out_features(packed)
        ways = _with_many(choice(x, lambda: out_features * x.shape[-1]), x, out_features)
    else:
        ways = Choice(*2 * [Way(x.dtype, DEVICE_MATERIALIZE_BYTES, DEVICE_GEMV_TOKENS)])
    if _budget is None and _gemv_tokens is None:
        return ways
    return Choice(_as_asked(ways.forward), _as_asked(ways.transposed))


def _with_many(ways: Choice, x: Tensor, out_features: int) -> Choice:
    """The ways with blocks as large as the inputs x [..., in] and outputs in float32 where these are larger: each block
    adds a product of their size to the sum in backward, so with many tokens few blocks are faster."""
    if torch.compiler.is_compiling():  # sizes are symbols
        return ways
    moved = min(4 * (x.numel() // max(1, x.shape[-1]) * (x.shape[-1] + out_features)), LARGEST_BLOCK_BYTES)
    if moved <= min(way.block_bytes for way in ways):
        return ways
    return Choice(*(way._replace(block_bytes=max(moved, way.block_bytes)) for way in ways))


def _as_asked(way: Way) -> Way:
    """The way within `materialize_budget` and `gemv_tokens`."""
    budget = way.block_bytes if _budget is None else _budget
    return Way(way.dtype, budget, way.few if _gemv_tokens is None else _gemv_tokens, way.bytes)


class Materialize(torch.autograd.Function):
    """The product and its gradient in x. The budget and the limit of GEMV kernels hold for the backward, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Rows, ways: Choice, names: tuple[str, ...], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors, *([x] if any(ctx.needs_input_grad[4:]) else []))
        ctx.source, ctx.ways, ctx.names, ctx.in_features = source, ways, names, x.shape[-1]
        return _forward(x, source, dict(zip(names, tensors, strict=True)), ways.forward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        packed = dict(zip(ctx.names, ctx.saved_tensors, strict=False))
        trained = [name for name, needed in zip(ctx.names, ctx.needs_input_grad[4:], strict=True) if needed]
        floats: Packed = {}
        if trained:
            floats = _float_gradients(grad, ctx.saved_tensors[-1], ctx.source, packed, trained, ctx.ways.forward)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _gradient(grad, ctx.source, packed, ctx.in_features, ctx.ways.transposed)
        return grad_x, None, None, None, *(floats.get(name) for name in ctx.names)


def _forward(x: Tensor, source: Rows, packed: Packed, way: Way) -> Tensor:
    """x [..., in] @ W.T -> [..., out]."""
    if torch.is_autocast_enabled(x.device.type):  # x is cast already; autocast must not change the products within
        with torch.autocast(x.device.type, enabled=False):
            return _forward(x, source, packed, way)
    rows = x.reshape(-1, x.shape[-1])  # [t, in]
    y = _fused(rows, source, packed, way, False)
    if y is None:
        y = _product(rows, source, packed, way)
    # Detached, since autograd forbids modifying views that a function returns in place.
    return y.reshape(*x.shape[:-1], y.shape[-1]).detach()


def _fused(x: Tensor, source: Rows, packed: Packed, way: Way, transposed: bool) -> Tensor | None:
    """The product by `Rows.multiply`, of x [t, in] or [t, out], where it is the way of so many tokens."""
    tokens = x.shape[0]
    if tokens > way.few or (x.is_cpu and tokens > source.multiply_tokens):
        return None
    if way.bytes or x.dtype not in HALVES:
        return source.multiply(x, packed, transposed)
    y = source.multiply(x.float(), packed, transposed)
    return None if y is None else y.to(x.dtype)


def _product(x: Tensor, source: Rows, packed: Packed, way: Way) -> Tensor:
    """x [t, in] @ W.T -> [t, out], a block of W's rows at a time."""
    tokens, out_features, dtype = x.shape[0], source.out_features(packed), x.dtype
    inputs = _in_few_shapes(x.to(_wide(x, way)))
    step = _rows_per_block(source, out_features, x.shape[1], way.block_bytes, inputs)
    if step >= out_features:
        return F.linear(inputs, source.dequantize(packed, slice(0, out_features), inputs.dtype))[:tokens].to(dtype)
    y = x.new_empty(tokens, out_features)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        y[:, rows] = F.linear(inputs, source.dequantize(packed, rows, inputs.dtype))[:tokens]  # [t, in] @ [r, in].T
    return y


def _in_few_shapes(x: Tensor) -> Tensor:
    """x [t, n] with rows of zeros up to a multiple of `MULTIPLE`, for products in half precision on a CPU."""
    more = -x.shape[0] % MULTIPLE if x.is_cpu and x.dtype in HALVES else 0
    return F.pad(x, (0, 0, 0, more)) if more else x


def _gradient(grad: Tensor, source: Rows, packed: Packed, in_features: int, way: Way) -> Tensor:
    """grad [..., out] @ W -> [..., in]."""
    if torch.is_autocast_enabled(grad.device.type):
        with torch.autocast(grad.device.type, enabled=False):
            return _gradient(grad, source, packed, in_features, way)
    rows = grad.reshape(-1, grad.shape[-1])  # [t, out]
    grad_x = _fused(rows, source, packed, way, True)
    if grad_x is None:
        grad_x = _product_transposed(rows, source, packed, in_features, way)
    return grad_x.reshape(*grad.shape[:-1], in_features)


def _product_transposed(grad: Tensor, source: Rows, packed: Packed, in_features: int, way: Way) -> Tensor:
    """grad [t, out] @ W -> [t, in], a block of W's rows at a time."""
    (tokens, out_features), dtype, result = grad.shape, _wide(grad, way), grad.dtype
    grad = _in_few_shapes(grad.to(dtype))
    step = _rows_per_block(source, out_features, in_features, way.block_bytes, grad)
    if step >= out_features:
        return (grad @ source.dequantize(packed, slice(0, out_features), dtype))[:tokens].to(result)
    # Blocks are summed in float32 at least, so that the number of blocks does not show in bf16 gradients.
    wide = torch.promote_types(dtype, torch.float32)
    grad_x = grad.new_zeros(len(grad), in_features, dtype=wide)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        part = grad[:, rows]  # a block of W gets no name: it must be gone before the next is made
        if dtype == wide:
            grad_x.addmm_(part, source.dequantize(packed, rows, dtype))  # [t, r] @ [r, in]
        else:
            grad_x += part @ source.dequantize(packed, rows, dtype)
    return grad_x[:tokens].to(result)


def _float_gradients(grad: Tensor, x: Tensor, source: Rows, packed: Packed, trained: list[str], way: Way) -> Packed:
    """The gradients of floating tensors of the weight, from grad [..., out] and x [..., in], in their own dtypes."""
    out_features, inputs = source.out_features(packed), x.reshape(-1, x.shape[-1]).to(_wide(x, way))
    grad = grad.reshape(-1, grad.shape[-1]).to(inputs.dtype)
    leaves = {name: packed[name].detach().requires_grad_() for name in trained}
    sums = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    step = max(
        1, way.block_bytes // (16 * inputs.shape[1])
    )  # the rows, their gradient and what autograd keeps between, float32
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
    return _wide(x, chosen(x.dtype).forward) if x.is_cpu else x.dtype


def _wide(x: Tensor, way: Way) -> torch.dtype:
    """x's type, or the way's for half precision."""
    return way.dtype if x.dtype in HALVES else x.dtype


def _rows_per_block(source: Rows, out_features: int, in_features: int, budget: int, inputs: Tensor) -> int:
    """Rows of equal blocks within the budget, in sixteens where it allows that."""
    rows = max(1, budget // (in_features * source.scratch_bytes(inputs.device, inputs.dtype)))
    if rows < 16:
        return rows
    rows -= rows % 16
    equal = -(-out_features // -(-out_features // rows))
    return equal + -equal % 16
