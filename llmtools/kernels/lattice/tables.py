"""The vectors of QuIP#'s lattice codebooks, by construction (arXiv:2402.04396, §4 and appendix C).

E8P holds 65 536 vectors of length 8: half-integer vectors with an even sum inside a ball, moved by +¼ or −¼, so that
all values are multiples of ¼. It has a product structure, and 2 KiB describe it. A code is 16 bits, c = 256·a + s:

    a, the magnitudes:  row a of a table of 256 vectors in {½, 3/2, 5/2}⁸
    s, the signs:       bit 0, 4, 1, 5, 2, 6, 3, 7 of s negates element 0 … 7. The number of signs must come out right
                        for an even sum, which frees one bit: the parity of s, odd for the shift −¼, even for +¼.

E81B holds 256 vectors around the origin and refines E8P's error for the third bit.

Everything is int8 in units of a quarter: 4·value. One copy a process and device.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

# The last 29 of the 256 magnitudes: some of the vectors of squared norm 12, as twice their entries.
_NORM_12 = """
    31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133
    33133311 33133131 33131331 33133113 33131313 33131133 31333311 31333131 31331331 31333113
    31331313 13331133 13333311 13333131 13331331 13333113 13331313 11331333 33113331
"""

SIGN_BITS = (0, 4, 1, 5, 2, 6, 3, 7)  # of s, for element 0 … 7


@cache
def e8p_magnitudes() -> Tensor:
    """int8 [256, 8] on the CPU: twice the magnitudes, hence 1, 3 or 5. Norms up to 10 in lexicographic order; 29."""
    ball = [v for v in product((1, 3, 5), repeat=8) if sum(x * x for x in v) <= 40]
    last = [tuple(int(digit) for digit in word) for word in _NORM_12.split()]
    with torch.inference_mode(False):
        return torch.tensor(ball + last, dtype=torch.int8, device="cpu")


@cache
def e8p_parts() -> tuple[Tensor, Tensor, Tensor]:
    """(magnitudes, flips, offsets), each int8 [256, 8] on the CPU: value·4 = (magnitudes[a] ^ flips[s]) + offsets[s].

    The magnitudes carry a minus on element 7 where their sum would be odd. In two's complement x ^ −1 = −x − 1, so
    negating is an exclusive or with −1 and adding 1; offsets hold that 1 and the ±1 of the shift by ¼.
    """
    with torch.inference_mode(False):
        magnitudes = 2 * e8p_magnitudes()
        odd = magnitudes.sum(-1) // 4 % 2
        magnitudes[:, 7] *= (1 - 2 * odd).to(torch.int8)
        s = torch.arange(256, device="cpu")
        parity = torch.stack([(s >> bit) & 1 for bit in range(8)]).sum(0) % 2
        signs = torch.stack([((s ^ parity) >> bit) & 1 for bit in SIGN_BITS], -1)
        offsets = signs + (1 - 2 * parity)[:, None]
        return magnitudes, (-signs).to(torch.int8), offsets.to(torch.int8)


@cache
def e8p_table() -> Tensor:
    """int8 [65536, 8] on the CPU: all vectors of E8P in quarters, by code."""
    with torch.inference_mode(False):
        magnitudes, flips, offsets = e8p_parts()
        return ((magnitudes[:, None] ^ flips) + offsets).reshape(65536, 8)


@cache
def e81b_table() -> Tensor:
    """int8 [256, 8] on the CPU: E81B in quarters: the origin, E8's 112 integer and 128 half-integer roots, 15 ±2e."""
    integers = [v for v in product((-4, 0, 4), repeat=8) if sum(map(abs, v)) in (0, 8)]
    halves = [v for v in product((-2, 2), repeat=8) if sum(v) % 8 == 0]
    doubled = [tuple(sign * 8 * (i == j) for j in range(8)) for sign in (1, -1) for i in range(8)][:15]
    with torch.inference_mode(False):
        return torch.tensor(integers + halves + doubled, dtype=torch.int8, device="cpu")


@cache
def values(name: str, divisor: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The vectors of "e8p" [65536, 8] or "e81b" [256, 8], on a device: divided in float32, rounded to `dtype`.

    Dividing in one place makes the bits the same everywhere: graphics processors multiply by the reciprocal instead.
    """
    with torch.inference_mode(False):
        table = e8p_table() if name == "e8p" else e81b_table()
        return (
            (table.to(torch.float32) / 4 / torch.tensor(divisor, dtype=torch.float32, device="cpu"))
            .to(dtype)
            .to(device)
        )
