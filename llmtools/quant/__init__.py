"""Quantizers: a weight to a few packed tensors, and rows of it back.

`base` says what a quantizer is; ours are a grid × a rounding × a basis (`composed`, `presets`, `quip_sharp`, `qtip`,
`learned`); `external` are the grids of other programs' checkpoints; `laws` is the specification in executable form.
"""

from .base import ALL, BlockLearner, Packed, Quantizer, Rows, TensorSpec, from_spec, quantizer, quantizers
from .external import ColumnGrid, EXL3Trellis, FusedLattice, QTIPHybrid, TableGrid, UniformGrid
from .gguf import GGMLBlocks
from .hessian import HessianSum, proxy_loss
from .learned import SignRound
from .materialize import DEFAULT_MATERIALIZE_BYTES, materialize_budget, materialized_linear
from .presets import AWQ, HQQ, NF4, OPTQ, RTN, QuIP
from .qtip import QTIP
from .quip_sharp import QuIPSharp

__all__ = [
    "ALL",
    "AWQ",
    "DEFAULT_MATERIALIZE_BYTES",
    "HQQ",
    "NF4",
    "OPTQ",
    "QTIP",
    "RTN",
    "BlockLearner",
    "ColumnGrid",
    "EXL3Trellis",
    "FusedLattice",
    "GGMLBlocks",
    "HessianSum",
    "Packed",
    "QTIPHybrid",
    "QuIP",
    "QuIPSharp",
    "Quantizer",
    "Rows",
    "SignRound",
    "TableGrid",
    "TensorSpec",
    "UniformGrid",
    "from_spec",
    "materialize_budget",
    "materialized_linear",
    "proxy_loss",
    "quantizer",
    "quantizers",
]
