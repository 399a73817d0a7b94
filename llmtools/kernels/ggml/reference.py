"""Decoders of ggml's blocks in plain torch: the specification of the faster kernels.

A decoder takes blocks [n, bytes] uint8 and returns their weights [n, weights] float32. Its operations are those of
ggml's own decoder, in the same order and in float32, so the results are bit-identical. "Planes": most types store the
low (or high) bits of many codes in runs of bytes; the first run of codes is in the lowest bits of the bytes, the next
in the bits above.

Source: llama.cpp, ggml/src/ggml-quants.c (dequantize_row_*).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .tables import grid, iq4_levels, sign_bytes
from .types import TYPES

Decoder = Callable[[Tensor], Tensor]

ROWS = 256
"""Number of rows that the product decodes at a time."""


def dequantize_ggml(blocks: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] of `dtype`; blocks [out, row_bytes] uint8, kind: a name of `TYPES`."""
    count = blocks.shape[1] // TYPES[kind].bytes
    flat = blocks.reshape(blocks.shape[0] * count, TYPES[kind].bytes)
    return DECODERS[kind](flat).to(dtype).reshape(blocks.shape[0], count * TYPES[kind].weights)


def multiply_ggml(x: Tensor, blocks: Tensor, kind: str, transposed: bool) -> Tensor:
    """x [t, in] -> [t, out], or [t, out] -> [t, in], `ROWS` rows at a time, accumulated in float32 or wider."""
    columns = blocks.shape[1] // TYPES[kind].bytes * TYPES[kind].weights
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros((len(x), columns), dtype=wide) if transposed else x.new_empty((len(x), len(blocks)))
    for start in range(0, len(blocks), ROWS):
        rows = slice(start, start + ROWS)
        weight = dequantize_ggml(blocks[rows], kind, x.dtype)
        if transposed:
            y += x[:, rows] @ weight  # [t, ROWS] @ [ROWS, in]
        else:
            y[:, rows] = x @ weight.T  # [t, in] @ [in, ROWS]
    return y.to(x.dtype)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, [n, 1] float32."""
    half: Tensor = blocks[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16)
    return half.float()


def _words(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, bytes] -> unsigned little-endian integers [n, bytes / size] int64 of the size of `dtype`."""
    words: Tensor = blocks.clone(memory_format=torch.contiguous_format).view(dtype).long()  # a copy: it is aligned
    return words & _ones(8 * dtype.itemsize)


def _ones(bits: int) -> int:
    return (1 << bits) - 1


def _split(values: Tensor, *sizes: int) -> Tensor:
    """[n, m] -> [n, *sizes]."""
    parts: Tensor = values.unflatten(1, sizes)
    return parts


