"""The quantized linear layer.

It subclasses `nn.Linear`, so stock PEFT adapts it through its usual dispatch. How it keeps its weight is `packed.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quant import Packed, Quantizer
from .packed import PackedWeight


class QuantizedLinear(PackedWeight, nn.Linear):  # type: ignore[override]
    """y = x Wᵀ + b, W given by `quantizer` from this module's packed tensors.

    x may have any float type; the result has x's (or autocast's). `dtype` is the type in which `weight` presents
    itself and in which bias is kept; the packed tensors keep their own types, whatever the module is cast to.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantizer: Quantizer,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the dense weight
        self.in_features, self.out_features = in_features, out_features
        self._allot(quantizer, dtype, device)
        if bias:
            zeros = torch.zeros(out_features, dtype=self.dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def empty(
        cls, linear: nn.Linear, quantizer: Quantizer, device: torch.device | str | None = None
    ) -> QuantizedLinear:
        """A layer of the shape and type of `linear`, with a bias if it has one; the values are to come."""
        return cls(
            linear.in_features,
            linear.out_features,
            quantizer,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=device,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantizer: Quantizer, hessian: Tensor | None = None) -> QuantizedLinear:
        """A quantized copy of `linear`; hessian [in, in] where the quantizer wants one. The bias is taken over.

        The layer's quantizer is `quantizer`, or what that finds `suited` to the weight.
        """
        quantizer = quantizer.suited(linear.weight)
        return cls.from_packed(linear, quantizer, quantizer.quantize(linear.weight.detach(), hessian))

    @classmethod
    def from_packed(cls, linear: nn.Linear, quantizer: Quantizer, packed: Packed) -> QuantizedLinear:
        """What stands for `linear`, with these tensors in place of its weight. The bias is taken over."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, quantizer, dtype=linear.weight.dtype)
        layer.pack_(packed)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        y = self.quantizer.linear(x, self.packed)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of activations to expect; PEFT gives new adapters this type."""
        return self.dtype

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.quantizer}"
