"""The float16 numbers in ggml's blocks: the scale of a block and, in some types, its minimum.

    blocks [out, row_bytes] uint8; halves [out, n, h] float16, h of `TYPES[kind].halves`, or 1 for IQ1_M

Decoding is linear in them: weight = Σ half_j · decode(block with half_j = 1 and the others 0), whatever the type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import iq1_m_scale
from .types import TYPES

_NIBBLES = (49, 51, 53, 55)
"""Bytes of an IQ1_M block whose upper nibbles are its float16, the lowest nibble first."""


def halves(blocks: Tensor, kind: str) -> Tensor:
    """The float16 numbers of each block, [out, n, h]."""
    each = TYPES[kind]
    split = blocks.unflatten(1, (-1, each.bytes))  # [out, n, bytes]
    if not each.halves:
        return iq1_m_scale(split.flatten(0, 1)).view(*split.shape[:2], 1)
    return torch.stack([split[..., at : at + 2].contiguous().view(torch.float16)[..., 0] for at in each.halves], -1)


def with_halves(blocks: Tensor, kind: str, values: Tensor) -> Tensor:
    """A copy of the blocks with other float16 numbers [out, n, h]; all other bits are kept."""
    each, changed = TYPES[kind], blocks.clone()
    split = changed.unflatten(1, (-1, each.bytes))  # a view
    if not each.halves:
        bits = values.contiguous().view(torch.int16).to(torch.int32)  # [out, n, 1]
        nibbles = bits >> 4 * torch.arange(4, dtype=torch.int32, device=blocks.device) & 15
        split[..., _NIBBLES] = split[..., _NIBBLES] & 15 | (nibbles << 4).to(torch.uint8)
    for index, at in enumerate(each.halves):
        split[..., at : at + 2] = values[..., index : index + 1].contiguous().view(torch.uint8)
    return changed
