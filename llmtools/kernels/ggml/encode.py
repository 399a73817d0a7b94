"""Encoders of ggml's blocks that keep their scales, in plain torch: each weight gets the code nearest to it.

For all types with a code per weight: value = scale · level[code] + offset, with a scale and an offset for each group of
a block, which are read from its bytes as in `reference.py`. Where no code is nearer than the former one, that one
stays, so blocks that are encoded from their own values keep their bytes. Types whose codes name vectors (IQ1 to IQ3)
have no such encoder here.

Shapes: n — blocks; w — weights in a block; g — groups in a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import _fields, _half, _planes, _sixes, _words
from .tables import iq4_levels
from .types import TYPES


class Encoding(NamedTuple):
    """The codes of a type, and where they are in a block [n, bytes] uint8."""

    scale: Callable[[Tensor], Tensor]
    """Scales of the groups, of blocks: [n, g] float32."""
    read: Callable[[Tensor], Tensor]
    """Codes of blocks: [n, w] uint8."""
    write: Callable[[Tensor, Tensor], None]
    """Writes codes [n, w] uint8 into blocks, in place."""
    top: int
    """Largest code."""
    zero: int = 0
    """Code of the level 0; level[code] = code − zero. Unused with a table."""
    offset: Callable[[Tensor], Tensor] | None = None
    """Offsets of the groups, of blocks: [n, g] float32; None for none."""
    least: int = 0
    """Least code that is chosen; Q8_0's own quantizer gives no −128."""
    table: bool = False
    """Whether the levels are those of `tables.iq4_levels`."""


def encode_ggml(values: Tensor, blocks: Tensor, kind: str) -> Tensor:
    """Blocks [out, row_bytes] uint8 with the codes nearest to the values [out, in] float; kind: one of `ENCODINGS`."""
    how, flat = ENCODINGS[kind], blocks.reshape(-1, TYPES[kind].bytes).clone()
    scale = how.scale(flat)[..., None]  # [n, g, 1]
    offset = 0.0 if how.offset is None else how.offset(flat)[..., None]
    target = values.float().reshape(len(flat), scale.shape[1], -1)  # [n, g, w / g]
    former = how.read(flat).view(target.shape)
    levels = iq4_levels(flat.device) if how.table else None
    codes = (target - offset).div_(torch.where(scale == 0, 1.0, scale))
    if levels is None:
        codes = codes.round_().add_(how.zero).clamp_(how.least, how.top)
    else:
        codes = torch.bucketize(codes, (levels[1:] + levels[:-1]) / 2)
    errors = []
    for each in (codes, former):
        level = torch.sub(each, float(how.zero)) if levels is None else levels[each.long()]
        errors.append(level.mul_(scale).add_(offset).sub_(target).abs_())
    how.write(flat, torch.where(errors[0] < errors[1], codes.to(torch.uint8), former).flatten(1))
    return flat.view_as(blocks)


def _joined(codes: Tensor, bits: int, run: int) -> Tensor:
    """The inverse of `_planes`: codes [n, m] uint8 of `bits` bits -> [n, m · bits / 8] uint8."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    planes = codes.unflatten(1, (-1, 8 // bits, run)) << shifts[:, None]
    joined: Tensor = planes.sum(2, dtype=torch.uint8).flatten(1)
    return joined


def _in_planes(start: int, bits: int, run: int, shift: int = 0, weights: int = 256) -> Callable[[Tensor, Tensor], None]:
    """A function that writes bits `shift` and up of codes into planes that begin at byte `start` of a block."""
    stop = start + weights * bits // 8

    def write(blocks: Tensor, codes: Tensor) -> None:
        blocks[:, start:stop] = _joined((codes >> shift) & (2**bits - 1), bits, run)

    return write


def _both(
    first: Callable[[Tensor, Tensor], None], second: Callable[[Tensor, Tensor], None]
) -> Callable[[Tensor, Tensor], None]:
    def write(blocks: Tensor, codes: Tensor) -> None:
        first(blocks, codes)
        second(blocks, codes)

    return write


def _tops(start: int) -> Callable[[Tensor, Tensor], None]:
    """A function that writes bit 4 of 32 codes into the bits of four bytes."""

    def write(blocks: Tensor, codes: Tensor) -> None:
        bits = (codes >> 4).unflatten(1, (4, 8)) << torch.arange(8, dtype=torch.uint8, device=codes.device)
        blocks[:, start : start + 4] = bits.sum(2, dtype=torch.uint8)

    return write


def _nibbles(start: int) -> Encoding:
    """32 codes of 4 bits from byte `start`; the scale is the block's first float16."""
    return Encoding(
        scale=lambda b: _half(b, 0),
        read=lambda b: _planes(b[:, start:], 4, 16),
        write=_in_planes(start, 4, 16, weights=32),
        top=15,
    )


