"""Grids of one code a weight, in groups along the inputs: what `kernels/grouped` decodes and multiplies.

The last word of a packed row may be padded, and then its length does not determine the number of columns. Such
weights carry `columns`, a tensor of shape [0, in]: no bytes, only a shape.

Shapes: as in `grids/base.py`; w = ceil(in·bits / 32) words in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import InputError, did_you_mean, where
from ...kernels.bits import unpack, words
from ...kernels.grouped import (
    Weight,
    decodes,
    dequantize_grouped,
    encode_grouped,
    multiplies,
    multiply_each,
    multiply_grouped,
)
from ..base import ALL, Packed, TensorSpec
from ..dither import offsets
from ..products import ALL_TOKENS
from .base import Grid

SCALE_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Dtypes of stored scales, by name."""


def check_scale_type(scale_type: str) -> None:
    """Raises InputError for a name that is not in `SCALE_TYPES`."""
    if scale_type not in SCALE_TYPES:
        raise InputError(f"scale_type: {scale_type!r}; {did_you_mean(str(scale_type), SCALE_TYPES)}")


def scale_range(dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest positive number of a type of scales; float16's least is a subnormal number."""
    limits = torch.finfo(dtype)
    return 2.0**-24 if dtype == torch.float16 else limits.tiny, limits.max


def check_group_size(name: str, group_size: int) -> None:
    """Raises InputError unless group_size is −1 (the whole row) or positive."""
    if not (group_size == -1 or group_size >= 1):
        raise InputError(f"{name}: group_size={group_size}; give a positive number of columns, or -1 for the whole row")


def resolve_group_size(group_size: int, in_features: int) -> int:
    """The columns of one group: never more than a row has."""
    if in_features < 1:
        raise InputError(f"{where()}a weight needs at least one column, this has {in_features}")
    return in_features if group_size == -1 else min(group_size, in_features)


def stream_layout(out_features: int, in_features: int, bits: int) -> dict[str, TensorSpec]:
    """`qweight` [out, w] int32, and `columns` [0, in] uint8 where w alone does not tell in_features."""
    width = words(in_features, bits)
    layout = {"qweight": TensorSpec((out_features, width), torch.int32)}
    if width * 32 // bits != in_features:
        layout["columns"] = TensorSpec((0, in_features), torch.uint8)
    return layout


def columns(packed: Packed, bits: int) -> int:
    """in_features of a weight stored by `stream_layout`: of columns [0, in], or of qweight [out, w]."""
    if "columns" in packed:
        return packed["columns"].shape[1]
    return packed["qweight"].shape[1] * 32 // bits


class Scalar(Grid):
    """`qweight` [out, w] int32 and `scales` [out, G], beside `qzeros` [out, ·] uint8 of grids with zero points."""

    codes: ClassVar[tuple[str, ...]] = ("qweight",)
    multiply_tokens: ClassVar[int] = ALL_TOKENS

    bits: int
    group_size: int
    float_zeros: bool = False
    """Whether zero points are stored in float, in place of `qzeros`; the kernels do not support that."""

    def resolve_group_size(self, in_features: int) -> int:
        return resolve_group_size(self.group_size, in_features)

    def grouped(self, packed: Packed, rows: slice = ALL) -> Weight:
        """These rows as `kernels/grouped` takes them: qweight [rows, w], scales [rows, G], qzeros, table, sizes.

        It runs for every token that is generated: hence no calls.
        """
        qweight, scales, zeros = packed["qweight"], packed["scales"], packed.get("qzeros")
        in_features = packed["columns"].shape[1] if "columns" in packed else qweight.shape[1] * 32 // self.bits
        group_size = self.group_size if 0 < self.group_size < in_features else in_features
        if rows is not ALL:
            qweight, scales, zeros = qweight[rows], scales[rows], None if zeros is None else zeros[rows]
        return qweight, scales, zeros, None, self.bits, group_size, in_features

    def requantize(self, weight: Tensor, packed: Packed, rows: slice = ALL) -> Packed:
        """As `Grid.requantize`, all groups at once; groups of a scale of 0 are values of 0 whatever their codes."""
        scales, *zeros = self.params(packed, rows).float().unbind(-1)  # [rows, G] each
        table = self.grouped(packed, slice(0, 0))[3]
        if table is None:
            scales = torch.where(scales == 0, 1.0, scales)
        sizes = self.bits, self.resolve_group_size(weight.shape[1])
        return {
            "qweight": encode_grouped(
                weight.float(), scales, zeros[0] if zeros else None, table, *sizes, self.float_zeros
            )
        }

    def dither(self, packed: Packed, rows: slice) -> Tensor:
        qweight, scales, _, table, bits, group_size, in_features = self.grouped(packed, rows)
        scales = scales.float().repeat_interleave(group_size, 1)[:, :in_features]
        return offsets(rows, scales, None if table is None else unpack(qweight, bits, in_features), table)

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantize_grouped(*self.grouped(packed, rows), dtype)

    def scratch_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        fused = not self.float_zeros and decodes(device, self.bits)
        return dtype.itemsize if fused else super().scratch_bytes(device, dtype)

    def multiply(self, x: Tensor, packed: Packed, transposed: bool = False) -> Tensor | None:
        if self.float_zeros:
            return None
        weight = self.grouped(packed)
        return multiply_grouped(x, *weight, transposed) if multiplies(x.device, self.bits) else None

    def multiply_each(self, x: Tensor, sizes: Sequence[int], packed: Sequence[Packed]) -> Tensor | None:
        if self.float_zeros:
            return None
        return multiply_each(x, sizes, [self.grouped(each) for each in packed])
