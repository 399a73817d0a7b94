"""Registration with transformers: ``from_pretrained`` opens our checkpoints, and quantizes on the fly.

A checkpoint is a Hugging Face folder. Its ``config.json`` holds each module's quantizer, so that opening needs no
rules:

    "quantization_config": {"quant_method": "llmtools", "version": 1,
      "quantizers": [{"name": "optq", "bits": 3, "group_size": 128}, …],
      "modules": {"model.layers.0.self_attn.q_proj": 0, …}}

Opening replaces those modules by `QuantizedLinear` on the meta device, whose tensors have the names, shapes and dtypes
of the files; transformers then loads them like any others. Only hooks that are the same from transformers 5.16 to 5.23
are used, hence no weight converters. Where transformers only warns we raise `CheckpointError`, because a model with
random weights in it looks like a bad quantizer: for a missing tensor, a wrong shape or dtype, a truncated file, a newer
format, an unknown quantizer. The names in the file are looked up among registered quantizers; they never import code.

A process that has not imported llmtools would fill the layers with random numbers after a mere warning. So each
quantized module also stores an empty tensor under the name of the missing weight; transformers without llmtools stops
at its shape.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, InputError, within
from ..files import unpickled
from ..nn.adapters import dequantize
from ..nn.embedding import QuantizedEmbedding, TiedLinear
from ..nn.experts import (
    IMPLEMENTATION,
    experts_forward,
    fuse_dense,
    fused_experts,
    is_fused,
    is_unfused,
    unfuse,
    unfused_experts,
    unfused_within,
)
from ..nn.linear import QuantizedLinear
from ..nn.packed import PackedWeight
from ..nn.swap import aliases, computes_otherwise, packed_layers, quantized_linears, set_everywhere, set_module
from ..options import fits, type_name
from ..quant import Quantizer, TensorSpec, from_spec, quantizers
from ..quant.base import layout_bytes
from .blocks import text_config
from .integrity import Header, check_values, read_headers
from .targets import Plan, base_quantizer

METHOD = "llmtools"
VERSION = 1
"""Version of the format; each new version keeps a reader for the earlier ones."""

SENTINEL = "weight"
"""Name of the empty tensor beside the packed ones: the one that transformers without llmtools looks for."""

# A reload of this module registers its classes again; the decorators refuse a registered name.
AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
AUTO_QUANTIZER_MAPPING.pop(METHOD, None)


def _register_experts() -> None:
    """Registers the forward of unfused experts with transformers; a version without its interface keeps them fused."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # before transformers 5: experts have no flags either, and are reported as not quantized
        return

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if is_unfused(self):
            return experts_forward(self, *args, **kwargs)
        dense: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, *args, **kwargs)  # a layer that stayed dense
        return dense

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


_register_experts()


