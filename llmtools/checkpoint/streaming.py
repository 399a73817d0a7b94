"""Open a model without its weights: the skeleton, and an index that says where the values of each parameter are.

transformers reads the folder itself, as it does for any model, and leaves the large weights on the disk, as its
``device_map`` says. So names are converted by its own rules, what it computes from several tensors (fused experts) is
in files that it writes, tied weights are tied, and buffers are made. The hooks that would read each layer at each call
are removed, since a walk knows better when a block is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..model.blocks import find_blocks, unit_of
from ..model.integrity import read_headers
from ..model.streaming import Stored, cannot_stream
from .folder import load, skeleton
from .loading import is_quantized


@dataclass(frozen=True)
class Unread:
    """A model whose large weights were not read."""

    model: Any
    """The model, its blocks, embeddings and head on the meta device."""
    tokenizer: Any
    """Its tokenizer."""
    index: dict[str, Stored]
    """Name of each parameter on the meta device → where its values are."""


def why_not_streamed(name: str, *, trust_remote_code: bool = False) -> str | None:
    """Why the weights of a folder or hub name cannot be read block by block; None where they can be."""
    if trust_remote_code:
        return "its code comes with it"
    if name.endswith(".gguf"):
        return "it is a GGUF file"
    if (Path(name).expanduser() / "adapter_config.json").exists():
        return "it is an adapter"
    if is_quantized(name):
        return "it is quantized"
    return cannot_stream(skeleton(name))


def open_unread(name: str, converted: Path, *, verify: bool = False) -> Unread:
    """Opens a model for which `why_not_streamed` gives no reason, with the checks of `load`.

    converted: folder for weights that the model has in another form than the files.
    """
    model, tokenizer = load(
        name, dtype="auto", verify=verify, device_map=_places(skeleton(name)), offload_folder=str(converted)
    )
    index = _detached(model)
    _check_shapes(model, index)
    return Unread(model.eval(), tokenizer, index)


def _places(empty: nn.Module) -> dict[str, str]:
    """The device map: blocks on the disk, and of what is around them embeddings and linears.

    All that is around the blocks is in memory where a module there has weights of its own beside modules with weights:
    accelerate moves such a module as a whole.
    """
    blocks = {block.path: "disk" for block in find_blocks(empty)}
    around = {
        path: module
        for path, module in empty.named_modules()
        if (module._parameters or module._buffers) and unit_of(path, blocks) is None
    }
    nested = any(path.startswith(f"{other}.") for path in around for other in around)
    large = () if nested else (nn.Embedding, nn.Linear)
    return blocks | {path: "disk" if isinstance(module, large) else "cpu" for path, module in around.items()}


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
