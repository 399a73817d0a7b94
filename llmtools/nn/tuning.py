"""A quantized layer whose floating tensors (scales, zero points, sign vectors) are trained; the codes are fixed.

Each floating tensor f is trained as f · (1 + δ), so one learning rate suits scales of any magnitude. Where f is zero, δ
counts in units of the tensor's mean magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quant import Packed
from .linear import QuantizedLinear
from .lora_init import LoraInit


class TuningLinear(nn.Module):
    """In place of a `QuantizedLinear` while it is trained: x [..., in] -> [..., out], differentiable in `deltas`.

    materialize: the weight exists a block of rows at a time, forward and backward, and the floating tensors have the
    values that will be stored, rounded to their dtypes in the layout (straight-through). Otherwise autograd keeps the
    whole weight, which is quicker where there is memory for it, and the floating tensors are float32.
    """

    def __init__(self, layer: QuantizedLinear, *, materialize: bool = False) -> None:
        super().__init__()
        self.quantizer, self.bias = layer.quantizer, layer.bias
        self.weight = layer.weight  # takes no memory; networks ask for its dtype
        self._packed = layer.quantizer.unpacked(layer.packed)
        self.materialize, self.dtype = materialize, layer.dtype
        names = layer.quantizer.tunable(self._packed)
        self._initial = {name: self._packed[name].detach().float() for name in names}
        self.deltas = {name: torch.zeros_like(initial) for name, initial in self._initial.items()}

    def floats(self) -> Packed:
        """The current floating tensors, in float32, differentiable in δ."""
        return {name: value + _unit(value) * self.deltas[name] for name, value in self._initial.items()}

    @torch.no_grad()
    def packed(self) -> Packed:
        """All tensors, in the dtypes of the layout."""
        floats = self.floats()
        stored = {name: floats.get(name, tensor).to(tensor.dtype) for name, tensor in self._packed.items()}
        return self.quantizer.repacked(stored)

    def forward(self, x: Tensor) -> Tensor:
        floats = self.floats()
        if self.materialize:
            stored = {name: _Stored.apply(value, self._packed[name].dtype) for name, value in floats.items()}
            y = self.quantizer.linear(x, self._packed | stored)
        else:
            y = self.quantizer.tuning_linear(x, self._packed | floats)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class AdaptedLinear(nn.Module):
    """A quantized layer with a low-rank update beside it, while that is trained: y = layer(x) + b a x.

    x [..., in] -> [..., out]; a [r, in], b [out, r] float32, copies of `init`.
    """

    def __init__(self, layer: QuantizedLinear, init: LoraInit) -> None:
        super().__init__()
        self.layer, self.a, self.b = layer, init.a.clone(), init.b.clone()
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        update = F.linear(F.linear(x, self.a), self.b)  # cast by autocast, where x is half precision
        return y + update.to(y.dtype)


class _Stored(torch.autograd.Function):
    """float32 values rounded to another dtype and back; its gradient is the identity."""

    @staticmethod
    def forward(ctx: object, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _unit(initial: Tensor) -> Tensor:
    size = initial.abs()
    return torch.where(size > 0, size, size.mean())