@register_quantization_config(METHOD)
class LLMToolsConfig(QuantizationConfigMixin):
    """The quantizer of each quantized module; or, given a quantizer, a pending config: to quantize while a dense model
    loads.

        AutoModelForCausalLM.from_pretrained(name, quantization_config=LLMToolsConfig("nf4", group_size=64))

    Only quantizers without calibration data can quantize on the fly. `skip`, `overrides` and the options are those of
    `llmtools.quantize`.
    """

    def __init__(
        self,
        quantizer: str | Quantizer | None = None,
        *,
        skip: Sequence[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
        quantizers: Sequence[Mapping[str, Any]] = (),
        modules: Mapping[str, int] | None = None,
        origin: Mapping[str, Any] | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
        **options: Any,
    ) -> None:
        if isinstance(version, bool) or not isinstance(version, int) or version > VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {version!r}, this llmtools reads up to {VERSION}; upgrade llmtools"
            )
        if quant_method != METHOD:
            raise CheckpointError(f"quantization_config: quant_method is {quant_method!r}, {METHOD!r} is expected")
        for key, value, hint in (
            ("quantizers", quantizers, list[dict[str, Any]]),
            ("modules", modules, dict[str, int] | None),
            ("origin", origin, dict[str, Any] | None),
        ):
            if not fits(value, hint):
                raise CheckpointError(f"quantization_config: {key}={_shortened(value)}; {type_name(hint)} is expected")
        self.quant_method = METHOD
        self.version = VERSION
        self.quantizers = [dict(spec) for spec in quantizers]
        self.modules = dict(modules or {})
        self.origin = dict(origin) if origin else None
        """Quantization config of the third-party checkpoint that this was converted from; nothing depends on it."""
        self._pending = None if quantizer is None else _PendingQuantization.of(quantizer, skip, overrides, options)
        if self._pending is None and options:
            raise CheckpointError(f"quantization_config: unknown keys {', '.join(map(repr, sorted(options)))}")

    @classmethod
    def of(cls, assigned: Mapping[str, Quantizer], origin: Mapping[str, Any] | None = None) -> LLMToolsConfig:
        """The config of a checkpoint with these quantizers by path."""
        specs: list[dict[str, Any]] = []
        modules = {}
        for path, quantizer in assigned.items():
            if (spec := quantizer.spec()) not in specs:
                specs.append(spec)
            modules[path] = specs.index(spec)
        return cls(quantizers=specs, modules=modules, origin=origin)

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``config.json``: JSON values only."""
        config = {
            "quant_method": self.quant_method,
            "version": self.version,
            "quantizers": [dict(spec) for spec in self.quantizers],
            "modules": dict(self.modules),
        }
        return config | {"origin": dict(self.origin)} if self.origin else config

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def describe(self, model: nn.Module) -> None:
        """Sets `quantizers` and `modules` from the model, in place."""
        found = LLMToolsConfig.of({path: layer.quantizer for path, layer in packed_layers(model).items()})
        self.quantizers, self.modules = found.quantizers, found.modules

    def assignment(self) -> dict[str, Quantizer]:
        """Module path → quantizer. Raises CheckpointError where a quantizer is unknown or the table is inconsistent."""
        built = [_from_spec(spec) for spec in self.quantizers]
        for path, index in self.modules.items():
            if not 0 <= index < len(built):
                raise CheckpointError(
                    f"config.json is damaged: {path} refers to quantizer {index!r}, and there are {len(built)}"
                )
        return {path: built[index] for path, index in self.modules.items()}


@register_quantizer(METHOD)
class LLMToolsHfQuantizer(HfQuantizer):
    """The hooks that transformers calls while it loads, saves and dequantizes a model."""

    quantization_config: LLMToolsConfig
    requires_calibration = False

    def __init__(self, quantization_config: LLMToolsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.assigned: dict[str, Quantizer] = {}
        self.listed: dict[str, list[str]] = {}
        self.mixtures: frozenset[str] = frozenset()
        """Paths of fused experts that are quantized as they arrive."""
        self.failures: list[InputError] = []
        self.stored: frozenset[str] = frozenset()

    # ---- loading -------------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized and self.quantization_config._pending is None:
            raise InputError(
                'LLMToolsConfig names no quantizer; name one, such as LLMToolsConfig("rtn", bits=4, group_size=64)'
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        _refuse_pickles(checkpoint_files)
        _refuse_tensor_parallel(model)
        if self.pre_quantized:
            self._insert_empty_layers(model, read_headers(checkpoint_files))
        else:
            pending = self.quantization_config._pending
            assert pending is not None
            self.assigned = pending.assignment(model)
            holders = {path.rpartition(".")[0].rpartition(".")[0] for path in self.assigned}
            self.mixtures = frozenset(holders & fused_experts(model).keys())
            self.listed = aliases(model)
            _untie(model, self.assigned)

    def _insert_empty_layers(self, model: nn.Module, headers: Mapping[str, Header]) -> None:
        self.stored = frozenset(headers)
        problems: list[str] = []
        of_module: dict[str, dict[str, Header]] = {}
        for key, header in headers.items():
            module, _, name = key.rpartition(".")
            of_module.setdefault(module, {})[name] = header
        assignment = self.quantization_config.assignment()
        for stored_path in dict.fromkeys(path.rpartition(".")[0].rpartition(".")[0] for path in assignment):
            holder = locate(model, stored_path) if stored_path else None
            if holder is not None and is_fused(model.get_submodule(holder)):
                unfuse(model, holder)
        experts = tuple(f"{path}." for path in unfused_experts(model))
        listed = aliases(model)
        for stored_path, chosen in assignment.items():
            path = locate(model, stored_path)
            if path is None:
                continue
            layer = empty_layer(model.get_submodule(path), chosen, stored_path)
            biased = getattr(layer, "bias", None) is not None
            wrong = _mismatches(stored_path, chosen.layout(*layer.shape), biased, of_module.get(stored_path, {}))
            problems += wrong
            if wrong:
                continue
            layer._is_hf_initialized = isinstance(layer, nn.Linear)  # an embedding may have buffers to be filled
            set_everywhere(model, path, layer, listed)
            self.assigned[path] = chosen
        _raise_for(problems)
        tie_heads(model)
        _untie(model, self.assigned)
        ignored = {re.escape(path) + rf"\.{SENTINEL}$" for path in self.assigned if not path.startswith(experts)}
        model._keys_to_ignore_on_load_unexpected = {  # type: ignore[assignment]
            *(model._keys_to_ignore_on_load_unexpected or ()),  # type: ignore[misc]
            *ignored,
        }

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.failures:
            raise self.failures[0]
        layers = packed_layers(model)
        problems = [f"{path}.weight is missing" for path in self.assigned if path not in layers]
        for path in self.assigned.keys() & layers.keys():
            layer = layers[path]
            for name, spec in layer.quantizer.layout(*layer.shape).items():
                mismatch = self._loaded_mismatch(path, name, layer.packed[name], spec.shape, spec.dtype)
                if mismatch:
                    problems.append(f"{path}.{name} {mismatch}")
            bias = getattr(layer, "bias", None)
            if bias is not None and (mismatch := self._loaded_mismatch(path, "bias", bias)):
                problems.append(f"{path}.bias {mismatch}")
            layer.requires_grad_(False)  # transformers makes every floating tensor that it loads trainable
        _raise_for(sorted(problems))
        check_values(model, "the checkpoint")
        self.quantization_config.describe(model)
        return model

    def _loaded_mismatch(
        self, path: str, name: str, tensor: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
    ) -> str | None:
        # A tensor offloaded to the disk (device_map "disk") is on the meta device here, and not flagged as loaded.
        loaded = getattr(tensor, "_is_hf_initialized", False) or (tensor.is_meta and f"{path}.{name}" in self.stored)
        if not loaded:
            return "is missing"
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            return f"has shape {list(tensor.shape)}, expected {list(shape)}"
        if dtype is not None and tensor.dtype != dtype:
            return f"is {tensor.dtype}, expected {dtype}"
        return None

    # ---- quantizing on the fly -----------------------------------------------------------------------------------

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return not self.pre_quantized and (path in self.mixtures or (name == "weight" and path in self.assigned))

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes per element after quantization, for ``device_map="auto"``."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        path = param_name.rpartition(".")[0]
        if path in self.mixtures:
            return self._mixture_bytes(model, path) / sum(
                each.numel() for each in model.get_submodule(path).parameters()
            )
        return layout_bytes(self.assigned[path].layout(*param.shape)) / param.numel()

    def _mixture_bytes(self, model: nn.Module, path: str) -> int:
        """Size of the experts of a layer after quantization."""

        def size(place: str, weight: Tensor) -> int:
            chosen = self.assigned.get(place)
            return weight.nbytes if chosen is None else layout_bytes(chosen.layout(*weight.shape))

        with unfused_within(model):
            linears = model.get_submodule(path).named_modules(prefix=path)
            return sum(size(place, each.weight) for place, each in linears if isinstance(each, nn.Linear))

    def get_quantize_ops(self) -> Any:
        return _quantize_on_arrival(self)

    # ---- saving, and back to dense -------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers saves the adapters alone
        wrapped = [path for path in packed_layers(model) if path.endswith(".base_layer")]
        if wrapped:
            raise InputError(
                f"the model carries adapters (at {wrapped[0].removesuffix('.base_layer')}), which would be mixed into "
                "the checkpoint; save them with the PEFT model's save_pretrained, or merge them with llmtools.merge"
            )
        self.quantization_config.describe(model)
        tensors: dict[str, Tensor] = dict(model.state_dict())
        seen: set[int] = set()
        for path, layer in packed_layers(model).items():
            for name in layer.packed:  # parts of a fused matrix share their codes; in a file each has its own
                tensor = tensors[f"{path}.{name}"]
                if tensor.numel() and tensor.data_ptr() in seen:
                    tensors[f"{path}.{name}"] = tensor.clone()
                seen.add(tensor.data_ptr())
        experts = tuple(f"{path}." for path in unfused_experts(model))
        for path in self.quantization_config.modules:
            if not path.startswith(experts):  # of which transformers knows no weight
                tensors[f"{path}.{SENTINEL}"] = torch.empty(0)
        return tensors, {METHOD: str(VERSION)}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize(model, dtype)


def attach(model: nn.Module) -> None:
    """Sets the config and attributes of a model quantized in place, for ``save_pretrained`` and the Trainer.

    Does nothing for a plain `nn.Module` without a Hugging Face config.
    """
    config = getattr(model, "config", None)
    if config is None or not packed_layers(model):
        return
    _untie(model, packed_layers(model))
    description = LLMToolsConfig()
    description.describe(model)
    config.quantization_config = description
    config._is_quantized = True
    network: Any = model
    network.hf_quantizer = LLMToolsHfQuantizer(description)
    network.is_quantized = True
    network.quantization_method = METHOD


def _untie(model: Any, paths: Collection[str]) -> None:
    """Removes quantized layers, such as a head, from the weights that transformers ties, in place.

    config.json may say that the head is tied where the files hold a separate one.
    """
    targets = {f"{path}.weight" for path in paths}
    heads = {f"{path}.weight" for path, layer in quantized_linears(model).items() if isinstance(layer, TiedLinear)}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    configured = set(_configured_ties(model))
    for target in (targets | heads) & tied.keys():
        del tied[target]
    if configured and configured <= targets:
        for config in {id(each): each for each in (model.config, text_config(model.config))}.values():
            config.tie_word_embeddings = False


def _configured_ties(model: Any) -> dict[str, str]:
    """Names of the weights that the config ties to others: name → name of the other."""
    expanded = getattr(model, "get_expanded_tied_weights_keys", None)
    return dict(expanded(all_submodels=True)) if expanded is not None else {}


def tie_heads(model: nn.Module) -> None:
    """Replaces dense linears that the config ties to a quantized embedding with a `TiedLinear`, in place."""
    for target, source in _configured_ties(model).items():
        head, embedding = (_module_of(model, name) for name in (target, source))
        if isinstance(embedding, QuantizedEmbedding) and isinstance(head, nn.Linear):
            layer = head if isinstance(head, QuantizedLinear) else TiedLinear(embedding)
            layer._is_hf_initialized = True
            set_module(model, target.removesuffix(".weight"), layer)


def _module_of(model: nn.Module, weight: str) -> nn.Module | None:
    try:
        return model.get_submodule(weight.removesuffix(".weight"))
    except AttributeError:
        return None


def empty_layer(module: nn.Module, quantizer: Quantizer, stored_path: str) -> PackedWeight:
    """A layer with uninitialised tensors for a linear or an embedding. Raises CheckpointError for any other module."""
    with within(stored_path):
        if isinstance(module, nn.Embedding) and not isinstance(module, PackedWeight):
            return QuantizedEmbedding.empty(module, quantizer, device="meta")
        if isinstance(module, nn.Linear) and not computes_otherwise(module):
            return QuantizedLinear.empty(module, quantizer, device="meta")
    raise CheckpointError(
        f"{stored_path} is quantized in the checkpoint, but is a {type(module).__name__} in this model"
    )


# ---- quantizing on the fly -------------------------------------------------------------------------------------------


class _PendingQuantization(NamedTuple):
    """The arguments of `LLMToolsConfig` for quantizing while a model is loaded."""

    quantizer: Quantizer
    """Quantizer of all modules but those of `overrides`."""
    skip: Sequence[str] | None
    """Patterns of linears to keep dense, as in `llmtools.quantize`."""
    overrides: Mapping[str, Mapping[str, Any] | None]
    """Options by pattern, as in `llmtools.quantize`."""

    @classmethod
    def of(
        cls,
        chosen: str | Quantizer,
        skip: Sequence[str] | None,
        overrides: Mapping[str, Mapping[str, Any] | None] | None,
        options: Mapping[str, Any],
    ) -> _PendingQuantization:
        base = base_quantizer(chosen, dict(options))
        _refuse_calibrated([base])
        return cls(base, skip, overrides or {})

    def assignment(self, model: nn.Module) -> dict[str, Quantizer]:
        """Path → quantizer, by the same plan as `llmtools.quantize`."""
        with unfused_within(model):
            plan = Plan.of(model, self.quantizer, self.overrides, self.skip)
        _refuse_calibrated(plan.quantizers.values())
        return plan.quantizers


def _refuse_calibrated(chosen: Iterable[Quantizer]) -> None:
    for each in chosen:
        if each.needs_hessian:
            raise InputError(
                f"quantizer {each.spec()['name']!r} needs calibration data, which from_pretrained does not have; run "
                "`llmtools quantize` (or llmtools.quantize) and open the folder it writes, or use one without data, "
                "such as 'rtn' or 'nf4'"
            )


def _quantize_on_arrival(owner: LLMToolsHfQuantizer) -> Any:
    """The loader's operation for a weight that has just been read: quantizes it and replaces its linear.

    So at most one dense weight is in memory at a time. The class is defined here because the module with its base class
    is still being imported when transformers' registry imports us.
    """
    from transformers.core_model_loading import ConversionOps

    class QuantizeOnArrival(ConversionOps):
        @torch.no_grad()
        def convert(
            self,
            input_dict: dict[str, Any],
            model: Any = None,
            full_layer_name: str = "",
            missing_keys: set[str] | None = None,
            **kwargs: Any,
        ) -> dict[str, Tensor]:
            (value,) = input_dict.values()
            weight = value[0] if isinstance(value, list) else value
            path, _, name = full_layer_name.rpartition(".")
            module = model.get_submodule(path)
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
            if missing_keys is not None:
                missing_keys.discard(full_layer_name)
            if path not in owner.mixtures:
                self.quantize(model, path)
            elif not any(each.is_meta for each in module.parameters(recurse=False)):  # all of its experts are here
                unfuse(model, path)
                for place, linear in list(model.get_submodule(path).named_modules(prefix=path)):
                    if isinstance(linear, nn.Linear):
                        self.quantize(model, place)
                fuse_dense(model)
            return {}

        def quantize(self, model: Any, path: str) -> None:
            linear = model.get_submodule(path)
            layer: nn.Module = linear
            try:
                if path in owner.assigned:
                    with within(path):
                        layer = QuantizedLinear.from_linear(linear, owner.assigned[path])
            except InputError as error:  # the loader would only report it; it is raised after loading
                owner.failures.append(error)
                return
            for tensor in layer.parameters():
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
            layer._is_hf_initialized = True  # type: ignore[assignment]
            set_everywhere(model, path, layer, owner.listed)

        @property
        def reverse_op(self) -> Any:
            raise NotImplementedError("a quantized weight is saved packed")

    return QuantizeOnArrival()


# ---- integrity -------------------------------------------------------------------------------------------------------


def _mismatches(
    path: str, expected: Mapping[str, TensorSpec], has_bias: bool, found: Mapping[str, Header]
) -> list[str]:
    """How the tensors of one module in the files differ from its quantizer's layout; missing ones are found later."""
    if not found:  # no files: a state dict was given
        return []
    wrong = [
        f"{path}.{name} {mismatch}"
        for name, spec in expected.items()
        if name in found and (mismatch := found[name].mismatch(spec.shape, spec.dtype))
    ]
    known = {*expected, SENTINEL, *(["bias"] if has_bias else [])}
    surplus = sorted(found.keys() - known)
    return wrong + [f"{path}.{name} is in the file and not in the layout of its quantizer" for name in surplus]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _refuse_pickles(files: Iterable[str] | None) -> None:
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            raise unpickled(file)


