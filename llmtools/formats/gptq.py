"""GPTQ checkpoints: of AutoGPTQ, GPTQModel, GPTQ-for-LLaMa and others; AutoRound's in GPTQ packing.

Source: AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda.py; GPTQModel, gptqmodel/nn_modules/qlinear/torch.py, and
gptqmodel/utils/planar_packing.py for "gptq_p".

The tensors of a linear, with b bits, m = out and n = in:

    qweight  int32 [ceil(n·b/32), m]     a bit stream along the inputs for each output
    qzeros   int32 [G, ceil(m·b/32)]     a bit stream along the outputs for each group
    scales   [G, m]                      g_idx int32 [n], optional: the group of each column

There are three versions. v1 ("gptq", the default of the config) stores zero − 1, v2 ("gptq_v2") stores zero; in v1 a
zero of 0 wraps to the largest field, which reading reverses. "gptq_p" stores fields of 3, 5, 6 and 7 bits in bit
planes: of every 32 codes first the low bits, then the next, each plane a bit stream of its own; zeros as in v2.

`dynamic` overrides options per module: its keys are regular expressions, "-:…" for modules that stay dense.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CheckpointError
from ..kernels.bits import pack, unpack, words
from ..limits import PATTERN_SECONDS, match
from ..quant import Packed, Quantizer
from .base import FLOATS, Format, affine, columns_by_group, formats, mapping, whole
from .tensors import Module
from .uniform import Limits, Uniform, natural_codes

log = logging.getLogger(__name__)

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Bits → widths of the planes of gptq_p, from the low bits up."""

_AUTOROUND = {"auto_round:auto_gptq": "gptq", "auto_round:gptqmodel": "gptq_v2", "auto_round:gptq": "gptq"}
"""AutoRound's packing_format → version."""


@formats.register("gptq")
class GPTQ(Format):
    """GPTQ checkpoints of all versions; exported as version 1."""

    marker, companion = "qweight", "qzeros"
    limits = Limits(bits=(2, 3, 4, 8), zero_codes=False)
    written_version: ClassVar[str] = "gptq"
    """Version of exported checkpoints."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        packing = config.get("packing_format")
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if config.get("quant_method") != "gptq":
            version = _AUTOROUND[str(packing)]
        if config.get("is_marlin_format"):
            version = "marlin"
        if version not in ("gptq", "gptq_v2", "gptq_p"):
            raise CheckpointError(
                f"GPTQ checkpoint_format {version!r} is not read; gptq, gptq_v2 and gptq_p are. GPTQModel converts it"
            )
        if config.get("pack_dtype", "int32") != "int32":
            raise CheckpointError(f"GPTQ pack_dtype {config['pack_dtype']!r} is not read; int32 is")
        self.version = version

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        method = config.get("quant_method")
        return method == "gptq" or (
            method in ("auto-round", "intel/auto-round") and config.get("packing_format") in _AUTOROUND
        )

    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        options = self._options(stored.path)
        bits = whole(options, "bits")
        group_size = whole(options, "group_size") if "group_size" in options else _group_size(stored, in_features)
        if bits not in range(2, 9):
            raise CheckpointError(f"{stored.path}: GPTQ with {bits} bits is not read; 2 to 8 are")
        group_size = in_features if group_size < 1 else min(group_size, in_features)
        groups = -(-in_features // group_size)
        planes = PLANES.get(bits) if self.version == "gptq_p" else None

        def height(count: int) -> int:
            return -(-count // 32) * bits if planes else words(count, bits)

        stream = stored.get("qweight", height(in_features), out_features, dtypes=(torch.int32,)).T.contiguous()
        qzeros = stored.get("qzeros", groups, height(out_features), dtypes=(torch.int32,))
        scales = stored.get("scales", groups, out_features, dtypes=FLOATS).T
        zeros = (_unpack_planes(qzeros, planes, out_features) if planes else unpack(qzeros, bits, out_features)).T
        if self.version == "gptq":
            _warn_of_carries(stored, qzeros, bits, out_features)
            zeros = (zeros.to(torch.int32) + 1) % 2**bits
        group_of = columns_by_group(stored, "g_idx", in_features, group_size, groups)
        codes = None
        if planes:
            codes = _unpack_planes(stream, planes, in_features)
        elif group_of is not None:
            codes = unpack(stream, bits, in_features)
        return affine(
            codes,
            scales,
            zeros,
            bits=bits,
            group_size=group_size,
            in_features=in_features,
            qweight=None if codes is not None else stream,
            group_of=group_of,
        )

    def scales(self, stored: Module, packed: Packed) -> dict[str, Tensor]:
        return {"scales": packed["scales"].T}

    def codes(self, stored: Module, quantizer: Quantizer, packed: Packed) -> dict[str, Tensor]:
        bits, codes = int(quantizer.spec()["bits"]), natural_codes(quantizer, packed)
        planes = PLANES.get(bits) if self.version == "gptq_p" else None
        return {"qweight": (_pack_planes(codes, planes) if planes else pack(codes, bits)).T}

    def _options(self, path: str) -> dict[str, Any]:
        """The options of one module: the config with its overrides."""
        options = dict(self.config)
        for pattern, changes in mapping(self.config.get("dynamic"), "dynamic").items():
            if _matches(pattern.removeprefix("+:").removeprefix("-:"), path):
                if pattern.startswith("-:"):
                    raise CheckpointError(f"{path} is quantized, but the config's dynamic[{pattern!r}] leaves it dense")
                return options | mapping(changes, f"dynamic[{pattern!r}]")
        extra = mapping(self.config.get("extra_config"), "extra_config")  # AutoRound's overrides, by path
        own = mapping(extra.get(path), f"extra_config[{path!r}]")
        return options | {key: value for key, value in own.items() if value is not None}

    @classmethod
    def write(cls, layer: Uniform) -> dict[str, Tensor]:
        in_features = layer.codes.shape[1]
        zeros = layer.zeros.to(torch.int32) - int(cls.written_version == "gptq")
        natural = torch.arange(in_features, device=layer.codes.device) // layer.group_size
        return {
            "qweight": pack(layer.codes, layer.bits).T,
            "qzeros": pack(zeros.T.contiguous(), layer.bits),
            "scales": layer.scales.T,
            "g_idx": (natural if layer.group_of is None else layer.group_of).to(torch.int32),
        }

    @classmethod
    def describe(cls, layers: Mapping[str, Uniform], dense: list[str]) -> dict[str, Any]:
        """The most common options, and under `dynamic` the overrides, one pattern per module."""
        options = {path: _options_of(layer) for path, layer in layers.items()}
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
            "checkpoint_format": cls.written_version,
            "pack_dtype": "int32",
            "lm_head": any(path.rpartition(".")[2] == "lm_head" for path in layers),
            **_as_json(common),
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": ["llmtools"]},
        }

    @classmethod
    def files(cls, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return {"quantize_config.json": config}


@formats.register("gptq_v2")
class GPTQv2(GPTQ):
    """GPTQ checkpoints exported as version 2, whose zero points may be 0; `GPTQ` reads them."""

    limits = Limits(bits=(2, 3, 4, 8))
    written_version = "gptq_v2"

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        return False


def _options_of(layer: Uniform) -> tuple[int, int, bool, bool]:
    in_features = layer.codes.shape[1]
    group_size = -1 if layer.group_size >= in_features else layer.group_size
    return layer.bits, group_size, layer.symmetric, layer.group_of is not None


def _as_json(options: tuple[int, int, bool, bool]) -> dict[str, Any]:
    return dict(zip(("bits", "group_size", "sym", "desc_act"), options, strict=True))


def _group_size(stored: Module, in_features: int) -> int:
    """The group size by the shape of the scales, for a config without one: programs differ in their defaults."""
    groups = max(stored.get("scales", None, None).shape[0], 1)
    if in_features % groups:
        raise CheckpointError(f"{stored.path}: the quantization config has no group_size for {groups} groups")
    return in_features // groups


def _matches(pattern: str, path: str) -> bool:
    """Whether the config's regular expression matches the beginning of a path. Raises CheckpointError for a bad one."""
    try:
        return match(pattern, path, PATTERN_SECONDS)
    except TimeoutError as error:
        raise CheckpointError(f"the config's dynamic[{pattern[:60]!r}] takes too long to match") from error
    except (re.error, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"the config's dynamic[{pattern[:60]!r}] is not a valid regular expression ({error})"
        ) from error


