"""Dithered rounding of an update: fixed offsets with which small changes of a weight change some codes.

The weights of a quantized base are values of its grid, so rounding Ŵ + ΔW to nearest changes nothing where |ΔW| is
below half a step: an adapter of the usual size disappears, and one that is trained through the rounding learns nothing.
So before rounding each weight is moved by an offset of its own, uniform in the cell of its present code, which are the
values that round to it (dithered quantization: Schuchman 1964; of lattices: Zamir and Feder 1996). A code then changes
with a probability in proportion to ΔW, the mean over weights of what is rounded is ΔW, and no code changes where ΔW is
zero. The offsets depend on row, column and grid alone: an adapter is trained, evaluated and merged with the same ones.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

STRIDE, PERIOD = 40, 1024
"""Row r takes the numbers of the sequence from STRIDE · (r mod PERIOD); a multiple of 8, so that vectors stay whole."""
MARGIN = 1 - 2.0**-8
"""Share of a cell that offsets lie in: with rounding errors they stay within."""
_BITS = 2**32 - 1


def uniform(rows: slice, columns: int, device: torch.device) -> Tensor:
    """Offsets of rows start … stop in units of a cell of width 1, [rows, columns] float32 in (−½, ½)."""
    return windows(sequence(length(columns), device), rows, columns)


def length(columns: int) -> int:
    """How many numbers of a sequence rows of so many columns need; few values, so that sequences are shared."""
    return -(-(STRIDE * PERIOD + columns) // 2**16) * 2**16


def windows(values: Tensor, rows: slice, columns: int) -> Tensor:
    """[rows, columns]: for each row its run of a sequence [length(columns)]."""
    row = torch.arange(rows.start, rows.stop, device=values.device) % PERIOD
    return values.as_strided((PERIOD, columns), (STRIDE, 1)).index_select(0, row)


@functools.lru_cache(maxsize=8)
def sequence(count: int, device: torch.device) -> Tensor:
    """[count] float32 in (−½, ½), hashes of the numbers 0, 1, …: the same on every device."""
    x = torch.arange(1, count + 1) * 0x9E3779B1 & _BITS
    for factor in (0x21F0AAAD, 0x735A2D97):
        x = (x ^ x >> 16) * factor & _BITS
    x = x ^ x >> 15
    return (((x >> 8).double() + 0.5) / 2**24 - 0.5).mul_(MARGIN).float().to(device)


def offsets(rows: slice, scales: Tensor, codes: Tensor | None = None, levels: Tensor | None = None) -> Tensor:
    """Offsets of rows start … stop of a weight of scale times level, [rows, in] float32 as the scales.

    levels [n], rising, are those of the codes [rows, in]; by default the whole numbers.
    """
    moved = uniform(rows, scales.shape[1], scales.device)
    if codes is not None and levels is not None:
        index = codes.flatten().int()
        below, above = (each.index_select(0, index).view_as(moved) for each in _borders(levels))
        moved = torch.lerp(below, above, moved.add_(0.5))
    return moved.mul_(scales)


def _borders(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Of the cells of a table's levels [n], rising: the lower and the upper border less the level, [n] each.

    The outer cells, which have no border at their ends, are taken as symmetric.
    """
    halves = levels.diff() / 2
    return -torch.cat([halves[:1], halves]), torch.cat([halves, halves[-1:]])
