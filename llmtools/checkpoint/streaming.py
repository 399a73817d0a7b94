"""Open a model without its weights: the skeleton, and an index that says where the values of each parameter are.

transformers reads the folder itself, as it does for any model, and leaves the large weights on the disk, as its
``device_map`` says. So names are converted by its own rules, what it computes from several tensors (fused experts) is
in files that it writes, tied weights are tied, and buffers are made. The hooks that would read each layer at each call
are removed, since a walk knows better when a block is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..formats.gguf_reading import find, open_tokenizer, why_not_unread
from ..formats.gguf_reading import open_unread as open_unread_gguf
from ..model.blocks import find_blocks, unit_of
from ..model.float8 import Float8, scales_of
from ..model.integrity import read_headers
from ..model.streaming import Source, Stored, Streamed, cannot_stream
from ..nn.experts import fused_experts
from .folder import check_verifiable, config_at, load, skeleton
from .loading import is_quantized


@dataclass(frozen=True)
class Unread:
    """A model whose large weights were not read."""

    model: Any
    """The model, its blocks, embeddings and head on the meta device."""
    tokenizer: Any
    """Its tokenizer."""
    index: Mapping[str, Source]
    """Name of each parameter on the meta device → where its values are."""


def why_not_streamed(name: str, *, trust_remote_code: bool = False) -> str | None:
    """Why the weights of a folder or hub name cannot be read block by block; None where they can be."""
    if trust_remote_code:
        return "its code comes with it"
    if (file := find(name, {})) is not None and (why := why_not_unread(file)) is not None:
        return why
    if (Path(name).expanduser() / "adapter_config.json").exists():
        return "it is an adapter"
    if is_quantized(name) and not is_converted(name):
        return "it is quantized"
    return cannot_stream(skeleton(name))


def open_unread(name: str, converted: Path, *, verify: bool = False) -> Unread:
    """Opens a model for which `why_not_streamed` gives no reason, with the checks of `load`; float8 weights are
    bfloat16 there, those of GGUF files decoded.

    converted: folder for weights that the model has in another form than the files. Raises CheckpointError for float8
    weights that are not read as they are.
    """
    if (file := find(name, {})) is not None:
        check_verifiable(file, verify=verify)
        model, decoded = open_unread_gguf(file)
        return Unread(model, open_tokenizer(file), decoded)
    empty, float8 = skeleton(name), float8_of(name)
    options: dict[str, Any] = {"dtype": "auto"}
    if float8 is not None:
        if mixture := next(iter(fused_experts(empty)), None):
            raise CheckpointError(
                f"{name}: experts ({mixture}) that are float8 are not read; give the model in bfloat16"
            )
        options = {"dtype": torch.bfloat16, "config": empty.config}
    options |= {"device_map": _places(empty), "offload_folder": str(converted)}
    with warnings.catch_warnings():  # the network's own tensors are no modules
        warnings.filterwarnings("ignore", "The following device_map keys do not match", UserWarning)
        model, tokenizer = load(name, verify=verify, **options)
    index = _detached(model)
    _check_shapes(model, index)
    if float8 is not None:
        index = _scaled(index, float8)
    return Unread(model.eval(), tokenizer, index)


@contextmanager
def opened_whole(name: str, *, verify: bool = False) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer) of `open_unread`, with all weights in memory, or on the GPU if there is one."""
    with TemporaryDirectory(prefix="llmtools-") as folder:
        opened = open_unread(name, Path(folder) / "converted", verify=verify)
        Streamed(opened.model, opened.index, Path(folder)).complete()
        yield opened.model.to("cuda" if torch.cuda.is_available() else "cpu"), opened.tokenizer


def is_converted(name: str) -> bool:
    """Whether the weights of a model are others than those in its files: float8, or blocks of a GGUF file."""
    return find(name, {}) is not None or float8_of(name) is not None


def float8_of(name: str) -> Float8 | None:
    """How the weights of a folder or hub name are float8; None where they are not."""
    return Float8.of(config_at(name))


def _scaled(index: Mapping[str, Stored], float8: Float8) -> dict[str, Stored]:
    """The index, with the scales of float8 weights. Raises CheckpointError where one is none of the index."""
    scales = {
        (stored, name): scale
        for stored in {each.file.parent for each in index.values()}
        for name, scale in scales_of(stored, float8).items()
    }
    found = {name: each._replace(scale=scales.pop((each.file.parent, each.name), None)) for name, each in index.items()}
    if scales:
        folder, name = next(iter(scales))
        raise CheckpointError(f"{folder}: {name} is float8 and no linear of the model; it is not read")
    return found


def _places(empty: nn.Module) -> dict[str, str]:
    """The device map: blocks on the disk, and of what is around them embeddings and linears.

    All that is around the blocks is in memory where a module there has weights of its own beside modules with weights:
    accelerate moves such a module as a whole.
    """
    blocks = {block.path: "disk" for block in find_blocks(empty)}
    around = {
        path: module
        for path, module in empty.named_modules()
        if path and (module._parameters or module._buffers) and unit_of(path, blocks) is None
    }
    nested = any(path.startswith(f"{other}.") for path in around for other in around)
    large = () if nested else (nn.Embedding, nn.Linear)
    places = blocks | {path: "disk" if isinstance(module, large) else "cpu" for path, module in around.items()}
    return places | dict.fromkeys({**empty._parameters, **empty._buffers}, "cpu")  # the network's own, by their names


def _detached(model: Any) -> dict[str, Stored]:
    """Removes accelerate's hooks from a model; returns the index that they read the weights by."""
    from accelerate.hooks import remove_hook_from_module

    found: Mapping[str, Mapping[str, str]] = {}
    for module in model.modules():
        dataset = getattr(getattr(getattr(module, "_hf_hook", None), "weights_map", None), "dataset", None)
        found = getattr(dataset, "index", found)
        hooked = hasattr(module, "_hf_hook")
        remove_hook_from_module(module)
        if hooked:
            vars(module).pop("forward", None)  # the class has it
    del model.hf_device_map
    model.tie_weights()
    return {
        name: Stored(Path(entry["safetensors_file"]), entry["weight_name"], getattr(torch, entry["dtype"]))
        for name, entry in found.items()
    }


def _check_shapes(model: nn.Module, index: Mapping[str, Stored]) -> None:
    """Raises CheckpointError for tensors whose shape is not that of the model: they would be noticed hours later."""
    headers = {file: read_headers([file]) for file in {stored.file for stored in index.values()}}
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            continue
        stored = index.get(name)
        if stored is None:
            raise CheckpointError(f"the weights of {name} are missing")
        if (shape := headers[stored.file][stored.name].shape) != list(parameter.shape):
            raise CheckpointError(f"{stored.file}: {name} has shape {shape}, expected {list(parameter.shape)}")