def _refuse_tensor_parallel(model: Any) -> None:
    distributed = getattr(model.config, "distributed_config", None)
    if (getattr(distributed, "tp_size", None) or 1) > 1:
        raise InputError("tensor parallelism does not work with quantized layers yet; use device_map or FSDP")


def locate(model: Any, path: str) -> str | None:
    """Path of a checkpoint's module in this model, which may be the bare decoder or have another head.

    None where the model is of another class and lacks the module; raises CheckpointError where it should have it.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        try:
            model.get_submodule(candidate)
            return candidate
        except AttributeError:
            continue
    if type(model).__name__ in (model.config.architectures or ()):
        raise CheckpointError(f"config.json: the model has no module {path}; the folder's files do not belong together")
    return None


def _from_spec(spec: Mapping[str, Any]) -> Quantizer:
    try:
        return from_spec(dict(spec))
    except InputError as error:
        name = spec.get("name")
        if name in quantizers.names():
            raise CheckpointError(
                f"the checkpoint's quantizer cannot be made here: {error}; config.json is damaged, or of a newer "
                "version: copy the checkpoint again, or update llmtools"
            ) from error
        if ":" in str(name):
            raise CheckpointError(
                f"the checkpoint was made with the custom quantizer {spec['name']}, and files never import code; "
                f"if you trust that module, pass --plugin {spec['name']} (in Python: import the module, then "
                f"llmtools.quantizers.get({spec['name']!r}))"
            ) from error
        raise CheckpointError(
            f"the checkpoint's quantizer {dict(spec)} cannot be made here: {error}. "
            "If it comes from a plug-in, install it (or import the module that registers it) before loading"
        ) from error


def _raise_for(problems: Sequence[str]) -> None:
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(f"the checkpoint is damaged: {shown}. Copy it again, or quantize again")
