"""Codebook decoding in plain torch: the specification of the faster routes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..bits import unpack


def dequantize_codebook(
    qweight: Tensor,
    scales: Tensor,
    table: Tensor,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See the package's docstring. `group_size` is resolved (1 ≤ group_size ≤ in_features). Returns [out, in]."""
    values = table.to(torch.float32)[unpack(qweight, 4, in_features).to(torch.int32)]  # [out, in]
    groups = scales.shape[-1]
    whole = F.pad(values, (0, groups * group_size - in_features)).unflatten(-1, (groups, group_size))
    weight: Tensor = whole * scales.to(torch.float32).unsqueeze(-1)
    return weight.flatten(-2)[..., :in_features].to(dtype)
