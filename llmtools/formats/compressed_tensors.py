"""compressed-tensors' "pack-quantized" checkpoints, which llm-compressor writes and vLLM reads. m = out, n = in.

Source: compressed-tensors, src/compressed_tensors/compressors/pack_quantized (base.py, helpers.py).

    weight_packed       int32 [m, ceil(n·b/32)]     a bit stream along the inputs of code = q + 2^(b−1)
    weight_scale        [m, G]                      or [1], one for the tensor
    weight_zero_point   int32 [ceil(m·b/32), G]     along the outputs, of zero + 2^(b−1); absent if symmetric
    weight_shape        int64 [2]                   weight_g_idx int32 [n], optional: the group of each column

Bits and groups follow from the tensors' shapes, as a module may match several patterns of the config. Versions before
0.18 packed 3 bits, and 5 to 7, with whole codes per word and the top bits of each word unused; the shape shows that,
too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CheckpointError, InputError
from ..kernels.bits import pack, unpack, words
from ..quant import Packed, Quantizer
from .base import FLOATS, Format, affine, columns_by_group, formats, mapping, whole
from .tensors import Module
from .uniform import Limits, Uniform, natural_codes

_VERSION = "0.18.0"
"""First version with a dense 3-bit stream, which we write."""


@formats.register("compressed-tensors")
class CompressedTensors(Format):
    """compressed-tensors' "pack-quantized" checkpoints."""

    marker, companion = "weight_packed", "weight_scale"
    limits = Limits(
        bits=(2, 3, 4, 5, 6, 7, 8),
        scale_types=(torch.float16, torch.bfloat16, torch.float32),
        whole_groups=True,
        any_order=False,  # "actorder: group" was removed from compressed-tensors, and readers ignore weight_g_idx
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        named = mapping(config.get("config_groups"), "config_groups")
        groups = [mapping(group, f"config_groups.{name}") for name, group in named.items()]
        weights = [mapping(group.get("weights"), "weights") for group in groups if group]
        for group in groups:
            if group.get("input_activations"):
                raise CheckpointError("compressed-tensors with quantized activations is not read; weights only are")
        if config.get("transform_config"):
            raise CheckpointError("compressed-tensors with transforms (Hadamard rotations) is not read")
        self.widths = sorted({whole(each, "num_bits") for each in weights if each.get("num_bits")})
        if (
            not self.widths
            or not set(self.widths) <= set(range(1, 9))
            or any(each.get("type", "int") != "int" for each in weights)
        ):
            raise CheckpointError("compressed-tensors: no config group with integer weights")

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        method, packing = config.get("quant_method"), config.get("format")
        if method in ("auto-round", "intel/auto-round"):
            return config.get("packing_format") == "auto_round:llm_compressor" and packing == "pack-quantized"
        return method == "compressed-tensors" and (
            packing == "pack-quantized" or (packing == "mixed-precision" and _all_packed(config.get("config_groups")))
        )

    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        if "weight_shape" in stored and stored.get("weight_shape").tolist() != [out_features, in_features]:
            raise CheckpointError(
                f"the checkpoint is damaged: {stored.path}.weight_shape is {stored.get('weight_shape').tolist()}, the "
                f"model has [{out_features}, {in_features}]"
            )
        stream = stored.get("weight_packed", out_features, None, dtypes=(torch.int32,))
        bits, dense = self._width(stored, stream.shape[1], in_features)
        scales = stored.get("weight_scale", dtypes=FLOATS)
        if scales.numel() == 1:
            scales = scales.reshape(1, 1).expand(out_features, 1)
        if scales.ndim != 2 or scales.shape[0] != out_features or in_features % scales.shape[1]:
            raise CheckpointError(
                f"the checkpoint is damaged: {stored.path}.weight_scale has shape {list(scales.shape)} for a weight of "
                f"[{out_features}, {in_features}]"
            )
        groups = scales.shape[1]
        group_size = in_features // groups
        zeros = torch.full((out_features, groups), 2 ** (bits - 1), dtype=torch.uint8)
        if "weight_zero_point" in stored:
            height = words(out_features, bits) if dense else _padded_words(out_features, bits)
            packed_zeros = stored.get("weight_zero_point", height, groups, dtypes=(torch.int32,)).T.contiguous()
            zeros = _codes(packed_zeros, bits, out_features, dense).T
        group_of = columns_by_group(stored, "weight_g_idx", in_features, group_size, groups)
        codes = None if dense and group_of is None else _codes(stream, bits, in_features, dense)
        return affine(
            codes,
            scales,
            zeros,
            bits=bits,
            group_size=group_size,
            in_features=in_features,
            qweight=stream if codes is None else None,
            group_of=group_of,
        )

    def scales(self, stored: Module, packed: Packed) -> dict[str, Tensor]:
        if stored.get("weight_scale").shape != packed["scales"].shape:
            raise InputError(f"{stored.path} has one scale for all its rows in the file")
        return {"weight_scale": packed["scales"]}

    def codes(self, stored: Module, quantizer: Quantizer, packed: Packed) -> dict[str, Tensor]:
        codes, former = natural_codes(quantizer, packed), stored.get("weight_packed")
        bits, dense = self._width(stored, former.shape[1], codes.shape[1])
        return {"weight_packed": pack(codes, bits) if dense else _padded(codes, bits)}

    def _width(self, stored: Module, width: int, in_features: int) -> tuple[int, bool]:
        """(bits, whether the stream is dense) for `width` words per row."""
        found = [(bits, True) for bits in self.widths if words(in_features, bits) == width]
        found += [(bits, False) for bits in self.widths if 32 % bits and _padded_words(in_features, bits) == width]
        if not found:
            raise CheckpointError(
                f"the checkpoint is damaged: {stored.path}.weight_packed has {width} words per row, which "
                f"do not match {in_features} codes of {' or '.join(map(str, self.widths))} bits"
            )
        if len(found) > 1 and _before_dense(str(self.config.get("version") or "")):
            return found[-1]
        return found[0]

    @classmethod
    def write(cls, layer: Uniform) -> dict[str, Tensor]:
        found = {
            "weight_packed": pack(layer.codes, layer.bits),
            "weight_scale": layer.scales,
            "weight_shape": torch.tensor(layer.codes.shape, dtype=torch.int64),
        }
        if not layer.symmetric:
            found["weight_zero_point"] = pack(layer.zeros.T.contiguous(), layer.bits).T
        return found

    @classmethod
    def describe(cls, layers: Mapping[str, Uniform], dense: list[str]) -> dict[str, Any]:
        """The config, with one config group for each kind of grid."""
        kinds: dict[tuple[Any, ...], list[str]] = {}
        for path, layer in layers.items():
            row = layer.scales.shape[1] == 1
            kind = (layer.bits, None if row else layer.group_size, layer.symmetric)
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


def _all_packed(groups: Any) -> bool:
    """Whether all config groups of a "mixed-precision" config, each with a format of its own, have this one."""
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    return bool(found) and all(isinstance(each, Mapping) and each.get("format") == "pack-quantized" for each in found)


def _padded_words(count: int, bits: int) -> int:
    return -(-count // (32 // bits))


def _codes(stream: Tensor, bits: int, count: int, dense: bool) -> Tensor:
    if dense:
        return unpack(stream, bits, count)
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    fields = (stream.unsqueeze(-1) >> shifts) & (2**bits - 1)
    codes: Tensor = fields.flatten(-2)[..., :count].to(torch.uint8)
    return codes


def _padded(codes: Tensor, bits: int) -> Tensor:
    """Codes [m, n] -> int32 [m, w] of whole codes per word, the first in the lowest bits."""
    count = 32 // bits
    runs = F.pad(codes.to(torch.int64), (0, -codes.shape[1] % count)).unflatten(1, (-1, count))
    words = (runs << torch.arange(0, count * bits, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _before_dense(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return bool(found) and (int(found[1]), int(found[2])) < (0, 18)  # type: ignore[index]
