"""The uniform grid: value = scale · (code − zero), 2^bits codes, a scale and a zero point a group.

The grid of RTN and GPTQ (arXiv:2210.17323, section 4). Zero is always representable. The scale is rounded to float16,
the type it is stored in, *before* any code is chosen, so that decoding gives exactly the values that rounding saw.

Shapes: as in `grids/base.py`; params [n, 2] are (scale, zero).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.affine import dequantize_affine
from ...kernels.bits import pack, words
from ..base import ALL, Packed, TensorSpec
from .base import Grid
from .scalar import check_group_size, columns, resolve_group_size, stream_layout

BITS = (2, 3, 4, 8)
_SCALE = torch.float16
_TINY, _HUGE = 2.0**-24, 65504.0  # the least and the largest positive float16


@dataclass(frozen=True)
class Affine(Grid):
    bits: int
    group_size: int = -1
    symmetric: bool = False
    clip: bool = False
    """Search each group's range for the least Σ|w − ŵ|^2.4 over 80 shrunken ranges, GPTQ's "mse" option."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(
                f"bits={self.bits}; a uniform grid has {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits"
            )
        check_group_size("affine grid", self.group_size)

    def span(self, in_features: int) -> int:
        return resolve_group_size(self.group_size, in_features)

    def fit(self, group: Tensor) -> Tensor:
        low = group.amin(-1, keepdim=True).clamp_max(0)
        high = group.amax(-1, keepdim=True).clamp_min(0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        best = self._params(low, high)
        if not self.clip:
            return best
        least = self._cost(group, best)
        for step in range(1, 80):
            params = self._params(low * (1 - step / 100), high * (1 - step / 100))
            cost = self._cost(group, params)
            better = cost < least
            least = torch.where(better, cost, least)
            best = torch.where(better, params, best)
        return best

    def _params(self, low: Tensor, high: Tensor) -> Tensor:
        """(scale, zero) [n, 2] of the range [low, high], each [n, 1]."""
        top = 2**self.bits - 1
        empty = high == low
        scale = torch.where(empty, 2.0 / top, (high - low) / top)
        scale = scale.clamp(_TINY, _HUGE).to(_SCALE).to(low.dtype)
        zero = torch.round(-low / scale).clamp(0, top)
        if self.symmetric:
            zero = torch.full_like(zero, 2.0 ** (self.bits - 1))
        return torch.cat([scale, zero], -1)

    def _cost(self, group: Tensor, params: Tensor) -> Tensor:
        return (self.value(self.nearest(group, params), params) - group).abs().pow(2.4).sum(-1, keepdim=True)

    def nearest(self, block: Tensor, params: Tensor) -> Tensor:
        scale, zero = params.unbind(-1)
        return (torch.round(block / scale[:, None]) + zero[:, None]).clamp(0, 2**self.bits - 1)

    def value(self, codes: Tensor, params: Tensor) -> Tensor:
        scale, zero = params.unbind(-1)
        return scale[:, None] * (codes - zero[:, None])

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        groups = -(-in_features // self.span(in_features))
        layout = stream_layout(out_features, in_features, self.bits)
        layout["scales"] = TensorSpec((out_features, groups), _SCALE)
        if not self.symmetric:
            layout["qzeros"] = TensorSpec((out_features, words(groups, self.bits, 8)), torch.uint8)
        return layout

    def pack(self, codes: Tensor, params: Tensor, in_features: int) -> Packed:
        packed = {"qweight": pack(codes, self.bits), "scales": params[..., 0].to(_SCALE).contiguous()}
        if not self.symmetric:
            packed["qzeros"] = pack(params[..., 1], self.bits, torch.uint8)
        layout = self.layout(codes.shape[0], in_features)
        if "columns" in layout:
            packed["columns"] = codes.new_empty(layout["columns"].shape, dtype=torch.uint8)
        return {name: packed[name] for name in layout}

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        in_features = columns(packed, self.bits)
        return dequantize_affine(
            packed["qweight"][rows],
            packed["scales"][rows],
            None if self.symmetric else packed["qzeros"][rows],
            self.bits,
            self.span(in_features),
            in_features,
            dtype,
        )