def _unpack_planes(stream: Tensor, planes: tuple[int, ...], count: int) -> Tensor:
    """gptq_p: int32 [..., w] -> codes uint8 [..., count]. Every 32 codes are planes of `width` words each."""
    runs = stream.unflatten(-1, (-1, sum(planes)))  # [..., r, bits]
    codes, shift = torch.zeros(*runs.shape[:-1], 32, dtype=torch.uint8), 0
    for width, plane in zip(planes, runs.split(planes, -1), strict=True):
        codes |= unpack(plane.contiguous(), width, 32) << shift
        shift += width
    return codes.flatten(-2)[..., :count]


def _pack_planes(codes: Tensor, planes: tuple[int, ...]) -> Tensor:
    """The inverse of `_unpack_planes`: codes [..., n] -> int32 [..., ceil(n / 32) · bits]."""
    runs, shift, words = F.pad(codes, (0, -codes.shape[-1] % 32)).unflatten(-1, (-1, 32)), 0, []
    for width in planes:
        words.append(pack((runs >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(words, -1).flatten(-2)


def _warn_of_carries(stored: Module, qzeros: Tensor, bits: int, out_features: int) -> None:
    """Warns of a bug of early writers: an unmasked zero − 1 = −1 sets all higher bits of its word."""
    if 32 % bits:
        return
    fields = unpack(qzeros, bits, qzeros.shape[1] * 32 // bits).unflatten(-1, (-1, 32 // bits))  # [G, w, fields]
    full = fields == 2**bits - 1
    to_the_top = full[..., :-1] <= full[..., 1:]  # a full field is followed by full ones
    if bool(full[..., :-1].any()) and bool(to_the_top.all()):
        log.warning(
            "%s: zero points of 0 seem to have overwritten their neighbours when this file was written; if the model's "
            "output is nonsense, that is the reason, and it has to be quantized again",
            stored.path,
        )
