"""Trellis codes in plain torch: the specification of the faster routes, and the route on every device without one.

This encoder and the one in C decide alike, bit for bit: costs are float32 sums formed in the order of the weights,
a square is rounded before it is added, and ties go to the lower state.

Shapes: out — rows; b — blocks of sixteen columns; k, L — bits of a weight, of a state; v — weights of a state; m —
tiles; T — states of one; table [512, 2] float, of hyb only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .tables import TILE, dimension, entries, places, signed, values

ROWS = 256  # decoded at a time by the product
_TABLE_BYTES = 1 << 26  # of notes in a search, for so many tiles at a time as fit


def dequantize_trellis(
    trellis: Tensor,
    table: Tensor | None,
    bits: int,
    state_bits: int,
    code: str,
    order: str,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows start … stop of the weight, [stop − start, 16b] of `dtype`. trellis [out, k·b] int16."""
    place, v = places(order, trellis.device), dimension(code)
    state = _states(trellis, bits, state_bits, bits * (place - place % v), start, stop)
    if table is None:
        return F.embedding(state, values(code, None, state_bits, trellis.device, dtype)).flatten(1)
    column = torch.arange(TILE, device=trellis.device) % v  # weights of one pair are neighbours in a row
    return F.embedding(entries(state) * v + column, signed(table.to(dtype)).view(-1, 1)).flatten(1)


def _states(trellis: Tensor, bits: int, state_bits: int, begins: Tensor, start: int, stop: int) -> Tensor:
    """The states of the weights of rows start … stop, [stop − start, b, 16] int32.

    begins [16, 16]: the first bit of the state of each weight of a tile, in the tile's string.
    """
    rows = torch.arange(start, stop, device=trellis.device)
    top = (rows - rows % TILE)[:, None]
    bit = begins[rows % TILE]  # [rows, 16]
    word = bit // 16
    following = (word + 1) % (bits * (len(trellis) - top).clamp(max=TILE))  # the tile's string is a circle
    words = trellis.unflatten(1, (-1, bits))  # [out, b, k]
    upper, lower = (
        words[top + each // bits, :, each % bits].to(torch.int32) & 0xFFFF for each in (word, following)
    )  # [rows, 16, b]
    window = (upper << 16 | lower) >> (32 - state_bits - bit % 16).to(torch.int32)[..., None]
    state: Tensor = window & (1 << state_bits) - 1
    return state.transpose(1, 2)


def multiply_trellis(
    x: Tensor,
    trellis: Tensor,
    table: Tensor | None,
    bits: int,
    state_bits: int,
    code: str,
    order: str,
    transposed: bool,
) -> Tensor:
    """x [t, 16b] -> [t, out], or transposed x [t, out] -> [t, 16b], of x's type; trellis [out, k·b] int16.

    A block of rows at a time; blocks are added in float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    columns = trellis.shape[1] // bits * TILE
    y = x.new_zeros((len(x), columns if transposed else len(trellis)), dtype=wide)
    for start in range(0, len(trellis), ROWS):
        stop = min(start + ROWS, len(trellis))
        weight = dequantize_trellis(trellis, table, bits, state_bits, code, order, start, stop, x.dtype)
        if transposed:
            y += x[:, start:stop] @ weight  # [t, ROWS] @ [ROWS, 16b]
        else:
            y[:, start:stop] = F.linear(x, weight).to(wide)
    return y.to(x.dtype)


def encode_trellis(weight: Tensor, table: Tensor | None, bits: int, state_bits: int, code: str) -> Tensor:
    """weight [out, 16b] float32 -> trellis [out, k·b] int16, near the nearest: Viterbi's search, tile by tile."""
    whole, v = len(weight) // TILE * TILE, dimension(code)
    worth, step = values(code, table, state_bits, weight.device, torch.float32), v * bits
    strips = [weight[:whole].unflatten(0, (-1, TILE))] if whole else []
    if whole < len(weight):
        strips.append(weight[None, whole:])  # the last tiles have fewer rows
    parts = []
    for strip in strips:  # [out / h, h, 16b]
        tiles = strip.unflatten(2, (-1, TILE)).transpose(1, 2)  # [out / h, b, h, 16]
        sequences = tiles.flatten(2).flatten(0, 1).unflatten(1, (-1, v))  # [m, T, v]
        at_once = max(1, _TABLE_BYTES // (sequences.shape[1] << state_bits - step))
        symbols = torch.cat([_symbols(part, worth, step, state_bits) for part in sequences.split(at_once)])
        words = _words(symbols.view(*tiles.shape[:3], -1), step)  # [out / h, b, h, k]
        parts.append(words.transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(parts) if parts else weight.new_empty((0, weight.shape[1] // TILE * bits), dtype=torch.int16)


def _symbols(x: Tensor, worth: Tensor, bits: int, state_bits: int) -> Tensor:
    """x [m, T, v], worth [2^L, v] -> what is stored of each step, [m, T] of so many bits.

    A free walk that begins half way round says what bits a good path has at the joint; the second walk is held to them
    (arXiv:2406.11235, algorithm 4).
    """
    half = x.shape[1] // 2
    free = _walk(x.roll(-half, 1), worth, bits, None)
    path = _walk(x, worth, bits, free[:, x.shape[1] - half] >> bits)
    return path >> state_bits - bits


def _walk(x: Tensor, worth: Tensor, bits: int, joint: Tensor | None) -> Tensor:
    """The states [m, T] of the best path for x [m, T, v], worth [states, v]. joint [m]: the upper bits of the first
    state, all but a step's, and the lower ones of the last; None for free ends."""
    families, members = len(worth) >> bits, 1 << bits  # states with one set of predecessors, in each a state a symbol
    cost = (x[:, 0, None] - worth).square().sum(-1)  # [m, states]
    if joint is not None:
        held = torch.arange(len(worth), device=x.device) >> bits == joint[:, None]
        cost = torch.where(held, cost, torch.inf)
    notes = []
    for t in range(1, x.shape[1]):
        least, origin = cost.unflatten(1, (members, families)).min(1)  # the first of equals
        notes.append(origin.to(torch.uint8))
        cost = least.repeat_interleave(members, 1) + (x[:, t, None] - worth).square().sum(-1)
    if joint is None:
        state = cost.argmin(1)
    else:
        ends = joint[:, None] + families * torch.arange(members, device=x.device)  # [m, members]
        state = ends.gather(1, cost.gather(1, ends).argmin(1, keepdim=True))[:, 0]
    path = [state]
    for origin in reversed(notes):
        family = state >> bits
        state = family | origin.gather(1, family[:, None])[:, 0].long() * families
        path.append(state)
    return torch.stack(path[::-1], 1)


def _words(symbols: Tensor, bits: int) -> Tensor:
    """Symbols of some bits, [..., n] -> words [..., n · bits / 16] int16, the first bit highest."""
    places = torch.arange(bits - 1, -1, -1, device=symbols.device)
    string = (symbols[..., None] >> places & 1).flatten(-2).unflatten(-1, (-1, 16))
    word: Tensor = (string << torch.arange(15, -1, -1, device=symbols.device)).sum(-1)
    return (word - (word >> 15 << 16)).to(torch.int16)
