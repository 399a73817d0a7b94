"""A grid: the values that a weight may take, and how one is named by a code.

A grid knows geometry (fit a scale to a group, find the nearest value) and storage (pack codes, decode rows). It does
not know how codes are chosen over a whole matrix; that is the rounding's part.

Shapes: n — rows at hand; c — columns at hand; p — parameters of a group; out, in — features; G — groups in a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..base import ALL, Packed, TensorSpec


class Grid(ABC):
    """The values a weight may take, group by group along the inputs."""

    width: ClassVar[int] = 1
    """Columns that share a code: 1 for scalars, 8 for a lattice."""

    @abstractmethod
    def span(self, in_features: int) -> int:
        """Columns that share a fit: the group size, resolved."""

    @abstractmethod
    def fit(self, group: Tensor, importance: Tensor | None = None) -> Tensor:
        """Parameters for groups of weights: [n, c] float -> [n, p], already rounded to what is stored.

        importance [c], if there is any: what a squared error costs in each column.
        """

    @abstractmethod
    def nearest(self, block: Tensor, params: Tensor) -> Tensor:
        """Codes of the nearest values: [n, c] and [n, p] -> [n, c / width] integers."""

    @abstractmethod
    def value(self, codes: Tensor, params: Tensor) -> Tensor:
        """[n, c / width] and [n, p] -> [n, c], in the type of `params`."""

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """As `Quantizer.layout`."""

    @abstractmethod
    def pack(self, codes: Tensor, params: Tensor, in_features: int) -> Packed:
        """codes [out, in / width], params [out, G, p] -> the tensors of `layout`."""

    @abstractmethod
    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `Quantizer.dequantize`, in the grid's own coordinates."""

    def out_features(self, packed: Packed) -> int:
        """As `Quantizer.out_features`."""
        return next(iter(packed.values())).shape[0]

    def scratch_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        """As `Quantizer.scratch_bytes`."""
        return 16

    def multiply(self, x: Tensor, packed: Packed, transposed: bool = False) -> Tensor | None:
        """As `Quantizer.multiply`, in the grid's own coordinates."""
        return None
