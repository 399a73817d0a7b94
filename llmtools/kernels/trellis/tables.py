"""The codes of a trellis: what each state is worth, and the orders in which a tile's weights form its sequence.

Most codes are computed from the state and need no table; the tables here are their definition, and what the encoder
reads.

    1mad    y = 34038481·s + 76625530 mod 2³²;  (Σ of the four bytes of y − 510) / 147.8
    3inst   y = 89226354·s + 64248484 mod 2³²;  y = (y & 8FFF8FFF₁₆) ^ 3B603B60₁₆;  upper half + lower half, as float16
    mcg     the same of y = CBAC1FED₁₆·s mod 2³²
    mul1    y = 83DCD12D₁₆·s mod 2³²;  (1024 + Σ of the four bytes of y) · 0.006767 − 10.38, both float16, rounded to it
    hyb     h = s² + s;  a pair of weights, entry (bits 6 … 14 of h) of a table [512, 2], the first one's sign by bit 15

The first two are QTIP's (arXiv:2406.11235, section 3.1), the next EXL3's (exllamav3, quant/codebook.cuh). The last is
QTIP's hybrid code (section 3.2; the signs as in its lib/codebook/bitshift.py): a step of the trellis takes 2k bits for
two weights, so that it is encoded in half as many steps, and its table can be fitted (`hybrid.py`) and trained.

The order "rows" reads a tile row by row. "exl3" is that of EXL3's files, in which a thread of a tensor core finds its
weights side by side: weight (r, c), r an output and c an input, has place
32·(r mod 8) + 8·⌊(c mod 8) / 2⌋ + 4·⌊r / 8⌋ + 2·⌊c / 8⌋ + c mod 2. QTIP's kernels have "fragments", the same with the
terms in ⌊r / 8⌋ and ⌊c / 8⌋ exchanged. In each of them a pair of weights are neighbours in a row.

One copy a process, device and type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

CODES = ("1mad", "3inst", "mcg", "mul1", "hyb")
ORDERS = ("rows", "exl3", "fragments")
TILE = 16
PAIRS = 512
"""Entries of the table of hyb."""


def dimension(code: str) -> int:
    """v, the number of weights of a state."""
    return 2 if code == "hyb" else 1


def values(code: str, table: Tensor | None, state_bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What every state is worth, [2^state_bits, v] of `dtype`; of hyb by its table [512, 2] float."""
    if table is None:
        return _values(code, state_bits, device, dtype)[:, None]
    return signed(table.to(device, dtype))[entries(torch.arange(1 << state_bits, device=device))]


@cache
def _values(code: str, state_bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[2^state_bits] of `dtype`: formed in float32 and rounded once."""
    with torch.inference_mode(False):
        state = torch.arange(1 << state_bits, dtype=torch.int64, device="cpu")
        return _FUNCTIONS[code](state).to(dtype).to(device)


def entries(state: Tensor) -> Tensor:
    """The entries of states in the `signed` table: bits 6 to 15 of s² + s."""
    return state.long() * (state + 1) >> 6 & 2 * PAIRS - 1


def signed(table: Tensor) -> Tensor:
    """table [512, 2] -> [1024, 2], the same and with the first of each pair negated."""
    return torch.cat([table, torch.stack([-table[:, 0], table[:, 1]], 1)])


@cache
def places(order: str, device: torch.device) -> Tensor:
    """The place of each weight of a tile in its sequence, [16, 16] int64: by output, by input."""
    with torch.inference_mode(False):
        r, c = torch.arange(TILE, device="cpu")[:, None], torch.arange(TILE, device="cpu")
        if order == "rows":
            return (TILE * r + c).to(device)
        first, second = (r // 8, c // 8) if order == "exl3" else (c // 8, r // 8)
        return (32 * (r % 8) + 8 * (c % 8 // 2) + 4 * first + 2 * second + c % 2).to(device)


def _1mad(state: Tensor) -> Tensor:
    total = (_bytes(34038481 * state + 76625530) - 510).to(torch.float32)
    return total * torch.tensor(1 / 147.800537109375, dtype=torch.float32, device="cpu")


def _mul1(state: Tensor) -> Tensor:
    """Product and sum are exact in float32: multiples of 2^-18 below 16."""
    factor, offset = torch.tensor([0x1EEE, 0xC931 - 0x10000], dtype=torch.int16, device="cpu").view(torch.float16)
    total = (1024 + _bytes(0x83DCD12D * state)).to(torch.float32)
    value: Tensor = total * factor.to(torch.float32) + offset.to(torch.float32)
    return value.to(torch.float16).to(torch.float32)


def _bytes(word: Tensor) -> Tensor:
    """The sum of the four lowest bytes."""
    return torch.stack([(word >> shift) & 0xFF for shift in (0, 8, 16, 24)]).sum(0)


def _halves(word: Tensor) -> Tensor:
    """The sum of two float16, of which each half of the word gives a sign and eleven bits."""
    word = (word & 0x8FFF8FFF) ^ 0x3B603B60
    high, low = (half.to(torch.int16).view(torch.float16) for half in (word >> 16, word & 0xFFFF))
    return (high + low).to(torch.float32)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "1mad": _1mad,
    "3inst": lambda state: _halves(89226354 * state + 64248484),
    "mcg": lambda state: _halves(0xCBAC1FED * state),
    "mul1": _mul1,
}
