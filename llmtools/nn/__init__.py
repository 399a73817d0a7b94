"""Modules: the quantized linear layer, its weight view, and how layers are swapped in a model."""

from .linear import QuantizedLinear
from .swap import count_parameters, packed_bytes, quantized_linears, set_module
from .weight import LazyWeight

__all__ = ["LazyWeight", "QuantizedLinear", "count_parameters", "packed_bytes", "quantized_linears", "set_module"]
