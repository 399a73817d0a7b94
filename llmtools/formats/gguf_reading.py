"""GGUF files opened as models whose weights stay in their blocks.

Names, the order of rows, config and tokenizer are those of transformers' own reader of GGUF, through its public
functions. That reader decodes every weight; here linears and embeddings that are quantized in the file keep their
bytes (`quant/gguf.py`). llama.cpp permutes the rows of some weights (queries and keys of LLaMA); rows decode
independently, so their bytes are permuted back. Other tensors, such as norms, are decoded as transformers decodes them.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError, opening
from ..kernels.ggml import TYPES, dequantize_ggml
from ..model.architectures import auto_class
from ..model.integrity import Header, check_config
from ..model.offload import Keep
from ..model.transformers_integration import LLMToolsConfig
from ..nn.experts import DOWN, GATE, UP, fused_experts, unfuse
from ..nn.swap import computes_otherwise
from ..pages import mapped
from ..quant import GGMLBlocks, Quantizer
from .gguf_header import FLOATS, GGUFFile, StoredTensor, read_header

log = logging.getLogger(__name__)

SUFFIX = ".gguf"
_HUB_FILE = re.compile(r"^(\w[\w.-]*/\w[\w.-]*)/([\w./ -]+\.gguf)$")
_HUB_OPTIONS = ("revision", "token", "cache_dir")


class GGUFModel(NamedTuple):
    """A GGUF file and the model name that it was found by."""

    name: str
    """Path ``folder/file.gguf``, or ``owner/name/file.gguf`` on the hub."""
    path: Path
    """Local file."""


def joined(name: str, gguf_file: str | None) -> str:
    """The name of a model that is a file of a folder or hub repository: ``name/gguf_file``."""
    return name if gguf_file is None else f"{name.rstrip('/')}/{gguf_file}"


def hub_base(base_name: str | None, config: Mapping[str, Any]) -> str | None:
    """A base model's name on the hub, as given, with the GGUF file that the adapter's configuration names."""
    file = Path(str(config.get("base_model_name_or_path") or "")).name
    if base_name is None or not file.endswith(".gguf") or base_name.endswith(".gguf"):
        return base_name
    return f"{base_name}/{file}"


def find(name: str, options: Mapping[str, Any]) -> GGUFModel | None:
    """The GGUF file that a model's name refers to, downloaded from the hub if needed; None for other names.

    Raises CheckpointError where there is no such file.
    """
    path = Path(name).expanduser()
    if not name.endswith(SUFFIX) or path.is_dir():
        return None
    check_name(name)
    if path.exists():
        return GGUFModel(str(path), path)
    on_hub = _HUB_FILE.match(name)
    assert on_hub is not None, name
    from transformers.utils.hub import cached_file

    where = {key: options[key] for key in _HUB_OPTIONS if key in options}
    with opening(f"{name} is no file here, and from the hub"):
        return GGUFModel(name, Path(str(cached_file(on_hub[1], on_hub[2], **where))))


def check_name(name: str) -> None:
    """Raises CheckpointError unless a name that ends in .gguf is a file with a valid header, or may be on the hub."""
    path = Path(name).expanduser()
    if path.exists():
        read_header(path)
    elif _HUB_FILE.match(name) is None or path.parent.exists():
        held = sorted(each.name for each in path.parent.glob(f"*{SUFFIX}"))[:5] if path.parent.is_dir() else []
        there = f"; {path.parent} has {', '.join(held)}" if held else ""
        raise CheckpointError(f"there is no file {name}{there}")


def gguf_config(file: GGUFFile) -> Any:
    """The transformers config of a GGUF file. Raises CheckpointError for an unsupported or damaged file."""
    from transformers import AutoConfig

    if file.metadata.get("general.type", "model") != "model":
        raise CheckpointError(f"{file.path} is not a model but a GGUF {file.metadata['general.type']}")
    if file.metadata.get("split.count", 0) > 1:
        raise CheckpointError(
            f"{file.path} is one of {file.metadata['split.count']} parts; join them with llama.cpp's "
            "llama-gguf-split --merge"
        )
    _require_package()
    with opening(f"{file.path}: transformers makes no model of it"), tempfile.TemporaryDirectory() as place:
        if file.architecture in _newer_architectures():  # read by a reader that skips long arrays
            config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
        else:
            (Path(place) / "outline.gguf").write_bytes(file.outline())
            config = AutoConfig.from_pretrained(place, gguf_file="outline.gguf")
    _size_experts(file, config)
    headers = {tensor.name: Header(list(tensor.shape), tensor.kind) for tensor in file.tensors.values()}
    check_config(config.to_dict(), headers, str(file.path))
    _scale_rotations(file, config)
    return config


def _size_experts(file: GGUFFile, config: Any) -> None:
    """Sets the widths of experts, which transformers' reader leaves at the default of the config."""
    for kind, name in (("expert", "moe_intermediate_size"), ("expert_shared", "shared_expert_intermediate_size")):
        stored = file.metadata.get(f"{file.architecture}.{kind}_feed_forward_length")
        if isinstance(stored, int) and hasattr(config, name):
            setattr(config, name, stored)


