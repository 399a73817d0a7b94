"""Rows of a weight on a small table of values: value = scale · table[code], group by group along the inputs.

Shapes: out, in — features; G = ceil(in / group_size); w = ceil(in·4 / 32); tables have 16 entries.

    dequantize_codebook: qweight [out, w] int32, scales [out, G], table [16] -> [out, in]

The product is formed in float32 and rounded once, to `dtype`.
"""

from .reference import dequantize_codebook

__all__ = ["dequantize_codebook"]
