"""The quantizers by name: rows of the table grid × rounding × basis.

| name         | grid     | rounding               | basis           | paper             |
|--------------|----------|------------------------|-----------------|-------------------|
| `rtn`        | affine   | nearest                | –               | –                 |
| `nf4`        | codebook | nearest                | –               | arXiv:2305.14314  |
| `hqq`        | affine   | proximal               | –               | Badri & Shaji 2023|
| `awq`        | affine   | clipped                | rescale         | arXiv:2306.00978  |
| `optq`       | affine   | sequential             | – / permutation | arXiv:2210.17323  |
| `signround`  | affine   | learned (`learned.py`) | –               | arXiv:2309.05516  |
| `quip`       | affine   | sequential             | signed Hadamard | arXiv:2307.13304  |
| `quip_sharp` | lattice  | sequential, by eights  | signed Hadamard | arXiv:2402.04396  |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from .base import Packed, later, quantizers
from .bases import Basis, Permutation, Rescale, SignedHadamard
from .composed import Composed
from .grids.affine import BITS, Affine
from .grids.base import Grid
from .grids.codebook import Codebook
from .grids.lattice import SCALE, Lattice
from .grids.scalar import check_group_size, check_scale_type
from .proximal import Proximal
from .rounding import Clipped, Nearest, Rounding, Sequential
from .suited import row_gains, suited_share


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
    """Store the maxima in 8 bits: 4.13 bits a weight instead of 4.5 at group_size 64."""

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
    passes: int = 0
    """Passes of coordinate descent after the sweep: each weight chosen anew with all others fixed."""
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
    """2, 3, 4 or 8."""
    group_size: int = 64
    """Consecutive inputs of a row that share a scale and a zero point; -1 for the whole row."""
    iterations: int = 20
    """Of the solver, at most."""
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

    Judged by the Hessian instead of by activations and never folded into other layers: see `bases.Rescale`.
    """

    needs_hessian: ClassVar[bool] = True

    bits: int = 4
    """2, 3, 4 or 8."""
    group_size: int = 64
    """Consecutive inputs of a row that share a scale and a zero point; -1 for the whole row."""
    symmetric: bool = False
    """Centre the grid on zero and store no zero points."""
    clip: bool = True
    """Search each group's range for the least error of its output instead of taking its extremes."""
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
    """2, 3, 4 or 8."""
    group_size: int = -1
    """Consecutive columns of a row that share a scale and a zero point; -1 for the whole row."""
    symmetric: bool = False
    """Centre the grid on zero and store no zero points."""
    clip: bool = True
    """Search each group's range instead of taking its extremes; matters most at 2 and 3 bits."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    passes: int = 10
    """Passes of coordinate descent after the sweep, at most."""
    seed: int = 0
    """Of the random signs, which are stored."""
    hadamard: int = 1
    """Version of the rules that say which Hadamard matrix belongs to a size."""
    scale_type: str = later("float16")
    """Type of the scales: float16, bfloat16 or float32; float32 anyway where float16 is too narrow."""

    def __post_init__(self) -> None:
        _check(self.name, self.bits, self.group_size, self.scale_type)
        Sequential(self.damping, passes=self.passes)
        SignedHadamard(rules=self.hadamard)

    @cached_property
    def grid(self) -> Grid:
        return Affine(self.bits, self.group_size, self.symmetric, self.clip, self.scale_type)

    @property
    def rounding(self) -> Rounding:
        return Sequential(self.damping, passes=self.passes)

    @cached_property
    def basis(self) -> Basis:
        return SignedHadamard(self.seed, rules=self.hadamard)


@quantizers.register("quip_sharp")
@dataclass(frozen=True)
class QuIPSharp(Composed):
    """QuIP# (arXiv:2402.04396): rotated weights, eight at a time on the lattice E8; the choice for 2 bits.

    2, 3 or 4 bits a weight and nothing per group: two float16 vectors are all that is stored beside the codes.
    """

    needs_hessian: ClassVar[bool] = True

    bits: int = 2
    """2, 3 or 4."""
    scale: float | None = None
    """Standard deviation of the weights on the grid. By default searched for each layer, from what suits Gaussian
    weights best, 1.03, 0.98 or 1.03, downwards."""
    residual_scale: float | None = None
    """How much larger the error of the first two bits is coded for the others; by default 2.04 at 3 bits, 3.45 at 4."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    passes: int = 10
    """Passes of coordinate descent after the sweep, at most; each costs about as much time as the sweep."""
    seed: int = 0
    """Of the random signs, which are stored."""
    hadamard: int = 1
    """Version of the rules that say which Hadamard matrix belongs to a size."""
    scale_type: str = later("float16")
    """Type of the scales of rows: float16, bfloat16 or float32; float32 anyway where float16 is too narrow."""

    def __post_init__(self) -> None:
        if self.bits not in SCALE or isinstance(self.bits, bool):
            raise InputError(f"{self.name}: bits={self.bits!r}; choose 2, 3 or 4")
        Lattice(self.bits, self.residual_scale)
        Sequential(self.damping, passes=self.passes)
        SignedHadamard(scale=self.scale, rules=self.hadamard, scale_type=self.scale_type)

    @cached_property
    def grid(self) -> Grid:
        return Lattice(self.bits, self.residual_scale)

    @property
    def rounding(self) -> Sequential:
        return Sequential(self.damping, passes=self.passes)

    @cached_property
    def basis(self) -> SignedHadamard:
        scale = SCALE[self.bits] if self.scale is None else self.scale
        return SignedHadamard(self.seed, scale, rules=self.hadamard, scale_type=self.scale_type)

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        weight = self._checked(weight, hessian)
        assert hessian is not None
        hessian, basis = hessian.to(weight.device), self.basis
        state = basis.draw(weight, hessian)
        inner, _ = basis.rotate(weight, None, state)
        if self.scale is None:
            share = suited_share(inner, basis.second_moment(hessian, state), self.grid)
            inner *= share
            state["sv"] = basis.stored(state["sv"].float() / share)
        codes, params = self.rounding.sweep(inner, lambda: basis.second_moment(hessian, state), self.grid)
        columns = inner.shape[1]
        del inner
        packed = self.grid.pack(codes, params, columns) | state
        gains = row_gains(weight, self.dequantize(packed, dtype=weight.dtype), hessian)
        packed["sv"] = basis.stored(packed["sv"].to(gains) * gains)
        return packed

    def _scales(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
        return norms / (weight.shape[1] ** 0.5 * SCALE[self.bits]), norms


def _check(name: str, bits: int, group_size: int, scale_type: str) -> None:
    if bits not in BITS or isinstance(bits, bool):
        raise InputError(f"{name}: bits={bits!r}; choose {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}")
    check_group_size(name, group_size)
    check_scale_type(scale_type)
