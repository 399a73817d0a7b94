"""Tiles of 16 × 16 weights on a trellis: the grid of QTIP (arXiv:2406.11235, section 3).

A tile's code is a path through the states of a trellis, 1 to 8 bits per weight (`kernels/trellis`): of all grids the
one with the least error at its bits, and the dearest to encode. Its values suit weights that are Gaussian; the scale
that makes them so belongs to the matrix as a whole and is kept by the basis (`bases.SignedHadamard`), so this grid has
nothing to fit. The hybrid code, hyb, takes its values from a table that is stored, and trained where scales are.

Where the number of columns is no multiple of sixteen the roundings and the basis pad it; rows need no padding, save
in orders of whole tiles.

Shapes: as in `grids/base.py`; b = ceil(in / 16) blocks in a row; k — bits; params have no columns, [n, 0]. Codes are
[n, b, k] int16, a row's share of its tiles' bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.trellis import (
    PAIRS,
    SCALE,
    TILE,
    check_trellis,
    decode_states,
    decodes,
    dequantize_trellis,
    encode_trellis,
    fitted_table,
    multiplies,
    multiply_trellis,
)
from ..base import ALL, Packed, TensorSpec
from .base import Grid


@dataclass(frozen=True)
class Trellis(Grid):
    """A bitshift trellis. Stored: trellis [out, b·k] int16; of the code hyb tlut [512, 2] float16, too."""

    bits: int = 2
    """Bits per weight, 1 to 8; of hyb 1 to 4."""
    state_bits: int = 12
    """Bits of a state, L, 8 to 16: each more takes twice as long to encode, and has less error."""
    code: str = "3inst"
    """Function from states to weights, "3inst", "1mad", "mcg" or "mul1"; or "hyb", a table of pairs of weights."""
    order: str = "rows"
    """Order of a tile's weights in their sequence, "rows", "exl3" or "fragments"."""

    width: ClassVar[int] = TILE
    height: ClassVar[int] = TILE
    ragged: ClassVar[bool] = True
    codes = ("trellis",)

    def __post_init__(self) -> None:
        check_trellis(self.bits, self.state_bits, self.code, self.order)

    @property
    def scale(self) -> float:
        """The standard deviation of Gaussian weights that fit best."""
        if self.code == "hyb":
            return 1.0  # the table is made for it
        return SCALE[self.bits] * float(decode_states(self.code, self.state_bits).square().mean().sqrt())

    def resolve_group_size(self, in_features: int) -> int:
        return in_features

    def fit(self, group: Tensor, importance: Tensor | None = None) -> Tensor:
        return group.new_empty(group.shape[0], 0)

    def quantize_values(self, values: Tensor, params: Tensor) -> Tensor:
        options = self.bits, self.state_bits, self.code, self.order
        return encode_trellis(values, *options, table=self._table(values.device)).view(len(values), -1, self.bits)

    def dequantize_codes(self, codes: Tensor, params: Tensor) -> Tensor:
        packed = self.pack(codes, params, codes.shape[1] * TILE)
        return self.dequantize(packed).to(params.dtype)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        trellis = TensorSpec((out_features, -(-in_features // TILE) * self.bits), torch.int16)
        table = {"tlut": TensorSpec((PAIRS, 2), torch.float16)} if self.code == "hyb" else {}
        return {"trellis": trellis} | table

    def pack(self, codes: Tensor, params: Tensor, in_features: int) -> Packed:
        table = self._table(codes.device)
        return {"trellis": codes.flatten(1)} | ({} if table is None else {"tlut": table.clone()})

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, 16·b]."""
        start, stop, step = rows.indices(len(packed["trellis"]))
        if step < 1:  # only forward
            return self.dequantize(packed, ALL, dtype)[rows]
        codes = packed["trellis"], self.bits, self.state_bits, self.code
        weight = dequantize_trellis(*codes, start, max(start, stop), dtype, order=self.order, table=packed.get("tlut"))
        return weight if step == 1 else weight[::step]

    def scratch_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        return dtype.itemsize if decodes(device) else super().scratch_bytes(device, dtype)

    def multiply(self, x: Tensor, packed: Packed, transposed: bool = False) -> Tensor | None:
        if not multiplies(x.device):
            return None
        codes = packed["trellis"], self.bits, self.state_bits, self.code
        return multiply_trellis(x, *codes, transposed, order=self.order, table=packed.get("tlut"))

    def _table(self, device: torch.device) -> Tensor | None:
        """The table that weights are encoded with, [512, 2] float16; None of codes without."""
        return fitted_table(self.bits, self.state_bits).to(device) if self.code == "hyb" else None
