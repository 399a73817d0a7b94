"""bitsandbytes' 4-bit checkpoints: NF4 and FP4, absmax in float32 or, with double quantization, in 8 bits.

Source: QLoRA (arXiv:2305.14314); bitsandbytes, bitsandbytes/functional.py (QuantState.as_dict).

The flattened matrix is split into blocks, usually of 64. Two codes per byte, the first in the high nibble.

    weight                               uint8 [N/2, 1]     (perhaps viewed as another type, for FSDP)
    weight.absmax                        float32 [blocks], or uint8 with double quantization
    weight.quant_map                     float32 [16]
    weight.nested_absmax, .nested_quant_map            float32 [blocks/256], [256]
    weight.quant_state.bitsandbytes__nf4               uint8: JSON of type, blocksize, shape, nested_offset …

Where the block size divides the row, blocks are groups of a row. Where it does not, groups of gcd(in, blocksize)
columns are within one block each, and its absmax is repeated for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..kernels.bits import pack, unpack
from ..quant import Packed, Quantizer, TableGrid
from ..quant.external import TABLES
from ..quant.grids.codebook import DYNAMIC
from .base import Format, formats, whole
from .tensors import Module

_STATE = "weight.quant_state.bitsandbytes__"


@formats.register("bitsandbytes")
class BitsAndBytes(Format):
    """bitsandbytes' 4-bit checkpoints; read only."""

    marker, companion = "weight.quant_map", "weight.absmax"
    implied = MappingProxyType({"quant_method": "bitsandbytes", "load_in_4bit": True})

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "bitsandbytes" and bool(
            config.get("load_in_4bit", config.get("_load_in_4bit"))
        )

    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        state = _state(stored)
        block, weights = whole(state, "blocksize"), out_features * in_features
        if block < 1 or list(state.get("shape") or ()) != [out_features, in_features]:
            raise CheckpointError(f"the checkpoint is damaged: {stored.path}.{_STATE}… says {state}")
        blocks = -(-weights // block)
        stream = stored.get("weight").contiguous().flatten().view(torch.uint8)
        if stream.numel() != -(-weights // 2):
            raise CheckpointError(f"the checkpoint is damaged: {stored.path}.weight has {stream.numel()} bytes")
        swapped = (stream << 4) | (stream >> 4)
        codes = unpack(swapped, 4, weights).reshape(out_features, in_features)
        table, codes = _sorted(stored.get("weight.quant_map", 16, dtypes=(torch.float32,)), codes)

        group = math.gcd(in_features, block)
        nested = "weight.nested_absmax" in stored
        absmax = stored.get("weight.absmax", blocks, dtypes=(torch.uint8,) if nested else (torch.float32,))
        packed = {"qweight": pack(codes, 4), "columns": torch.empty(0, in_features, dtype=torch.uint8)}
        nested_tensors = None
        if nested:
            absmax, nested_tensors = _denest(stored, state, absmax)
        double = nested_tensors is not None and group == block
        if nested_tensors is not None and double:
            packed |= nested_tensors | {"scales": nested_tensors["scales"].reshape(out_features, -1)}
        else:
            spread = absmax.repeat_interleave(block // group)[: weights // group]  # [out · G]
            packed["scales"] = spread.reshape(out_features, -1).contiguous()
        named = next((name for name, values in TABLES.items() if _float32(values) == table), None)
        quantizer = TableGrid(named or table, group_size=group, double_quantization=double)
        return quantizer, {name: packed[name] for name in quantizer.layout(out_features, in_features)}

    def scales(self, stored: Module, packed: Packed) -> dict[str, Tensor]:
        if "nested_scales" in packed:
            name, state = _STATE + next(kind for kind in ("nf4", "fp4") if _STATE + kind in stored), _state(stored)
            text = json.dumps({**state, "nested_offset": float(packed["nested_offset"])})
            as_bytes = torch.tensor(list(text.encode()), dtype=torch.uint8)
            return {"weight.nested_absmax": packed["nested_scales"], name: as_bytes}
        blocks = stored.get("weight.absmax")
        if blocks.dtype != torch.float32 or blocks.numel() != packed["scales"].numel():
            raise InputError(f"{stored.path}: a scale of its file is that of several groups here")
        return {"weight.absmax": packed["scales"].reshape(blocks.shape)}


def _denest(stored: Module, state: Mapping[str, Any], codes: Tensor) -> tuple[Tensor, Packed | None]:
    """(absmax in float32, its packed tensors where our double quantization is the same). codes: uint8 [blocks]."""
    size = whole(state, "nested_blocksize", 256)
    table = stored.get("weight.nested_quant_map", 256, dtypes=(torch.float32,))
    scales = stored.get("weight.nested_absmax", -(-codes.numel() // size), dtypes=(torch.float32,))
    offset = torch.tensor([float(state.get("nested_offset", 0.0))], dtype=torch.float32)
    absmax = table[codes.int()] * scales.repeat_interleave(size)[: codes.numel()] + offset
    same = size == 256 and torch.equal(table, torch.tensor(DYNAMIC))
    return absmax, {"scales": codes, "nested_scales": scales, "nested_offset": offset} if same else None


def _state(stored: Module) -> dict[str, Any]:
    for kind in ("nf4", "fp4"):
        if _STATE + kind in stored:
            raw = stored.get(_STATE + kind, None, dtypes=(torch.uint8,))
            try:
                return dict(json.loads(bytes(raw.tolist()).decode()))
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"the checkpoint is damaged: {stored.path}.{_STATE}{kind}: {error}") from error
    raise CheckpointError(f"the checkpoint is damaged: {stored.path}.{_STATE}nf4 (or fp4) is missing")


def _sorted(table: Tensor, codes: Tensor) -> tuple[tuple[float, ...], Tensor]:
    """(table in ascending order, codes into it). table: float32 [16]; codes: uint8, any shape."""
    order = table.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(16)).to(torch.uint8)
    return tuple(table[order].tolist()), rank[codes.int()]


def _float32(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(torch.tensor(values, dtype=torch.float32).tolist())
