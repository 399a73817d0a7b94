"""Tiles of 16 × 16 weights on a trellis: the grid of QTIP (arXiv:2406.11235, section 3).

A tile's code is a path through the states of a trellis, 1 to 8 bits per weight (`kernels/trellis`): of all grids the
one with the least error at its bits, and the dearest to encode. Its values suit weights that are Gaussian; the scale
that makes them so belongs to the matrix as a whole and is kept by the basis (`bases.SignedHadamard`), so this grid has
nothing to fit.

Where the number of columns is no multiple of sixteen the roundings and the basis pad it; rows need no padding, save
in EXL3's order.

Shapes: as in `grids/base.py`; b = ceil(in / 16) blocks in a row; k — bits; params have no columns, [n, 0]. Codes are
[n, b, k] int16, a row's share of its tiles' bits.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.trellis import (
    SCALE,
    TILE,
    check_trellis,
    decode_states,
    decodes,
    dequantize_trellis,
    encode_trellis,
    multiplies,
    multiply_trellis,
)
from ...kernels.trellis.hybrid import PAIRS, check_hybrid, dequantize_hybrid, encode_hybrid
from ..base import ALL, Packed, TensorSpec
from .base import Grid


class _Tiles(Grid):
    """Tiles of 16 × 16 on a trellis of any code: what does not depend on how a state becomes weights.

    Stored: trellis [out, b·k] int16, and what the code needs.
    """

    bits: int
    """Bits per weight."""

    width: ClassVar[int] = TILE
    height: ClassVar[int] = TILE
    ragged: ClassVar[bool] = True
    codes = ("trellis",)

    def resolve_group_size(self, in_features: int) -> int:
        return in_features

    def fit(self, group: Tensor, importance: Tensor | None = None) -> Tensor:
        return group.new_empty(group.shape[0], 0)

    def dequantize_codes(self, codes: Tensor, params: Tensor) -> Tensor:
        packed = self.pack(codes, params, codes.shape[1] * TILE)
        return self.dequantize(packed).to(params.dtype)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {"trellis": TensorSpec((out_features, -(-in_features // TILE) * self.bits), torch.int16)}

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, 16·b]."""
        start, stop, step = rows.indices(len(packed["trellis"]))
        if step < 1:  # only forward
            return self.dequantize(packed, ALL, dtype)[rows]
        weight = self._rows(packed, start, max(start, stop), dtype)
        return weight if step == 1 else weight[::step]

    @abstractmethod
    def _rows(self, packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start … stop, [stop − start, 16·b] of `dtype`."""


@dataclass(frozen=True)
class Trellis(_Tiles):
    """A bitshift trellis. Stored: trellis [out, b·k] int16."""

    bits: int = 2
    """Bits per weight, 1 to 8."""
    state_bits: int = 12
    """Bits of a state, L, 8 to 16: each more takes twice as long to encode, and has less error."""
    code: str = "3inst"
    """Function from states to weights, "3inst", "1mad", "mcg" or "mul1"."""
    order: str = "rows"
    """Order of a tile's weights in their sequence, "rows" or "exl3"."""

    def __post_init__(self) -> None:
        check_trellis(self.bits, self.state_bits, self.code, self.order)

    @property
    def scale(self) -> float:
        """The standard deviation of Gaussian weights that fit best."""
        return SCALE[self.bits] * float(decode_states(self.code, self.state_bits).square().mean().sqrt())

    def quantize_values(self, values: Tensor, params: Tensor) -> Tensor:
        codes = encode_trellis(values, self.bits, self.state_bits, self.code, self.order)
        return codes.view(len(values), -1, self.bits)

    def pack(self, codes: Tensor, params: Tensor, in_features: int) -> Packed:
        return {"trellis": codes.flatten(1)}

    def scratch_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        return dtype.itemsize if decodes(device) else super().scratch_bytes(device, dtype)

    def multiply(self, x: Tensor, packed: Packed, transposed: bool = False) -> Tensor | None:
        if not multiplies(x.device):
            return None
        trellis = packed["trellis"]
        return multiply_trellis(x, trellis, self.bits, self.state_bits, self.code, transposed, order=self.order)

    def _rows(self, packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        codes = packed["trellis"], self.bits, self.state_bits, self.code
        return dequantize_trellis(*codes, start, stop, dtype, order=self.order)


@dataclass(frozen=True)
class HybridTrellis(_Tiles):
    """The same with pairs of weights from a table that is stored: QTIP's hybrid code. Rows in whole tiles.

    Stored: trellis [out, b·k] int16, tlut [512, 2] float16.
    """

    bits: int = 2
    """Bits per weight, 1 to 4."""
    state_bits: int = 16
    """Bits of a state."""
    order: str = "rows"
    """Order of a tile's weights in their sequence, "rows" or "fragments"."""

    def __post_init__(self) -> None:
        check_hybrid(self.bits, self.state_bits, self.order)

    def quantize_values(self, values: Tensor, params: Tensor) -> Tensor:
        table = pairs().to(values.device)
        codes = encode_hybrid(values.float(), table, self.bits, self.state_bits, self.order)
        return codes.view(len(values), -1, self.bits)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return super().layout(out_features, in_features) | {"tlut": TensorSpec((PAIRS, 2), torch.float16)}

    def pack(self, codes: Tensor, params: Tensor, in_features: int) -> Packed:
        return {"trellis": codes.flatten(1), "tlut": pairs().to(codes.device)}

    def _rows(self, packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        codes = packed["trellis"], packed["tlut"], self.bits, self.state_bits, self.order
        return dequantize_hybrid(*codes, start, stop, dtype)

    def scratch_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        return 48


@cache
def pairs() -> Tensor:
    """A table for weights of standard deviation one, [512, 2] float16: a product of quantiles, as the first of a pair
    has a sign of its own. QTIP's are the centres of clusters, each file its own."""
    with torch.inference_mode(False):
        first = torch.special.ndtri(0.5 + (torch.arange(16, dtype=torch.float64, device="cpu") + 0.5) / 32)
        second = torch.special.ndtri((torch.arange(32, dtype=torch.float64, device="cpu") + 0.5) / 32)
        return torch.cartesian_prod(first, second).to(torch.float16)