def _planes(blocks: Tensor, bits: int, run: int) -> Tensor:
    """[n, bytes] -> codes [n, bytes · 8 / bits] uint8, planes of `bits` bits of each `run` bytes."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=blocks.device)
    codes = _split(blocks, -1, 1, run) >> shifts[:, None]
    return (codes & _ones(bits)).flatten(1)


def _fields(words: Tensor, bits: int, count: int) -> Tensor:
    """[n, m] integers -> [n, m · count]: `count` fields of `bits` bits of each, the lowest first."""
    shifts = bits * torch.arange(count, dtype=words.dtype, device=words.device)
    return ((words[..., None] >> shifts) & _ones(bits)).flatten(1)


def _scaled(scale: Tensor, values: Tensor) -> Tensor:
    """scale [n, g] times values [n, g · k], each for k consecutive ones."""
    return (scale[..., None] * _split(values, scale.shape[1], -1)).flatten(1)


# ---- a code per weight: value = scale · level + offset ------------------------------------------------------------


class Codes(NamedTuple):
    """Where a block [n, bytes] uint8 of a type with a code per weight holds what; g — groups of a block."""

    scale: Callable[[Tensor], Tensor]
    """Scales of the groups, [n, g] float32."""
    read: Callable[[Tensor], Tensor]
    """Codes, [n, weights] uint8."""
    zero: int = 0
    """Code of the level 0: level = code − zero."""
    offset: Callable[[Tensor], Tensor] | None = None
    """Offsets of the groups, [n, g] float32; None for none."""
    table: bool = False
    """Whether the levels are those of `tables.iq4_levels`, at the code, instead."""

    def values(self, scale: Tensor, codes: Tensor, offset: Tensor | None) -> Tensor:
        """Weights [n, g, w / g] float32 of codes of that shape, of any type; scale, offset [n, g]."""
        level = iq4_levels(codes.device)[codes.long()] if self.table else codes.float() - self.zero
        value = scale[..., None] * level
        return value if offset is None else value + offset[..., None]

    def decode(self, b: Tensor) -> Tensor:
        """[n, bytes] -> [n, weights] float32."""
        scale = self.scale(b)
        offset = None if self.offset is None else self.offset(b)
        return self.values(scale, _split(self.read(b), scale.shape[1], -1), offset).flatten(1)


def _nibbles(start: int) -> Callable[[Tensor], Tensor]:
    """32 codes of 4 bits from byte `start`."""
    return lambda b: _planes(b[:, start:], 4, 16)


def _fives(start: int) -> Callable[[Tensor], Tensor]:
    """32 codes of 5 bits: nibbles from byte `start`, and the tops in the four bytes before, bit i for code i."""
    return lambda b: _planes(b[:, start:], 4, 16) | _fields(b[:, start - 4 : start], 1, 8) << 4


def _first(b: Tensor) -> Tensor:
    return _half(b, 0)


def _second(b: Tensor) -> Tensor:
    return _half(b, 2)


def _q3_scale(b: Tensor) -> Tensor:
    return _half(b, 108) * ((_planes(b[:, 96:104], 4, 8) | _planes(b[:, 104:108], 2, 4) << 4).float() - 32)


def _q6_scale(b: Tensor) -> Tensor:
    return _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float()


def _iq4_xs_scale(b: Tensor) -> Tensor:
    scale = _fields(b[:, 4:8], 4, 2).long() | _fields(_words(b[:, 2:4], torch.int16), 2, 8) << 4  # [n, 8]
    return _half(b, 0) * (scale.float() - 32)


def _sixes(b: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits, [n, 8] float32 each, out of 12 bytes [n, 12].

    The first four of both are the low 6 bits of bytes 0 to 7; of the others the nibbles are in bytes 8 to 11, and the
    upper two bits above the first four.
    """
    first, second, third = b[:, :4], b[:, 4:8], b[:, 8:12]
    scale = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], 1)
    least = torch.cat([second & 63, (third >> 4) | (second >> 6) << 4], 1)
    return scale.float(), least.float()


def _k(read: Callable[[Tensor], Tensor]) -> Codes:
    """Q4_K and Q5_K: eight scales and minima of 6 bits."""
    return Codes(
        scale=lambda b: _half(b, 0) * _sixes(b[:, 4:16])[0],
        read=read,
        offset=lambda b: -(_half(b, 2) * _sixes(b[:, 4:16])[1]),
    )


CODES: dict[str, Codes] = {
    "Q4_0": Codes(_first, _nibbles(2), zero=8),
    "Q4_1": Codes(_first, _nibbles(4), offset=_second),
    "Q5_0": Codes(_first, _fives(6), zero=16),
    "Q5_1": Codes(_first, _fives(8), offset=_second),
    "Q8_0": Codes(_first, lambda b: b[:, 2:] ^ 128, zero=128),  # the signed byte and 128
    "Q2_K": Codes(
        scale=lambda b: _half(b, 80) * (b[:, :16] & 15).float(),
        read=lambda b: _planes(b[:, 16:80], 2, 32),
        offset=lambda b: -(_half(b, 82) * (b[:, :16] >> 4).float()),
    ),
    "Q3_K": Codes(_q3_scale, lambda b: _planes(b[:, 32:96], 2, 32) | _planes(b[:, :32], 1, 32) << 2, zero=4),
    "Q4_K": _k(lambda b: _planes(b[:, 16:], 4, 32)),
    "Q5_K": _k(lambda b: _planes(b[:, 48:], 4, 32) | _planes(b[:, 16:48], 1, 32) << 4),
    "Q6_K": Codes(_q6_scale, lambda b: _planes(b[:, :128], 4, 64) | _planes(b[:, 128:192], 2, 32) << 4, zero=32),
    "IQ4_NL": Codes(_first, _nibbles(2), table=True),
    "IQ4_XS": Codes(_iq4_xs_scale, _nibbles(8), table=True),
}
"""The types with a code per weight, by name."""


# ---- codebooks of whole vectors --------------------------------------------------------------------------------------


