"""The quantizers by name: rows of the table grid × rounding × basis.

| name   | grid     | rounding   | basis           | paper             |
|--------|----------|------------|-----------------|-------------------|
| `rtn`  | affine   | nearest    | –               | –                 |
| `nf4`  | codebook | nearest    | –               | arXiv:2305.14314  |
| `optq` | affine   | sequential | – / permutation | arXiv:2210.17323  |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import InputError
from .base import quantizers
from .bases import Basis, Permutation
from .composed import Composed
from .grids.affine import BITS, Affine
from .grids.base import Grid
from .grids.codebook import Codebook
from .grids.scalar import check_group_size
from .rounding import Nearest, Rounding, Sequential


@quantizers.register("rtn")
@dataclass(frozen=True)
class RTN(Composed):
    """Round to nearest on a uniform grid: no data, seconds for any model, good at 4 bits and above."""

    bits: int = 4
    """2, 3, 4 or 8."""
    group_size: int = 64
    """Consecutive inputs of a row that share a scale and a zero point; -1 for the whole row."""
    symmetric: bool = False
    """Centre the grid on zero and store no zero points."""
    clip: bool = True
    """Search each group's range instead of taking its extremes; matters most at 2 and 3 bits."""

    def __post_init__(self) -> None:
        _check(self.name, self.bits, self.group_size)

    @property
    def grid(self) -> Grid:
        return Affine(self.bits, self.group_size, self.symmetric, self.clip)

    @property
    def rounding(self) -> Rounding:
        return Nearest()


@quantizers.register("nf4")
@dataclass(frozen=True)
class NF4(Composed):
    """4-bit NormalFloat of QLoRA (arXiv:2305.14314), arithmetic as in bitsandbytes: no data, 4 bits only."""

    group_size: int = 64
    """Consecutive inputs of a row that share a maximum; -1 for the whole row."""
    double_quantization: bool = False
    """Store the maxima in 8 bits: 4.13 bits a weight instead of 4.5 at group_size 64."""

    def __post_init__(self) -> None:
        check_group_size(self.name, self.group_size)

    @property
    def grid(self) -> Grid:
        return Codebook(group_size=self.group_size, double_quantization=self.double_quantization)

    @property
    def rounding(self) -> Rounding:
        return Nearest()


@quantizers.register("optq")
@dataclass(frozen=True)
class OPTQ(Composed):
    """OPTQ, also known as GPTQ (arXiv:2210.17323): rounds column by column, later columns making up for the error."""

    needs_hessian: ClassVar[bool] = True

    bits: int = 4
    """2, 3, 4 or 8."""
    group_size: int = 64
    """Consecutive inputs of a row that share a scale and a zero point; -1 for the whole row."""
    symmetric: bool = False
    """Centre the grid on zero and store no zero points."""
    clip: bool = True
    """Search each group's range instead of taking its extremes; matters most at 2 and 3 bits."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    act_order: bool = False
    """Quantize the columns with the largest activations first."""
    static_groups: bool = False
    """Fit all groups before the sweep. With act_order, groups then stay in natural order and nothing is gathered."""

    def __post_init__(self) -> None:
        _check(self.name, self.bits, self.group_size)
        Sequential(self.damping)

    @property
    def grid(self) -> Grid:
        return Affine(self.bits, self.group_size, self.symmetric, self.clip)

    @property
    def rounding(self) -> Rounding:
        return Sequential(self.damping, order=self.act_order and self.static_groups, static_groups=self.static_groups)

    @property
    def basis(self) -> Basis | None:
        return Permutation() if self.act_order and not self.static_groups else None


def _check(name: str, bits: int, group_size: int) -> None:
    if bits not in BITS or isinstance(bits, bool):
        raise InputError(f"{name}: bits={bits!r}; choose {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}")
    check_group_size(name, group_size)
