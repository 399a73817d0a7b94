"""A toy checkpoint format: symmetric bytes, one float scale a row."""

from collections.abc import Mapping
from typing import Any

import torch

from llmtools.formats.base import FLOATS, Format, affine
from llmtools.formats.tensors import Module
from llmtools.formats.uniform import Limits, Uniform
from llmtools.quant import Packed, Quantizer


class Toy8(Format):
    """codes int8 [out, in], scale [out, 1]: weight = scale · codes."""

    marker = "codes"
    limits = Limits(bits=(8,), scale_types=FLOATS, whole_rows=True, symmetric_only=True)

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "toy8"

    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        codes = stored.get("codes", out_features, in_features, dtypes=(torch.int8,)).int() + 128
        zeros = torch.full((out_features, 1), 128, dtype=torch.uint8)
        scales = stored.get("scale", out_features, 1, dtypes=FLOATS)
        codes = codes.to(torch.uint8)
        return affine(codes, scales, zeros, bits=8, group_size=in_features, in_features=in_features)

    @classmethod
    def write(cls, layer: Uniform) -> dict[str, torch.Tensor]:
        return {"codes": (layer.codes.int() - 128).to(torch.int8), "scale": layer.scales}

    @classmethod
    def describe(cls, layers: Mapping[str, Uniform], dense: list[str]) -> dict[str, Any]:
        return {"quant_method": "toy8"}
