"""Third-party checkpoints opened as ours, exact to the bit, so that they finetune and export like ours.

`llmtools.load(folder)` detects them by what their config says. Each quantized module is translated into one of our
quantizers and its tensors (one file a format here), and the result goes through the same door as our own checkpoints,
with the same checks: `llmtools.save` writes it as one of ours. What the third-party config said is kept, all of it,
under "origin" in ``config.json``.

transformers opens some of these formats as well, with the peers' packages, and keeps doing so:
``AutoModelForCausalLM.from_pretrained`` of such a folder is theirs. What is not listed here is left to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..errors import CheckpointError, opening, within
from ..files import read_json
from ..model.architectures import auto_class
from ..model.integrity import config_of
from ..model.transformers_integration import METHOD, LLMToolsConfig, locate
from ..nn.linear import QuantizedLinear
from ..nn.swap import computes_otherwise, quantized_linears
from ..quant import Packed, Quantizer
from .base import Format, formats, mapping
from .quip_sharp import QUIP_PARAMS
from .tensors import Module, Tensors

_SIDE_FILES = ("quantize_config.json", "quant_config.json")  # GPTQ's and AWQ's, where config.json says nothing
_HUB_OPTIONS = ("revision", "token", "cache_dir")


class External(NamedTuple):
    """A third-party checkpoint: where it is, and how it is read."""

    folder: Path
    format: Format


def detect(name: str, options: Mapping[str, Any]) -> External | None:
    """The checkpoint of others at this folder or hub name; None where it is ours, dense, or left to transformers."""
    folder = Path(name)
    if not folder.exists():
        return _from_hub(name, options)
    config = config_of(folder)
    quantization = quantization_config(config, folder)
    found = format_of(quantization)
    if found is not None:
        return External(folder, found(quantization))
    method = quantization.get("quant_method") if quantization else METHOD
    if method == "bitsandbytes":  # int8; transformers lists it by the width
        method = (
            "bitsandbytes_8bit"
            if quantization.get("load_in_8bit", quantization.get("_load_in_8bit"))
            else "bitsandbytes_4bit"
        )
    if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise CheckpointError(f"{folder} is quantized by {method!r}, which neither llmtools nor transformers can read")
    return None


def format_of(quantization: Mapping[str, Any]) -> type[Format] | None:
    """The format of checkpoints with this quantization config; None where there is none, or it is nobody's here.

    Plug-ins are asked about methods that neither llmtools nor transformers reads.
    """
    if not quantization or quantization.get("quant_method") == METHOD:
        return None
    known = quantization.get("quant_method") in AUTO_QUANTIZATION_CONFIG_MAPPING
    return next((kind for kind in formats.classes(plugins=not known) if kind.detect(quantization)), None)


def quantization_config(config: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """What a model's config says about its quantization, or the file beside it; {} where nothing does."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        return mapping(quantization, "quantization_config")
    if config.get(QUIP_PARAMS):
        return {"quant_method": "quip_sharp", **mapping(config[QUIP_PARAMS], QUIP_PARAMS)}
    for name in _SIDE_FILES if folder else ():
        if folder and (side := read_json(folder / name, CheckpointError)):
            method = "awq" if "w_bit" in side or str(side.get("version")).lower() in ("gemm", "gemv") else "gptq"
            return {"quant_method": method, **side}
    return {}


