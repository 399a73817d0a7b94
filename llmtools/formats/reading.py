"""Reading of third-party checkpoints as llmtools models, bit for bit, so that they can be finetuned and exported.

`llmtools.load(folder)` detects them by their quantization config. Each quantized module is translated into one of our
quantizers and its packed tensors (one file per format in this package), and the result is loaded like our own
checkpoints, with the same checks: `llmtools.save` writes it as one. The original quantization config is kept under
"origin" in ``config.json``.

transformers opens some of these formats, too, with the packages that wrote them:
``AutoModelForCausalLM.from_pretrained`` of such a folder is not changed. Other methods are left to transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..errors import CheckpointError, opening, within
from ..files import read_json
from ..model.architectures import auto_class
from ..model.integrity import config_of, read_headers, shards_of
from ..model.offload import Keep
from ..model.transformers_integration import METHOD, LLMToolsConfig, locate
from ..nn.experts import unfuse, unfused_experts, unfused_within
from ..nn.linear import QuantizedLinear
from ..nn.swap import computes_otherwise, quantized_linears
from ..quant import Packed, Quantizer
from .base import Format, formats, mapping
from .expert_names import stored_paths
from .quip_sharp import QUIP_PARAMS
from .tensors import Module

_SIDE_FILES = ("quantize_config.json", "quant_config.json")  # GPTQ's and AWQ's, where config.json has no entry
_HUB_OPTIONS = ("revision", "token", "cache_dir")


class External(NamedTuple):
    """A third-party checkpoint."""

    folder: Path
    """Folder of the files."""
    format: Format
    """Format that reads them."""


def detect(name: str, options: Mapping[str, Any]) -> External | None:
    """The third-party checkpoint in a folder or hub name; None where it is ours, dense, or left to transformers.

    Raises CheckpointError for a damaged quantization config, or quantized tensors without one.
    """
    folder = Path(name)
    if not folder.exists():
        return _from_hub(name, options)
    quantization = quantization_config(config_of(folder), folder)
    found = format_of(quantization)
    return External(folder, found(quantization)) if found is not None else None


def left_to_transformers(config: Mapping[str, Any], name: str) -> str | None:
    """The quantization method of a checkpoint left to transformers; None where it is dense, or llmtools reads it.

    Raises CheckpointError for a method that neither can read.
    """
    folder = Path(name) if Path(name).exists() else None
    quantization = quantization_config(config, folder)
    if not quantization or format_of(quantization) is not None or quantization.get("quant_method") == METHOD:
        return None
    method, packing = quantization.get("quant_method"), quantization.get("format")
    if method == "bitsandbytes":  # transformers has one entry for each width
        eight = quantization.get("load_in_8bit", quantization.get("_load_in_8bit"))
        method = "bitsandbytes_8bit" if eight else "bitsandbytes_4bit"
    if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise CheckpointError(f"{name} is quantized by {method!r}, which neither llmtools nor transformers can read")
    if method in _REFUSED:
        raise CheckpointError(f"{name} is quantized by {method}, which llmtools does not read; {_REMEDY}")
    return f"{method} (format {packing})" if isinstance(packing, str) else method


_REFUSED = ("torchao",)
"""Methods with tensor subclasses as weights, which llmtools cannot check, train on or save."""
_REMEDY = (
    "give the dense model that it was made from, or dequantize it with the program that wrote it and save_pretrained"
)


@contextmanager
def naming_method(config: Mapping[str, Any], name: str) -> Iterator[None]:
    """Adds the quantization method and a remedy to errors of a checkpoint that was left to transformers."""
    try:
        yield
    except CheckpointError as error:
        if (method := left_to_transformers(config, name)) is None:
            raise
        raise CheckpointError(
            f"{str(error).rstrip('.')}; the model is quantized by {method}, which llmtools leaves to transformers: "
            f"install the package that it requires, or {_REMEDY}"
        ) from error


def format_of(quantization: Mapping[str, Any]) -> type[Format] | None:
    """The format that reads checkpoints with this quantization config; None where there is none.

    Plug-ins are loaded only for methods that neither llmtools nor transformers reads. Raises CheckpointError for a
    damaged config.
    """
    if not quantization or quantization.get("quant_method") == METHOD:
        return None
    with opening("the quantization config is damaged"):
        method = quantization.get("quant_method")
        known = isinstance(method, str) and method in AUTO_QUANTIZATION_CONFIG_MAPPING
        return next((kind for kind in formats.classes(plugins=not known) if kind.detect(quantization)), None)


def quantization_config(config: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """The quantization config of a model's config, of the file beside it, or implied by the tensors; {} for none."""
    entry = config.get("quantization_config") or config.get("compression_config")
    if entry:
        quantization = mapping(entry, "quantization_config")
        return quantization if quantization.get("quant_method") is not None else _with_method(quantization)
    if config.get(QUIP_PARAMS):
        params = mapping(config[QUIP_PARAMS], QUIP_PARAMS)
        return {"quant_method": "qtip" if "decode_mode" in params else "quip_sharp", **params}
    for name in _SIDE_FILES if folder else ():
        if folder and (side := read_json(folder / name, CheckpointError)):
            return _with_method(side)
    return _implied(folder) if folder else {}


