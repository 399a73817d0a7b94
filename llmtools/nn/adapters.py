"""Around adapters: a quantized model made ready for training, and a dense model got back, with or without an adapter.

The adapters themselves are PEFT's; here is what PEFT cannot know about our layers. PEFT is not imported: its layers
are told by what they have, a `base_layer` and a `merge`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import InputError, first_line
from .embedding import QuantizedEmbedding, TiedLinear
from .linear import QuantizedLinear
from .packed import PackedWeight
from .swap import aliases, computes_otherwise, packed_layers, quantized_linears, set_everywhere, set_module


def prepare_for_training(
    model: nn.Module, gradient_checkpointing: bool = True, use_reentrant: bool = False
) -> nn.Module:
    """Freezes the model and turns gradient checkpointing on, in place; to be called before `peft.get_peft_model`.

    It stands in for PEFT's ``prepare_model_for_kbit_training``, which knows a fixed list of quantization methods. For
    any other it casts each half-precision parameter to float32, embeddings and output head included (often the
    largest tensors of a 2-bit model, whose memory would double), and leaves checkpointing off. Nothing is cast here:
    PEFT keeps the adapters in float32 by itself, and what is frozen gains nothing from a wider type.

    Reentrant checkpointing (`use_reentrant`) needs an input that requires a gradient, or it skips the block's backward
    and the adapters in it stay untrained; the embedding's output is marked for that. The other kind has no such need.

    Raises InputError for a model without gradient checkpointing that is asked for it, and under FSDP1.
    """
    _refuse_fsdp1()
    model.requires_grad_(False)
    if not gradient_checkpointing:
        return model
    told: Any = model
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(
            f"{type(model).__name__} does not support gradient checkpointing; pass gradient_checkpointing=False"
        )
    options = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.23 or so
        told.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        told.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if use_reentrant:
        told.enable_input_require_grads()
    return model


def _refuse_fsdp1() -> None:
    """Raises InputError where accelerate was launched with the FSDP that makes one tensor of all parameters."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and os.environ.get("FSDP_VERSION", "1") == "1":
        raise InputError(
            "FSDP1 cannot shard packed weights, which are integers; use FSDP2 (fsdp_version: 2 in accelerate's "
            "configuration, or accelerate launch --fsdp_version 2)"
        )


def not_adaptable(model: nn.Module) -> list[str]:
    """Paths of linears that PEFT's ``target_modules="all-linear"`` would adapt and cannot: for ``exclude_modules``.

    These are subclasses of `nn.Linear` that compute something else, such as routers that return a tuple, and the
    ``out_proj`` of Mamba blocks, which PEFT refuses. Layers that another library quantized (their weight is of a
    type of its own, as bitsandbytes' `Params4bit`) are PEFT's to know.

    Raises InputError where no linear is left that can carry an adapter.
    """
    network: Any = model
    head = network.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    refused = getattr(getattr(model, "config", None), "model_type", None) in _MAMBA
    linears = {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head}
    others = [
        path
        for path, each in linears.items()
        if (_is_plain(each) and computes_otherwise(each)) or (refused and path.rpartition(".")[2] == "out_proj")
    ]
    if len(others) == len(linears):
        raise InputError(f"{type(model).__name__} has no linear that can carry an adapter; name lora.target_modules")
    return others


def _is_plain(linear: nn.Linear) -> bool:
    """Whether a linear is ours or has an ordinary weight."""
    return isinstance(linear, QuantizedLinear) or type(linear.weight) is nn.Parameter


_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Model types of which PEFT says so (`_check_lora_target_modules_mamba`)."""


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces each quantized layer by the dense layer it stands for, in place; returns the model.

    dtype: of the dense weights; by default each layer's own (that of the model it was made from). The quantization
    config goes too, so `save_pretrained` writes an ordinary model.
    """
    listed = aliases(model)
    heads = {path: layer for path, layer in quantized_linears(model).items() if isinstance(layer, TiedLinear)}
    made: dict[int, Any] = {}
    for path, layer in packed_layers(model).items():
        made[id(layer)] = _dense(layer, dtype)
        set_everywhere(model, path, made[id(layer)], listed)
    for path, head in heads.items():
        embedding = made.get(id(head.embedding))  # None where an adapter was merged into the embedding, and not here
        dense = _dense(head, dtype) if embedding is None else _linear(head, embedding.weight, embedding.weight.dtype)
        set_everywhere(model, path, dense, listed)
    _forget_quantization(model)
    return model


def merge(peft_model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The dense model with the active adapters added to its weights; `peft_model` is used up.

    Layer by layer the base is dequantized and the adapter added in float32, then rounded once to `dtype` (by default
    the layer's own). Merging into the packed weights instead would quantize again, and lose much of the adapter.

    Raises InputError for adapters that PEFT cannot merge; where no layer was merged before, the model is as it was.
    """
    told: Any = peft_model
    if not hasattr(peft_model, "merge_and_unload"):
        raise InputError(
            f"{type(peft_model).__name__} is no PEFT model with mergeable adapters; open the adapter with "
            "peft.PeftModel.from_pretrained(model, folder), or use llmtools.dequantize for a model without adapters"
        )
    _separate_head(peft_model)
    for path, layer in _adapted(peft_model):
        base = layer.base_layer
        layer.base_layer = _dense(base, torch.float32)
        try:
            layer.merge(safe_merge=True)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            layer.base_layer = base
            raise InputError(
                f"{path}: PEFT cannot merge this adapter ({first_line(error)}); keep it beside the quantized model"
            ) from error
        set_module(peft_model, path, layer.base_layer.to(dtype or base.dtype))
    merged: nn.Module = told.merge_and_unload(safe_merge=True)  # what was adapted without being quantized
    return dequantize(merged, dtype)


def _separate_head(model: Any) -> None:
    """Gives the head a weight of its own where an adapter on the embedding, or on the head, would change both."""
    embedding, head = (getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings"))
    adapted = [each for each in (embedding, head) if hasattr(each, "base_layer")]
    if not adapted or embedding is None or head is None:
        return
    ends = [getattr(each, "base_layer", each) for each in (embedding, head)]
    if not isinstance(ends[1], TiedLinear):
        if isinstance(ends[1], QuantizedLinear) or ends[0].weight is not ends[1].weight:
            return
        ends[1].weight = nn.Parameter(ends[1].weight.detach().clone(), requires_grad=False)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers around quantized ones, by path."""
    for path, module in list(model.named_modules()):
        if isinstance(getattr(module, "base_layer", None), PackedWeight) and hasattr(module, "merge"):
            yield path, module


def _dense(layer: PackedWeight, dtype: torch.dtype | None) -> nn.Module:
    """The linear or embedding that a layer stands for."""
    dtype = dtype or layer.dtype
    if layer.device.type == "meta":
        raise InputError("the packed weights are not in memory but on the disk; load the model without offloading")
    if isinstance(layer, QuantizedEmbedding):
        return layer.dense(dtype)
    assert isinstance(layer, QuantizedLinear)
    return _linear(layer, nn.Parameter(layer.dequantize(dtype=dtype), requires_grad=False), dtype)


def _linear(layer: QuantizedLinear, weight: nn.Parameter, dtype: torch.dtype) -> nn.Linear:
    """The dense linear with this weight, and the bias of the layer."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = weight
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return dense.train(layer.training)


def _forget_quantization(model: nn.Module) -> None:
    """Takes away what tells transformers that the model is quantized."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if "_is_quantized" in getattr(config, "__dict__", {}):
            del config._is_quantized
