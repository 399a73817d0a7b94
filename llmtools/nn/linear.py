"""The quantized linear layer.

It subclasses `nn.Linear`, so stock PEFT adapts it through its usual dispatch. Its packed tensors are in `packed.py`.

Shapes: in, out — features of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quant import Packed, Quantizer
from .packed import PackedWeight


class QuantizedLinear(PackedWeight, nn.Linear):  # type: ignore[override]
    """y = x Wᵀ + b, W given by `quantizer` from this module's packed tensors.

    x [..., in] may have any float dtype; the result [..., out] has x's (or autocast's). `dtype` is that of `weight` and
    of the bias; the packed tensors keep their own dtypes, whatever the module is cast to.
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
        self._allocate(quantizer, dtype, device)
        if bias:
            zeros = torch.zeros(out_features, dtype=self.dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def empty(
        cls, linear: nn.Linear, quantizer: Quantizer, device: torch.device | str | None = None
    ) -> QuantizedLinear:
        """A layer of the shape and dtype of `linear`, with a bias if it has one, and uninitialised tensors."""
        return cls(
            linear.in_features,
            linear.out_features,
            quantizer,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=device,
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quantizer: Quantizer, hessian: Tensor | None = None, outputs: Tensor | None = None
    ) -> QuantizedLinear:
        """A quantized copy of `linear`; hessian [in, in] where the quantizer needs one. The bias is kept.

        outputs [out, out]: for two-sided rounding, see `Quantizer.quantize_two_sided`. The layer's quantizer is
        `quantizer.suited(weight)`, as a rule `quantizer` itself.
        """
        quantizer, weight = quantizer.suited(linear.weight), linear.weight.detach()
        if hessian is None or outputs is None:
            return cls.from_packed(linear, quantizer, quantizer.quantize(weight, hessian))
        return cls.from_packed(linear, quantizer, quantizer.quantize_two_sided(weight, hessian, outputs))

    @classmethod
    def from_packed(cls, linear: nn.Linear, quantizer: Quantizer, packed: Packed) -> QuantizedLinear:
        """A layer in place of `linear`, with these packed tensors instead of its weight. The bias is kept."""
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
        return self.product(x, self.packed)

    def product(self, x: Tensor, packed: Packed) -> Tensor:
        """The layer's output [..., out] with these packed tensors in place of its own."""
        y = self.quantizer.linear(x, packed)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the activations; PEFT creates new adapters in it."""
        return self.dtype

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.quantizer}"
