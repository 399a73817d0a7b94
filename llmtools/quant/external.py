"""Third-party grids as quantizers, for checkpoints that other programs wrote.

| name             | what it stores                                   | written by                         |
|------------------|--------------------------------------------------|------------------------------------|
| `affine`         | a uniform grid: scales of any type, integer or   | GPTQ, AWQ, compressed-tensors, HQQ |
|                  | float zero points, columns in any order          |                                    |
| `affine_columns` | the same with groups that run along the outputs  | HQQ with axis 0                    |
| `codebook`       | 16 values times a maximum                        | bitsandbytes                       |
| `quip_sharp_rows`| rows of a matrix that was rotated with others    | QuIP#                              |
| `exl3`           | a trellis in runs of 128 rotated features        | EXL3                               |
| `qtip_hybrid`    | a trellis with a table of pairs, rotated         | QTIP                               |

They are quantizers like any other, so `QuantizedLinear`, our checkpoints, finetuning and export do not depend on
a layer's origin. To quantize, each rounds to nearest, but `exl3`, which sweeps as `qtip` does. The readers and writers
are in `llmtools.formats`.

Shapes: out, in — features; P = ceil(out / group_size) rows of scales of `affine_columns`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, did_you_mean
from ..kernels.bits import pack, unpack
from .base import ALL, Packed, Quantizer, TensorSpec, later, quantizers
from .bases import Basis, Permutation, SignedHadamard
from .composed import Composed
from .dither import offsets
from .grids.affine import Affine, shifted
from .grids.base import Grid
from .grids.codebook import NF4, Codebook
from .grids.lattice import Lattice
from .grids.scalar import SCALE_TYPES, check_group_size, columns, stream_layout
from .grids.trellis import Trellis
from .materialize import materialized_linear
from .quip_sharp import QuIPSharp, Rotated
from .rounding import Nearest, Rounding
from .update import updated

_POSITIVE = (0, 1, 32, 48, 64, 96, 128, 192)
FP4 = tuple(n / 192 for n in (*(-n for n in reversed(_POSITIVE)), *_POSITIVE))
"""Values of bitsandbytes' 4-bit float: 0 (twice), 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and their negatives, sorted."""

TABLES = {"nf4": NF4, "fp4": FP4}

EXL3_RUN = 128
"""Features that EXL3 mixes with each other."""


@quantizers.register("affine")
@dataclass(frozen=True)
class UniformGrid(Composed):
    """A uniform grid as GPTQ, AWQ, HQQ and compressed-tensors store it; for weights of these formats."""

    bits: int = 4
    """Bits per weight, 1 to 8."""
    group_size: int = 64
    """Consecutive inputs of a row that share a scale and a zero point; -1 for the whole row."""
    symmetric: bool = False
    """Whether the zero point is the middle code, and none is stored."""
    scale_type: str = "float16"
    """Type of the scales: float16, bfloat16 or float32."""
    float_zeros: bool = False
    """Whether zero points are of the scales' type instead of integers."""
    permuted: bool = False
    """Whether groups are runs of permuted columns; the permutation is stored."""

    def __post_init__(self) -> None:
        _ = self.grid

    @cached_property
    def grid(self) -> Affine:
        return Affine(self.bits, self.group_size, self.symmetric, False, self.scale_type, self.float_zeros)

    @property
    def rounding(self) -> Rounding:
        return Nearest()

    @cached_property
    def basis(self) -> Basis | None:
        return Permutation() if self.permuted else None


@quantizers.register("codebook")
@dataclass(frozen=True)
class TableGrid(Composed):
    """Sixteen values times a group's largest magnitude, as in bitsandbytes; for weights of this format."""

    table: str | tuple[float, ...] = "fp4"
    """Table of the 16 values: nf4, fp4, or 16 numbers in rising order."""
    group_size: int = 64
    """Consecutive inputs of a row that share a maximum; -1 for the whole row."""
    double_quantization: bool = False
    """Whether the maxima are stored in 8 bits."""

    def __post_init__(self) -> None:
        if isinstance(self.table, str):
            if self.table not in TABLES:
                raise InputError(f"codebook: no table {self.table!r}; {did_you_mean(self.table, TABLES)}")
        else:
            object.__setattr__(self, "table", tuple(float(value) for value in self.table))  # JSON has lists
            if len(self.table) != 16 or sorted(self.table) != list(self.table):
                raise InputError("codebook: a table is 16 numbers in rising order")
        check_group_size("codebook", self.group_size)

    @cached_property
    def grid(self) -> Grid:
        table = TABLES[self.table] if isinstance(self.table, str) else self.table
        return Codebook(table, self.group_size, self.double_quantization)

    @property
    def rounding(self) -> Rounding:
        return Nearest()


