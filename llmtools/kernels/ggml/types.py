"""ggml's block types: their numbers in files, and their sizes."""

from __future__ import annotations

from typing import NamedTuple


class BlockType(NamedTuple):
    """One of ggml's block types."""

    number: int
    """Number in files."""
    weights: int
    """Number of weights in a block."""
    bytes: int
    """Size of a block, in bytes."""
    halves: tuple[int, ...]
    """Offsets of the float16 numbers in a block, in bytes; none for IQ1_M, which scatters their bits."""


TYPES = {
    "Q4_0": BlockType(2, 32, 18, (0,)),
    "Q4_1": BlockType(3, 32, 20, (0, 2)),
    "Q5_0": BlockType(6, 32, 22, (0,)),
    "Q5_1": BlockType(7, 32, 24, (0, 2)),
    "Q8_0": BlockType(8, 32, 34, (0,)),
    "Q2_K": BlockType(10, 256, 84, (80, 82)),
    "Q3_K": BlockType(11, 256, 110, (108,)),
    "Q4_K": BlockType(12, 256, 144, (0, 2)),
    "Q5_K": BlockType(13, 256, 176, (0, 2)),
    "Q6_K": BlockType(14, 256, 210, (208,)),
    "IQ2_XXS": BlockType(16, 256, 66, (0,)),
    "IQ2_XS": BlockType(17, 256, 74, (0,)),
    "IQ3_XXS": BlockType(18, 256, 98, (0,)),
    "IQ1_S": BlockType(19, 256, 50, (0,)),
    "IQ4_NL": BlockType(20, 32, 18, (0,)),
    "IQ3_S": BlockType(21, 256, 110, (0,)),
    "IQ2_S": BlockType(22, 256, 82, (0,)),
    "IQ4_XS": BlockType(23, 256, 136, (0,)),
    "IQ1_M": BlockType(29, 256, 56, ()),
}
"""Block types by name."""

NUMBERS = {kind.number: name for name, kind in TYPES.items()}
"""Names by number in files."""
