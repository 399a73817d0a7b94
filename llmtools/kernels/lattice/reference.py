"""Lattice codes in plain torch: the specification of the faster routes, and the route on every device but the CPU.

This encoder and the one in C decide alike, bit for bit: scores are float32 sums formed in the order of the elements,
products are rounded once before they are added, and ties go to the lower row, the earlier element, the shift by +¼.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .tables import SIGN_BITS, e8p_magnitudes, e81b_table, values

ROWS = 256  # decoded at a time by the product


def dequantize_lattice(codes: Tensor, residual: Tensor | None, residual_scale: float, dtype: torch.dtype) -> Tensor:
    """The weights of `dtype`. codes [..., b] int16; residual [..., b] uint8, int16 or None. Returns [..., 8b]."""
    if residual is None:
        return look_up("e8p", codes, dtype).flatten(-2)
    book = "e8p" if residual.dtype == torch.int16 else "e81b"
    total = look_up("e8p", codes, torch.float32) + look_up(book, residual, torch.float32, divisor=residual_scale)
    return total.flatten(-2).to(dtype)


def multiply_lattice(
    x: Tensor, codes: Tensor, residual: Tensor | None, residual_scale: float, transposed: bool
) -> Tensor:
    """x [t, 8b] -> [t, out], or transposed x [t, out] -> [t, 8b], of x's type; codes and residual [out, b].

    A block of rows at a time; blocks are added in float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros((len(x), 8 * codes.shape[1] if transposed else len(codes)), dtype=wide)
    for start in range(0, len(codes), ROWS):
        rows = slice(start, start + ROWS)
        weight = dequantize_lattice(
            codes[rows], residual if residual is None else residual[rows], residual_scale, x.dtype
        )
        if transposed:
            y += x[:, rows] @ weight  # [t, ROWS] @ [ROWS, 8b]
        else:
            y[:, rows] = F.linear(x, weight).to(wide)
    return y.to(x.dtype)


def look_up(book: str, codes: Tensor, dtype: torch.dtype, divisor: float = 1.0) -> Tensor:
    """Points of "e8p" or "e81b", over the divisor. codes [...] -> [..., 8]; an int16's bits count, not its sign."""
    index = codes.to(torch.int32) & 0xFFFF
    return F.embedding(index, values(book, divisor, codes.device, dtype))


def encode_e8p(x: Tensor) -> Tensor:
    """The nearest vector of E8P. x [n, 8] float32 -> codes [n] int16, to be read as 16 bits without a sign.

    For either shift h = ±¼ let y = x − h. With free signs each element takes the sign of y, and the best magnitudes A
    are those with the largest 2⟨A, |y|⟩ − |A|². Where the number of negatives does not suit the even sum, one sign must
    be wrong, which costs 4·A_i·|y_i| and is cheapest at the smallest product. So 2·256 rows are compared, not 65 536.
    """
    return torch.cat([_encode_e8p(part) for part in x.split(_chunk(x.device))])


def encode_e81b(x: Tensor) -> Tensor:
    """The nearest vector of E81B, by 2⟨c, x⟩ − |c|². x [n, 8] float32 -> codes [n] uint8."""
    table = e81b_table().to(x.device, torch.float32) / 4  # [256, 8]
    parts = []
    for part in x.split(_chunk(x.device)):
        score = (2 * table[:, 0]) * part[:, :1]
        for i in range(1, 8):
            score = score + (2 * table[:, i]) * part[:, i : i + 1]  # [n, 256]
        parts.append((score - table.square().sum(-1)).argmax(-1).to(torch.uint8))
    return torch.cat(parts)


def _encode_e8p(x: Tensor) -> Tensor:
    plus, score_plus = _with_shift(x, 0.25)
    minus, score_minus = _with_shift(x, -0.25)
    total = x[:, 0]
    for i in range(1, 8):
        total = total + x[:, i]
    # |x − ¼|² − |x + ¼|² = −Σx turns the difference of squared errors into a comparison of scores.
    return torch.where(score_plus + total >= score_minus, plus, minus).to(torch.int16)


def _with_shift(x: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """(codes [n] int64, scores [n]) of the best vector among those with this shift."""
    twice = e8p_magnitudes().to(x.device, torch.float32)  # 2A, [256, 8]
    norm = twice.square().sum(-1) / 4
    odd = twice.sum(-1) % 4 == 2  # the sum of A is odd, hence so is the number of negatives: [256]
    y = x - shift
    size, negative = y.abs(), y < 0

    total = least = size[:, :1] * twice[:, 0]  # [n, 256]
    for i in range(1, 8):
        term = size[:, i : i + 1] * twice[:, i]
        total, least = total + term, torch.minimum(least, term)
    unsuited = (negative.sum(-1) % 2 == 1)[:, None] != odd
    score = (total - norm) - torch.where(unsuited, 2 * least, 0)
    row = score.argmax(-1, keepdim=True)  # the first of equals, [n, 1]

    wrong = (size * twice[row[:, 0]]).argmin(-1, keepdim=True)
    element = torch.arange(8, device=x.device)
    signs = negative ^ ((element == wrong) & unsuited.gather(1, row)) ^ ((element == 7) & odd[row])  # [n, 8]
    places = torch.tensor(SIGN_BITS, device=x.device)
    codes = row[:, 0] << 8 | (signs.long() << places).sum(-1)
    return codes ^ int(shift < 0), score.gather(1, row)[:, 0]


def _chunk(device: torch.device) -> int:
    """Vectors encoded at once, with 256 scores each: what stays in a processor's cache or keeps an accelerator busy."""
    return 256 if device.type == "cpu" else 1 << 16
