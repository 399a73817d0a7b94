"""What grids of one code a weight share: group sizes, and how the number of columns is remembered.

The last word of a packed row may be partly filled, and then its length does not tell the number of columns. Such
weights carry `columns`, a tensor of shape [0, in]: no bytes, only a shape.
"""

from __future__ import annotations

import torch

from ...errors import InputError, did_you_mean, where
from ...kernels.bits import words
from ..base import Packed, TensorSpec

SCALE_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""The types in which scales are stored."""


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
    """`qweight`, and `columns` where the packed width alone does not tell in_features."""
    width = words(in_features, bits)
    layout = {"qweight": TensorSpec((out_features, width), torch.int32)}
    if width * 32 // bits != in_features:
        layout["columns"] = TensorSpec((0, in_features), torch.uint8)
    return layout


def columns(packed: Packed, bits: int) -> int:
    """in_features of a weight stored by `stream_layout`."""
    if "columns" in packed:
        return packed["columns"].shape[1]
    return packed["qweight"].shape[1] * 32 // bits
