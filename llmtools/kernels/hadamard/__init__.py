"""Rotation by a Hadamard matrix, of every size, in O(n log n): it spreads outliers evenly over a vector.

For n = K·2^t features the matrix is Q = (M ⊗ S) / √n: S is Sylvester's matrix of order 2^t, M a Hadamard matrix of
order K, and feature i = k·2^t + j sits at index k of M and j of S (QuIP#, arXiv:2402.04396, §3 and appendix A). Q is
orthogonal, and in general not symmetric: the inverse is the transpose. Which M a size takes is its *rule*, a string
that `rule_for` chooses and that checkpoints store (`rules.py`); sizes without a known Hadamard matrix get a
block-diagonal one, so every n works.

    rule_for:      n -> rule
    hadamard:      x [..., n] -> Q x along the last dimension, or Qᵀ x; same shape and type, summed in float32 or wider
    rotate:        the same between two products by vectors, in one pass
    matrix:        name -> int8 [K, K]

>>> x = torch.randn(2, 11008)
>>> rule = rule_for(11008)                                        # 'williamson:172'
>>> hadamard(hadamard(x, rule), rule, transpose=True)             # x again, up to rounding
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..ops import define
from . import native, reference
from .matrices import matrix
from .rules import rule_for

__all__ = ["hadamard", "matrix", "rotate", "rule_for"]


def hadamard(x: Tensor, rule: str, transpose: bool = False) -> Tensor:
    """Q x along the last dimension of x [..., n], or Qᵀ x with `transpose`. Differentiable; works under torch.compile.

    Raises InputError where the rule does not fit n.
    """
    if not x.is_floating_point() or x.dim() == 0:
        raise InputError(f"hadamard needs floating-point vectors, not {x.dtype} of shape {tuple(x.shape)}")
    return _hadamard(x, rule, transpose)


def _setup_context(ctx: Any, inputs: tuple[Tensor, str, bool], output: Tensor) -> None:
    _, ctx.rule, ctx.transpose = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """The gradient of Q x with respect to x is Qᵀ grad."""
    return hadamard(grad, ctx.rule, not ctx.transpose), None, None


def rotate(
    x: Tensor,
    rule: str,
    size: int,
    *,
    before: Tensor | None = None,
    after: Tensor | None = None,
    length: int | None = None,
    factor: float = 1.0,
    transpose: bool = False,
) -> Tensor:
    """factor · after ∘ Q (before ∘ x), or with Qᵀ, for x [..., k] padded with zeros to `size` features: [..., length].

    before [k] and after [length] are of any float type, or 1; `length` entries are kept, by default all. The factor is
    1 where there is neither vector. Differentiable in x, before and after. Raises InputError where sizes do not fit.
    """
    length, given = size if length is None else length, x.shape[-1]
    if (
        max(given, length) > size
        or (before is not None and before.shape != (given,))
        or (after is not None and after.shape != (length,))
    ):
        vectors = " and ".join(str(list(each.shape)) for each in (before, after) if each is not None)
        raise InputError(f"activations of shape {list(x.shape)} do not fit a rotation of {size} features, by {vectors}")
    if torch.is_grad_enabled():
        if any(vector is not None and vector.requires_grad for vector in (before, after)):
            return reference.rotate(x, rule, size, before, after, length, factor, transpose, hadamard)
        if x.requires_grad:
            result: Tensor = _Rotate.apply(x, rule, size, before, after, length, factor, transpose)
            return result
    return _rotate(x, rule, size, before, after, length, factor, transpose)


class _Rotate(torch.autograd.Function):
    """`rotate` with fixed vectors. Nothing is saved for backward, so that the result may be shared between layers of
    which some are checkpointed: vectors that are views are copied, since what they lie in may be filled again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rule: str,
        size: int,
        before: Tensor | None,
        after: Tensor | None,
        length: int,
        factor: float,
        transpose: bool,
    ) -> Tensor:
        ctx.arguments = (rule, size, _own(after), _own(before), x.shape[-1], factor, not transpose)
        return _rotate(x, rule, size, before, after, length, factor, transpose)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient in x is factor · before ∘ Qᵀ (after ∘ grad)."""
        rule, size, before, after, length, factor, transpose = ctx.arguments
        grad = rotate(
            grads[0], rule, size, before=before, after=after, length=length, factor=factor, transpose=transpose
        )
        return grad, *(7 * [None])


def _own(vector: Tensor | None) -> Tensor | None:
    if vector is None or torch.compiler.is_compiling() or not vector._is_view():
        return vector
    return vector.clone()


_hadamard = define(
    "hadamard(Tensor x, str rule, bool transpose) -> Tensor",
    package=__name__,
    reference=reference.hadamard,
    native=native.hadamard,
    fake=lambda x, rule, transpose: x.new_empty(x.shape),
    backward=_backward,
    setup_context=_setup_context,
)
_VECTORS = "Tensor? before, Tensor? after"
_rotate = define(
    f"rotate(Tensor x, str rule, SymInt size, {_VECTORS}, SymInt length, float factor, bool transpose) -> Tensor",
    package=__name__,
    reference=reference.rotate,
    native=native.rotate,
    fake=lambda x, rule, size, before, after, length, factor, transpose: x.new_empty((*x.shape[:-1], length)),
)
