"""The uniform grid: value = scale · (code − zero), 2^bits codes, a scale and a zero point a group.

The grid of RTN and GPTQ (arXiv:2210.17323, section 4). Zero is always representable. The scale is rounded to the type
it is stored in, float16 for ours, *before* any code is chosen, so that decoding gives exactly the values that rounding
saw. What other programs store of such grids, other types of scales and zero points that are no integers, is covered
by two options.

Shapes: as in `grids/base.py`; params [n, 2] are (scale, zero).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.bits import pack, unpack, words
from ...kernels.build import TYPES
from ...kernels.ranges import Kind, best_shares, searches
from ...kernels.sweep import sweep_columns, sweeps
from ..base import ALL, Packed, TensorSpec
from ..shift import stored
from .scalar import SCALE_TYPES, Scalar, check_group_size, check_scale_type, columns, scale_range, stream_layout

BITS = (2, 3, 4, 8)
"""The widths of our own presets; the grid itself takes 1 … 8."""
_SHARES = tuple(1 - step / 100 for step in range(80))
"""Shares of the full range that a search tries."""
_CHUNK = 2**18  # weights of a search at a time, which with what is computed from them stay in a cache


@dataclass(frozen=True)
class Affine(Scalar):
    """2^bits equally spaced values in each group.

    Stored: qweight [out, w] int32, scales [out, G] of `scale_type` and, unless the grid is symmetric, qzeros
    [out, ceil(G·bits / 8)] uint8 or, with `float_zeros`, zeros [out, G] of `scale_type`; columns [0, in] where needed.
    Raises InputError for options out of range.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = False
    clip: bool = False
    """Whether each group's range is searched among 80 shrunken ones: for the least Σ|w − ŵ|^2.4, GPTQ's "mse" option,
    or, where it is known what an error costs in each column, for the least cost."""
    scale_type: str = "float16"
    """Type of the stored scales: float16, bfloat16 or float32."""
    float_zeros: bool = False
    """Zero points of the scales' type instead of integers: `zeros` [out, G] is stored in place of `qzeros`."""

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise InputError(f"bits={self.bits}; a uniform grid has 1 to 8 bits")
        check_scale_type(self.scale_type)
        if self.symmetric and self.float_zeros:
            raise InputError("a symmetric grid stores no zero points: float_zeros must be false")
        check_group_size("affine grid", self.group_size)

    @property
    def _scale(self) -> torch.dtype:
        return SCALE_TYPES[self.scale_type]

    def fit(self, group: Tensor, importance: Tensor | None = None) -> Tensor:
        low = group.amin(-1, keepdim=True).clamp_max(0)
        high = group.amax(-1, keepdim=True).clamp_min(0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        if not self.clip:
            return self._params(low, high)
        if searches(group):
            shares = torch.tensor(_SHARES, dtype=low.dtype)
            share = shares[best_shares(group, low, high, shares, self._kind, importance)][:, None]
            return self._params(low * share, high * share)
        some = max(1, _CHUNK // group.shape[1])
        parts = zip(group.split(some), low.split(some), high.split(some), strict=True)
        return torch.cat([self._search(part, least, most, importance) for part, least, most in parts])

    def _search(self, group: Tensor, low: Tensor, high: Tensor, importance: Tensor | None) -> Tensor:
        """Of the range [low, high], each [n, 1], and shrunken ones the params [n, 2] that cost least."""
        best = self._params(low, high)
        least = self._cost(group, best, importance)
        for share in _SHARES[1:]:
            params = self._params(low * share, high * share)
            cost = self._cost(group, params, importance)
            better = cost < least
            least = torch.where(better, cost, least)
            best = torch.where(better, params, best)
        return best

    @property
    def _kind(self) -> Kind:
        limits = scale_range(self._scale)
        return Kind(TYPES[self._scale], self.symmetric, not self.float_zeros, 2**self.bits - 1, *limits)

    def _params(self, low: Tensor, high: Tensor) -> Tensor:
        """(scale, zero) [n, 2] of the range [low, high], each [n, 1]."""
        top = 2**self.bits - 1
        empty = high == low
        scale = torch.where(empty, 2.0 / top, (high - low) / top)
        scale = scale.clamp(*scale_range(self._scale)).to(self._scale).to(low.dtype)
        zero = -low / scale
        zero = zero.to(self._scale).to(low.dtype) if self.float_zeros else torch.round(zero).clamp(0, top)
        if self.symmetric:
            zero = torch.full_like(zero, 2.0 ** (self.bits - 1))
        return torch.cat([scale, zero], -1)

    def _cost(self, group: Tensor, params: Tensor, importance: Tensor | None) -> Tensor:
        error = self.dequantize_codes(self.quantize_values(group, params), params) - group
        if importance is None:
            return error.abs().pow(2.4).sum(-1, keepdim=True)
        return error.square() @ importance[:, None]

    def quantize_values(self, values: Tensor, params: Tensor) -> Tensor:
        scale, zero = params.unbind(-1)
        if self.float_zeros:
            return torch.round(values / scale[:, None] + zero[:, None]).clamp(0, 2**self.bits - 1)
        return (torch.round(values / scale[:, None]) + zero[:, None]).clamp(0, 2**self.bits - 1)

    def dequantize_codes(self, codes: Tensor, params: Tensor) -> Tensor:
        scale, zero = params.unbind(-1)
        return scale[:, None] * (codes - zero[:, None])

    def sweep(self, target: Tensor, error: Tensor, update: Tensor, params: Tensor) -> Tensor | None:
        if not sweeps(target):
            return None
        scale, zero = params.unbind(-1)
        top = 2**self.bits - 1
        return sweep_columns(target, error, update, scale, zero, top, whole_zeros=not self.float_zeros)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        groups = -(-in_features // self.resolve_group_size(in_features))
        layout = stream_layout(out_features, in_features, self.bits)
        layout["scales"] = TensorSpec((out_features, groups), self._scale)
        if self.float_zeros:
            layout["zeros"] = TensorSpec((out_features, groups), self._scale)
        elif not self.symmetric:
            layout["qzeros"] = TensorSpec((out_features, words(groups, self.bits, 8)), torch.uint8)
        return layout

    def pack(self, codes: Tensor, params: Tensor, in_features: int) -> Packed:
        packed = {"qweight": pack(codes, self.bits), "scales": params[..., 0].to(self._scale).contiguous()}
        if self.float_zeros:
            packed["zeros"] = params[..., 1].to(self._scale).contiguous()
        elif not self.symmetric:
            packed["qzeros"] = pack(params[..., 1], self.bits, torch.uint8)
        layout = self.layout(codes.shape[0], in_features)
        if "columns" in layout:
            packed["columns"] = codes.new_empty(layout["columns"].shape, dtype=torch.uint8)
        return {name: packed[name] for name in layout}

    def params(self, packed: Packed, rows: slice = ALL) -> Tensor:
        scales = packed["scales"][rows].float()  # [rows, G]
        if self.float_zeros:
            zeros = packed["zeros"][rows].float()
        elif self.symmetric:
            zeros = torch.full_like(scales, 2.0 ** (self.bits - 1))
        else:
            zeros = unpack(packed["qzeros"][rows], self.bits, scales.shape[1]).float()
        return torch.stack([scales, zeros], -1)

    def shift_group(self, in_features: int) -> int | None:
        return self.resolve_group_size(in_features) if self.float_zeros else None

    def shift(self, packed: Packed, change: Tensor) -> Packed:
        if not self.float_zeros:
            return super().shift(packed, change)
        scales, zeros = packed["scales"].float(), packed["zeros"].float()
        moved = torch.where(change == 0, zeros, zeros - change.to(scales) / scales)  # a scale of 0 holds no change
        return packed | {"zeros": stored(moved, packed["zeros"].dtype)}

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        if not self.float_zeros:
            return super().dequantize(packed, rows, dtype)
        in_features = columns(packed, self.bits)
        codes = unpack(packed["qweight"][rows], self.bits, in_features)
        group = torch.arange(in_features, device=codes.device) // self.resolve_group_size(in_features)
        return shifted(codes, packed["zeros"][rows][:, group], packed["scales"][rows][:, group], dtype)


def shifted(codes: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(code − zero) · scale, all [out, in], where zeros are no integers; each step is rounded to `dtype`, as in HQQ."""
    distance = (codes.to(torch.float32) - zeros.to(torch.float32)).to(dtype)
    return (distance.to(torch.float32) * scales.to(torch.float32)).to(dtype)