@quantizers.register("affine_columns")
@dataclass(frozen=True)
class ColumnGrid(Quantizer):
    """A uniform grid whose groups run along the outputs, as HQQ stores it with axis 0.

    Rows r, r + P, r + 2P, … of one column share a scale and a zero point, for P = ceil(out / group_size). Stored:
    qweight [out, w] int32, scales and zeros [P, in] of `scale_type`, columns [0, in] where needed.
    """

    bits: int = 4
    """Bits per weight, 1 to 8."""
    group_size: int = 64
    """Number of weights of a column that share a scale and a zero point."""
    scale_type: str = "float16"
    """Type of the scales and zero points: float16, bfloat16 or float32."""

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise InputError(f"affine_columns: group_size={self.group_size}; give a positive number of rows")
        _ = self._grid

    @property
    def _grid(self) -> Affine:
        """The same grid with groups along the inputs, to fit the groups of a column."""
        return Affine(self.bits, -1, scale_type=self.scale_type, float_zeros=True)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        shared = TensorSpec((-(-out_features // self.group_size), in_features), SCALE_TYPES[self.scale_type])
        return stream_layout(out_features, in_features, self.bits) | {"scales": shared, "zeros": shared}

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        (out_features, in_features), layout = weight.shape, self.layout(*weight.shape)
        period = layout["scales"].shape[0]
        groups = F.pad(weight, (0, 0, 0, -out_features % period)).unflatten(0, (-1, period))  # [k, P, in]
        flat = groups.permute(1, 2, 0).flatten(0, 1)  # [P·in, k]
        params = self._grid.fit(flat)
        codes = self._grid.quantize_values(flat, params).unflatten(0, (period, in_features)).permute(2, 0, 1)
        scales, zeros = params.to(SCALE_TYPES[self.scale_type]).unflatten(0, (period, in_features)).unbind(-1)
        packed = {
            "qweight": pack(codes.flatten(0, 1)[:out_features], self.bits),
            "columns": weight.new_empty((0, in_features), dtype=torch.uint8),
            "scales": scales.contiguous(),
            "zeros": zeros.contiguous(),
        }
        return {name: packed[name] for name in layout}

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = unpack(packed["qweight"][rows], self.bits, columns(packed, self.bits))  # [r, in]
        return shifted(codes, *self._shared(packed, rows), dtype)

    def requantize(self, weight: Tensor, packed: Packed, rows: slice = ALL) -> Packed:
        zeros, scales = (each.float() for each in self._shared(packed, rows))
        codes = torch.round(weight / scales + zeros).clamp_(0, 2**self.bits - 1)
        return {"qweight": pack(codes, self.bits)}

    def dither(self, packed: Packed, rows: slice) -> Tensor:
        return offsets(rows, self._shared(packed, rows)[1].float())

    def _shared(self, packed: Packed, rows: slice) -> tuple[Tensor, Tensor]:
        """(zero points, scales) of the weights of these rows, [rows, in]."""
        first, last, _ = rows.indices(packed["qweight"].shape[0])
        shared = torch.arange(first, last, device=packed["scales"].device) % packed["scales"].shape[0]
        return packed["zeros"][shared], packed["scales"][shared]


@quantizers.register("quip_sharp_rows")
@dataclass(frozen=True)
class FusedLattice(Quantizer):
    """Rows of a matrix that QuIP# quantized as one: queries, keys and values, or up and gate.

    Its files fuse such matrices before the outputs are rotated, which mixes all rows. So each part needs the codes of
    the whole, and parts that are opened together share them in memory; each computes the whole product, and keeps its
    rows. sv holds the part's own rows, in float32 because two float16 scales are multiplied in it. Stored: the tensors
    of `grids.lattice` for all rows, su [in] float16, sv [out] float32.
    """

    needs_hessian: ClassVar[bool] = True

    bits: int = 2
    """Bits per weight, 2, 3 or 4."""
    residual_scale: float | None = None
    """Factor on the error of the first two bits in the residual code; by default 2.04 at 3 bits, 3.45 at 4."""
    first: int = 0
    """Index of the part's first row in the fused matrix."""
    total: int | None = None
    """Number of rows of the fused matrix; by default the part is all of it."""

    def __post_init__(self) -> None:
        _ = self._grid
        if self.first < 0 or (self.total is not None and self.first >= self.total):
            raise InputError(f"quip_sharp_rows: no row {self.first} of {self.total}")

    @property
    def _grid(self) -> Lattice:
        return Lattice(self.bits, self.residual_scale)

    def _total(self, out_features: int) -> int:
        return self.first + out_features if self.total is None else self.total

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        codes = self._grid.layout(self._total(out_features), SignedHadamard().columns(in_features))
        signs = {"su": TensorSpec((in_features,), torch.float16), "sv": TensorSpec((out_features,), torch.float32)}
        return codes | signs

    def out_features(self, packed: Packed) -> int:
        return packed["sv"].shape[0]

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        if self.first or self._total(weight.shape[0]) != weight.shape[0]:
            raise InputError("rows of a fused matrix cannot be quantized by themselves; use quip_sharp")
        packed = QuIPSharp(self.bits, residual_scale=self.residual_scale).quantize(weight, hessian)
        return packed | {"sv": packed["sv"].float()}

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        whole = SignedHadamard().inverse_transform(self._grid.dequantize(packed, ALL, wide), self._whole(packed))
        return whole[self._part(packed)][rows].to(dtype)

    def requantize(self, weight: Tensor, packed: Packed, rows: slice = ALL) -> Packed:
        """Of all rows of the part only: they are mixed, with those of the other parts, too."""
        if len(weight) != self.out_features(packed):
            raise ValueError(f"{self.name} mixes all rows of a weight; {rows} cannot be encoded by themselves")
        change = (weight - self.dequantize(packed, dtype=weight.dtype)).float()
        made = self.updated(packed, change, torch.eye(change.shape[1], device=change.device))
        return {name: made[name] for name in self._grid.codes}

    def updated(self, packed: Packed, b: Tensor, a: Tensor) -> Packed:
        """As `Quantizer.updated`. The part has codes of its own then, of all rows."""
        basis, whole = SignedHadamard(), self._whole(packed)
        rest = packed["codes"].shape[0] - self._part(packed).stop
        b, a = basis.transform_update(F.pad(b, (0, 0, self.first, rest)), a, whole)
        return packed | updated(self._grid, basis.rotated(packed), b, a)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        basis, whole = SignedHadamard(), self._whole(packed)
        y = materialized_linear(basis.inputs(x, whole), self._grid, basis.rotated(packed))
        return basis.outputs(y, whole)[..., self._part(packed)].clone()  # no view: it may be modified in place

    def _part(self, packed: Packed) -> slice:
        return slice(self.first, self.first + packed["sv"].shape[0])

    def _whole(self, packed: Packed) -> Packed:
        """The state of the whole matrix, with zeros in the other parts' rows."""
        rest = packed["codes"].shape[0] - self._part(packed).stop
        return {"su": packed["su"], "sv": F.pad(packed["sv"], (self.first, rest))}


@quantizers.register("exl3")
@dataclass(frozen=True)
class EXL3Trellis(Rotated):
    """EXL3's form of QTIP, for exllamav3: 1 to 8 bits on a trellis of 2^16 states, very slow to quantize.

    Runs of 128 features are mixed on either side, both padded to whole runs. Stored: trellis [out', in'/16 · bits]
    int16 in the order "exl3" of `kernels.trellis`, su [in] and sv [out] float16; out', in' are the next multiples of
    128. Of vectors padded with zeros no input, and of padded outputs none is seen.
    """

    needs_hessian: ClassVar[bool] = True
    rows_tried: ClassVar[int] = 32

    bits: int = 4
    """Bits per weight, 1 to 8."""
    code: str = "mul1"
    """Function from states to weights: mul1, mcg, 3inst or 1mad, which EXL3's files have not."""
    state_bits: int = 16
    """Bits of the trellis' state, 8 to 16; always 16 in EXL3's files."""
    scale: float | None = later(None)
    """Standard deviation of the weights on the grid. By default searched for each layer, from what suits Gaussian
    weights best downwards."""
    damping: float = later(0.01)
    """Damping added to the Hessian's diagonal, as a fraction of its mean."""
    passes: int = later(0)
    """Largest number of coordinate-descent iterations after the sweep; each takes about as long as the sweep."""
    seed: int = later(0)
    """Seed of the random signs, which are stored."""

    @property
    def fitting_scale(self) -> float:
        return self.grid.scale

    @cached_property
    def grid(self) -> Trellis:
        return Trellis(self.bits, self.state_bits, self.code, "exl3")

    @cached_property
    def basis(self) -> SignedHadamard:
        scale = self.fitting_scale if self.scale is None else self.scale
        return SignedHadamard(self.seed, scale, mixed=EXL3_RUN)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return super().layout(out_features, in_features) | self.grid.layout(
            self.basis.rows(out_features), self.basis.columns(in_features)
        )

    def out_features(self, packed: Packed) -> int:
        return packed["sv"].shape[0]


@quantizers.register("qtip_hybrid")
@dataclass(frozen=True)
class QTIPHybrid(Composed):
    """A rotated weight on a trellis with a table of pairs, as QTIP stores it; outputs and inputs in whole tiles of 16.

    Stored: trellis and tlut of `Trellis`, su [in] float16, sv [out] float32.
    """

    bits: int = 2
    """Bits per weight, 1 to 4."""
    order: str = "fragments"
    """Order of a tile's weights: fragments where QTIP has a kernel, rows elsewhere."""
    state_bits: int = 16
    """Bits of the trellis' state; 16 in most files."""

    def __post_init__(self) -> None:
        _ = self.grid

    @cached_property
    def grid(self) -> Trellis:
        return Trellis(self.bits, self.state_bits, "hyb", self.order)

    @property
    def rounding(self) -> Rounding:
        return Nearest()

    @cached_property
    def basis(self) -> SignedHadamard:
        return SignedHadamard(scale=self.grid.scale, block=self.grid.width, scale_type="float32")

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        if out_features % self.grid.height or in_features % self.grid.width:
            raise InputError(f"{self.name}: [{out_features}, {in_features}] is not in whole tiles of 16 × 16")
        return super().layout(out_features, in_features)
