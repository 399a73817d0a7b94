"""Encoders of ggml's blocks that keep their scales, in plain torch: each weight gets the code nearest to it.

For all types with a code per weight, `reference.CODES`: value = scale · level[code] + offset, with a scale and an
offset for each group of a block. Where no code is nearer than the former one, that one stays, so blocks that are
encoded from their own values keep their bytes. Types whose codes name vectors (IQ1 to IQ3) have no such encoder here.

Shapes: n — blocks; w — weights in a block; g — groups in a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import CODES
from .tables import iq4_levels
from .types import TYPES

Write = Callable[[Tensor, Tensor], None]
"""Writes codes [n, w] uint8 into blocks [n, bytes] uint8, in place."""


class Encoding(NamedTuple):
    """How codes get into a block."""

    write: Write
    """Writes them."""
    top: int
    """Largest code."""
    least: int = 0
    """Least code that is chosen; Q8_0's own quantizer gives no −128."""


def encode_ggml(values: Tensor, blocks: Tensor, kind: str) -> Tensor:
    """Blocks [out, row_bytes] uint8 with the codes nearest to the values [out, in] float; kind: one of `ENCODINGS`."""
    held, how, flat = CODES[kind], ENCODINGS[kind], blocks.reshape(-1, TYPES[kind].bytes).clone()
    scale, offset = held.scale(flat), None if held.offset is None else held.offset(flat)  # [n, g]
    target = values.float().reshape(*scale.shape, -1)  # [n, g, w / g]
    former = held.read(flat).view(target.shape)
    codes = target if offset is None else target - offset[..., None]
    codes = codes / torch.where(scale == 0, 1.0, scale)[..., None]
    if held.table:
        levels = iq4_levels(flat.device)
        codes = torch.bucketize(codes, (levels[1:] + levels[:-1]) / 2)
    else:
        codes = codes.round_().add_(held.zero).clamp_(how.least, how.top)
    errors = [held.values(scale, each, offset).sub_(target).abs_() for each in (codes, former)]
    how.write(flat, torch.where(errors[0] < errors[1], codes.to(torch.uint8), former).flatten(1))
    return flat.view_as(blocks)


def codes_ggml(blocks: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of blocks [out, row_bytes] uint8: scales [out, in] float32 and codes [out, in] uint8 of the weights, and the
    levels of the codes, rising, float32; None where they are the whole numbers."""
    held, flat = CODES[kind], blocks.reshape(-1, TYPES[kind].bytes)
    codes, scale = held.read(flat), held.scale(flat)
    scales = scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    levels = iq4_levels(flat.device) if held.table else None
    return scales.view(len(blocks), -1), codes.reshape(len(blocks), -1), levels


def _joined(codes: Tensor, bits: int, run: int) -> Tensor:
    """The inverse of `_planes`: codes [n, m] uint8 of `bits` bits -> [n, m · bits / 8] uint8."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    planes = codes.unflatten(1, (-1, 8 // bits, run)) << shifts[:, None]
    joined: Tensor = planes.sum(2, dtype=torch.uint8).flatten(1)
    return joined


def _in_planes(start: int, bits: int, run: int, shift: int = 0, weights: int = 256) -> Write:
    """A function that writes bits `shift` and up of codes into planes that begin at byte `start` of a block."""
    stop = start + weights * bits // 8

    def write(blocks: Tensor, codes: Tensor) -> None:
        blocks[:, start:stop] = _joined((codes >> shift) & (2**bits - 1), bits, run)

    return write


def _both(first: Write, second: Write) -> Write:
    def write(blocks: Tensor, codes: Tensor) -> None:
        first(blocks, codes)
        second(blocks, codes)

    return write


def _tops(start: int) -> Write:
    """A function that writes bit 4 of 32 codes into the bits of four bytes."""

    def write(blocks: Tensor, codes: Tensor) -> None:
        bits = (codes >> 4).unflatten(1, (4, 8)) << torch.arange(8, dtype=torch.uint8, device=codes.device)
        blocks[:, start : start + 4] = bits.sum(2, dtype=torch.uint8)

    return write


def _bytes(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, 2:] = codes ^ 128  # the code −128 + c as a signed byte


def _nibbles(start: int) -> Write:
    return _in_planes(start, 4, 16, weights=32)


ENCODINGS: dict[str, Encoding] = {
    "Q4_0": Encoding(_nibbles(2), top=15),
    "Q4_1": Encoding(_nibbles(4), top=15),
    "Q5_0": Encoding(_both(_nibbles(6), _tops(2)), top=31),
    "Q5_1": Encoding(_both(_nibbles(8), _tops(4)), top=31),
    "Q8_0": Encoding(_bytes, top=255, least=1),
    "Q2_K": Encoding(_in_planes(16, 2, 32), top=3),
    "Q3_K": Encoding(_both(_in_planes(32, 2, 32), _in_planes(0, 1, 32, shift=2)), top=7),
    "Q4_K": Encoding(_in_planes(16, 4, 32), top=15),
    "Q5_K": Encoding(_both(_in_planes(48, 4, 32), _in_planes(16, 1, 32, shift=4)), top=31),
    "Q6_K": Encoding(_both(_in_planes(0, 4, 64), _in_planes(128, 2, 32, shift=4)), top=63),
    "IQ4_NL": Encoding(_nibbles(2), top=15),
    "IQ4_XS": Encoding(_in_planes(8, 4, 16), top=15),
}
"""Encodings by the type's name."""