def described(found: GGUFModel) -> Any:
    """The config of a GGUF model as it is opened, including its quantization config, without reading weights."""
    file = read_header(found.path)
    config = gguf_config(file)
    config.dtype = _dtype(None, file)
    _quantized(config, _assigned(file, Naming(file, config, skeleton(file, config))), found)
    return config


def skeleton(file: GGUFFile, config: Any) -> Any:
    """The model with dense layers on the meta device."""
    with opening(f"{file.path}: transformers makes no model of it"), torch.device("meta"):
        return auto_class(config.to_dict()).from_config(config)


def open_tokenizer(found: GGUFModel) -> Any:
    """The tokenizer of a GGUF file, with its chat template."""
    from transformers import AutoTokenizer

    with opening(f"{found.name} has no tokenizer that transformers can open"):
        return AutoTokenizer.from_pretrained(found.path.parent, gguf_file=found.path.name)


def open_gguf(found: GGUFModel, options: Mapping[str, Any], keep: Keep | None = None) -> tuple[Any, dict[str, Any]]:
    """(model in eval mode, transformers' loading info) of a GGUF file. options: as for ``from_pretrained``.

    keep: where packed weights stay whose rows are in another order in the file, the others being views of it; by
    default all are read into memory.
    """
    file = read_header(found.path)
    config = gguf_config(file)
    empty = skeleton(file, config)
    dropped = (*_HUB_OPTIONS, "use_safetensors", "trust_remote_code", "gguf_file")
    options = {key: value for key, value in options.items() if key not in dropped}
    dtype = _dtype(options.pop("torch_dtype", options.pop("dtype", None)), file)
    state, assigned = translate(file, config, empty, dtype, keep)
    _quantized(config, assigned, found)
    with opening(f"{found.name} does not fit its metadata"):
        model, info = type(empty).from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, dtype=dtype, **options
        )
    model.name_or_path = model.config.name_or_path = found.name
    return model, dict(info)


class Decoded(NamedTuple):
    """The values of a parameter, decoded from a tensor of a GGUF file when they are read; a `streaming.Source`."""

    naming: Naming
    """The names of the file's parameters."""
    tensor: StoredTensor
    """The tensor."""
    dtype: torch.dtype
    """Dtype in the model."""

    @property
    def files(self) -> list[Path]:
        return [self.naming.file.path]

    def read(self, *, mapped: bool) -> Tensor:
        found: dict[str, Tensor] = {}
        self.naming.decode(self.tensor, found)
        if list(found) != [self.naming.names[self.tensor.name]]:
            raise CheckpointError(f"{self.naming.file.path}: {self.tensor.name} is not read by itself")
        return next(iter(found.values())).to(self.dtype)


def why_not_unread(found: GGUFModel) -> str | None:
    """Why the weights of a GGUF file cannot be decoded one by one, as the end of a sentence; None where they can be."""
    file = read_header(found.path)
    if any(tensor.name.endswith("_exps.weight") for tensor in file.tensors.values()):
        return "the experts in its GGUF file are in one tensor"
    return None