def _with_method(config: Mapping[str, Any]) -> dict[str, Any]:
    """A quantization config without quant_method, completed by the options that only one method has."""
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        method = "bitsandbytes"
    elif "w_bit" in config or str(config.get("version")).lower() in ("gemm", "gemv"):
        method = "awq"
    elif "config_groups" in config:
        method = "compressed-tensors"
    elif "bits" in config:
        method = "gptq"
    else:
        return dict(config)
    return {**config, "quant_method": method}


def _implied(folder: Path) -> dict[str, Any]:
    """The quantization config of a folder without one, from its tensors' names; {} for a dense model.

    Raises CheckpointError for quantized tensors that do not determine it.
    """
    names = read_headers(shards_of(folder)).keys()
    for kind in formats.classes(plugins=False):
        if kind.companion is None:
            continue
        end = f".{kind.marker}"
        found = next((name for name in names if name.endswith(end) and _companion(name, kind) in names), None)
        if found is None:
            continue
        if kind.implied is None:
            raise CheckpointError(
                f"{folder}: {found} is a quantized weight, as {_writers(kind)} writes it, and neither config.json nor "
                "a file beside it says how it was quantized; copy the quantization_config from the model's source"
            )
        return dict(kind.implied)
    return {}


def _companion(name: str, kind: type[Format]) -> str:
    return f"{name.removesuffix(kind.marker)}{kind.companion}"


def _writers(kind: type[Format]) -> str:
    """The names of the formats that share a kind's tensors."""
    return " or ".join(
        each.__name__
        for each in formats.classes(plugins=False)
        if each.marker == kind.marker and Format in each.__bases__
    )


def open_model(found: External, options: Mapping[str, Any], keep: Keep | None = None) -> tuple[Any, dict[str, Any]]:
    """(model in eval mode, transformers' loading info). options as for ``AutoModelForCausalLM.from_pretrained``.

    keep: where the packed tensors of each module stay once they are read; by default in memory.

    Raises CheckpointError for damaged files, or ones that do not fit config.json.
    """
    from transformers import GenerationConfig

    options = {key: value for key, value in options.items() if key not in (*_HUB_OPTIONS, "use_safetensors")}
    config, skeleton = _outline(found, options.pop("trust_remote_code", False))
    state, assigned = _translated(found, skeleton, keep)
    _describe(config, assigned, found)
    with opening(f"{found.folder} does not fit its config.json"):
        model, info = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )
    _share(model)
    model.name_or_path = model.config.name_or_path = str(found.folder)
    if (found.folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(found.folder)
    return model, dict(info)


def described(found: External, *, trust_remote_code: bool = False) -> Any:
    """The config of a third-party checkpoint, including its quantization config as one of llmtools.

    Which quantizer a module has may depend on its values, so that all are read, those of one module at a time.
    """
    config, skeleton = _outline(found, trust_remote_code)
    _, assigned = _translated(found, skeleton, _without_values)
    _describe(config, assigned, found)
    return config


def _without_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def _outline(found: External, trust_remote_code: bool) -> tuple[Any, Any]:
    """(config without an entry of quantization, model with dense layers on the meta device)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(found.folder, trust_remote_code=trust_remote_code)
    for key in ("quantization_config", "compression_config", QUIP_PARAMS):
        if hasattr(config, key):
            delattr(config, key)
    with torch.device("meta"):
        return config, auto_class(config.to_dict()).from_config(config, trust_remote_code=trust_remote_code)


def _describe(config: Any, assigned: Mapping[str, Quantizer], found: External) -> None:
    if "lm_head" in assigned:
        config.tie_word_embeddings = False
    config.quantization_config = LLMToolsConfig.of(assigned, origin=found.format.config).to_dict()


def _translated(
    found: External, skeleton: nn.Module, keep: Keep | None
) -> tuple[dict[str, Tensor], dict[str, Quantizer]]:
    """`translate` of a folder; experts that are quantized there are linears of the skeleton afterwards."""
    tensors = found.format.tensors(found.folder)
    return translate(found.format, tensors, skeleton, keep, _unfuse_stored(skeleton, found.format.modules(tensors)))


def _unfuse_stored(skeleton: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Path in the files → path in the model, where they differ; experts that are quantized in the files are linears of
    the skeleton afterwards. stored: paths of the quantized modules in the files."""
    with unfused_within(skeleton):
        names = {there: here for here, there in stored_paths(skeleton).items()}
        mixtures = tuple(unfused_experts(skeleton))
    quantized = {names[path] for path in stored if path in names}
    for path in mixtures:
        if any(each.startswith(f"{path}.") for each in quantized):
            unfuse(skeleton, path)
    return names


def translate(
    reader: Format,
    tensors: Mapping[str, Tensor],
    skeleton: nn.Module,
    keep: Keep | None = None,
    names: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Quantizer]]:
    """(name → tensor of an llmtools checkpoint, path → quantizer).

    tensors: name → tensor in the file, shapes and dtypes as in the format's module. skeleton: the model on the meta
    device, with linears [out, in]. keep: where the tensors of a module stay. names: path in the files → path in the
    model, where they differ.

    Raises CheckpointError for damaged, missing or surplus tensors.
    """
    state: dict[str, Tensor] = {}
    assigned: dict[str, Quantizer] = {}
    paths = reader.modules(tensors)
    names_below: dict[str, list[str]] = {path: [] for path in paths}
    for name in tensors:
        for path in _parents(name):
            if path in names_below:
                names_below[path].append(name.removeprefix(f"{path}."))
    for stored_path in paths:
        stored = Module(tensors, stored_path)
        parts = [(names or {}).get(path, path) for path in reader.parts(stored_path)]
        located = {path: locate(skeleton, path) for path in parts}
        linears = {path: _linear(skeleton, path, stored_path) for path in located.values() if path is not None}
        if len(linears) < len(located):
            continue
        with within(stored_path), opening(f"the checkpoint is damaged: {stored_path}"):
            converted = reader.read_parts(
                stored, [linear.out_features for linear in linears.values()], next(iter(linears.values())).in_features
            )
        read: dict[str, Tensor] = {}
        for (path, linear), (quantizer, packed) in zip(linears.items(), converted, strict=True):
            _check(quantizer, packed, linear)
            assigned[path] = quantizer
            read |= {f"{path}.{name}": tensor for name, tensor in packed.items()}
        state |= read if keep is None else keep(read)
        if "bias" in stored:
            state |= _bias(reader, stored, linears)
        _refuse_unread(stored, reader, names_below.get(stored_path, []))
    if not assigned:
        raise CheckpointError(
            f"the config says that the model is quantized ({reader.config.get('quant_method')}), but no module has a "
            f"tensor {reader.marker!r}"
        )
    inside = set(paths)
    rest = (name for name in tensors if inside.isdisjoint(_parents(name)) and not name.endswith("rotary_emb.inv_freq"))
    return {name: tensors[name] for name in rest} | state, assigned


