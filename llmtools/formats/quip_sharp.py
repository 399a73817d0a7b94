"""QuIP# checkpoints (arXiv:2402.04396), as on the hub under "relaxml". m = out, n = in, multiples of 16 and 64.

Source: quip-sharp, lib/linear/quantized_linear.py and lib/codebook/latticee8_padded12.py (..._rvq3bit, ..._rvq4bit).

The tensors of a linear; a block has four linears, as ``qkv_proj`` and ``upgate_proj`` (in this order) are fused:

    Qidxs        int64: [m, n/32] for 2 bits, [m, n/16] for 4, [m, 3n/64] for 3
    SU, SV       float16 [n], [m]: signs, or arbitrary values after fine-tuning
    Wscale       float16 [], a factor, 1 in most files
    codebook_id  7, 18 or 17 for 2, 3 or 4 bits
    fuse_scales  float16 [3] or [2]: a factor for each of the fused parts

A word of Qidxs holds four codes of E8P for two rows and sixteen columns, see `_codes`. At 4 bits the first half of the
columns are the codes, the other half those of the residual; at 3 bits the last third are E81B's bytes, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..options import fits
from ..quant import FusedLattice, Packed, Quantizer
from ..quant.quip_sharp import QuIPSharp
from .base import Format, formats
from .tensors import Module

QUIP_PARAMS = "quip_params"
"""Key of the quantization config in config.json."""
BOOKS = {"E8P12": (2, 7), "E8P12RVQ3B": (3, 18), "E8P12RVQ4B": (4, 17)}
"""Codebook → (bits, codebook_id)."""
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}
"""Fused module → its parts, in the order of their outputs."""


@formats.register("quip_sharp")
class QuIPSharpFiles(Format):
    """QuIP# checkpoints; read only."""

    marker, companion = "Qidxs", "SU"
    unused = ("scaleWH", "A", "B", "ocs_dupe_inds")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        book = config.get("codebook")
        if not isinstance(book, str) or book not in BOOKS:
            raise CheckpointError(f"QuIP# codebook {book!r} is not read; {', '.join(BOOKS)} are")
        for key in ("lora_rank", "rescale_WH", "outlier_channel_split"):
            if config.get(key):
                raise CheckpointError(f"QuIP# with {key}={config[key]!r} is not read")
        self.bits, self.book_id = BOOKS[str(book)]
        override = config.get("resid_scale_override", -1)
        if not fits(override, float):
            raise CheckpointError(f"QuIP# with resid_scale_override={override!r}; a number is expected")
        self.residual_scale = override if self.bits > 2 and override > 0 else None

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "quip_sharp"

    def parts(self, path: str) -> tuple[str, ...]:
        parent, _, name = path.rpartition(".")
        return tuple(f"{parent}.{part}" for part in FUSED.get(name, (name,)))

    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        (converted,) = self.read_parts(stored, [out_features], in_features)
        return converted

    def read_parts(
        self, stored: Module, out_features: Sequence[int], in_features: int
    ) -> list[tuple[Quantizer, Packed]]:
        total = sum(out_features)
        if total % 16 or in_features % 64:
            raise CheckpointError(f"{stored.path}: QuIP# has no weights of [{total}, {in_features}]")
        if "codebook_id" in stored and int(stored.get("codebook_id")) != self.book_id:
            raise CheckpointError(
                f"{stored.path}: codebook_id {int(stored.get('codebook_id'))} is not that of {self.config['codebook']}"
            )
        halves = (torch.float16, torch.bfloat16, torch.float32)
        su = stored.get("SU", in_features, dtypes=halves).to(torch.float16)
        sv = stored.get("SV", total, dtypes=halves).float()
        if "Wscale" in stored:
            sv = sv * stored.get("Wscale").float()
        if len(out_features) > 1:
            scales = stored.get("fuse_scales", len(out_features), dtypes=halves).float()
            sv = sv * scales.repeat_interleave(torch.tensor(out_features))
        shared = self._codes_of(stored, total, in_features) | {"su": su}
        if len(out_features) == 1 and torch.equal(sv.half().float(), sv):
            quantizer = QuIPSharp(bits=self.bits, residual_scale=self.residual_scale)
            return [(quantizer, shared | {"sv": sv.half()})]
        converted: list[tuple[Quantizer, Packed]] = []
        first = 0
        for rows in out_features:
            part = FusedLattice(self.bits, self.residual_scale, first, total)
            converted.append((part, shared | {"sv": sv[first : first + rows].clone()}))
            first += rows
        return converted

    def _codes_of(self, stored: Module, m: int, n: int) -> Packed:
        words = n // 32
        width = {2: words, 3: words + n // 64, 4: 2 * words}[self.bits]
        stream = stored.get("Qidxs", m, width, dtypes=(torch.int64,))
        packed = {"codes": _codes(stream[:, :words], m, n)}
        if self.bits == 3:
            packed["residual"] = stream[:, words:].contiguous().view(torch.uint8)
        elif self.bits == 4:
            packed["residual"] = _codes(stream[:, words:], m, n)
        return packed


def _codes(stream: Tensor, m: int, n: int) -> Tensor:
    """int64 [m, n/32] -> E8P codes int16 [m, n/8], magnitudes in the high byte and signs in the low byte.

    As [m/16, n/64, 8, 4] words, word [I, J, r, c] belongs to rows 16 I + 2 r + {0, 1} and columns 64 J + 16 c + 0 … 15.
    Code i = 0 … 3 of it has row i mod 2 and the eight columns i div 2. Bits 8 i … 8 i + 7 of a word are the magnitudes
    of code i, bit 32 + 4 j + i is bit j of its signs.
    """
    words = stream.reshape(m // 16, n // 64, 8, 4, 1)
    index = torch.arange(4)
    codes = ((words >> 8 * index) & 255) << 8
    for j in range(8):
        codes |= ((words >> (32 + 4 * j + index)) & 1) << j
    grid = codes.unflatten(-1, (2, 2))  # [I, J, r, c, columns, row]
    rows: Tensor = grid.permute(0, 2, 5, 1, 3, 4).reshape(m, n // 8).to(torch.int16)
    return rows
