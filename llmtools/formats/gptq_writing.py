"""Layers as GPTQ stores them; `formats/gptq.py` explains the tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.bits import pack
from .uniform import Limits, Uniform

LIMITS = {
    "gptq": Limits(bits=(2, 3, 4, 8), zero_codes=False),
    "gptq_v2": Limits(bits=(2, 3, 4, 8)),
}


def tensors(layer: Uniform, version: str) -> dict[str, Tensor]:
    """qweight, qzeros, scales and g_idx of one linear."""
    in_features = layer.codes.shape[1]
    zeros = layer.zeros.to(torch.int32) - int(version == "gptq")
    natural = torch.arange(in_features, device=layer.codes.device) // layer.group_size
    return {
        "qweight": pack(layer.codes, layer.bits).T,
        "qzeros": pack(zeros.T.contiguous(), layer.bits),
        "scales": layer.scales.T,
        "g_idx": (natural if layer.group_of is None else layer.group_of).to(torch.int32),
    }


def config(layers: Mapping[str, Uniform], dense: list[str], version: str) -> dict[str, Any]:
    """The quantization config: what most layers have, and under `dynamic` the rest, one pattern a module."""
    options = {path: _options(layer) for path, layer in layers.items()}
    common, _ = Counter(options.values()).most_common(1)[0]
    dynamic: dict[str, dict[str, Any]] = {}
    for path in dense:
        if path.rpartition(".")[2] != "lm_head":
            dynamic[f"-:^{re.escape(path)}$"] = {}
    for path, own in options.items():
        if own != common:
            dynamic[f"+:^{re.escape(path)}$"] = _as_json(own)
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "lm_head": any(path.rpartition(".")[2] == "lm_head" for path in layers),
        **_as_json(common),
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": ["llmtools"]},
    }


def _options(layer: Uniform) -> tuple[int, int, bool, bool]:
    in_features = layer.codes.shape[1]
    group_size = -1 if layer.group_size >= in_features else layer.group_size
    return layer.bits, group_size, layer.symmetric, layer.group_of is not None


def _as_json(options: tuple[int, int, bool, bool]) -> dict[str, Any]:
    return dict(zip(("bits", "group_size", "sym", "desc_act"), options, strict=True))
