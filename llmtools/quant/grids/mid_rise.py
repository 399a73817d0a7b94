"""Equally spaced values without a zero: scale · (code − (2^bits − 1) / 2), a mid-rise quantizer.

At 2 bits these are ±½ and ±1½. A uniform grid that has zero has three other values there, two on one side, and weights
that are alike on both sides, as rotated ones are, lose by that (Qift, 2026). Nothing but a scale is stored for a group;
one of zeros has the scale 0.

Shapes: as in `grids/base.py`; params [n, 1] are the scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.bits import pack
from ...kernels.grouped import Weight
from ..base import ALL, Packed, TensorSpec
from .codebook import constant
from .scalar import SCALE_TYPES, Scalar, check_group_size, check_scale_type, scale_range, stream_layout

_SHARES = tuple(1 - step / 100 for step in range(80))
"""Shares of the full range that a search tries."""
_CHUNK = 2**18  # weights of a search at a time


@dataclass(frozen=True)
class MidRise(Scalar):
    """2^bits values in each group, symmetric about zero, which is none of them.

    Stored: qweight [out, w] int32, scales [out, G] of `scale_type`; columns [0, in] where needed. Raises InputError for
    options out of range.
    """

    bits: int
    group_size: int = -1
    clip: bool = False
    """Whether each group's range is searched among 80 shrunken ones, as `Affine` does it."""
    scale_type: str = "float16"
    """Type of the stored scales: float16, bfloat16 or float32."""

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise InputError(f"bits={self.bits}; a uniform grid has 1 to 8 bits")
        check_scale_type(self.scale_type)
        check_group_size("mid-rise grid", self.group_size)

    @property
    def _levels(self) -> tuple[float, ...]:
        return tuple(code - (2**self.bits - 1) / 2 for code in range(2**self.bits))

    def fit(self, group: Tensor, importance: Tensor | None = None) -> Tensor:
        some = max(1, _CHUNK // group.shape[1])
        return torch.cat([self._fit(part, importance) for part in group.split(some)])

    def _fit(self, group: Tensor, importance: Tensor | None) -> Tensor:
        largest = group.abs().amax(-1, keepdim=True) / self._levels[-1]
        best, least = self._scale(largest), group.new_full((len(group), 1), torch.inf)
        for share in _SHARES if self.clip else ():
            scale = self._scale(largest * share)
            error = self.dequantize_codes(self.quantize_values(group, scale), scale) - group
            weighed = error.abs().pow(2.4).sum(-1) if importance is None else error.square() @ importance
            better = weighed[:, None] < least
            best, least = torch.where(better, scale, best), torch.where(better, weighed[:, None], least)
        return best

    def _scale(self, scale: Tensor) -> Tensor:
        """As it is stored; 0 for a group of zeros."""
        dtype = SCALE_TYPES[self.scale_type]
        return torch.where(scale == 0, 0, scale.clamp(*scale_range(dtype)).to(dtype).to(scale.dtype))

    def quantize_values(self, values: Tensor, params: Tensor) -> Tensor:
        normal = values * torch.where(params == 0, 0.0, 1 / params)
        codes: Tensor = torch.floor(normal) + 2 ** (self.bits - 1)
        return codes.clamp(0, 2**self.bits - 1)

    def dequantize_codes(self, codes: Tensor, params: Tensor) -> Tensor:
        values: Tensor = params * (codes - (2**self.bits - 1) / 2)
        return values

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        groups = -(-in_features // self.resolve_group_size(in_features))
        scales = TensorSpec((out_features, groups), SCALE_TYPES[self.scale_type])
        return stream_layout(out_features, in_features, self.bits) | {"scales": scales}

    def pack(self, codes: Tensor, params: Tensor, in_features: int) -> Packed:
        scales = params[..., 0].to(SCALE_TYPES[self.scale_type]).contiguous()
        packed = {"qweight": pack(codes, self.bits), "scales": scales}
        layout = self.layout(codes.shape[0], in_features)
        if "columns" in layout:
            packed["columns"] = codes.new_empty(layout["columns"].shape, dtype=torch.uint8)
        return {name: packed[name] for name in layout}

    def params(self, packed: Packed, rows: slice = ALL) -> Tensor:
        return packed["scales"][rows].float()[..., None]

    def grouped(self, packed: Packed, rows: slice = ALL) -> Weight:
        qweight, scales, _, _, *sizes = super().grouped(packed, rows)
        bits, group_size, in_features = sizes
        return qweight, scales, None, constant(self._levels, qweight.device), bits, group_size, in_features