def open_unread(found: GGUFModel) -> tuple[Any, dict[str, Decoded]]:
    """(model with dense linears, its parameters on the meta device; name of each parameter → where its values are).

    Raises CheckpointError for a file that does not have them all.
    """
    from accelerate import init_empty_weights

    file = read_header(found.path)
    config = gguf_config(file)
    dtype = _dtype(None, file)
    with opening(f"{found.name}: transformers makes no model of it"), init_empty_weights(include_buffers=False):
        model: Any = auto_class(config.to_dict()).from_config(config, dtype=dtype)
    model.tie_weights()
    naming = Naming(file, config, model)
    index = {
        naming.names[tensor.name]: Decoded(naming, tensor, dtype)
        for tensor in file.tensors.values()
        if tensor.name in naming.names
    }
    known: dict[nn.Parameter, Decoded] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = index.setdefault(name, known[parameter]) if parameter in known else index.get(name)  # tied
        if source is None:
            raise CheckpointError(f"{found.name}: the weights of {name} are missing")
        known.setdefault(parameter, source)
    model.name_or_path = model.config.name_or_path = found.name
    return model.eval(), index


def _quantized(config: Any, assigned: Mapping[str, Quantizer], found: GGUFModel) -> None:
    if assigned:
        origin = {"quant_method": "gguf", "file": found.path.name}
        config.quantization_config = LLMToolsConfig.of(assigned, origin=origin).to_dict()


def _assigned(file: GGUFFile, naming: Naming) -> dict[str, Quantizer]:
    places = {tensor: naming.place(tensor) for tensor in file.tensors.values()}
    assigned: dict[str, Quantizer] = {
        place.name.removesuffix(".weight"): GGMLBlocks(tensor.kind)
        for tensor, place in places.items()
        if place and place.packed
    }
    return assigned | {
        path: GGMLBlocks(tensor.kind) for tensor in file.tensors.values() for path in naming.experts(tensor)
    }


def translate(
    file: GGUFFile, config: Any, empty: nn.Module, dtype: torch.dtype, keep: Keep | None = None
) -> tuple[dict[str, Tensor], dict[str, Quantizer]]:
    """(tensors by name as in a checkpoint of llmtools, quantizers by path); empty: the model on the meta device."""
    naming = Naming(file, config, empty)
    mapping = None if keep is None else mapped(file.path)
    state: dict[str, Tensor] = {}
    assigned: dict[str, Quantizer] = {}
    for path in naming.mixtures:
        unfuse(empty, path)
    for tensor in file.tensors.values():
        if experts := naming.experts(tensor):
            assigned |= dict.fromkeys(experts, GGMLBlocks(tensor.kind))
            stacked = file.read(tensor.name, mapping)  # [E, out, bytes of a row]
            read = {f"{path}.blocks": each for path, each in zip(experts, stacked, strict=True)}
            state |= read if keep is None else keep(read)
            continue
        place = naming.place(tensor)
        if place is None:
            continue
        if place.packed:
            path = place.name.removesuffix(".weight")
            assigned[path] = GGMLBlocks(tensor.kind)
            rows = file.read(tensor.name, mapping)
            read = {f"{path}.blocks": rows if place.order is None else rows[place.order]}
            state |= read if keep is None else keep(read)
        else:
            naming.decode(tensor, state)
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    _check_shapes(file, empty, state)
    return state, assigned


_EXPERTS = re.compile(r"(.*\.ffn_(gate|up|down)_exps)\.weight")
"""Name of a tensor with the weights of all experts of a layer: (its name in `Naming.names`, projection)."""
_LINEARS = {"gate": GATE, "up": UP, "down": DOWN}


class Place(NamedTuple):
    """The parameter that a tensor of the file is for."""

    name: str
    """Name of the model's parameter."""
    packed: bool
    """Whether it stays packed."""
    order: Tensor | None
    """Permutation [out] of a packed tensor: the file's row for each row of the parameter; None for the identity."""


