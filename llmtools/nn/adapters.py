"""Preparing a quantized model for adapter training, and converting it back to a dense one, with or without the adapter.

The adapters themselves are PEFT's; this is what PEFT cannot know about our layers. PEFT is not imported: its layers are
recognised by their attributes `base_layer` and `merge`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import InputError, first_line, within
from ..quant import Packed
from .embedding import QuantizedEmbedding, TiedLinear
from .exact import active_adapters, is_low_rank, updated_packed
from .experts import fuse_dense
from .linear import QuantizedLinear
from .packed import PackedWeight
from .swap import aliases, computes_otherwise, packed_layers, quantized_linears, set_everywhere, set_module
from .zeros import shifted_packed


def prepare_for_training(
    model: nn.Module, gradient_checkpointing: bool = True, use_reentrant: bool = False
) -> nn.Module:
    """Freezes the model and turns gradient checkpointing on, in place; to be called before `peft.get_peft_model`.

    It replaces PEFT's ``prepare_model_for_kbit_training``, which knows a fixed list of quantization methods. For
    any other it casts each half-precision parameter to float32, embeddings and output head included (often the
    largest tensors of a 2-bit model, whose memory would double), and leaves checkpointing off. Nothing is cast here:
    PEFT keeps the adapters in float32 by itself, and frozen parameters gain nothing from a wider dtype.

    Reentrant checkpointing (`use_reentrant`) needs an input that requires a gradient, or it skips the block's backward
    and the adapters in it stay untrained; `enable_input_require_grads` sees to that.

    Raises InputError for a model that does not support gradient checkpointing, unless it is off, and under FSDP1.
    """
    refuse_fsdp1()
    model.requires_grad_(False)
    if not gradient_checkpointing:
        return model
    network: Any = model
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(
            f"{type(model).__name__} does not support gradient checkpointing; pass gradient_checkpointing=False"
        )
    options = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.23 or so
        network.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if use_reentrant:
        network.enable_input_require_grads()
    return model


def refuse_fsdp1(version: str | None = None) -> None:
    """Raises InputError for FSDP1, which flattens all parameters into one tensor.

    version: of FSDP in the training arguments; None where they do not set it, and accelerate's launcher decides.
    """
    if version is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        version = os.environ.get("FSDP_VERSION", "1")
    if version == "1":
        raise InputError(
            "FSDP1 cannot shard packed weights, which are integers; use FSDP2 (training.fsdp_config: {version: 2}; "
            "fsdp_version: 2 in accelerate's configuration, or accelerate launch --fsdp_version 2)"
        )


def plain_lora(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers on linears, quantized or not, that are no variant such as DoRA."""
    layers: Iterator[Any] = model.modules()
    return [
        each
        for each in layers
        if isinstance(getattr(each, "base_layer", None), nn.Linear)
        and hasattr(each, "cast_input_dtype_enabled")
        and not getattr(each, "lora_variant", True)
    ]


@contextmanager
def inputs_uncast(layers: list[Any]) -> Iterator[None]:
    """Within this context PEFT's layers do not cast their inputs to the adapters' type; for use under autocast.

    Autocast would cast them back: to the same values, but in a copy for each layer, which is kept for backward.
    """
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def not_adaptable(model: nn.Module) -> list[str]:
    """Paths of linears that ``target_modules="all-linear"`` includes and PEFT cannot adapt: for ``exclude_modules``.

    These are subclasses of `nn.Linear` that compute something else, such as routers that return a tuple, and the
    ``out_proj`` of Mamba blocks, which PEFT refuses. Layers that another library quantized (with a weight class of its
    own, such as bitsandbytes' `Params4bit`) are left to PEFT.

    Raises InputError where no linear is left that can carry an adapter.
    """
    refused = getattr(getattr(model, "config", None), "model_type", None) in _MAMBA
    linears = linears_but_head(model)
    excluded = [
        path
        for path, each in linears.items()
        if (_is_plain(each) and computes_otherwise(each)) or (refused and path.rpartition(".")[2] == "out_proj")
    ]
    if len(excluded) == len(linears):
        raise InputError(f"{type(model).__name__} has no linear that can carry an adapter; name lora.target_modules")
    return excluded


