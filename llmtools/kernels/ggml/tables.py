"""Constants of ggml's block types: levels and codebooks.

The codebooks of the IQ types were searched for by their author (Iwan Kawrakow, in llama.cpp, MIT licence) and follow no
formula; `grids.bin` holds them as indices of their few levels, the first in the lowest bits: 2 bits each where there
are three levels, 4 where there are eight, table after table in the order of `_GRIDS`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_GRIDS: dict[str, tuple[tuple[int, ...], tuple[int, int]]] = {
    "IQ2_XXS": ((8, 25, 43), (256, 8)),
    "IQ2_XS": ((8, 25, 43), (512, 8)),
    "IQ2_S": ((8, 25, 43), (1024, 8)),
    "IQ3_XXS": ((4, 12, 20, 28, 36, 44, 52, 62), (256, 4)),
    "IQ3_S": ((1, 3, 5, 7, 9, 11, 13, 15), (512, 4)),
    "IQ1": ((-1, 0, 1), (2048, 8)),
}
"""Levels, and (number of vectors, their width), by name."""


@functools.cache
def grid(name: str, device: torch.device) -> Tensor:
    """A codebook, [vectors, width] float32."""
    data, start = (Path(__file__).parent / "grids.bin").read_bytes(), 0
    for each, (levels, (count, width)) in _GRIDS.items():
        bits = 2 if len(levels) == 3 else 4
        size = count * width * bits // 8
        if each == name:
            index = torch.tensor(list(data[start : start + size]), dtype=torch.uint8)
            codes = (index[:, None] >> torch.arange(0, 8, bits, dtype=torch.uint8)) & (2**bits - 1)
            return torch.tensor(levels, dtype=torch.float32)[codes.flatten().long()].reshape(count, width).to(device)
        start += size
    raise KeyError(name)


@functools.cache
def iq4_levels(device: torch.device) -> Tensor:
    """The 16 levels of IQ4_NL and IQ4_XS, float32."""
    return torch.tensor(_IQ4, dtype=torch.float32, device=device)


@functools.cache
def sign_bytes(device: torch.device) -> Tensor:
    """[128] uint8: eight signs for seven bits; the eighth makes the number of minus signs even."""
    return torch.tensor([i | i.bit_count() % 2 << 7 for i in range(128)], dtype=torch.uint8, device=device)
