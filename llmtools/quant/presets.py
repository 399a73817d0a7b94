"""The quantizers by name: rows of the table grid × rounding × basis.

| name         | grid     | rounding               | basis           | paper             |
|--------------|----------|------------------------|-----------------|-------------------|
| `rtn`        | affine   | nearest                | –               | –                 |
| `nf4`        | codebook | nearest                | –               | arXiv:2305.14314  |
| `hqq`        | affine   | proximal               | –               | Badri & Shaji 2023|
| `awq`        | affine   | clipped                | rescale         | arXiv:2306.00978  |
| `optq`       | affine   | sequential             | – / permutation | arXiv:2210.17323  |
| `signround`  | affine   | learned                | –               | arXiv:2309.05516  |
| `quip`       | affine   | sequential             | signed Hadamard | arXiv:2307.13304  |
| `quip_sharp` | lattice  | sequential, by eights  | signed Hadamard | arXiv:2402.04396  |
| `qtip`       | trellis  | sequential, 16 × 16    | signed Hadamard | arXiv:2406.11235  |

`signround` is in `learned.py`, `quip_sharp` and `qtip` in files of their own: they search a scale for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from ..errors import InputError
from .base import later, quantizers
from .bases import Basis, Permutation, Rescale, SignedHadamard
from .composed import Composed
from .grids.affine import BITS, Affine
from .grids.base import Grid
from .grids.codebook import Codebook
from .grids.mid_rise import MidRise
from .grids.scalar import check_group_size, check_scale_type
from .proximal import Proximal
from .rounding import Clipped, Nearest, Rounding, Sequential


@quantizers.register("rtn")
@dataclass(frozen=True)
class RTN(Composed):
    """Round to nearest on a uniform grid: no data, seconds for any model, good at 4 bits and above."""

    bits: int = 4
    """Bits per weight, 2, 3, 4 or 8."""
    group_size: int = 64
    """Consecutive inputs of a row that share a scale and a zero point; -1 for the whole row."""
    symmetric: bool = False
    """Whether the grid is centred on zero and stores no zero points."""
    clip: bool = True
    """Whether each group's range is searched instead of its extremes; matters most at 2 and 3 bits."""
    scale_type: str = later("float16")
    """Type of the scales: float16, bfloat16 or float32; float32 anyway where float16 is too narrow."""

    def __post_init__(self) -> None:
        _check(self.name, self.bits, self.group_size, self.scale_type)

    @cached_property
    def grid(self) -> Grid:
        return Affine(self.bits, self.group_size, self.symmetric, self.clip, self.scale_type)

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
    """Whether the maxima are stored in 8 bits: 4.13 bits per weight instead of 4.5 at group_size 64."""

    def __post_init__(self) -> None:
        check_group_size(self.name, self.group_size)

    @cached_property
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
    """Bits per weight, 2, 3, 4 or 8."""
    group_size: int = 64
    """Consecutive inputs of a row that share a scale and a zero point; -1 for the whole row."""
    symmetric: bool = False
    """Whether the grid is centred on zero and stores no zero points."""
    clip: bool = True
    """Whether each group's range is searched instead of its extremes; matters most at 2 and 3 bits."""
    damping: float = 0.01
    """Damping added to the Hessian's diagonal, as a fraction of its mean."""
    act_order: bool = False
    """Whether the columns with the largest activations are quantized first."""
    static_groups: bool = False
    """Whether all groups are fitted before the sweep. With act_order, groups then stay in natural order, without a
    gather."""
    passes: int = 0
    """Number of coordinate-descent iterations after the sweep: each weight is chosen again, all others fixed."""
    scale_type: str = later("float16")
    """Type of the scales: float16, bfloat16 or float32; float32 anyway where float16 is too narrow."""

    def __post_init__(self) -> None:
        _check(self.name, self.bits, self.group_size, self.scale_type)
        Sequential(self.damping, passes=self.passes)

    @cached_property
    def grid(self) -> Grid:
        return Affine(self.bits, self.group_size, self.symmetric, self.clip, self.scale_type)

    @property
    def rounding(self) -> Rounding:
        return Sequential(
            self.damping,
            order=self.act_order and self.static_groups,
            static_groups=self.static_groups,
            passes=self.passes,
        )

    @cached_property
    def basis(self) -> Basis | None:
        return Permutation() if self.act_order and not self.static_groups else None


