"""A quantizer put together from a grid, a rounding and, possibly, a basis."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, where
from .base import ALL, Packed, Quantizer, TensorSpec
from .bases import Basis
from .grids.base import Grid
from .materialize import materialized_linear
from .rounding import Rounding


class Composed(Quantizer):
    """grid × rounding × basis. A preset is a frozen dataclass that says which; see `presets.py`."""

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
        inner = self.grid.layout(out_features, self.basis.columns(in_features))
        return inner | self.basis.layout(out_features, in_features)

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        weight = self._checked(weight, hessian)
        state: Packed = {}
        if self.basis:
            state = self.basis.draw(weight, hessian)
            weight, hessian = self.basis.rotate(weight, hessian, state)
        codes, params = self.rounding(weight, hessian, self.grid)
        return self.grid.pack(codes, params, weight.shape[1]) | state

    def _checked(self, weight: Tensor, hessian: Tensor | None) -> Tensor:
        """The weight in float32 or wider, if it can be quantized."""
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if weight.ndim != 2:
            raise InputError(f"{where()}a weight has shape [out, in], this has {list(weight.shape)}")
        if not torch.isfinite(weight).all():
            raise InputError(f"{where()}NaN or inf in the weight; the model cannot be quantized as it is")
        if self.needs_hessian and hessian is None:
            raise InputError(f"{where()}{self.name} needs calibration data; give some, or choose rtn or nf4")
        return weight

    def check(self, packed: Packed) -> None:
        super().check(packed)
        if self.basis is not None:
            self.basis.check(packed)

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.basis is None:
            return self.grid.dequantize(packed, rows, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        if self.basis.by_rows:
            return self.basis.restore(self.grid.dequantize(packed, rows, wide), packed).to(dtype)
        return self.basis.restore(self.grid.dequantize(packed, ALL, wide), packed)[rows].to(dtype)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        if self.basis is None:
            return materialized_linear(x, self.grid, packed)
        y = materialized_linear(self.basis.inputs(x, packed), self.grid, packed)
        return self.basis.outputs(y, packed)

    def tuning_linear(self, x: Tensor, packed: Packed) -> Tensor:
        if self.basis is None:
            return F.linear(x, self.grid.dequantize(packed, dtype=x.dtype))
        y = F.linear(self.basis.inputs(x, packed), self.grid.dequantize(packed, dtype=x.dtype))
        return self.basis.outputs(y, packed)
