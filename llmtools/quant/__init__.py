"""Quantizers: a weight to a few packed tensors, and rows of it back.

`base` says what a quantizer is; ours are a grid × a rounding × a basis (`composed`, `presets`); `laws` is the
specification in executable form.
"""

from .base import ALL, Packed, Quantizer, TensorSpec, from_spec, quantizer, quantizers
from .hessian import HessianSum, proxy_loss
from .materialize import DEFAULT_MATERIALIZE_BYTES, materialize_budget, materialized_linear
from .presets import NF4, OPTQ, RTN

__all__ = [
    "ALL",
    "DEFAULT_MATERIALIZE_BYTES",
    "NF4",
    "OPTQ",
    "RTN",
    "HessianSum",
    "Packed",
    "Quantizer",
    "TensorSpec",
    "from_spec",
    "materialize_budget",
    "materialized_linear",
    "proxy_loss",
    "quantizer",
    "quantizers",
]