class Naming:
    """The parameter for each tensor of a GGUF file, by transformers' tables."""

    def __init__(self, file: GGUFFile, config: Any, empty: nn.Module) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            GGUF_SUPPORTED_ARCHITECTURES,
            TENSOR_PROCESSORS,
            TensorProcessor,
        )

        if file.architecture not in GGUF_SUPPORTED_ARCHITECTURES and file.architecture in _newer_architectures():
            raise CheckpointError(
                f"{file.path}: weights of {file.architecture} are in an order that is not supported yet; decode them "
                "with transformers (from_pretrained(folder, gguf_file=…), save_pretrained) and use `llmtools quantize`"
            )
        self.file, self.empty = file, empty
        self.processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())
        with opening(f"{file.path}: the tensors of {file.architecture} are not known"):
            self.names = gguf_names(file.architecture, empty, self.processor)

        self.mixtures = self._packed_mixtures()
        """Paths of fused experts whose weights stay packed, one by one."""

    def experts(self, tensor: StoredTensor) -> list[str]:
        """Paths of the linears whose weights, [E, out, in] together, a tensor holds; [] for other tensors."""
        match = _EXPERTS.fullmatch(tensor.name)
        holder = self.names.get(match[1], "").rpartition(".")[0] if match else ""
        if not match or holder not in self.mixtures:
            return []
        return [f"{holder}.{index}.{_LINEARS[match[2]]}" for index in range(tensor.shape[0])]

    def _packed_mixtures(self) -> frozenset[str]:
        """Fused experts, without biases and in the usual layout, all of whose tensors are of a block type."""
        kinds: dict[str, list[bool]] = {}
        for tensor in self.file.tensors.values():
            if match := _EXPERTS.fullmatch(tensor.name):
                holder = self.names.get(match[1], "").rpartition(".")[0]
                kinds.setdefault(holder, []).append(tensor.kind in TYPES and len(tensor.shape) == 3)
        fused: dict[str, Any] = fused_experts(self.empty)
        plain = {
            path
            for path, module in fused.items()
            if module.has_gate and not module.has_bias and not module.is_transposed
        }
        return frozenset(path for path, packed in kinds.items() if path in plain and len(packed) == 3 and all(packed))

    def place(self, tensor: StoredTensor) -> Place | None:
        """The parameter for a tensor; None, with a warning, where the model has none."""
        name = self.names.get(tensor.name)
        if name is None and tensor.name.endswith("_exps.weight"):  # experts, which their processor stacks
            return Place(tensor.name, False, None)
        if name is None:
            if tensor.name != ROTATIONS:
                log.warning("%s: tensor %s is not used by %s", self.file.path, tensor.name, type(self.empty).__name__)
            return None
        if tensor.kind not in TYPES or not self._may_be_packed(name, tensor):
            return Place(name, False, None)
        order = self.order(tensor)
        return Place(name, order is not None, None if order is None or _natural(order) else order)

    def _may_be_packed(self, name: str, tensor: StoredTensor) -> bool:
        path, _, last = name.rpartition(".")
        module: Any = self.empty.get_submodule(path)
        if last != "weight" or len(tensor.shape) != 2 or tuple(module.weight.shape) != tensor.shape:
            return False
        return isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and not computes_otherwise(module))

    def order(self, tensor: StoredTensor) -> Tensor | None:
        """The permutation [out] that transformers' reader applies to the rows of a weight; None where it does more.

        It is determined on a weight of two columns whose entries are their own indices.
        """
        cells = np.arange(2 * tensor.shape[0], dtype=np.int64).reshape(-1, 2)
        try:
            done = self.processor.process(weights=cells, name=tensor.name, tensor_key_mapping=self.names)
        except Exception:  # it depends on the number of columns
            return None
        moved = np.asarray(done.weights)
        if done.name != tensor.name or moved.shape != cells.shape or not (moved[:, 0] + 1 == moved[:, 1]).all():
            return None
        order = torch.from_numpy(moved[:, 0] // 2)
        return order if torch.equal(order.sort().values, torch.arange(len(order))) else None

    def decode(self, tensor: StoredTensor, state: dict[str, Tensor]) -> None:
        """Adds a tensor to `state`, decoded as transformers' reader decodes it."""
        stored = self.file.read(tensor.name)
        if tensor.kind in TYPES:
            stored = dequantize_ggml(stored.flatten(0, -2), tensor.kind, torch.float32).reshape(tensor.shape)
        done = self.processor.process(
            weights=stored.float().numpy(),
            name=tensor.name,
            tensor_key_mapping=self.names,
            parsed_parameters={"tensors": state},
        )
        if done.name is not None and done.name in self.names:
            state[self.names[done.name]] = torch.from_numpy(np.ascontiguousarray(done.weights))


def gguf_names(architecture: str, empty: Any, processor: Any) -> dict[str, str]:
    """Parameter of the model by tensor of the file, from the table of the package gguf.

    transformers' function builds that table again for each module, which takes ten seconds.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (number,) = [each for each, name in MODEL_ARCH_NAMES.items() if name == architecture]
    table = get_tensor_name_map(number, empty.config.num_hidden_layers)
    names: dict[str, str] = {}
    for true_name in empty.state_dict():
        name = processor.preprocess_name(true_name)
        path, dot, last = name.rpartition(".")
        stem, suffix = (path, dot + last) if last in ("weight", "bias") else (name, "")
        found = next((each for each in (table.get_name(part) for part in _tails(stem)) if each is not None), None)
        if found is not None:
            names.setdefault(found + suffix, name)
        else:
            processor.perform_fallback_tensor_mapping(names, suffix, "", name)
    return names


def _tails(path: str) -> list[str]:
    """A path, and that path without its first part: some models were converted as bare decoders."""
    return [path, path.partition(".")[2]] if "." in path else [path]


def _newer_architectures() -> Mapping[str, Any]:
    """The architectures whose configs transformers (5.22 and later) has in its newer tables."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:
        return {}
    return dict(GGUF_CONFIG_ARCHS)


def _natural(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order)))


