"""Eight weights at a time on a lattice: the grid of QuIP# (arXiv:2402.04396, section 4).

E8P names 65 536 points of a shifted E8 lattice by 16 bits, two bits per weight. The residual may be coded again, larger
by `residual_scale`: by one of 256 points (E81B) for a third bit, by E8P once more for a third and fourth. The points
suit weights that are Gaussian with a standard deviation of about one; the scale that makes them so belongs to the
matrix as a whole and is kept by the basis (`bases.SignedHadamard`), so this grid has nothing to fit.

Where the number of columns is no multiple of eight the roundings and the basis pad it.

Shapes: as in `grids/base.py`; b = ceil(in / 8) blocks in a row; params have no columns, [n, 0]. A code in memory joins
both stages, int64: E8P's in bits 0–15, the residual's above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ...kernels.lattice import (
    RESIDUAL_SCALE,
    SCALE,
    decode_e8p,
    decode_e81b,
    decodes,
    dequantize_lattice,
    encode_lattice,
    multiplies,
    multiply_lattice,
)
from ..base import ALL, Packed, TensorSpec
from .base import Grid

__all__ = ["SCALE", "Lattice"]

_RESIDUAL = {3: torch.uint8, 4: torch.int16}


@dataclass(frozen=True)
class Lattice(Grid):
    """E8P, alone or refined. Stored: codes [out, b] int16; residual [out, b] uint8 at 3 bits, int16 at 4."""

    bits: int = 2
    """Bits per weight, 2: E8P; 3: with E81B; 4: with E8P again."""
    residual_scale: float | None = None
    """Factor on the error in the residual code; by default the paper's. Unused at 2 bits."""

    width: ClassVar[int] = 8

    @property
    def codes(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("codes",) if self.bits == 2 else ("codes", "residual")

    def __post_init__(self) -> None:
        if self.bits not in SCALE or isinstance(self.bits, bool):
            raise InputError(f"bits={self.bits!r}; a lattice grid has 2, 3 or 4 bits")
        if self.residual_scale is not None and not 1e-3 <= self.residual_scale < float("inf"):
            raise InputError(
                f"residual_scale={self.residual_scale}; give a positive number, as {RESIDUAL_SCALE[self.bits]}"
            )

    @property
    def _scale(self) -> float:
        return RESIDUAL_SCALE[self.bits] if self.residual_scale is None else self.residual_scale

    def resolve_group_size(self, in_features: int) -> int:
        return in_features

    def fit(self, group: Tensor, importance: Tensor | None = None) -> Tensor:
        return group.new_empty(group.shape[0], 0)

    def quantize_values(self, values: Tensor, params: Tensor) -> Tensor:
        codes, residual = encode_lattice(values, self.bits, self._scale)
        joined = codes.to(torch.int64) & 0xFFFF
        return joined if residual is None else joined | (residual.to(torch.int64) & 0xFFFF) << 16

    def dequantize_codes(self, codes: Tensor, params: Tensor) -> Tensor:
        values = decode_e8p(codes & 0xFFFF)
        if self.bits > 2:
            decode = decode_e81b if self.bits == 3 else decode_e8p
            values = values + decode(codes >> 16) / self._scale
        return values.flatten(-2).to(params.dtype)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        blocks = -(-in_features // 8)
        layout = {"codes": TensorSpec((out_features, blocks), torch.int16)}
        if self.bits > 2:
            layout["residual"] = TensorSpec((out_features, blocks), _RESIDUAL[self.bits])
        return layout

    def pack(self, codes: Tensor, params: Tensor, in_features: int) -> Packed:
        packed = {"codes": codes.to(torch.int16)}  # the low 16 bits
        if self.bits > 2:
            packed["residual"] = (codes >> 16).to(_RESIDUAL[self.bits])
        return packed

    def params(self, packed: Packed) -> Tensor:
        return packed["codes"].new_empty((len(packed["codes"]), 1, 0), dtype=torch.float32)

    def requantize(self, values: Tensor, packed: Packed) -> Packed:
        """Residual codes are chosen one after the other, not together: where the former ones are nearer, they stay."""
        made = super().requantize(values, packed)
        if self.bits == 2:
            return made
        target = F.pad(values, (0, -values.shape[1] % 8)).unflatten(1, (-1, 8))  # [out, b, 8]
        errors = [
            (self.dequantize(each, dtype=values.dtype).unflatten(1, (-1, 8)) - target).square().sum(-1)
            for each in (made, packed)
        ]
        nearer = errors[0] < errors[1]
        return packed | {name: torch.where(nearer, made[name], packed[name]) for name in self.codes}

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, 8·b]."""
        residual = packed["residual"][rows] if self.bits > 2 else None
        return dequantize_lattice(packed["codes"][rows], residual, self._scale, dtype)

    def scratch_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        return dtype.itemsize if decodes(device) else super().scratch_bytes(device, dtype)

    def multiply(self, x: Tensor, packed: Packed, transposed: bool = False) -> Tensor | None:
        if not multiplies(x.device, x.dtype, transposed):
            return None
        return multiply_lattice(x, packed["codes"], packed.get("residual"), self._scale, transposed)
