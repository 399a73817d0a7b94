"""MXFP4 checkpoints (gpt-oss): experts in 4-bit floats that share a power of two in 32 (OCP Microscaling, version 1.0).

The layout is that of openai/gpt-oss and of transformers' `integrations/mxfp4.py`, all experts of a layer in one tensor:
``experts.gate_up_proj_blocks [E, 2I, H/32, 16] uint8``, two codes a byte, the low half first; ``_scales [E, 2I, H/32]
uint8``, exponents with a bias of 127; ``down_proj_…`` likewise. Rows of gate and up alternate. Here each expert and
projection is a `codebook` of those 16 values, with scales in float32 (5 bits per weight stored, for 4.25 in the file):
the values are the same, to the bit, and experts stay packed in training.

Shapes: E — experts; H, I — features of the model and within an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.bits import pack
from ..quant import Packed, Quantizer
from ..quant.external import TableGrid
from .base import Format, formats
from .tensors import Module, Tensors

GROUP = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0 to 7; 8 more are their negatives."""
_TABLE = (*(-value for value in reversed(VALUES)), *VALUES)
_RANK = (*range(8, 16), *range(7, -1, -1))
"""Place in the sorted table, by code."""
_KINDS = {"_blocks": "blocks", "_scales": "scales", "_bias": "bias"}
"""End of a fused tensor's name → name of a linear's tensor."""
_PARTS = {
    "gate_up_proj": {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)},
    "down_proj": {"down_proj": slice(None)},
}


class _Source(NamedTuple):
    """Where the tensor of one expert's linear is."""

    name: str
    expert: int
    rows: slice


class _ByExpert(Mapping[str, Tensor]):
    """The tensors of a folder, with those of the experts one by one: ``experts.3.gate_proj.blocks``."""

    def __init__(self, folder: Path) -> None:
        self._tensors = Tensors(folder)
        self._sources: dict[str, _Source] = {}
        self._rest: list[str] = []
        packed = {name.removesuffix("_blocks") for name in self._tensors if name.endswith("_proj_blocks")}
        for name in self._tensors:
            kind = next((kind for kind in _KINDS if name.removesuffix(kind) in packed), None)
            path, _, projection = name.removesuffix(kind or "").rpartition(".")
            if kind is None or projection not in _PARTS:
                self._rest.append(name)
                continue
            for expert in range(self._tensors.shape(name)[0]):
                for part, rows in _PARTS[projection].items():
                    self._sources[f"{path}.{expert}.{part}.{_KINDS[kind]}"] = _Source(name, expert, rows)

    def __getitem__(self, name: str) -> Tensor:
        if (source := self._sources.get(name)) is None:
            return self._tensors[name]
        return self._tensors.row(source.name, source.expert)[source.rows].contiguous()

    def __iter__(self) -> Iterator[str]:
        yield from self._sources
        yield from self._rest

    def __len__(self) -> int:
        return len(self._sources) + len(self._rest)


@formats.register("mxfp4")
class MXFP4(Format):
    """Experts of gpt-oss as it is published; read only."""

    marker = "blocks"

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "mxfp4"

    def tensors(self, folder: Path) -> Mapping[str, Tensor]:
        return _ByExpert(folder)

    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        if in_features % GROUP:
            raise CheckpointError(f"{stored.path}: {in_features} inputs are no multiple of {GROUP}")
        groups = in_features // GROUP
        blocks = stored.get("blocks", out_features, groups, GROUP // 2, dtypes=(torch.uint8,))
        exponents = stored.get("scales", out_features, groups, dtypes=(torch.uint8,))
        codes = torch.stack([blocks & 15, blocks >> 4], -1).reshape(out_features, in_features)
        rank = torch.tensor(_RANK, dtype=torch.uint8)
        quantizer = TableGrid(_TABLE, group_size=GROUP)
        packed = {
            "qweight": pack(rank[codes.int()], 4),
            "scales": torch.exp2(exponents.float() - 127),
            "columns": torch.empty(0, in_features, dtype=torch.uint8),
        }
        return quantizer, {name: packed[name] for name in quantizer.layout(out_features, in_features)}