def open_model(found: External, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(model in eval mode, transformers' loading info). options as for ``AutoModelForCausalLM.from_pretrained``."""
    from transformers import AutoConfig, GenerationConfig

    options = {key: value for key, value in options.items() if key not in (*_HUB_OPTIONS, "use_safetensors")}
    trust = {"trust_remote_code": options.pop("trust_remote_code", False)}
    config = AutoConfig.from_pretrained(found.folder, **trust)
    for key in ("quantization_config", "compression_config", QUIP_PARAMS):
        if hasattr(config, key):
            delattr(config, key)
    with torch.device("meta"):
        skeleton = auto_class(config.to_dict()).from_config(config, **trust)
    state, assigned = translate(found.format, Tensors(found.folder), skeleton)
    if "lm_head" in assigned:
        config.tie_word_embeddings = False
    config.quantization_config = LLMToolsConfig.of(assigned, origin=found.format.config).to_dict()
    with opening(f"{found.folder} does not fit its config.json"):
        model, info = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )
    _share(model)
    model.name_or_path = model.config.name_or_path = str(found.folder)
    if (found.folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(found.folder)
    return model, dict(info)


def translate(
    form: Format, tensors: Mapping[str, Tensor], skeleton: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Quantizer]]:
    """(tensors of our own checkpoint by name, path → quantizer) for a model of this skeleton, on the meta device."""
    state: dict[str, Tensor] = {}
    assigned: dict[str, Quantizer] = {}
    paths = form.modules(tensors)
    names_below: dict[str, list[str]] = {path: [] for path in paths}
    for name in tensors:
        for path in _parents(name):
            if path in names_below:
                names_below[path].append(name.removeprefix(f"{path}."))
    for stored_path in paths:
        stored = Module(tensors, stored_path)
        located = {path: locate(skeleton, path) for path in form.parts(stored_path)}
        linears = {path: _linear(skeleton, path, stored_path) for path in located.values() if path is not None}
        if len(linears) < len(located):
            continue
        with within(stored_path), opening(f"the checkpoint is damaged: {stored_path}"):
            converted = form.read_parts(
                stored, [linear.out_features for linear in linears.values()], next(iter(linears.values())).in_features
            )
        for (path, linear), (quantizer, packed) in zip(linears.items(), converted, strict=True):
            _check(quantizer, packed, linear)
            assigned[path] = quantizer
            state |= {f"{path}.{name}": tensor for name, tensor in packed.items()}
        if "bias" in stored:
            state |= _bias(stored, linears)
        _refuse_unread(stored, form, names_below.get(stored_path, []))
    if not assigned:
        raise CheckpointError(
            f"the config says that the model is quantized ({form.config.get('quant_method')}), but no module has a "
            f"tensor {form.marker!r}"
        )
    inside = set(paths)
    rest = (name for name in tensors if inside.isdisjoint(_parents(name)) and not name.endswith("rotary_emb.inv_freq"))
    return {name: tensors[name] for name in rest} | state, assigned


def _refuse_unread(stored: Module, form: Format, names: list[str]) -> None:
    """Raises CheckpointError for tensors of a quantized module that its translation did not look at."""
    unread = sorted(name for name in names if name not in stored.seen and not name.startswith(form.unused))
    if unread:
        raise CheckpointError(
            f"the checkpoint is damaged: {stored.path}.{unread[0]} is in the file, and "
            f"{form.config.get('quant_method')} has no such tensor"
        )


def _parents(name: str) -> list[str]:
    """The paths of the modules that a tensor may belong to: "a.b.weight.absmax" -> "a", "a.b", "a.b.weight"."""
    return [name[:dot] for dot, letter in enumerate(name) if letter == "."]


def _share(model: nn.Module) -> None:
    """Parts of a fused matrix hold its codes as one parameter, which stays one wherever the model is moved."""
    known: dict[int, nn.Parameter] = {}
    for layer in quantized_linears(model).values():
        for name, tensor in layer.packed.items():
            if tensor.numel() and not tensor.is_meta:
                layer._parameters[name] = known.setdefault(tensor.data_ptr(), nn.Parameter(tensor, requires_grad=False))


def _linear(skeleton: nn.Module, path: str, stored_path: str) -> nn.Linear:
    linear = skeleton.get_submodule(path)
    if not isinstance(linear, nn.Linear) or computes_otherwise(linear):
        raise CheckpointError(f"{stored_path} is quantized, but is a {type(linear).__name__}; only linears are read")
    return linear


def _bias(stored: Module, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    ((path, linear),) = linears.items()
    bias = stored.get("bias", linear.out_features)
    if "bias" in dict(linear.named_parameters()):
        return {f"{path}.bias": bias}
    if bool(bias.any()):  # some writers store zeros where the model has no bias
        raise CheckpointError(f"{stored.path} has a bias in the file, and none in the model of config.json")
    return {}


def _check(quantizer: Quantizer, packed: Packed, linear: nn.Linear) -> None:
    """Raises unless the translation is what its quantizer's layout says; that would be a mistake of ours."""
    with torch.device("meta"):
        QuantizedLinear(linear.in_features, linear.out_features, quantizer).pack_(packed)


def _from_hub(name: str, options: Mapping[str, Any]) -> External | None:
    """A hub name's folder in the cache, downloaded if need be, if its config is one of ours to translate."""
    from huggingface_hub import snapshot_download
    from transformers import PreTrainedConfig

    where = {key: options[key] for key in _HUB_OPTIONS if key in options}
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **where)
    except (OSError, ValueError):
        return None  # transformers will say what is wrong with the name
    quantization = quantization_config(config)
    if quantization.get("quant_method") == METHOD or format_of(quantization) is None:
        return None
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    return detect(snapshot_download(name, allow_patterns=wanted, **where), options)
