"""Merge-aware LoRA: y = x Q(Ŵ + s B A)ᵀ, computed with the very codes that a merged checkpoint holds.

An adapter that is rounded into a quantized base after training loses most of what it learned at 2 to 4 bits. Here it is
trained through the rounding instead: the forward multiplies with the codes of the updated weight, on the base's own
scales and dithered (`quant/update.py`), and the adapter's gradient goes straight through the rounding, as that of a
plain LoRA branch. So no gradient of the weight, [out, in], is formed: dB = s · gradᵀ (x Aᵀ), dA = s · (grad B)ᵀ x, and
the gradient of x is grad Q(Ŵ + s B A). Kept for backward are x, as by any LoRA layer, and the layer's codes.

PEFT is not imported: its layers are recognised by their attributes. The layer itself is `model/exact_lora.py`.

Shapes: out, in — features; r — rank; t — tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant import Packed
from ..quant.materialize import product_type


def active_adapters(layer: Any) -> list[str]:
    """Names of the active adapters of a PEFT layer that it has."""
    held = getattr(layer, "lora_A", {})
    return [name for name in getattr(layer, "active_adapters", ()) if name in held]


def is_low_rank(layer: Any) -> bool:
    """Whether a PEFT layer's active adapters add s B A to the weight, and nothing else.

    It is not so for other kinds than LoRA, for DoRA, biases and embeddings.
    """
    names = active_adapters(layer)
    return bool(names) and not any(name in layer.lora_variant or layer.lora_bias.get(name) for name in names)


def updated_packed(layer: Any) -> Packed:
    """The packed tensors of a PEFT layer's quantized base with its active adapters merged: Q(Ŵ + s B A).

    The adapters are such that `is_low_rank`. Under autocast, too, the codes are those that are merged without it.
    """
    b, a = factors(layer)
    with torch.no_grad(), torch.autocast(b.device.type, enabled=False):
        made: Packed = layer.base_layer.quantizer.updated(layer.base_layer.packed, b, a)
    return made


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """s B [out, r] and A [r, in], float32, of a PEFT layer's active adapters, which are such that `is_low_rank`."""
    names = active_adapters(layer)
    b = torch.cat([layer.lora_B[name].weight.float() * layer.scaling[name] for name in names], 1)
    a = torch.cat([layer.lora_A[name].weight.float() for name in names], 0)
    return b, a


def straight_through(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """y [..., out] as it is, with the gradients of the branch s · x Aᵀ Bᵀ in A [r, in] and B [out, r]."""
    result: Tensor = _StraightThrough.apply(y, x, a, b, scaling)
    return result


class _StraightThrough(torch.autograd.Function):
    """The identity in y; its gradients in A and B are those of a plain LoRA branch of x [..., in]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scaling = scaling
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, a, b = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            dtype = product_type(x)
            flat = grad.reshape(-1, grad.shape[-1]).to(dtype)  # [t, out]
            inputs = x.reshape(-1, x.shape[-1]).to(dtype)  # [t, in]
            down = inputs @ a.to(dtype).mT  # [t, r]
            up = flat @ b.to(dtype)  # [t, r]
            grad_a = (up.mT @ inputs).to(a.dtype) * ctx.scaling if ctx.needs_input_grad[2] else None
            grad_b = (flat.mT @ down).to(b.dtype) * ctx.scaling if ctx.needs_input_grad[3] else None
        return grad, None, grad_a, grad_b, None
