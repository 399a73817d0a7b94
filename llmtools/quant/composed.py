"""Quantizers composed of a grid, a rounding and, possibly, a basis.

Shapes: out, in — features.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, where
from .base import ALL, Packed, Quantizer, TensorSpec
from .bases import Basis
from .grids.affine import Affine
from .grids.base import Grid
from .grids.mid_rise import MidRise
from .hessian import check_hessian
from .materialize import materialized_linear, products_of_each
from .rounding import Rounding, Sequential, split
from .update import updated

log = logging.getLogger(__name__)

LEAST, LARGEST = 2.0**-17, 2.0**15
"""Range of scales that float16 represents with an error of at most 1/256, with a margin for the range search."""
NEGLIGIBLE = 1e-3
"""Share of a weight's norm that may be lost; 4 bits lose 0.08."""


class Composed(Quantizer):
    """grid × rounding × basis. A preset is a frozen dataclass that names them; see `presets.py`.

    Stored are the grid's tensors for the rotated weight, and the basis' state. `quantize` raises InputError for a
    weight with NaN or infinities, for one that is no matrix, and for a Hessian that is missing or too large.
    """

    scale_type: str = "float32"
    """Dtype of the scales; presets with another one, or a choice, override it."""

    @property
    @abstractmethod
    def grid(self) -> Grid: ...

    @property
    @abstractmethod
    def rounding(self) -> Rounding: ...

    @property
    def basis(self) -> Basis | None:
        return None

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        if self.basis is None:
            return self.grid.layout(out_features, in_features)
        rotated = self.grid.layout(out_features, self.basis.columns(in_features))
        return rotated | self.basis.layout(out_features, in_features)

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        return self._quantize(weight, hessian, None)

    def quantize_two_sided(self, weight: Tensor, hessian: Tensor, outputs: Tensor) -> Packed:
        """As `Quantizer.quantize_two_sided`, for every grid whose rounding is a sweep."""
        if not self.rounds_two_sided():
            return super().quantize_two_sided(weight, hessian, outputs)
        check_hessian(outputs)
        return self._quantize(weight, hessian, outputs.to(weight.device))

    def rounds_two_sided(self) -> bool:
        return isinstance(self.rounding, Sequential)

    def _quantize(self, weight: Tensor, hessian: Tensor | None, outputs: Tensor | None) -> Packed:
        """outputs: the second moment of the outputs' gradients [out, out], for a `Sequential` rounding."""
        weight = self._checked(weight, hessian)
        state: Packed = {}
        if self.basis:
            state = self.basis.init(weight, hessian)
            weight, hessian = self.basis.transform(weight, hessian, state)
            outputs = None if outputs is None else self.basis.output_moment(outputs, state)
        if outputs is None:
            codes, params = self.rounding(weight, hessian, self.grid)
        else:
            assert isinstance(self.rounding, Sequential)
            codes, params = self.rounding(weight, hessian, self.grid, outputs)
        return self.grid.pack(codes, params, weight.shape[1]) | state

    def requantize(self, weight: Tensor, packed: Packed, rows: slice = ALL) -> Packed:
        """As `Quantizer.requantize`; where the basis mixes rows, of all rows only."""
        values = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if not torch.isfinite(values).all():
            raise InputError(f"{where()}NaN or inf in the weight; it cannot be encoded")
        if self.basis is None:
            return self.grid.requantize(values, packed, rows)
        if not self.basis.by_rows and len(values) != self.out_features(packed):
            raise ValueError(f"{self.name} mixes all rows of a weight; {rows} cannot be encoded by themselves")
        # The change alone is rotated: what padded columns hold stays, and nothing is rounded.
        change, _ = self.basis.transform(values - self.dequantize(packed, rows, values.dtype), None, packed)
        former = self.grid.dequantize(packed, rows, values.dtype)[:, : change.shape[1]]
        return self.grid.requantize(former + change, packed, rows)

    def requantizes(self) -> bool:
        return self.grid.requantizes()

    def shift_group(self, in_features: int) -> int | None:
        """As `Quantizer.shift_group`; a basis mixes or reorders the columns of a group."""
        return self.grid.shift_group(in_features) if self.basis is None else None

    def shift(self, packed: Packed, change: Tensor) -> Packed:
        return self.grid.shift(packed, change) if self.basis is None else super().shift(packed, change)

    def updated(self, packed: Packed, b: Tensor, a: Tensor) -> Packed:
        """As `Quantizer.updated`, in the coordinates of the grid: a rotation is of the factors, not of the product."""
        if self.basis is None:
            return updated(self.grid, packed, b, a, self.grid.height)
        b, a = self.basis.transform_update(b, a, packed)
        return packed | updated(self.grid, self.basis.rotated(packed), b, a, self.grid.height)

    def _checked(self, weight: Tensor, hessian: Tensor | None) -> Tensor:
        """The weight [out, in] in float32 or wider; raises InputError where it cannot be quantized."""
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if weight.ndim != 2:
            raise InputError(f"{where()}a weight has shape [out, in], this one has {list(weight.shape)}")
        if not torch.isfinite(weight).all():
            raise InputError(f"{where()}NaN or inf in the weight; the model cannot be quantized as it is")
        if self.needs_hessian and hessian is None:
            raise InputError(f"{where()}{self.name} needs calibration data; pass a Hessian, or choose rtn or nf4")
        if hessian is not None:
            check_hessian(hessian)
        if (lost := self._lost(weight)) > NEGLIGIBLE:
            log.warning("%s%s; choose scale_type=float32", where(), _lossy(lost))
        return weight

    def suited(self, weight: Tensor) -> Self:
        """The same with float32 scales, where float16 scales would lose more of the weight [out, in] than
        `NEGLIGIBLE`."""
        lost = self._lost(weight.detach())
        if not lost > NEGLIGIBLE:
            return self
        log.warning("%s%s; this layer gets float32 scales", where(), _lossy(lost))
        return dataclasses.replace(self, scale_type="float32")  # type: ignore[type-var]

    def _lost(self, weight: Tensor) -> float:
        """The share of the weight's norm in groups whose scales are out of float16's range, if that is their dtype."""
        if self.scale_type != "float16" or weight.is_meta or not weight.numel():
            return 0.0
        scales, norms = self._scales(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        beyond = (scales < LEAST) | (scales > LARGEST)
        whole = float(norms.norm())
        return float((norms * beyond).norm()) / whole if whole else 0.0

    def _scales(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The unrounded scale of each group of weights, and the group's norm in float64; of equal shapes."""
        if self.basis is not None and not self.basis.by_rows:
            weight, _ = self.basis.transform(weight, None, self.basis.init(weight, None))
        assert isinstance(self.grid, Affine | MidRise)
        grid = dataclasses.replace(self.grid, scale_type="float32", clip=False)
        groups = [part.flatten(0, 1) for part in split(weight, grid.resolve_group_size(weight.shape[1]))]
        scales = torch.cat([grid.fit(group)[:, 0] for group in groups])
        return scales, torch.cat([torch.linalg.vector_norm(group, dim=1, dtype=torch.float64) for group in groups])

    def check(self, packed: Packed) -> None:
        super().check(packed)
        if self.basis is not None:
            self.basis.check(packed)

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.basis is None:
            return self.grid.dequantize(packed, rows, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        if self.basis.by_rows:
            return self.basis.inverse_transform(self.grid.dequantize(packed, rows, wide), packed).to(dtype)
        return self.basis.inverse_transform(self.grid.dequantize(packed, ALL, wide), packed)[rows].to(dtype)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        if self.basis is None:
            return materialized_linear(x, self.grid, packed)
        y = materialized_linear(self.basis.inputs(x, packed), self.grid, self.basis.rotated(packed))
        return self.basis.outputs(y, packed)

    def linear_each(self, x: Tensor, sizes: Sequence[int], packed: Sequence[Packed]) -> Tensor | None:
        return products_of_each(x, sizes, self.grid, packed) if self.basis is None else None

    def tuning_linear(self, x: Tensor, packed: Packed) -> Tensor:
        if self.basis is None:
            return F.linear(x, self.grid.dequantize(packed, dtype=x.dtype))
        y = F.linear(self.basis.inputs(x, packed), self.grid.dequantize(packed, dtype=x.dtype))
        return self.basis.outputs(y, packed)


def _lossy(lost: float) -> str:
    return f"float16 scales cannot represent weights of this magnitude ({100 * lost:.3g} % of the weight's norm)"