def _check_shapes(file: GGUFFile, empty: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where a tensor has another shape than its parameter."""
    for name, parameter in empty.named_parameters():
        if name in state and state[name].shape != parameter.shape:
            raise CheckpointError(
                f"{file.path} is damaged: {name} has shape {list(state[name].shape)}, expected {list(parameter.shape)}"
            )


def _dtype(asked: Any, file: GGUFFile) -> torch.dtype:
    """The dtype of unpacked tensors: the one asked for; by default float32, or that of a file without blocks."""
    if isinstance(asked, str) and asked != "auto":
        asked = getattr(torch, asked, None)
    if isinstance(asked, torch.dtype):
        return asked
    kinds = {tensor.kind for tensor in file.tensors.values()}
    halves = [kind for name, kind in FLOATS.values() if name in ("BF16", "F16") and name in kinds]
    return torch.float32 if kinds & TYPES.keys() or not halves else halves[-1]


def _require_package() -> None:
    """Raises CheckpointError where transformers cannot read GGUF."""
    import transformers

    try:
        import gguf  # noqa: F401
        import transformers.modeling_gguf_pytorch_utils
    except ImportError as error:
        lacking = getattr(error, "name", None) or str(error)
        way = "pip install 'llmtools[export]'" if lacking == "gguf" else "transformers 5.16 to 5.23 have it"
        raise CheckpointError(
            f"GGUF files are read by transformers (installed: {transformers.__version__}) with {lacking}, which is not "
            f"installed: {way}"
        ) from error


# ---- rotary scaling of LLaMA 3 ---------------------------------------------------------------------------------------

ROTATIONS = "rope_freqs.weight"
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _scale_rotations(file: GGUFFile, config: Any) -> None:
    """Sets LLaMA 3's rotary scaling, stored as a factor per frequency, which transformers' reader ignores."""
    from .gguf import llama3_factors

    if ROTATIONS not in file.tensors:
        return
    factors = file.read(ROTATIONS).float()
    rope = dict(getattr(config, "rope_parameters", None) or {})
    for original in (8192, config.max_position_embeddings):
        tried = {**rope, **_LLAMA3, "factor": float(factors.max()), "original_max_position_embeddings": original}
        expected = llama3_factors(tried, 2 * len(factors))
        if torch.allclose(expected, factors, rtol=1e-4):
            config.rope_parameters = tried
            return
    log.warning("%s: its rotary factors are not LLaMA 3's and are ignored", file.path)
