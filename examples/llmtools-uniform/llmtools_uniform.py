"""Each row of a weight on a uniform grid between minus and plus its largest entry, one byte a weight."""

from dataclasses import dataclass

import torch

from llmtools.quant import ALL, Packed, Quantizer, TensorSpec


@dataclass(frozen=True)
class Uniform(Quantizer):
    """value = scale · code, code an integer from −levels to levels."""

    levels: int = 127

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {
            "codes": TensorSpec((out_features, in_features), torch.int8),
            "scales": TensorSpec((out_features, 1), torch.float32),
        }

    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor | None = None) -> Packed:
        weight = weight.float()
        scales = weight.abs().amax(dim=1, keepdim=True) / self.levels
        codes = (weight / scales.clamp_min(torch.finfo(torch.float32).tiny)).round()
        return {"codes": codes.to(torch.int8), "scales": scales}

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (packed["scales"][rows] * packed["codes"][rows]).to(dtype)
