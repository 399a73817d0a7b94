"""EXL3 checkpoints, as exllamav3 writes them. m = out, n = in, both padded to multiples of 128.

Source: exllamav3, exllamav3/modules/quant/exl3.py and exl3_lib/quantize.py (tensors), exllamav3_ext/quant/pack.cu and
exl3_dq.cuh (words and states), codebook.cuh (codes). Its own form of QTIP (arXiv:2406.11235).

The tensors of a linear; k bits per weight, any in each linear:

    trellis   int16 [n/16, m/16, 16k]: a tile of 16 inputs and 16 outputs is a circle of 256k bits
    suh, svh  float16 [n], [m]: signs times scales, of the inputs and outputs
    su, sv    int16 [n/16], [m/16] in place of these, in files of the first versions: a bit for each sign, the lowest
              first, 1 for -1
    mcg, mul1 int32 []: one of them names the code of the states; 3INST without. Its value is the code's factor
    bias      float16 [m], of some models

W = diag(suh) H inner H diag(svh) in the orientation [in, out], H block-diagonal Hadamard matrices of order 128.

State t of a tile is the 16 bits before bit (t + 1)·k of the circle, whose first bit is the highest of word 0; words are
swapped in pairs. Ours begin with bit t·k: opening turns each circle by 16 - k bits, and spreads its words over
the sixteen rows of the tile. The order of a tile's weights, that of a tensor core's fragments, mixes rows and columns:
it stays, as the order "exl3" of `kernels.trellis`.

Beside config.json exllamav3 writes quantization_config.json, with name, shape and type of each linear's tensors
(conversion/quant_config.py). exllamav3 pads the outputs of every linear, and of the inputs only those of an MLP's last.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError, InputError
from ..kernels.trellis import TILE
from ..nn.linear import QuantizedLinear
from ..nn.swap import own_linears
from ..quant import EXL3Trellis, Packed, Quantizer
from ..quant.external import EXL3_RUN
from .base import Format, WriteResult, formats, write_folder
from .expert_names import stored_paths
from .readers import readers_of
from .tensors import Module, write_json

CODES = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
"""Tensor that names a code → the factor in it."""


@formats.register("exl3")
class EXL3(Format):
    """EXL3 checkpoints."""

    marker, companion = "trellis", "suh"
    implied = MappingProxyType({"quant_method": "exl3"})

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "exl3"

    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        m, n = _padded(out_features), _padded(in_features)
        tiles = stored.get("trellis", n // TILE, m // TILE, None, dtypes=(torch.int16,))
        quantizer = EXL3Trellis(_bits(stored, tiles), _code(stored))
        packed = {
            "trellis": _circles(tiles, quantizer.bits),
            "su": _scales(stored, "su", n)[:in_features].clone(),
            "sv": _scales(stored, "sv", m)[:out_features].clone(),
        }
        return quantizer, packed

    def bias(self, stored: Module, out_features: int) -> Tensor:
        return stored.get("bias", _padded(out_features))[:out_features].clone()

    @classmethod
    def writes(cls) -> bool:
        return True

    @classmethod
    def write_model(
        cls,
        model: nn.Module,
        tokenizer: Any,
        folder: Path,
        *,
        lossy: bool = False,
        reader: str | None = None,
        max_shard_size: str | int = "5GB",
    ) -> WriteResult:
        """As `Format.write_model`. Raises InputError for layers that are not of the quantizer `exl3`, lossy or not."""
        layers, names = own_linears(model), stored_paths(model)
        for path, layer in layers.items():
            if (reason := _mismatch(layer.quantizer)) is not None:
                raise InputError(
                    f"{path}: {reason}; nothing was written. EXL3 is exact or not at all: quantize the original with "
                    "--quantizer exl3"
                )
        readers = readers_of(cls.name, [], [], reader)
        written = {names.get(path, path): tensors_of(layer) for path, layer in layers.items()}
        described = _described(written)
        write_folder(model, tokenizer, folder, written, described, max_shard_size)
        storage = {path: _storage(path, tensors) for path, tensors in written.items()}
        write_json(folder / "quantization_config.json", described | {"tensor_storage": storage})
        return WriteResult(len(layers), [], readers)


def tensors_of(layer: QuantizedLinear) -> dict[str, Tensor]:
    """Name → tensor of a linear of the quantizer `exl3` with 16 bits of state. Padded inputs have a scale of one,
    padded outputs of zero; a bias is float16."""
    quantizer, packed = layer.quantizer, {name: each.detach() for name, each in layer.packed.items()}
    assert isinstance(quantizer, EXL3Trellis)
    m, n = _padded(layer.out_features), _padded(layer.in_features)
    tensors = {
        "trellis": _tiles(packed["trellis"], quantizer.bits),
        "suh": F.pad(packed["su"], (0, n - layer.in_features), value=1),
        "svh": F.pad(packed["sv"], (0, m - layer.out_features)),
    }
    if quantizer.code in CODES:
        tensors[quantizer.code] = torch.tensor(CODES[quantizer.code] - 2**32, dtype=torch.int32)
    if layer.bias is not None:
        tensors["bias"] = F.pad(layer.bias.detach().half(), (0, m - layer.out_features))
    return tensors


def _mismatch(quantizer: Quantizer) -> str | None:
    """The reason why EXL3 cannot hold weights of this quantizer; None where it can."""
    if not isinstance(quantizer, EXL3Trellis):
        return f"EXL3 does not hold weights of {quantizer.name}, whose transform and tiles are others"
    if quantizer.state_bits != 16:
        return f"states of {quantizer.state_bits} bits; EXL3's have 16"
    if quantizer.code not in (*CODES, "3inst"):
        return f"EXL3 has no code {quantizer.code} ({', '.join((*CODES, '3inst'))} are known)"
    return None


def _described(written: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The quantization config: mean bits of the linears before the head, bits of the head (16: not quantized)."""
    words = {path: tensors["trellis"].numel() for path, tensors in written.items()}  # int16
    weights = {path: words[path] * TILE * TILE // tensors["trellis"].shape[2] for path, tensors in written.items()}
    body = [path for path in written if path.rpartition(".")[2] != "lm_head"] or list(written)
    head = [tensors["trellis"].shape[2] // TILE for path, tensors in written.items() if path not in body]
    bits = 16 * sum(words[path] for path in body) / sum(weights[path] for path in body)
    codes = {next((code for code in CODES if code in tensors), "3inst") for tensors in written.values()}
    described = {"quant_method": "exl3", "bits": round(bits, 2), "head_bits": head[0] if head else 16}
    return described | ({"codebook": codes.pop()} if len(codes) == 1 else {})


def _storage(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A linear's entry in quantization_config.json."""
    stored = {
        f"{path}.{name}": {"shape": list(tensor.shape), "n_bytes": tensor.nbytes, "dtype": str(tensor.dtype)}
        for name, tensor in tensors.items()
    }
    factors = {f"{code}_multiplier": factor for code, factor in CODES.items() if code in tensors}
    bits = tensors["trellis"].shape[2] // TILE
    return {"stored_tensors": stored, "quant_format": "exl3", "bits_per_weight": bits} | factors


def _padded(size: int) -> int:
    return size + -size % EXL3_RUN


def _bits(stored: Module, tiles: Tensor) -> int:
    bits, rest = divmod(tiles.shape[2], TILE)
    if rest or not 1 <= bits <= 8:
        raise CheckpointError(
            f"{stored.path}: {tiles.shape[2] / TILE:g} bits per weight (tiles of {tiles.shape[2]} words) are not read; "
            "1 to 8 whole bits are. Convert the model with another bitrate"
        )
    return bits


def _code(stored: Module) -> str:
    named = [name for name in CODES if name in stored]
    if len(named) > 1:
        raise CheckpointError(f"the checkpoint is damaged: {stored.path} has {' and '.join(named)}, two codes")
    for name in named:
        stored_factor = stored.get(name, dtypes=(torch.int32,))
        if stored_factor.numel() != 1:
            raise CheckpointError(
                f"the checkpoint is damaged: {stored.path}.{name} has shape {list(stored_factor.shape)}, expected []"
            )
        factor = int(stored_factor) & 0xFFFFFFFF
        if factor != CODES[name]:
            raise CheckpointError(
                f"{stored.path}: the code {name} with factor {factor:#x} is not read; {CODES[name]:#x} is"
            )
    return named[0] if named else "3inst"


def _scales(stored: Module, name: str, size: int) -> Tensor:
    """suh or svh [size] float16; of files of the first versions, from the bits of su or sv."""
    if f"{name}h" in stored or name not in stored:
        return stored.get(f"{name}h", size, dtypes=(torch.float16,))
    words = stored.get(name, size // 16, dtypes=(torch.int16,))
    signs = words[:, None].to(torch.int32) >> torch.arange(16) & 1
    return (1 - 2 * signs).flatten().to(torch.float16)


def _circles(tiles: Tensor, bits: int) -> Tensor:
    """int16 [n/16, m/16, 16k] -> ours, int16 [m, n/16 · k]."""
    words = tiles.unflatten(2, (-1, 2)).flip(3).flatten(2)  # the first bit highest in the first
    words = words.roll(1, 2).to(torch.int32) & 0xFFFF  # turned by sixteen bits: state t begins with bit (t + 1)·k
    turned = words << bits | words.roll(-1, 2) >> 16 - bits
    rows = (turned & 0xFFFF).to(torch.int16).unflatten(2, (TILE, bits))  # [n/16, m/16, 16, k]
    ours: Tensor = rows.permute(1, 2, 0, 3).flatten(2).flatten(0, 1).contiguous()
    return ours


def _tiles(ours: Tensor, bits: int) -> Tensor:
    """int16 [m, n/16 · k] -> [n/16, m/16, 16k]: the inverse of `_circles`."""
    rows = ours.unflatten(0, (-1, TILE)).unflatten(2, (-1, bits)).permute(2, 0, 1, 3)  # [n/16, m/16, 16, k]
    turned = rows.flatten(2).to(torch.int32) & 0xFFFF
    words = (turned >> bits | turned.roll(1, 2) << 16 - bits).roll(-1, 2) & 0xFFFF
    tiles: Tensor = words.to(torch.int16).unflatten(2, (-1, 2)).flip(3).flatten(2).contiguous()
    return tiles
