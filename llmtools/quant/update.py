"""A low-rank update of a packed weight, encoded on the weight's own grid: the codes of Q(Ŵ + b a), dithered.

Training with ``finetune --merge exact`` computes with these codes, and `merge` writes them: there is one function, so
both have the same bits. Blocks of rows are decoded, updated and encoded one after the other, so no dense weight
is ever held. A block's size depends on nothing but the weight's shape and the kind of device, since the sums of a
matrix product may depend on it.

Shapes: out, in — features; r — rank.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..errors import InputError, where

if TYPE_CHECKING:
    from .base import Packed

_BYTES = {"cpu": 2**20, "cuda": 2**25}
"""Size of a block in float32, by type of device: what stays in a cache, or keeps a GPU busy."""
_ALIGNMENT = 16  # no code of ours is of more rows


class Encodes(Protocol):
    """A quantizer, or a grid in its own coordinates."""

    def dequantize(self, packed: Packed, rows: slice = ..., dtype: torch.dtype = ...) -> Tensor: ...

    def out_features(self, packed: Packed) -> int: ...

    def dither(self, packed: Packed, rows: slice) -> Tensor | None: ...

    def requantize(self, weight: Tensor, packed: Packed, rows: slice = ...) -> Packed: ...


@torch.no_grad()
def updated(source: Encodes, packed: Packed, b: Tensor, a: Tensor, height: int = 1) -> Packed:
    """`packed` with the codes of Ŵ + b a, b [out, r] and a [r, in], on its own scales: nearest to that value moved by
    the quantizer's `dither`.

    height: number of rows that share a code. Raises InputError for NaN and infinities.
    """
    b, a = (each.detach().float() for each in (b, a))
    if not bool(torch.isfinite(b).all() & torch.isfinite(a).all()):
        raise InputError(f"{where()}NaN or inf in the update; it cannot be encoded")
    made: Packed = {}
    written: dict[str, int] = {}
    with torch.autocast(b.device.type, enabled=False):
        for rows in row_blocks(source.out_features(packed), a.shape[1], b.device, height):
            values = torch.addmm(source.dequantize(packed, rows, torch.float32), b[rows], a)
            if (offsets := source.dither(packed, rows)) is not None:
                values += offsets
            for name, codes in source.requantize(values, packed, rows).items():
                first = written.get(name, 0)
                written[name] = first + len(codes)
                made.setdefault(name, torch.empty_like(packed[name]))[first : written[name]] = codes
    return packed | made


def row_blocks(out_features: int, in_features: int, device: torch.device, height: int = 1) -> list[slice]:
    """Slices of the rows of a weight, which begin at multiples of 16 and of `height`."""
    unit = lcm(_ALIGNMENT, height)
    step = max(unit, _BYTES.get(device.type, _BYTES["cuda"]) // (4 * in_features) // unit * unit)
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]