def _fives(start: int) -> Encoding:
    """32 codes of 5 bits: four bytes with the upper bits before byte `start`, nibbles from there."""
    return Encoding(
        scale=lambda b: _half(b, 0),
        read=lambda b: _planes(b[:, start:], 4, 16) | _fields(b[:, start - 4 : start], 1, 8) << 4,
        write=_both(_in_planes(start, 4, 16, weights=32), _tops(start - 4)),
        top=31,
    )


def _bytes(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, 2:] = codes ^ 128  # the code −128 + c as a signed byte


def _q3_scale(b: Tensor) -> Tensor:
    return _half(b, 108) * ((_planes(b[:, 96:104], 4, 8) | _planes(b[:, 104:108], 2, 4) << 4).float() - 32)


def _iq4_xs_scale(b: Tensor) -> Tensor:
    scale = _fields(b[:, 4:8], 4, 2).long() | _fields(_words(b[:, 2:4], torch.int16), 2, 8) << 4  # [n, 8]
    return _half(b, 0) * (scale.float() - 32)


def _k(start: int, bits: int) -> Encoding:
    """Q4_K and Q5_K: eight scales and minima of 6 bits."""
    four = _in_planes(start, 4, 32)
    return Encoding(
        scale=lambda b: _half(b, 0) * _sixes(b[:, 4:16])[0],
        offset=lambda b: -(_half(b, 2) * _sixes(b[:, 4:16])[1]),
        read=lambda b: _planes(b[:, start:], 4, 32) | (_planes(b[:, 16:48], 1, 32) << 4 if bits == 5 else 0),
        write=four if bits == 4 else _both(four, _in_planes(16, 1, 32, shift=4)),
        top=2**bits - 1,
    )


ENCODINGS: dict[str, Encoding] = {
    "Q4_0": _nibbles(2)._replace(zero=8),
    "Q4_1": _nibbles(4)._replace(offset=lambda b: _half(b, 2)),
    "Q5_0": _fives(6)._replace(zero=16),
    "Q5_1": _fives(8)._replace(offset=lambda b: _half(b, 2)),
    "Q8_0": Encoding(lambda b: _half(b, 0), lambda b: b[:, 2:] ^ 128, _bytes, top=255, zero=128, least=1),
    "Q2_K": Encoding(
        scale=lambda b: _half(b, 80) * (b[:, :16] & 15).float(),
        offset=lambda b: -(_half(b, 82) * (b[:, :16] >> 4).float()),
        read=lambda b: _planes(b[:, 16:80], 2, 32),
        write=_in_planes(16, 2, 32),
        top=3,
    ),
    "Q3_K": Encoding(
        scale=_q3_scale,
        read=lambda b: _planes(b[:, 32:96], 2, 32) | _planes(b[:, :32], 1, 32) << 2,
        write=_both(_in_planes(32, 2, 32), _in_planes(0, 1, 32, shift=2)),
        top=7,
        zero=4,
    ),
    "Q4_K": _k(16, 4),
    "Q5_K": _k(48, 5),
    "Q6_K": Encoding(
        scale=lambda b: _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float(),
        read=lambda b: _planes(b[:, :128], 4, 64) | _planes(b[:, 128:192], 2, 32) << 4,
        write=_both(_in_planes(0, 4, 64), _in_planes(128, 2, 32, shift=4)),
        top=63,
        zero=32,
    ),
    "IQ4_NL": _nibbles(2)._replace(table=True),
    "IQ4_XS": Encoding(
        scale=_iq4_xs_scale,
        read=lambda b: _planes(b[:, 8:], 4, 16),
        write=_in_planes(8, 4, 16),
        top=15,
        table=True,
    ),
}
"""Encodings by the type's name."""
