"""QA-LoRA's merge (arXiv:2309.14717): an adapter whose A is constant in each group moves zero points, not codes.

s B A is then one value for each row and group of columns, which the quantizer adds to the zero points or minima of the
base (`Quantizer.shift`). The adapter is a plain LoRA in all else.

Shapes: out, in — features; r — rank; G — groups.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError, where
from ..quant import Packed
from ..quant.shift import group_means, pooled
from .exact import factors, is_low_rank

CAN = "hqq, HQQ checkpoints with axis 1, and GGUF files of Q4_1 and Q5_1"
"""The bases of ours whose zero points or minima are floating numbers."""
TOLERANCE = 1e-5
"""Largest difference of columns of a group, beside the largest entry of A."""


@torch.no_grad()
def shifted_packed(layer: Any) -> Packed:
    """The packed tensors of a PEFT layer's quantized base, with its active LoRA adapters in zero points or minima.

    Raises InputError for an adapter that is no plain LoRA or not constant in the groups of its base, and for a
    quantizer that has no such numbers.
    """
    packed: Packed = layer.base_layer.packed
    change = _change(layer)
    made: Packed = layer.base_layer.quantizer.shift(packed, change)
    return made


@torch.no_grad()
def check_constant(layer: Any) -> None:
    """Raises InputError as `shifted_packed`, without the work."""
    _change(layer)


def _change(layer: Any) -> torch.Tensor:
    """s B mean(A), [out, G] float32."""
    if not is_low_rank(layer):
        raise InputError(f"{where()}zero points hold plain LoRA adapters: no DoRA, no other variant, no bias")
    b, a = factors(layer)
    size = layer.base_layer.quantizer.shift_group(a.shape[1])
    if size is None:
        raise InputError(f"{where()}{layer.base_layer.quantizer} has no floating zero points; {CAN} have")
    if bool(((a - pooled(a, size)).abs() > TOLERANCE * a.abs().max()).any()):
        raise InputError(
            f"{where()}lora_A is not constant in the base's groups of {size} columns, so the adapter does not fit into "
            "zero points; was it trained on a base with other groups? Merge it with --how round"
        )
    return b @ group_means(a, size)
