"""HQQ checkpoints, in safetensors as transformers and hqq write them: W = (code − zero) · scale with float zeros.

Source: hqq, hqq/core/quantize.py and hqq/core/bitpack.py.

The matrix is reshaped, to [·, group_size] for axis 1 and to [group_size, ·] for axis 0; each row, or column, of that is
a group. The codes are then packed along the first dimension: with P per word, the rows are split into P equal blocks,
and the first block takes the highest field.

    W_q     uint8 [rows/P, ·]; 3 bits: int32 with ten fields, the rows padded to a multiple of ten
    scale, zero     [groups, 1] for axis 1, [1, groups] for axis 0
    nbits, group_size, shape, axis, packing, …     one tensor per option
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.bits import pack
from ..quant import ColumnGrid, Packed, Quantizer
from .base import FLOATS, TYPE_NAMES, Format, affine, formats
from .tensors import Module

_FIELDS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
"""Packing → (bits of a field, fields per word)."""


@formats.register("hqq")
class HQQ(Format):
    """HQQ checkpoints; read only."""

    marker, companion = "W_q", "packing"
    implied = MappingProxyType({"quant_method": "hqq"})  # hqq's own save_to_safetensors writes no config
    unused = (
        "channel_wise", "compute_dtype", "encoded_state_dict", "offload_meta", "optimize", "round_zero",
        "stores_quant_config", "unpack_view_dtype", "view_as_float",
    )  # fmt: skip

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "hqq"

    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        packing = bytes(stored.get("packing", None, dtypes=(torch.uint8,)).tolist()).decode(errors="replace")
        if packing not in _FIELDS:
            raise CheckpointError(f"{stored.path}: HQQ packing {packing!r} is not read; {', '.join(_FIELDS)} are")
        width, per_word = _FIELDS[packing]
        bits, axis = round(_number(stored, "nbits")), int(_number(stored, "axis"))
        if bits > width or axis not in (0, 1) or stored.get("shape").tolist() != [out_features, in_features]:
            raise CheckpointError(
                f"the checkpoint is damaged: {stored.path} has nbits={bits}, axis={axis} and packing {packing}"
            )
        for name in ("quant_scale", "quant_zero"):
            if name in stored and bool(stored.get(name).any()):
                raise CheckpointError(f"{stored.path}: HQQ with {name} is not read (quantized scales or zeros)")
        weights, group_size = out_features * in_features, self._group_size(stored, in_features, axis, out_features)
        groups = weights // group_size
        rows = groups if axis == 1 else group_size
        codes = _fields(stored.get("W_q"), width, per_word, rows)
        if codes.numel() != weights or int(codes.max()) >= 2**bits:
            raise CheckpointError(
                f"the checkpoint is damaged: {stored.path}.W_q does not hold {weights} {bits}-bit codes"
            )
        codes = codes.reshape(out_features, in_features)
        per_group = (groups, 1) if axis == 1 else (1, groups)
        scales, zeros = (stored.get(name, *per_group, dtypes=FLOATS) for name in ("scale", "zero"))
        if scales.dtype != zeros.dtype:
            raise CheckpointError(
                f"{stored.path}: scale is {scales.dtype} and zero {zeros.dtype}; one type is expected"
            )
        if axis == 0:
            return _columns(codes, scales, zeros, bits, group_size)
        shape = (out_features, groups // out_features)
        return affine(
            codes,
            scales.reshape(shape),
            _integers(zeros, bits).reshape(shape),
            bits=bits,
            group_size=group_size,
            in_features=in_features,
        )

    def scales(self, stored: Module, packed: Packed) -> dict[str, Tensor]:
        found = {"scale": packed["scales"]} | ({"zero": packed["zeros"]} if "zeros" in packed else {})
        return {name: tensor.reshape(stored.get(name).shape) for name, tensor in found.items()}

    def _group_size(self, stored: Module, in_features: int, axis: int, out_features: int) -> int:
        size = stored.get("group_size")
        group_size = int(size.flatten()[0]) if size.numel() else 0
        if group_size < 1:
            group_size = in_features if axis == 1 else out_features
        if (in_features if axis == 1 else out_features) % group_size:
            raise CheckpointError(
                f"{stored.path}: [{out_features}, {in_features}] in HQQ groups of {group_size} along axis {axis} is "
                "not read; the group size must divide that axis"
            )
        return group_size


def _columns(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, size: int) -> tuple[Quantizer, Packed]:
    """Axis 0: element (r, c) belongs to group (r mod P, c), P = out / group_size.

    codes uint8 [out, in]; scales, zeros: float [1, P · in].
    """
    out_features, in_features = codes.shape
    quantizer = ColumnGrid(bits=bits, group_size=size, scale_type=TYPE_NAMES[scales.dtype])
    packed = {
        "qweight": pack(codes, bits),
        "columns": torch.empty(0, in_features, dtype=torch.uint8),
        "scales": scales.reshape(-1, in_features).contiguous(),
        "zeros": zeros.reshape(-1, in_features).contiguous(),
    }
    return quantizer, {name: packed[name] for name in quantizer.layout(out_features, in_features)}


def _fields(words: Tensor, width: int, per_word: int, rows: int) -> Tensor:
    """W_q [rows / P, c] -> codes uint8 [rows, c]."""
    if words.is_floating_point():  # "view_as_float": the same bytes as another type
        words = words.contiguous().view(torch.int32 if per_word == 10 else torch.uint8)
    if words.dtype != (torch.int32 if per_word == 10 else torch.uint8):
        raise CheckpointError(f"the checkpoint is damaged: W_q is {words.dtype}")
    shifts = range(width * (per_word - 1), -1, -width)
    blocks = [(words >> shift).to(torch.uint8) & (2**width - 1) for shift in shifts]
    return torch.cat(blocks)[:rows]


def _integers(zeros: Tensor, bits: int) -> Tensor:
    """Zero points as int32 where all are integers (round_zero), which are smaller; else unchanged."""
    whole = zeros.round()
    if torch.equal(whole, zeros) and bool(((whole >= 0) & (whole < 2**bits)).all()):
        return whole.to(torch.int32)
    return zeros


def _number(stored: Module, name: str) -> float:
    return float(stored.get(name).flatten()[0])
