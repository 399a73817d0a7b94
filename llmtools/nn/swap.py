"""Finding and replacing modules in a model."""

from __future__ import annotations

from typing import NamedTuple

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


class Parameters(NamedTuple):
    """How many parameters a model has."""

    trainable: int
    total: int
    """those of a quantized layer's weight counted as the out · in that they stand for"""


def count_parameters(model: nn.Module) -> Parameters:
    """The parameters of a model, with adapters or without, each tensor once.

    PEFT's `print_trainable_parameters` counts the elements of packed tensors instead, several weights to a word.
    """
    layers = quantized_linears(model).values()
    packed = {id(tensor) for layer in layers for tensor in layer.packed.values()}
    plain = [each for each in model.parameters() if id(each) not in packed]
    return Parameters(
        trainable=sum(each.numel() for each in plain if each.requires_grad),
        total=sum(each.numel() for each in plain) + sum(layer.out_features * layer.in_features for layer in layers),
    )
