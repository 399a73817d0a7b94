"""AWQ checkpoints (arXiv:2306.00978): AutoAWQ's versions "gemm" and "gemv", always 4 bits. m = out, n = in.

Source: AutoAWQ, awq/modules/linear/gemm.py, gemv.py and awq/utils/packing_utils.py.

gemm   qweight int32 [n, m/8]    qzeros int32 [G, m/8]    scales [G, m]
       nibble i of word c is that of output 8c + ORDER[i]
gemv   qweight int32 [m, n/8]    qzeros int32 [m, z]      scales [m, 8z], padded with zeros
       nibbles in their natural order, along the inputs and along the groups
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.bits import pack, unpack
from ..quant import Packed, Quantizer
from .base import FLOATS, Format, affine, formats, whole
from .tensors import Module
from .uniform import natural_codes

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output of each nibble of a word, from the lowest nibble up."""


@formats.register("awq")
class AWQ(Format):
    """AWQ checkpoints, versions gemm and gemv; read only."""

    marker, companion = "qweight", "qzeros"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.version = "gemm"
        if config.get("quant_method") == "awq":
            self.version = str(config.get("version") or "gemm").lower()
        if self.version not in ("gemm", "gemv"):
            raise CheckpointError(f"AWQ version {self.version!r} is not read; gemm and gemv are")
        bits = whole({"bits": config.get("bits", config.get("w_bit", 4))}, "bits")
        if bits != 4:
            raise CheckpointError(f"AWQ with {bits} bits is not read; 4 are")

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        method = config.get("quant_method")
        return method == "awq" or (
            method in ("auto-round", "intel/auto-round")
            and config.get("packing_format") in ("auto_round:auto_awq", "auto_round:awq")
        )

    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        group_size = whole(
            {"group_size": self.config.get("group_size", self.config.get("q_group_size", 128))}, "group_size"
        )
        group_size = in_features if group_size < 1 else group_size
        if in_features % group_size:
            raise CheckpointError(f"{stored.path}: {in_features} columns are no multiple of group_size={group_size}")
        groups, int32 = in_features // group_size, (torch.int32,)
        if self.version == "gemv":
            qweight = stored.get("qweight", out_features, in_features // 8, dtypes=int32)
            scales = stored.get("scales", out_features, None, dtypes=FLOATS)[:, :groups]
            zeros = unpack(stored.get("qzeros", out_features, None, dtypes=int32), 4, groups)
            if scales.shape[1] != groups or zeros.shape[1] != groups:
                raise CheckpointError(f"the checkpoint is damaged: {stored.path} has too few scales")
            return affine(None, scales, zeros, bits=4, group_size=group_size, in_features=in_features, qweight=qweight)
        codes = _interleaved(stored.get("qweight", in_features, out_features // 8, dtypes=int32))
        scales = stored.get("scales", groups, out_features, dtypes=FLOATS)
        if self.config.get("zero_point", True) or "qzeros" in stored:
            zeros = _interleaved(stored.get("qzeros", groups, out_features // 8, dtypes=int32))
        else:
            zeros = torch.full((groups, out_features), 8, dtype=torch.uint8)
        return affine(codes.T, scales.T, zeros.T, bits=4, group_size=group_size, in_features=in_features)

    def scales(self, stored: Module, packed: Packed) -> dict[str, Tensor]:
        if self.version == "gemm":
            return {"scales": packed["scales"].T}
        scales = stored.get("scales").clone()  # padded
        scales[:, : packed["scales"].shape[1]] = packed["scales"]
        return {"scales": scales}

    def codes(self, stored: Module, quantizer: Quantizer, packed: Packed) -> dict[str, Tensor]:
        codes = natural_codes(quantizer, packed)
        if self.version == "gemv":
            return {"qweight": pack(codes, 4)}
        nibbles = codes.T.unflatten(-1, (-1, 8))[..., torch.tensor(ORDER)]  # nibble i of a word is output ORDER[i]'s
        return {"qweight": pack(nibbles.flatten(-2), 4)}


def _interleaved(stream: Tensor) -> Tensor:
    """[..., w] int32 -> nibbles [..., 8w] uint8 in the order of the outputs."""
    nibbles = unpack(stream, 4, stream.shape[-1] * 8).unflatten(-1, (-1, 8))
    return torch.empty_like(nibbles).index_copy_(-1, torch.tensor(ORDER), nibbles).flatten(-2)