def _signs(b: Tensor) -> Tensor:
    """[n, m] bytes -> [n, 8 m] of 1 and −1: a bit that is set is a minus."""
    return 1 - 2 * _fields(b, 1, 8).float()


def _points(table: str, index: Tensor) -> Tensor:
    """[n, m] indices -> the vectors of a codebook, one after the other, [n, m · width]."""
    return grid(table, index.device)[index].flatten(1)


def _iq2_xxs(b: Tensor) -> Tensor:
    words = _split(_words(b[:, 2:], torch.int32), 8, 2)  # four indices of 8 bits; four of signs, and a scale
    scale = _half(b, 0) * (0.5 + (words[..., 1] >> 28).float()) * 0.25
    values = _scaled(scale, _points("IQ2_XXS", _fields(words[..., 0], 8, 4)))
    return values * _signs(sign_bytes(b.device)[_fields(words[..., 1], 7, 4)])


def _iq2_xs(b: Tensor) -> Tensor:
    words = _words(b[:, 2:66], torch.int16)  # [n, 32]: an index of 9 bits, one of signs
    scale = _half(b, 0) * (0.5 + _fields(b[:, 66:], 4, 2).float()) * 0.25  # [n, 16]
    return _scaled(scale, _points("IQ2_XS", words & 511)) * _signs(sign_bytes(b.device)[words >> 9])


def _iq2_s(b: Tensor) -> Tensor:
    index = b[:, 2:34].long() | _fields(b[:, 66:74], 2, 4).long() << 8
    scale = _half(b, 0) * (0.5 + _fields(b[:, 74:], 4, 2).float()) * 0.25
    return _scaled(scale, _points("IQ2_S", index)) * _signs(b[:, 34:66])


def _iq3_xxs(b: Tensor) -> Tensor:
    words = _words(b[:, 66:], torch.int32)  # [n, 8]: four indices of signs, and a scale
    scale = _half(b, 0) * (0.5 + (words >> 28).float()) * 0.5
    return _scaled(scale, _points("IQ3_XXS", b[:, 2:66].long())) * _signs(sign_bytes(b.device)[_fields(words, 7, 4)])


def _iq3_s(b: Tensor) -> Tensor:
    index = b[:, 2:66].long() | _fields(b[:, 66:74], 1, 8).long() << 8
    scale = _half(b, 0) * (1 + 2 * _fields(b[:, 106:], 4, 2).float())  # [n, 8]
    return _scaled(scale, _points("IQ3_S", index)) * _signs(b[:, 74:106])


def _iq1_s(b: Tensor) -> Tensor:
    words = _words(b[:, 34:], torch.int16)  # [n, 8]: the tops of four indices, a scale, the sign of the shift
    scale = _half(b, 0) * (2 * (words >> 12 & 7) + 1).float()
    points = _points("IQ1", b[:, 2:34].long() | _fields(words, 3, 4) << 8)
    shift = 0.125 - 0.25 * (words >> 15).float()
    return _scaled(scale, (_split(points, 8, 32) + shift[..., None]).flatten(1))


def iq1_m_scale(b: Tensor) -> Tensor:
    """The float16 of a block of IQ1_M, [n, 1]: its nibbles are the upper ones of four words."""
    tops = _words(b[:, 48:56], torch.int16) >> 12  # [n, 4]
    bits = (tops << 4 * torch.arange(4, device=b.device)).sum(1, keepdim=True)
    return torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16).view(torch.float16)


def _iq1_m(b: Tensor) -> Tensor:
    scale = iq1_m_scale(b).float() * (2 * _fields(_words(b[:, 48:56], torch.int16), 3, 4) + 1).float()  # [n, 16]
    tops = _fields(b[:, 32:48], 4, 2).long()  # [n, 32]: the top of an index, the sign of the shift
    points = _points("IQ1", b[:, :32].long() | (tops & 7) << 8)
    shift = 0.125 - 0.25 * (tops >> 3).float()
    return _scaled(scale, (_split(points, 32, 8) + shift[..., None]).flatten(1))


DECODERS: dict[str, Decoder] = {
    **{name: codes.decode for name, codes in CODES.items()},
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ3_XXS": _iq3_xxs,
    "IQ1_S": _iq1_s,
    "IQ3_S": _iq3_s,
    "IQ2_S": _iq2_s,
    "IQ1_M": _iq1_m,
}
