"""QTIP's hybrid code (arXiv:2406.11235, section 3.1.2): two weights a state, from a table of 512 pairs that is tunable.

A step of the trellis takes 2k bits. Of a state x, h = x² + x picks the pair (bits 6 to 14) and, by bit 15, the sign of
its first weight. The circle of a tile is that of the other codes, with a state only at each even place. In plain torch,
differentiable in the table; there is no faster route yet.

Shapes: as in `__init__.py`; table [512, 2] float.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from . import reference
from .tables import TILE, places

PAIRS = 512
ORDERS = ("rows", "fragments")


def check_hybrid(bits: int, state_bits: int, order: str) -> None:
    """Raises InputError for what no hybrid code has."""
    if bits not in (1, 2, 3, 4) or isinstance(bits, bool):
        raise InputError(f"bits={bits!r}; a hybrid trellis code has 1, 2, 3 or 4 bits per weight")
    if isinstance(state_bits, bool) or not isinstance(state_bits, int) or not 2 * bits < state_bits <= 16:
        raise InputError(f"state_bits={state_bits!r}; the state has {2 * bits + 1} to 16 bits at bits={bits}")
    if order not in ORDERS:
        raise InputError(f"order={order!r}; the orders of a tile are {' and '.join(ORDERS)}")


def dequantize_hybrid(
    trellis: Tensor, table: Tensor, bits: int, state_bits: int, order: str, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """Rows start … stop of the weight, [stop − start, 16b] of `dtype`. trellis [out, k·b] int16, out in whole tiles."""
    place = places(order, trellis.device)
    state = reference.states(trellis, bits, state_bits, bits * (place - place % 2), start, stop)  # [rows, b, 16]
    pair, sign = _drawn(state)
    column = torch.arange(TILE, device=trellis.device) % 2  # weights of one pair are neighbours in a row
    value = table.to(dtype)[pair, column.expand_as(pair)]
    return torch.where(sign & (column == 0), -value, value).flatten(1)


def encode_hybrid(weight: Tensor, table: Tensor, bits: int, state_bits: int, order: str) -> Tensor:
    """weight [out, 16b] float32, out in whole tiles -> trellis [out, k·b] int16, near the nearest."""
    if len(weight) % TILE:
        raise InputError(f"{len(weight)} rows; a hybrid trellis code is one of whole tiles of {TILE} rows")
    tiles = weight.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2)  # [out / 16, b, 16, 16]
    at = places(order, weight.device).flatten().argsort()
    vectors = tiles.flatten(2)[..., at].flatten(0, 1).unflatten(1, (-1, 2))  # [m, 128, 2]
    pair, sign = _drawn(torch.arange(1 << state_bits, device=weight.device))
    values = table.to(weight.dtype)[pair]  # [states, 2]
    values = torch.stack([torch.where(sign, -values[:, 0], values[:, 0]), values[:, 1]], 1)
    step = 2 * bits
    symbols = [reference._symbols(part, values, step, state_bits) for part in vectors.split(16)]
    words = reference._words(torch.cat(symbols), step)  # [m, 16k]
    return words.view(*tiles.shape[:2], TILE, bits).transpose(1, 2).flatten(2).flatten(0, 1)


def _drawn(state: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the pair, whether its first weight is negated) of states."""
    h = state.long() * (state.long() + 1)
    return h >> 6 & PAIRS - 1, (h >> 15 & 1).bool()
