"""Layers as compressed-tensors stores them; `formats/compressed_tensors.py` explains the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.bits import pack
from .uniform import Limits, Uniform

LIMITS = Limits(
    bits=(2, 3, 4, 5, 6, 7, 8),
    scale_types=(torch.float16, torch.bfloat16, torch.float32),
    whole_groups=True,
    any_order=False,  # "actorder: group" was taken out of compressed-tensors, and readers ignore weight_g_idx
)
_VERSION = "0.18.0"
"""The first whose 3-bit stream is dense, as ours is."""


def tensors(layer: Uniform) -> dict[str, Tensor]:
    """weight_packed, weight_scale, … of one linear."""
    found = {
        "weight_packed": pack(layer.codes, layer.bits),
        "weight_scale": layer.scales,
        "weight_shape": torch.tensor(layer.codes.shape, dtype=torch.int64),
    }
    if not layer.symmetric:
        found["weight_zero_point"] = pack(layer.zeros.T.contiguous(), layer.bits).T
    return found


def config(layers: Mapping[str, Uniform], dense: list[str]) -> dict[str, Any]:
    """The quantization config: one group of modules for each kind of grid."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for path, layer in layers.items():
        whole = layer.scales.shape[1] == 1
        kind = (layer.bits, None if whole else layer.group_size, layer.symmetric)
        kinds.setdefault(kind, []).append(path)
    groups = {}
    for index, ((bits, group_size, symmetric), paths) in enumerate(kinds.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group" if group_size else "channel",
            "group_size": group_size,
            "actorder": None,
            "dynamic": False,
        }
        targets = ["Linear"] if len(kinds) == 1 else paths
        groups[f"group_{index}"] = {"targets": targets, "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "version": _VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
    }