@quantizers.register("hqq")
@dataclass(frozen=True)
class HQQ(Composed):
    """Half-quadratic quantization (Badri & Shaji 2023, mobiusml.github.io/hqq_blog): zero points refined; no data."""

    bits: int = 4
    """Bits per weight, 2, 3, 4 or 8."""
    group_size: int = 64
    """Consecutive inputs of a row that share a scale and a zero point; -1 for the whole row."""
    iterations: int = 20
    """Largest number of iterations of the solver."""
    scale_type: str = later("float16")
    """Type of the scales and zero points: float16, bfloat16 or float32; float32 anyway where float16 is too narrow."""

    def __post_init__(self) -> None:
        _check(self.name, self.bits, self.group_size, self.scale_type)
        Proximal(self.iterations)

    @cached_property
    def grid(self) -> Affine:
        return Affine(self.bits, self.group_size, scale_type=self.scale_type, float_zeros=True)

    @property
    def rounding(self) -> Rounding:
        return Proximal(self.iterations)


@quantizers.register("awq")
@dataclass(frozen=True)
class AWQ(Composed):
    """Activation-aware quantization (arXiv:2306.00978): inputs that are large get finer columns, then nearest rounding.

    Evaluated by the Hessian instead of by activations and never folded into other layers: see `bases.Rescale`.
    """

    needs_hessian: ClassVar[bool] = True

    bits: int = 4
    """Bits per weight, 2, 3, 4 or 8."""
    group_size: int = 64
    """Consecutive inputs of a row that share a scale and a zero point; -1 for the whole row."""
    symmetric: bool = False
    """Whether the grid is centred on zero and stores no zero points."""
    clip: bool = True
    """Whether each group's range is searched for the least output error, instead of its extremes."""
    scale_type: str = later("float16")
    """Type of the scales: float16, bfloat16 or float32; float32 anyway where float16 is too narrow."""

    def __post_init__(self) -> None:
        _check(self.name, self.bits, self.group_size, self.scale_type)

    @cached_property
    def grid(self) -> Grid:
        return Affine(self.bits, self.group_size, self.symmetric, scale_type=self.scale_type)

    @property
    def rounding(self) -> Rounding:
        return Clipped() if self.clip else Nearest()

    @cached_property
    def basis(self) -> Basis:
        return Rescale(self.grid)


@quantizers.register("quip")
@dataclass(frozen=True)
class QuIP(Composed):
    """QuIP (arXiv:2307.13304) with QuIP#'s transform: a uniform grid on weights that a rotation has made alike."""

    needs_hessian: ClassVar[bool] = True

    bits: int = 4
    """Bits per weight, 2, 3, 4 or 8."""
    group_size: int = -1
    """Consecutive columns of a row that share a scale and a zero point; -1 for the whole row."""
    symmetric: bool = False
    """Whether the grid is centred on zero and stores no zero points."""
    clip: bool = True
    """Whether each group's range is searched instead of its extremes; matters most at 2 and 3 bits."""
    damping: float = 0.01
    """Damping added to the Hessian's diagonal, as a fraction of its mean."""
    passes: int = 10
    """Largest number of coordinate-descent iterations after the sweep."""
    seed: int = 0
    """Seed of the random signs, which are stored."""
    hadamard: int = 1
    """Version of the rules that say which Hadamard matrix belongs to a size."""
    scale_type: str = later("float16")
    """Type of the scales: float16, bfloat16 or float32; float32 anyway where float16 is too narrow."""
    mid_rise: bool = later(False)
    """Whether the levels are odd multiples of half a scale, ±½, ±1½ at 2 bits, and zero is none of them (Qift); such a
    grid is symmetric and stores no zero points."""

    def __post_init__(self) -> None:
        _check(self.name, self.bits, self.group_size, self.scale_type)
        Sequential(self.damping, passes=self.passes)
        SignedHadamard(rules=self.hadamard)

    @cached_property
    def grid(self) -> Grid:
        if self.mid_rise:
            return MidRise(self.bits, self.group_size, self.clip, self.scale_type)
        return Affine(self.bits, self.group_size, self.symmetric, self.clip, self.scale_type)

    @property
    def rounding(self) -> Rounding:
        return Sequential(self.damping, passes=self.passes)

    @cached_property
    def basis(self) -> Basis:
        return SignedHadamard(self.seed, rules=self.hadamard)


def _check(name: str, bits: int, group_size: int, scale_type: str) -> None:
    if bits not in BITS or isinstance(bits, bool):
        raise InputError(f"{name}: bits={bits!r}; choose {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}")
    check_group_size(name, group_size)
    check_scale_type(scale_type)