def has_fused_experts(model: nn.Module) -> bool:
    """Whether the experts of a mixture are stacked in one parameter [experts, …] instead of being linears."""
    return any(
        path.rpartition(".")[2] == "experts" and any(each.dim() == 3 for each in module.parameters(recurse=False))
        for path, module in model.named_modules()
    )


def without_adapter(peft_model: Any) -> list[str]:
    """Paths, in the base model, of the linears that carry no adapter; the head and excluded ones are not counted."""
    base: nn.Module = peft_model.get_base_model()
    wrapped = {id(each) for module in base.modules() if hasattr(module, "base_layer") for each in module.modules()}
    excluded = {path for config in peft_model.peft_config.values() for path in config.exclude_modules or ()}
    return [path for path, each in linears_but_head(base).items() if id(each) not in wrapped and path not in excluded]


def linears_but_head(model: nn.Module) -> dict[str, nn.Linear]:
    """All linears by path, quantized or not, without the output head."""
    network: Any = model
    head = network.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head}


def _is_plain(linear: nn.Linear) -> bool:
    """Whether a linear is a `QuantizedLinear` or has a plain `nn.Parameter` as weight."""
    return isinstance(linear, QuantizedLinear) or type(linear.weight) is nn.Parameter


_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Model types whose ``out_proj`` PEFT refuses (`_check_lora_target_modules_mamba`)."""


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces each quantized layer by a dense `nn.Linear`, in place; returns the model.

    dtype: of the dense weights; by default each layer's own (that of the original model). The quantization config is
    removed, so that `save_pretrained` writes an ordinary model.
    """
    listed = aliases(model)
    heads = {path: layer for path, layer in quantized_linears(model).items() if isinstance(layer, TiedLinear)}
    dense_layers: dict[int, Any] = {}
    for path, layer in packed_layers(model).items():
        dense_layers[id(layer)] = _dense(layer, dtype)
        set_everywhere(model, path, dense_layers[id(layer)], listed)
    for path, head in heads.items():
        embedding = dense_layers.get(id(head.embedding))  # None where an adapter was merged into the embedding alone
        dense = _dense(head, dtype) if embedding is None else _linear(head, embedding.weight, embedding.weight.dtype)
        set_everywhere(model, path, dense, listed)
    fuse_dense(model)
    _remove_quantization_config(model)
    return model


