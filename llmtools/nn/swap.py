"""Finding and replacing modules in a model."""

from __future__ import annotations

from torch import nn

from .linear import QuantizedLinear


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` where `path` ("model.layers.0.mlp.up_proj") points to, in place."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by path, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all packed tensors."""
    layers = quantized_linears(model).values()
    return sum(t.numel() * t.element_size() for layer in layers for t in layer.packed.values())
