"""Groups of codes on a GPU: the tile that the kernels of `triton_common.py` need, and the calls.

    weight = (level[code] − zero) · scale       formed in float32, so that rounding it gives the reference's bits

A thread decodes eight neighbouring codes at 2 to 4 bits, which one or two words hold and, usually, one scale serves. A
codebook's values lie in one line of the cache, where a warp looks up 32 at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_common
from ..triton_common import fields, number
from . import reference


def dequantize_grouped(*weight: Any) -> Tensor:
    """The weight [out, in]; arguments as in the package's docstring, the type last."""
    *tensors, dtype = weight
    if dtype not in triton_common.FLOATS:
        return reference.dequantize_grouped(*weight)
    return triton_common.dequantize(_weight(*tensors), dtype)


def multiply_grouped(x: Tensor, *weight: Any) -> Tensor:
    """x [t, in] -> [t, out], or [t, out] -> [t, in]; arguments as in the package's docstring, `transposed` last."""
    *tensors, transposed = weight
    if x.dtype not in triton_common.FLOATS:
        return reference.multiply_grouped(x, *weight)
    product = triton_common.multiply_transposed if transposed else triton_common.multiply
    return product(x, _weight(*tensors))


def _weight(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    table: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> triton_common.Weight:
    qweight, scales = qweight.contiguous(), scales.contiguous()
    zeros = (qzeros.contiguous(), qzeros.shape[1]) if qzeros is not None else (None, 0)
    levels = table.to(torch.float32).contiguous() if table is not None else None
    tensors = (qweight, qweight.shape[1], scales, scales.shape[1], *zeros, levels)
    stages = {} if table is None else {"stages": 1}
    return triton_common.Weight(_tile, (bits, group_size), tensors, qweight.shape[0], in_features, **stages)


@triton.jit
def _tile(tensors, rows, live, first, CONFIG: tl.constexpr, COLUMNS: tl.constexpr):
    qweight, words, scales, groups, zeros, octets, table = tensors
    BITS: tl.constexpr = CONFIG[0]
    GROUP: tl.constexpr = CONFIG[1]
    RUN: tl.constexpr = 8 if BITS <= 4 else 4
    code = fields(qweight, words, words, rows, live, first, BITS, COLUMNS)  # [ROWS, n, RUN]
    if GROUP % RUN == 0:  # one scale for the run, [ROWS, n, 1]
        group = ((first + tl.arange(0, COLUMNS // RUN) * RUN) // GROUP)[None, :, None]
    else:
        group = ((first + tl.reshape(tl.arange(0, COLUMNS), (COLUMNS // RUN, RUN))) // GROUP)[None, :, :]
    row, ok = rows.to(tl.int64)[:, None, None], live[:, None, None] & (group < groups)
    scale = tl.load(scales + row * groups + group, mask=ok, other=0).to(tl.float32)
    if table is not None:
        value = tl.load(table + code)
    elif zeros is None:
        value = number(code) - 2.0 ** (BITS - 1)
    else:
        octet, shift = (group * BITS) >> 3, ((group * BITS) & 7).to(tl.uint32)
        place = zeros + row * octets + octet
        field = tl.load(place, mask=ok, other=0).to(tl.uint32)
        if 8 % BITS != 0:  # it may go on in the next byte
            field = field | (tl.load(place + 1, mask=ok & (octet + 1 < octets), other=0).to(tl.uint32) << 8)
        value = number(code) - number((field >> shift) & ((1 << BITS) - 1))
    return tl.reshape(value * scale, (rows.shape[0], COLUMNS))