def merge(peft_model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The dense model with the active adapters merged into its weights; `peft_model` is modified and must not be
    reused.

    Layer by layer the base is dequantized and the adapter added in float32, then rounded once to `dtype` (by default
    the layer's own). Merging into the packed weights would re-quantize them, and lose much of the adapter.

    Raises InputError for adapters that PEFT cannot merge; where no layer was merged before, the model is unchanged.
    """
    network: Any = peft_model
    if not hasattr(peft_model, "merge_and_unload"):
        raise InputError(
            f"{type(peft_model).__name__} is no PEFT model with mergeable adapters; open the adapter with "
            "peft.PeftModel.from_pretrained(model, folder), or use llmtools.dequantize for a model without adapters"
        )
    _untie_head(peft_model)
    for path, layer in _adapted(peft_model):
        merged_layer = _dense(_baked(layer), torch.float32) if _is_exact(layer) else _merged_weight(path, layer)
        set_module(peft_model, path, merged_layer.to(dtype or layer.base_layer.dtype))
    merged: nn.Module = network.merge_and_unload(safe_merge=True)  # adapted layers that are not quantized
    return dequantize(merged, dtype)


def merge_into_packed(
    peft_model: nn.Module, *, zeros: bool = False, keep: Callable[[Packed], Packed] | None = None
) -> tuple[nn.Module, dict[str, float]]:
    """The quantized model with the active adapters merged into its codes, and what rounding lost of each adapter.

    Each adapted weight is encoded again, to the nearest values on its own scales (`Quantizer.updated`). The second
    value is path → |Ŵ − W| / |ΔW|, Frobenius norms: the rounding error of the merged weight beside the adapter itself.
    Adapters of ``finetune --merge exact`` are not in it: they were trained with these very codes, and nothing of them
    is lost. zeros: adapters of ``finetune --merge zeros`` go into zero points or minima instead, and the codes stay
    (`nn/zeros.py`). keep: where the packed tensors of a merged layer stay, by default in memory. `peft_model` is
    modified and must not be reused.

    Raises InputError for adapters that PEFT cannot merge, and for a quantizer that cannot encode on given scales, or
    with `zeros` has none in floating point; where the first layer fails the model is unchanged.
    """
    network: Any = peft_model
    lost: dict[str, float] = {}
    _untie_head(peft_model)
    for path, layer in _adapted(peft_model):
        if _is_exact(layer):
            _baked(layer)
        else:
            lost[own_path(path)] = _encoded(path, layer, zeros=zeros)
        if keep is not None:
            layer.base_layer.pack_(keep(layer.base_layer.packed))
        set_module(peft_model, path, layer.base_layer)
    model: nn.Module = network.merge_and_unload(safe_merge=True)  # adapted layers that are not quantized
    return model, lost


def _encoded(path: str, layer: Any, *, zeros: bool) -> float:
    """Merges an adapter into the codes, or the zero points, of its quantized base, in place; returns what rounding
    lost, |Ŵ − W| / |ΔW|."""
    base = layer.base_layer
    merged = _merged_weight(path, layer)
    delta = float((merged.weight - base.dequantize(dtype=torch.float32)).norm())
    with within(path):
        if zeros:
            base.pack_(shifted_packed(layer))
        elif is_low_rank(layer):
            base.pack_(updated_packed(layer))
        else:  # DoRA, for one
            base.pack_(base.packed | base.quantizer.requantize(merged.weight.detach(), base.packed))
    error = float((merged.weight - base.dequantize(dtype=torch.float32)).norm())
    if getattr(merged, "bias", None) is not None:
        base.bias = nn.Parameter(merged.bias.detach().to(base.dtype), requires_grad=False)
    return error / delta if delta else 0.0


def _is_exact(layer: Any) -> bool:
    """Whether the layer's adapters are those of ``finetune --merge exact``, trained with the codes that merging
    writes."""
    return hasattr(layer, "codes") and bool(active_adapters(layer))


def _baked(layer: Any) -> QuantizedLinear:
    """The quantized layer of an exact one, with the codes that it computes with, in place."""
    base: QuantizedLinear = layer.base_layer
    base.pack_(layer.codes())
    return base


def _merged_weight(path: str, layer: Any) -> Any:
    """The dense layer, float32, of a quantized one with its adapter merged; `layer` keeps the quantized one."""
    base = layer.base_layer
    layer.base_layer = _dense(base, torch.float32)
    try:
        layer.merge(safe_merge=True)
        return layer.base_layer
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{path}: PEFT cannot merge this adapter ({first_line(error)}); keep it beside the quantized model"
        ) from error
    finally:
        layer.base_layer = base


def _untie_head(model: Any) -> None:
    """Unties head and embedding where one of them has an adapter, which would change both."""
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


def own_path(path: str) -> str:
    """The path in the base model of a module of a PEFT model."""
    return path.removeprefix("base_model.model.").removesuffix(".base_layer")


def adapted_modules(peft_model: nn.Module) -> set[str]:
    """Paths, in the base model, of all modules that carry an adapter or were trained whole."""
    return {
        own_path(path)
        for path, module in peft_model.named_modules()
        if module._modules.keys() & {"base_layer", "modules_to_save", "original_module"}
    }


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers around quantized ones, by path."""
    for path, module in list(model.named_modules()):
        if isinstance(getattr(module, "base_layer", None), PackedWeight) and hasattr(module, "merge"):
            yield path, module


def _dense(layer: PackedWeight, dtype: torch.dtype | None) -> nn.Module:
    """The dense linear or embedding of a quantized layer."""
    dtype = dtype or layer.dtype
    if layer.device.type == "meta":
        raise InputError("the packed weights are not in memory but on the disk; load the model without offloading")
    if isinstance(layer, QuantizedEmbedding):
        return layer.dense(dtype)
    assert isinstance(layer, QuantizedLinear)
    return _linear(layer, nn.Parameter(layer.dequantize(dtype=dtype), requires_grad=False), dtype)


def _linear(layer: QuantizedLinear, weight: nn.Parameter, dtype: torch.dtype) -> nn.Linear:
    """A dense linear with this weight and the bias of `layer`."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = weight
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return dense.train(layer.training)


def _remove_quantization_config(model: nn.Module) -> None:
    """Removes the quantization config and the attributes by which transformers knows a quantized model."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if "_is_quantized" in getattr(config, "__dict__", {}):
            del config._is_quantized
