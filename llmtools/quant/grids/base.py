"""A grid: the values that a weight may take, and how a code encodes one.

A grid knows geometry (fit a scale to a group, find the nearest value) and storage (pack codes, decode rows). It does
not know how codes are chosen over a whole matrix; that is the rounding's part.

A code names one weight, or a tile of `height` rows and `width` columns: 1 × 8 on a lattice (QuIP#, arXiv:2402.04396,
section 4), 16 × 16 on a trellis (QTIP, arXiv:2406.11235, section 3). Tiles begin at the first row and column;
where a weight ends within one, roundings pad it with zeros, and `dequantize` removes them; or, in a `ragged` grid, the
last tile has fewer rows.

Shapes: n — given rows, a multiple of the height h; c — given columns, a multiple of the width w; p — parameters of
a group; out, in — features; G — groups in a row.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError, where
from ..base import ALL, Packed, Rows, TensorSpec


class Grid(Rows):
    """The values a weight may take, group by group along the inputs; rows of it, in the grid's own coordinates."""

    width: ClassVar[int] = 1
    """Columns that share a code: the dimension of a vector code. It divides the group size, or a group is the row."""
    height: ClassVar[int] = 1
    """Rows that share a code."""
    ragged: ClassVar[bool] = False
    """Whether the last tile has as many rows as are left, and none are padded. Codes are then [n, c / w, …] integers,
    for each row its share of its tiles' codes, and a group is the whole row."""
    codes: ClassVar[tuple[str, ...]]
    """Names of the tensors of `layout` that hold the codes; the others hold the parameters."""

    @abstractmethod
    def resolve_group_size(self, in_features: int) -> int:
        """Columns that share a fit, at most in_features."""

    @abstractmethod
    def fit(self, group: Tensor, importance: Tensor | None = None) -> Tensor:
        """Parameters for groups of weights: [n, c] float -> [n, p], already rounded to what is stored.

        importance [c], optional: the weight of a squared error in each column.
        """

    @abstractmethod
    def quantize_values(self, values: Tensor, params: Tensor) -> Tensor:
        """Codes of the nearest values: [n, c] and [n, p] -> [n / h, c / w] integers."""

    @abstractmethod
    def dequantize_codes(self, codes: Tensor, params: Tensor) -> Tensor:
        """[n / h, c / w] and [n, p] -> [n, c], in the type of `params`."""

    def sweep(self, target: Tensor, error: Tensor, update: Tensor, params: Tensor) -> Tensor | None:
        """The codes [n / h, c / w] of columns of a group rounded in turn, each with the feedback of those before it.

        target [n, c], where column j takes Σ_{i<j} E_i M_ij, too; error [n, c] is W and becomes E = W − Ŵ, in place;
        update [c, c] is M. Optional, for speed: None, with nothing done, where `quantize_values` is to be called for
        column after column.
        """
        return None

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """As `Quantizer.layout`."""

    @abstractmethod
    def pack(self, codes: Tensor, params: Tensor, in_features: int) -> Packed:
        """codes [ceil(out / h), ceil(in / w)], params [out, G, p] -> the tensors of `layout`."""

    def params(self, packed: Packed, rows: slice = ALL) -> Tensor:
        """The parameters of rows of a packed weight, [rows, G, p] float32, as `fit` gives them; optional, for
        `requantize`."""
        raise InputError(f"{where()}{type(self).__name__} does not read the parameters of a packed weight")

    def requantizes(self) -> bool:
        """Whether `requantize` is there: it needs `params`."""
        return type(self).params is not Grid.params or type(self).requantize is not Grid.requantize

    def shift_group(self, in_features: int) -> int | None:
        """As `Quantizer.shift_group`."""
        return None

    def shift(self, packed: Packed, change: Tensor) -> Packed:
        """As `Quantizer.shift`."""
        raise InputError(
            f"{where()}this {type(self).__name__} grid has no floating zero points to move; merge with --how round or "
            "requantize, or dense"
        )

    def requantize(self, weight: Tensor, packed: Packed, rows: slice = ALL) -> Packed:
        """The codes of these rows, [rows, in] float, nearest on the grid of `packed`; as `Quantizer.requantize`.

        Tiles are padded with zeros; a grid whose codes hold anything else there overrides it.
        """
        in_features = weight.shape[1]
        values = F.pad(weight, (0, -in_features % self.width, 0, -len(weight) % self.height))
        params = self.params(packed, rows).to(values.dtype)
        params = F.pad(params, (0, 0, 0, 0, 0, len(values) - len(params)))
        groups = values.split(self.resolve_group_size(values.shape[1]), dim=1)
        codes = torch.cat([self.quantize_values(group, params[:, g]) for g, group in enumerate(groups)], 1)
        made = self.pack(codes, params, in_features)
        return {name: made[name] for name in self.codes}


def tile_rows(rows: slice, out_features: int, height: int) -> tuple[slice, slice]:
    """The rows of tiles that `rows` of the weight touch, and the slice of the requested rows among theirs.

    >>> tile_rows(slice(5, 8), 100, 2)        # rows 4 … 7 of the weight are decoded, and the first is dropped
    (slice(2, 4, None), slice(1, 4, 1))
    """
    start, stop, step = rows.indices(out_features)
    first = start // height
    return slice(first, -(-stop // height)), slice(start - first * height, max(start, stop) - first * height, step)
