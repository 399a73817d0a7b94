"""The codes of a trellis: what each state is worth (QTIP, arXiv:2406.11235, section 3.1, with its constants).

A code is computed from the state and needs no table; the tables here are its definition, and what the encoder reads.

    1mad    y = 34038481·s + 76625530 mod 2³²;  (Σ of the four bytes of y − 510) / 147.8
    3inst   y = 89226354·s + 64248484 mod 2³²;  y = (y & 8FFF8FFF₁₆) ^ 3B603B60₁₆;  upper half + lower half, as float16

One copy a process, device and type.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

CODES = ("1mad", "3inst")


@cache
def values(code: str, state_bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The value of every state, [2^state_bits] of `dtype`: formed in float32 and rounded once."""
    with torch.inference_mode(False):
        state = torch.arange(1 << state_bits, dtype=torch.int64, device="cpu")
        return (_mad(state) if code == "1mad" else _inst(state)).to(dtype).to(device)


def _mad(state: Tensor) -> Tensor:
    word = (34038481 * state + 76625530) & 0xFFFFFFFF
    total = torch.stack([(word >> shift) & 0xFF for shift in (0, 8, 16, 24)]).sum(0)
    return (total - 510).to(torch.float32) * torch.tensor(1 / 147.800537109375, dtype=torch.float32, device="cpu")


def _inst(state: Tensor) -> Tensor:
    word = ((89226354 * state + 64248484) & 0x8FFF8FFF) ^ 0x3B603B60
    high, low = (half.to(torch.int16).view(torch.float16) for half in (word >> 16, word & 0xFFFF))
    return (high + low).to(torch.float32)
