"""Rows of a weight on uniform grids: value = scale · (code − zero), group by group along the inputs.

Shapes: out, in — features; G = ceil(in / group_size) groups, the last may be shorter; w = ceil(in·bits / 32).

    dequantize_affine: qweight [out, w] int32, scales [out, G], qzeros [out, ceil(G·bits / 8)] uint8 -> [out, in]

`qzeros` is the bit stream of the zero points along the groups, or None for the symmetric grid, zero = 2^(bits−1).
The product is formed in float32 and rounded once, to `dtype`.
"""

from .reference import dequantize_affine

__all__ = ["dequantize_affine"]
