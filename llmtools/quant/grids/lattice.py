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

import functools
from collections.abc import Callable
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
    encode_e8p,
    encode_e81b,
    encode_lattice,
    multiplies,
    multiply_lattice,
)
from ..base import ALL, Packed, TensorSpec
from ..dither import MARGIN, length, sequence, windows
from .base import Grid

__all__ = ["SCALE", "Lattice"]

_RESIDUAL = {3: torch.uint8, 4: torch.int16}
_INSIDE = 1 - 2.0**-10
"""Largest product with a root of E8 at which a vector is in the cell of 0, less a margin for rounding."""
_USUAL = 0.75
"""Squared error of eight Gaussian weights on E8P."""


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

    def params(self, packed: Packed, rows: slice = ALL) -> Tensor:
        codes = packed["codes"][rows]
        return codes.new_empty((len(codes), 1, 0), dtype=torch.float32)

    def requantize(self, weight: Tensor, packed: Packed, rows: slice = ALL) -> Packed:
        """Only blocks that have left the cell of E8 around their point are searched: within it no point of a codebook
        is nearer.

        Residuals make many points, which are not searched together: first the first stage's code stays and the
        residual is chosen again; where that leaves more than the usual error, both are chosen one after the other. Of
        these and the former ones the nearest codes are taken.
        """
        former = {name: packed[name][rows] for name in self.codes}
        target = F.pad(weight.float(), (0, -weight.shape[1] % 8)).unflatten(1, (-1, 8))  # [rows, b, 8]
        left = _outside((target - self._points(former).view_as(target)).mul_(self._unit)).nonzero(as_tuple=True)
        if not len(left[0]):
            return former
        target, codes = target[left], {name: tensor[left] for name, tensor in former.items()}  # [n, 8], [n]
        error = self._error(target, codes)
        for proposal, limit in self._proposals():
            far = (error > limit * self._unit**-2).nonzero()[:, 0]
            some, before = target[far], {name: tensor[far] for name, tensor in codes.items()}
            tried = proposal(some, before)
            nearer = (made := self._error(some, tried)) < error[far]
            error[far] = torch.where(nearer, made, error[far])
            for name, tensor in codes.items():
                tensor[far] = torch.where(nearer, tried[name], before[name])
        return {name: tensor.index_put(left, codes[name]) for name, tensor in former.items()}

    def dither(self, packed: Packed, rows: slice) -> Tensor:
        """Uniform in the cell of E8, the least of any point of the codebooks, of the last stage's scale."""
        in_features = packed["codes"].shape[1] * 8
        cells = _cells(length(in_features), packed["codes"].device)
        return windows(cells, rows, in_features).div_(self._unit)

    @property
    def _unit(self) -> float:
        """Factor of the last stage's coordinates."""
        return 1.0 if self.bits == 2 else self._scale

    def _proposals(self) -> list[tuple[Callable[[Tensor, Packed], Packed], float]]:
        """Functions of vectors [n, 8] and their former codes [n] to other codes, and the squared error, in units of the
        last stage, from which they are tried."""
        return [(self._both, 0.0)] if self.bits == 2 else [(self._residual_again, 0.0), (self._both, _USUAL)]

    def _residual_again(self, target: Tensor, former: Packed) -> Packed:
        encode = encode_e81b if self.bits == 3 else encode_e8p
        rest = target - decode_e8p(former["codes"].to(torch.int64) & 0xFFFF)
        return {"codes": former["codes"], "residual": encode(rest * self._scale)}

    def _both(self, target: Tensor, former: Packed) -> Packed:
        codes, residual = encode_lattice(target, self.bits, self._scale)
        made = {"codes": codes[:, 0]}
        return made if residual is None else made | {"residual": residual[:, 0]}

    def _error(self, target: Tensor, codes: Packed) -> Tensor:
        """Squared distances [...] of vectors [..., 8] from the points of their codes [...]."""
        return (self._points(codes).view_as(target) - target).square_().sum(-1)

    def _points(self, codes: Packed) -> Tensor:
        return dequantize_lattice(codes["codes"], codes.get("residual"), self._scale)

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


def _outside(x: Tensor) -> Tensor:
    """Whether vectors [..., 8] are outside the cell of E8 around 0: [...] bool.

    They are where a product with one of its 240 roots exceeds 1, half a root's squared length. The roots have two
    entries of ±1, or eight of ±1/2, of which an even number is negative.
    """
    entries = x.movedim(-1, 0).contiguous()  # [8, ...]
    odd = (entries < 0).sum(0, dtype=torch.uint8) & 1 == 1
    sizes = entries.abs_()
    first, second = sizes[0], torch.zeros_like(sizes[0])
    for size in sizes[1:]:
        second = torch.maximum(second, torch.minimum(first, size))
        first = torch.maximum(first, size)
    halves = sizes.sum(0) / 2 - torch.where(odd, sizes.amin(0), 0.0)
    return torch.maximum(first + second, halves) > _INSIDE


@functools.lru_cache(maxsize=8)
def _cells(count: int, device: torch.device) -> Tensor:
    """[count] float32: vectors of eight, uniform in the cell of E8 around 0, a fixed sequence (`dither.sequence`).

    A cube of side 2 is a period of E8, so a uniform vector of it less the nearest point is uniform in the cell. That
    point is the nearer one of D8 and D8 + ½ (Conway and Sloane, "Fast quantizing and decoding algorithms", 1982).
    """
    x = sequence(count, device).view(-1, 8) * 2
    whole, half = _nearest_d8(x), _nearest_d8(x - 0.5) + 0.5
    nearer = (x - half).square().sum(-1, keepdim=True) < (x - whole).square().sum(-1, keepdim=True)
    return (x - torch.where(nearer, half, whole)).mul_(MARGIN).flatten()


def _nearest_d8(x: Tensor) -> Tensor:
    """The nearest whole numbers of an even sum to vectors [n, 8]: of an odd one the worst is rounded the other way."""
    rounded = torch.round(x)
    odd = rounded.sum(-1, keepdim=True) % 2 != 0
    worst = (x - rounded).abs().argmax(-1, keepdim=True)
    step = torch.where((x - rounded).gather(-1, worst) < 0, -1.0, 1.0)
    return rounded.scatter_add(-1, worst, torch.where(odd, step, 0.0))
