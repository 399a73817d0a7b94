"""Finding and replacing modules in a model."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .embedding import TiedLinear
from .linear import QuantizedLinear
from .packed import PackedWeight


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces the module at `path` ("model.layers.0.mlp.up_proj") by `module`, in place, with the hooks of the
    former."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    former = holder._modules.get(name)
    if former is not None and former is not module:
        _transfer(former, module)
    setattr(holder, name, module)


def set_everywhere(model: nn.Module, path: str, module: nn.Module, listed: Mapping[str, Sequence[str]]) -> None:
    """`set_module` at `path` and at the other paths of the module there; listed: the `aliases` of the model."""
    for each in (path, *listed.get(path, ())):
        set_module(model, each, module)


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """First path of each module that is registered more than once → its other paths."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return {first: others for first, *others in paths.values() if others}


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _transfer(former: nn.Module, module: nn.Module) -> None:
    """Transfers hooks, as the same tables so that their handles still remove them, and other attributes of a linear."""
    if any(getattr(former, table, None) for table in _HOOKS):
        for table in (*_HOOKS, "_is_full_backward_hook"):
            setattr(module, table, getattr(former, table))
    if isinstance(former, nn.Linear) and isinstance(module, nn.Linear):
        for name, value in vars(former).items():
            if not name.startswith("_") and name not in vars(module) and name not in ("quantizer", "dtype"):
                setattr(module, name, value)


def computes_otherwise(linear: nn.Linear) -> str | None:
    """Why a subclass of `nn.Linear` cannot be replaced, as the end of a sentence; None where it is y = x Wᵀ + b."""
    kind: Any = type(linear)
    if isinstance(linear, QuantizedLinear) or is_parametrized(linear) or kind is nn.Linear:
        return None
    own = kind.forward is not nn.Linear.forward or kind.__call__ is not nn.Module.__call__
    if own and not _acts_as_linear(linear):
        return f"a {kind.__name__}, which computes something else than nn.Linear"
    if surplus := _surplus(linear):
        return f"a {kind.__name__}, which holds {surplus} beside weight and bias"
    return None


@torch.no_grad()
def _acts_as_linear(linear: nn.Linear) -> bool:
    """Whether an overridden forward (Falcon's rounds the bias separately) is y = x Wᵀ + b, tested on random inputs.

    A copy with a small random weight is run on inputs of several magnitudes and shapes, in both modes.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    probe = copy.copy(linear)
    weight = torch.randn(6, 8, generator=generator, device="cpu")
    bias = None if linear.bias is None else torch.randn(6, generator=generator, device="cpu")
    probe.__dict__ |= {
        "_parameters": {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    }
    for name, size in (("in_features", 8), ("out_features", 6)):
        probe.__dict__[name] = size
    for name in _HOOKS:
        probe.__dict__[name] = OrderedDict()
    try:
        for training in (False, True):
            probe.__dict__["training"] = training
            for scale in (1e-3, 1.0, 1e3):
                for shape in ((8,), (5, 8), (2, 3, 8)):
                    x = scale * torch.randn(shape, generator=generator, device="cpu")
                    y, expected = probe(x), nn.functional.linear(x, weight, bias)
                    if not isinstance(y, torch.Tensor) or y.shape != expected.shape:
                        return False
                    if not torch.allclose(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
                        return False
    except Exception:  # it needs more than a matrix of any size
        return False
    return True


def altered(linear: nn.Linear) -> str | None:
    """What packing the weight of a linear would lose, as the end of a sentence; None where nothing."""
    if is_parametrized(linear):
        names = ", ".join(linear.parametrizations)  # type: ignore[arg-type]
        return f"its {names} is parametrized (torch.nn.utils.parametrize.remove_parametrizations makes it plain)"
    if surplus := _surplus(linear):
        return (
            f"its weight is computed from {surplus} at each call (weight norm, spectral norm, pruning; torch.nn.utils "
            "has a function that removes each)"
        )
    if "forward" in vars(linear):
        holder = "accelerate spreads the model over devices" if hasattr(linear, "_hf_hook") else "on this module"
        return f"its forward was replaced ({holder})"
    return None


def _surplus(linear: nn.Linear) -> str:
    """Names of parameters, buffers and modules beside weight and bias."""
    names = {*linear._parameters, *linear._buffers, *linear._modules} - {"weight", "bias"}
    return ", ".join(sorted(names))


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by path, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def own_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized linears by path, without a head that is tied to the embedding."""
    return {path: layer for path, layer in quantized_linears(model).items() if not isinstance(layer, TiedLinear)}


def packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    """The layers that own packed tensors, by path: linears and embeddings, without heads that are tied to one."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, PackedWeight) and not isinstance(module, TiedLinear)
    }


def packed_bytes(model: nn.Module) -> int:
    """Size of all packed tensors, in bytes."""
    layers = packed_layers(model).values()
    return sum(t.numel() * t.element_size() for layer in layers for t in layer.stored.values())


def stored_bits(model: nn.Module) -> float | None:
    """Bits stored per weight of the layers that own packed tensors, scales included; None without such a layer."""
    weights = sum(rows * columns for rows, columns in (layer.shape for layer in packed_layers(model).values()))
    return 8 * packed_bytes(model) / weights if weights else None


class Parameters(NamedTuple):
    """Numbers of parameters of a model."""

    trainable: int
    """Number of trainable parameters."""
    total: int
    """Number of all parameters; a quantized weight (bitsandbytes' too) counts as out · in."""


def count_parameters(model: nn.Module) -> Parameters:
    """The parameters of a model, with adapters or without, each tensor once.

    PEFT's `print_trainable_parameters` counts the elements of packed tensors instead, several weights to a word.
    """
    layers = packed_layers(model).values()
    packed = {id(tensor) for layer in layers for tensor in layer.stored.values()}
    plain = [each for each in model.parameters() if id(each) not in packed]
    return Parameters(
        trainable=sum(each.numel() for each in plain if each.requires_grad),
        total=sum(map(_weights, plain)) + sum(math.prod(layer.shape) for layer in layers),
    )


def _weights(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter; bitsandbytes packs two of 4 bits in a byte, or more in wider words."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()
