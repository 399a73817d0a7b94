"""QTIP checkpoints (arXiv:2406.11235), as on the hub under "relaxml". m = out, n = in, multiples of 16.

Source: qtip, lib/linear/quantized_linear.py, lib/codebook/bitshift.py, lib/algo/finetune.py, lib/utils/kernel_check.py.

The tensors of a linear; k bits per weight, perhaps others in each linear:

    trellis   int16 [m/16 · n/16, 16k]: a tile of 16 × 16 weights is a circle of 256k bits, the first highest in word 0
    tlut      float16 [512, 2], with the decode mode quantlut_sym
    SU, SV    float16 [n], float32 [m]: signs times scales, perhaps trained
    rcp       int64 [], 0: whether the Hadamard matrices are those of slices, for tensor parallelism
    tp_rank   int64 [], 8

State i of a tile begins with bit i·V·k for V weights a state, in the order of the rows. Where QTIP has a kernel
(quantlut_sym, L = 16, k from 2 to 4), the order is that of a tensor core's fragments, and the words of 2 × 2 tiles lie
among each other, see `_apart`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.trellis import TILE
from ..quant import QTIP, Packed, QTIPHybrid, Quantizer
from .base import FLOATS, Format, formats
from .tensors import Module

MODES = {"quantlut_sym": 2, "1mad": 1, "3inst": 1}
"""Decode mode → V, the number of weights of a state."""
KERNEL_BITS = (2, 3, 4)


@formats.register("qtip")
class QTIPFiles(Format):
    """QTIP checkpoints; read only."""

    marker, companion = "trellis", "SU"
    unused = ("tp_rank",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        mode, state_bits = config.get("decode_mode"), config.get("L", 16)
        if not isinstance(mode, str) or mode not in MODES:
            raise CheckpointError(f"QTIP with decode_mode={mode!r} is not read; {', '.join(MODES)} are")
        if isinstance(state_bits, bool) or not isinstance(state_bits, int) or not 9 <= state_bits <= 16:
            raise CheckpointError(f"QTIP with L={state_bits!r} is not read; states of 9 to 16 bits are")
        wanted = {"V": MODES[mode], "td_x": TILE, "td_y": TILE} | ({"tlut_bits": 9} if MODES[mode] == 2 else {})
        for key, value in wanted.items():
            if config.get(key, value) != value:
                raise CheckpointError(f"QTIP with {key}={config[key]!r} and decode_mode={mode} is not read; {value} is")
        self.mode, self.state_bits = mode, state_bits

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "qtip"

    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        m, n = out_features, in_features
        if m % TILE or n % TILE:
            raise CheckpointError(f"{stored.path}: QTIP has no weights of [{m}, {n}]")
        if "rcp" in stored and stored.get("rcp").numel() != 1:
            raise CheckpointError(
                f"the checkpoint is damaged: {stored.path}.rcp has shape {list(stored.get('rcp').shape)}, expected []"
            )
        if "rcp" in stored and int(stored.get("rcp")):
            raise CheckpointError(
                f"{stored.path}: QTIP with split Hadamard matrices (rcp={int(stored.get('rcp'))}) is not read"
            )
        words = stored.get("trellis", m // TILE * (n // TILE), None, dtypes=(torch.int16,))
        bits, rest = divmod(words.shape[1], TILE)
        if rest or not 1 <= bits <= 4:
            raise CheckpointError(
                f"{stored.path}: tiles of {words.shape[1]} words are not read; 16 to 64 are, 1 to 4 bits"
            )
        scales = {"su": _su(stored, n), "sv": stored.get("SV", m, dtypes=FLOATS).float()}
        if MODES[self.mode] == 1:
            plain = QTIP(bits=bits, state_bits=self.state_bits, code=self.mode, scale_type="float32")
            return plain, {"trellis": _rows(words, m, n, bits)} | scales
        kernel = bits in KERNEL_BITS and self.state_bits == 16
        if kernel:
            if m % 32 or n % 32:
                raise CheckpointError(f"{stored.path}: QTIP's kernel has no weights of [{m}, {n}]")
            words = _apart(words, m, n, bits)
        packed = {"trellis": _rows(words, m, n, bits), "tlut": stored.get("tlut", 512, 2, dtypes=(torch.float16,))}
        return QTIPHybrid(bits, "fragments" if kernel else "rows", self.state_bits), packed | scales


def _su(stored: Module, size: int) -> Tensor:
    su = stored.get("SU", size, dtypes=FLOATS)
    if not torch.equal(su.half().to(su.dtype), su) and not su.isnan().any():
        raise CheckpointError(f"{stored.path}.SU is {su.dtype} with values that float16 has not")
    return su.half()


def _rows(words: Tensor, m: int, n: int, bits: int) -> Tensor:
    """int16 [m/16 · n/16, 16k] -> ours, int16 [m, n/16 · k]."""
    tiles = words.reshape(m // TILE, n // TILE, TILE, bits)
    return tiles.transpose(1, 2).reshape(m, n // TILE * bits)


def _apart(words: Tensor, m: int, n: int, bits: int) -> Tensor:
    """Words as a kernel reads them -> tile by tile, int16 [m/16 · n/16, 16k].

    As bytes they are [m/32, n/32, 32 lanes, column of tiles, row of tiles, k]: a lane's k bytes, the last first.
    """
    lanes = words.contiguous().view(torch.uint8).reshape(m // 32, n // 32, 32, 2, 2, bits).flip(5)
    string = lanes.permute(0, 4, 1, 3, 2, 5).reshape(len(words), TILE * bits, 2)  # of each tile, the first bit highest
    return string.flip(2).contiguous().view(torch.int16).reshape(words.shape)