def _refuse_unread(stored: Module, reader: Format, names: list[str]) -> None:
    """Raises CheckpointError for tensors of a quantized module that its translation did not use."""
    unread = sorted(name for name in names if name not in stored.seen and not name.startswith(reader.unused))
    if unread:
        raise CheckpointError(
            f"the checkpoint is damaged: {stored.path}.{unread[0]} is in the file, and "
            f"{reader.config.get('quant_method')} has no such tensor"
        )


def _parents(name: str) -> list[str]:
    """Paths of the modules that a tensor may belong to: "a.b.weight.absmax" -> "a", "a.b", "a.b.weight"."""
    return [name[:dot] for dot, letter in enumerate(name) if letter == "."]


def _share(model: nn.Module) -> None:
    """Makes the parts of a fused matrix share its codes as one parameter, also after the model is moved."""
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


def _bias(reader: Format, stored: Module, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    ((path, linear),) = linears.items()
    bias = reader.bias(stored, linear.out_features)
    if "bias" in dict(linear.named_parameters()):
        return {f"{path}.bias": bias}
    if bool(bias.any()):  # some writers store zeros where the model has no bias
        raise CheckpointError(f"{stored.path} has a bias in the file, and none in the model of config.json")
    return {}


def _check(quantizer: Quantizer, packed: Packed, linear: nn.Linear) -> None:
    """Raises unless the translation has its quantizer's layout, which would be a bug of the format."""
    with torch.device("meta"):
        QuantizedLinear(linear.in_features, linear.out_features, quantizer).pack_(packed)


def _from_hub(name: str, options: Mapping[str, Any]) -> External | None:
    """The checkpoint of a hub name, downloaded into the cache if a format here reads it; else None."""
    from huggingface_hub import snapshot_download
    from transformers import PreTrainedConfig

    where = {key: options[key] for key in _HUB_OPTIONS if key in options}
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **where)
    except (OSError, ValueError):
        return None  # transformers reports the error when the model is opened
    quantization = quantization_config(config)
    if quantization.get("quant_method") == METHOD or format_of(quantization) is None:
        return None
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    return detect(snapshot_download(name, allow_patterns=wanted, **where), options)
