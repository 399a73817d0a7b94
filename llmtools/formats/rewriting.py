"""A third-party checkpoint written again with other codes in some modules, in its own format and bits.

Everything that is not a code of those modules is copied from the original file: scales, zero points, config,
tokenizer, other tensors. That is how an adapter is merged into a GPTQ, AWQ, compressed-tensors or GGUF base (`llmtools
merge`), for the programs that read the original. What was written is read again and compared before it is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from ..files import METADATA
from ..model.integrity import reading, shards_of
from ..model.transformers_integration import locate
from ..nn.packed import PackedWeight
from ..quant import GGMLBlocks
from .base import Format
from .gguf_header import read_header
from .gguf_reading import GGUFModel, Naming, find, gguf_config, skeleton
from .reading import External, detect
from .tensors import Module

_OWN = (METADATA, "README.md")
"""Names of files that are written anew."""


def writer(name: str, model: nn.Module) -> Callable[[Path, Collection[str]], None] | None:
    """A function (folder, paths of layers) that writes the checkpoint `name` with those layers' codes from `model`.

    name: the folder, hub name or GGUF file that the model was opened by. None where it is of no third-party format that
    can be written back: then `checkpoint.folder` writes it as ours.
    """
    if (file := find(name, {})) is not None:
        return lambda folder, paths: _rewrite_gguf(file, model, folder, paths)
    external = detect(name, {}) if Path(name).exists() or "/" in name else None
    if external is None or type(external.format).rewrite is Format.rewrite:
        return None
    return lambda folder, paths: _rewrite_folder(external, model, folder, paths)


def _rewrite_folder(external: External, model: Any, folder: Path, paths: Collection[str]) -> None:
    shards = shards_of(external.folder)
    copied = {file.name for file in shards} | {*_OWN}
    for each in sorted(external.folder.iterdir()):
        if each.is_file() and each.name not in copied and not each.name.startswith("."):
            shutil.copyfile(each, folder / each.name)
    left = set(paths)
    for shard in shards:
        with reading(shard):
            file = safe_open(shard, framework="pt")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        for stored_path in external.format.modules(tensors):
            located = [locate(model, part) for part in external.format.parts(stored_path)]
            if len(located) == 1 and located[0] in left:
                tensors |= _rewritten(external.format, tensors, stored_path, model.get_submodule(located[0]))
                left.discard(located[0])
        save_file(tensors, folder / shard.name, metadata=metadata)
    if left:
        raise InputError(f"{min(left)} cannot be written back in the format of {external.folder}")


def _rewritten(reader: Format, tensors: Mapping[str, Tensor], stored_path: str, layer: Any) -> dict[str, Tensor]:
    """The tensors of a module with the codes of `layer`, by their names in the file, read again and compared."""
    shape, packed = (layer.out_features, layer.in_features), {k: v.detach().cpu() for k, v in layer.packed.items()}
    codes = reader.rewrite(Module(tensors, stored_path), layer.quantizer, packed)
    made = {f"{stored_path}.{name}": tensor.contiguous() for name, tensor in codes.items()}
    for name, tensor in made.items():
        if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
            raise CheckpointError(f"{name} would be written as {list(tensor.shape)} {tensor.dtype}")
    quantizer, again = reader.read(Module({**tensors, **made}, stored_path), *shape)
    if quantizer != layer.quantizer or any(not torch.equal(again[name], packed[name]) for name in packed):
        raise CheckpointError(f"{stored_path} is not what was written, when it is read again")
    return made


def _rewrite_gguf(found: GGUFModel, model: nn.Module, folder: Path, paths: Collection[str]) -> None:
    """A copy of the file in which the bytes of these layers are replaced, their rows in the file's order."""
    file = read_header(found.path)
    config = gguf_config(file)
    naming = Naming(file, config, skeleton(file, config))
    target = folder / found.path.name
    shutil.copyfile(found.path, target)
    left = set(paths)
    with target.open("r+b") as stream:
        for tensor in file.tensors.values():
            place = naming.place(tensor)
            path = place.name.removesuffix(".weight") if place is not None and place.packed else None
            if place is None or path not in left:
                continue
            layer: Any = model.get_submodule(path)
            assert isinstance(layer, PackedWeight) and layer.quantizer == GGMLBlocks(tensor.kind)
            rows = layer.packed["blocks"].detach().cpu()
            if place.order is not None:
                rows = torch.empty_like(rows).index_copy_(0, place.order, rows)
            data = rows.contiguous().numpy().tobytes()
            assert len(data) == tensor.size, tensor.name
            stream.seek(tensor.start)
            stream.write(data)
            left.discard(path)
    if left:
        raise InputError(f"{min(left)} cannot be written back into {found.path.name}")
