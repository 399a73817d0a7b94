"""Checkpoints whose weights are float8 with scales, as sources: dequantized tensor by tensor while they are read.

    weight            float8_e4m3fn [out, in]
    weight_scale_inv  one number for each tile of `weight_block_size` (DeepSeek-V3, arXiv:2412.19437, section 3.3, and
                      transformers' `fp8`), [⌈out / height⌉, ⌈in / width⌉]; of one element without tiles
    weight_scale      compressed-tensors' float-quantized: one element, one a row [out, 1], or one a tile

Both are factors: value = code · scale, here in float32, rounded once to the type of the model. Scales of activations
and of caches beside them do not change weights, and are left.

Shapes: out, in — features of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from .integrity import read_headers, reading

SUFFIXES = ("_scale_inv", "_scale")
"""Ends of a scale's name, after the weight's."""
_BESIDE = ("input_scale", "output_scale", "activation_scale", "k_scale", "v_scale", "q_scale")
"""Scales of activations and caches."""
_CODES, _OTHER_CODES = "F8_E4M3", ("F8_E5M2", "F8_E8M0")


class Float8(NamedTuple):
    """How the weights of a checkpoint are float8."""

    tile: tuple[int, int] | None
    """Height and width of the tiles that share a scale; None where the scale's shape says all."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Float8 | None:
        """By the quantization config of a model's config; None where its weights are no float8.

        Raises CheckpointError for float8 of another kind.
        """
        quantization = config.get("quantization_config") or config.get("compression_config")
        if not isinstance(quantization, Mapping):
            return None
        method, packing = quantization.get("quant_method"), quantization.get("format")
        if method == "fp8":
            if (kind := quantization.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
                raise CheckpointError(f"quantization_config: fmt={kind!r}; float8 of e4m3 is read")
            return cls(_tile(quantization.get("weight_block_size")))
        if method != "compressed-tensors" or packing not in ("float-quantized", "naive-quantized"):
            return None
        groups = quantization.get("config_groups")
        weights = [each.get("weights") for each in (groups.values() if isinstance(groups, Mapping) else ()) if each]
        if not weights or any(not _is_float8(each) for each in weights):
            return None
        tiles = {_tile(each.get("block_structure")) for each in weights}
        if len(tiles) > 1:
            raise CheckpointError("quantization_config: config groups with tiles of several sizes are not read")
        return cls(tiles.pop())


class Scale(NamedTuple):
    """Where the scales of a float8 weight are."""

    file: Path
    """Safetensors file."""
    name: str
    """Name of the tensor in it."""
    tile: tuple[int, int] | None
    """Height and width of the tiles that share one."""

    def apply(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The values [out, in] of codes [out, in] float8, in `dtype`. Raises CheckpointError for misshapen scales."""
        with reading(self.file), safe_open(self.file, framework="pt") as opened:
            scales: Tensor = opened.get_tensor(self.name)
        if not scales.is_floating_point():
            raise CheckpointError(f"{self.file}: {self.name} is {scales.dtype}; floating scales are read")
        try:
            return dequantized(codes, scales.float(), self.tile).to(dtype)
        except ValueError as error:
            raise CheckpointError(f"{self.file}: {self.name} {error}") from error


def dequantized(codes: Tensor, scales: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
    """code · scale, float32 [out, in].

    codes [out, in] float8; scales float32 of one element, [out] or [out, 1], or with a tile of height × width
    [⌈out / height⌉, ⌈in / width⌉].

    Raises ValueError for scales of another shape.
    """
    rows, columns = codes.shape
    values = codes.float()
    if scales.numel() == 1:
        return values * scales.reshape(())
    if tile is None:
        if scales.shape not in ((rows,), (rows, 1)):
            raise ValueError(f"has shape {list(scales.shape)} for a weight of [{rows}, {columns}]")
        return values * scales.reshape(rows, 1)
    (height, width), grid = tile, (-(-rows // tile[0]), -(-columns // tile[1]))
    if scales.shape != grid:
        raise ValueError(
            f"has shape {list(scales.shape)} for a weight of [{rows}, {columns}] in tiles of {height} × {width}"
        )
    for number, row in enumerate(scales):
        values[number * height : (number + 1) * height] *= row.repeat_interleave(width)[:columns]
    return values


def scales_of(folder: Path, found: Float8) -> dict[str, Scale]:
    """Name of each float8 weight in a folder → its scales.

    Raises CheckpointError for float8 of other kinds, and where scales are missing.
    """
    kinds: dict[str, str] = {}
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        headers = read_headers([file])
        kinds |= {name: header.dtype for name, header in headers.items()}
        files |= dict.fromkeys(headers, file)
    scales: dict[str, Scale] = {}
    for name, kind in kinds.items():
        if kind in _OTHER_CODES and not is_scale(name):
            raise CheckpointError(f"{files[name]}: {name} is {kind}; float8 weights are read as {_CODES}")
        if kind == _CODES:
            beside = next((name + suffix for suffix in SUFFIXES if name + suffix in files), None)
            if beside is None:
                raise CheckpointError(f"{files[name]}: {name} is float8, and its scales ({name}_scale) are missing")
            scales[name] = Scale(files[beside], beside, found.tile)
    return scales


def is_scale(name: str) -> bool:
    """Whether a tensor of a float8 checkpoint has scales."""
    return name.endswith(SUFFIXES) or name.rpartition(".")[2] in _BESIDE


def _is_float8(weights: Any) -> bool:
    return isinstance(weights, Mapping) and weights.get("type") == "float" and weights.get("num_bits") == 8


def _tile(size: Any) -> tuple[int, int] | None:
    """Raises CheckpointError unless it is None or two numbers."""
    if size is None:
        return None
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(each) is int and each > 0 for each in size):
        raise CheckpointError(f"quantization_config: weights in tiles of {size!r}; two numbers are expected")
    return size[0], size[1]
