"""A third-party checkpoint written again with other scales, zero points or codes, in its own format and bits.

Recovery changes scales, float zero points, norms and biases; merging an adapter changes codes or zero points. In a
folder the tensors that hold them are replaced, in a GGUF file the bytes of the blocks and the tensors of norms and
biases. All other tensors, and in a GGUF file all other bytes, are those of the original, so the programs that read the
original read the result. What replaces a module's tensors is `Format.scales` and `Format.codes`; what is merged is
read again and compared before it is written.
"""

from __future__ import annotations

import logging
import shutil
from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from ..files import METADATA, RUN
from ..kernels.ggml import TYPES
from ..model.integrity import read_headers, shards_of
from ..model.recover import trained_parameters
from ..model.transformers_integration import locate
from ..nn.embedding import TiedLinear
from ..nn.linear import QuantizedLinear
from ..nn.swap import own_linears, packed_layers
from .expert_names import stored_paths
from .gguf_header import StoredTensor, read_header
from .gguf_reading import GGUFModel, Naming, Place, find, gguf_config, skeleton
from .reading import External, detect
from .tensors import Module

log = logging.getLogger(__name__)

Part = Literal["scales", "codes", "zeros"]
"""What is written anew: scales, with norms and biases; codes; or zero points."""
_OWN = (METADATA, RUN, "README.md")
"""Files that are written anew, or not at all."""


class Rewriter(ABC):
    """Writes a recovered or merged model in the files' own format.

    Where it is made it raises InputError, saying what the files cannot hold, for a model that has to be written
    otherwise.
    """

    format: str
    """Name of the format."""

    @abstractmethod
    def write(self, model: nn.Module, folder: Path, changed: Collection[str] | None = None) -> None:
        """Writes the files into an existing folder.

        model: the one it was made with, or the same opened again. changed: paths of the layers that differ; None for
        all. Raises CheckpointError where codes are not what was written, when they are read again.
        """


def rewriter(name: str, model: nn.Module, part: Part = "scales") -> Rewriter | None:
    """What writes the third-party checkpoint of that name; None where it is ours. model: opened from it."""
    if (file := find(name, {})) is not None:
        return GGUFRewriter(file, model, part)
    external = detect(name, {})
    return None if external is None else FolderRewriter(external, model, part)


def rewriter_if_any(name: str, model: nn.Module, part: Part = "scales") -> Rewriter | None:
    """As `rewriter`; None, with a warning, also where those files cannot hold the result, which llmtools' own can."""
    try:
        return rewriter(name, model, part)
    except InputError as error:
        log.warning(
            "%s; the result is written as a folder of llmtools, which `llmtools export` converts (--format gptq, "
            "compressed-tensors, gguf or dense) where that format can hold it",
            error,
        )
        return None


class FolderRewriter(Rewriter):
    """Writes a folder of safetensors; files of other kinds are copied."""

    def __init__(self, found: External, model: nn.Module, part: Part) -> None:
        self.found, self.format, self.part = found, found.format.name, part
        self.shards = shards_of(found.folder)
        self.dense: dict[str, str] = {}
        if part == "scales":
            headers, trained = read_headers(self.shards), trained_parameters(model)
            places = {name: self._parameter(model, name) for name, each in headers.items() if len(each.shape) <= 1}
            self.dense = {name: place for name, place in places.items() if place in trained}
            if missing := trained.keys() - set(self.dense.values()):
                raise InputError(f"{found.folder} has no tensor of its own for {min(missing)}")
        for _ in islice(self._modules(model, None), None if part == "scales" else 1):  # codes: all or none can be
            pass

    def write(self, model: nn.Module, folder: Path, changed: Collection[str] | None = None) -> None:
        parameters = trained_parameters(model) if self.dense else {}
        made = {name: parameters[place].data for name, place in self.dense.items()}
        for module in self._modules(model, changed):
            made |= module
        kept = {*_OWN, *(shard.name for shard in self.shards)}
        for file in self.found.folder.iterdir():
            if file.is_file() and file.name not in kept and not file.name.startswith("."):
                shutil.copyfile(file, folder / file.name)
        for shard in self.shards:
            with safe_open(shard, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
                metadata = opened.metadata()
            for name in tensors.keys() & made.keys():
                tensors[name] = made[name].detach().cpu().to(tensors[name].dtype).contiguous()
            save_file(tensors, folder / shard.name, metadata=metadata)

    def _modules(self, model: nn.Module, changed: Collection[str] | None) -> Iterator[dict[str, Tensor]]:
        """For each packed layer, name in the files → tensor, of its scales or codes."""
        reader = self.found.format
        tensors = reader.tensors(self.found.folder)
        layers = own_linears(model)
        names = {there: here for here, there in stored_paths(model).items()}
        for stored_path in reader.modules(tensors):
            paths = [locate(model, names.get(part, part)) for part in reader.parts(stored_path)]
            if len(paths) != 1:
                raise InputError(f"{stored_path} holds several layers in one")
            if paths[0] in layers and (changed is None or paths[0] in changed):
                yield self._module(tensors, stored_path, layers[paths[0]])

    def _module(self, tensors: Mapping[str, Tensor], stored_path: str, layer: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of one module, by their names in the files."""
        reader, packed = self.found.format, {name: each.detach().cpu() for name, each in layer.packed.items()}
        stored = Module(tensors, stored_path)
        if self.part == "scales":
            return {f"{stored_path}.{name}": each for name, each in reader.scales(stored, packed).items()}
        changed = (
            reader.scales(stored, packed) if self.part == "zeros" else reader.codes(stored, layer.quantizer, packed)
        )
        made = {f"{stored_path}.{name}": each for name, each in changed.items()}
        for name, tensor in made.items():
            if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise CheckpointError(f"{name} would be written as {list(tensor.shape)} {tensor.dtype}")
        quantizer, again = reader.read(Module(ChainMap(made, tensors), stored_path), *layer.shape)  # type: ignore[arg-type]
        if quantizer != layer.quantizer or any(not torch.equal(again[name], packed[name]) for name in packed):
            raise CheckpointError(f"{stored_path} is not what was written, when it is read again")
        return made

    def _parameter(self, model: nn.Module, name: str) -> str | None:
        """Name of the model's parameter for a tensor of the files; None where there is none."""
        path, _, last = name.rpartition(".")
        try:
            found = locate(model, path)
        except CheckpointError:
            return None
        return None if found is None else f"{found}.{last}"


class GGUFRewriter(Rewriter):
    """Writes a file of the same name, byte by byte the same but for the trained numbers."""

    format = "gguf"

    def __init__(self, found: GGUFModel, model: nn.Module, part: Part = "scales") -> None:
        self.file = read_header(found.path)
        config = gguf_config(self.file)
        self.naming = Naming(self.file, config, skeleton(self.file, config))
        if self.naming.mixtures:
            raise InputError(f"{found.path}: the experts of a mixture in a GGUF file cannot be written again")
        self.places = {tensor: self.naming.place(tensor) for tensor in self.file.tensors.values()}
        dense = trained_parameters(model) if part == "scales" else {}
        self.maps = {
            tensor: _affine_map(self.naming, tensor)
            for tensor, place in self.places.items()
            if place is not None and place.name in dense
        }
        held = {place.name for tensor, place in self.places.items() if place and tensor in self.maps}
        if missing := dense.keys() - held:
            raise InputError(f"{found.name} has no tensor of its own for {min(missing)}")

    def write(self, model: nn.Module, folder: Path, changed: Collection[str] | None = None) -> None:
        self.write_file(model, folder / self.file.path.name)

    def write_file(self, model: nn.Module, target: Path) -> None:
        """`write` to that file."""
        shutil.copyfile(self.file.path, target)
        layers = {path: layer for path, layer in packed_layers(model).items() if not isinstance(layer, TiedLinear)}
        parameters = trained_parameters(model) if self.maps else {}
        with target.open("r+b") as stream:
            for tensor, place in self.places.items():
                if place is None:
                    continue
                path = place.name.removesuffix(".weight")
                if place.packed and path in layers:
                    data = _in_files_order(layers[path].packed["blocks"], place)
                elif tensor in self.maps:
                    data = self._dense(tensor, parameters[place.name])
                else:
                    continue
                stream.seek(tensor.start)
                stream.write(data.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def _dense(self, tensor: StoredTensor, parameter: Tensor) -> Tensor:
        """The file's values [n] for a parameter [n]; those that are unchanged are the file's to the bit."""
        stored, (order, shift) = self.file.read(tensor.name), self.maps[tensor]
        wanted = parameter.detach().cpu().float()
        changed = stored.float()[order] + shift != wanted
        stored[order[changed]] = (wanted - shift)[changed].to(stored.dtype)
        return stored


def _in_files_order(rows: Tensor, place: Place) -> Tensor:
    if place.order is None:
        return rows
    stored = torch.empty_like(rows)
    stored[place.order] = rows.detach()
    return stored


def _affine_map(naming: Naming, tensor: StoredTensor) -> tuple[Tensor, Tensor]:
    """(order int64 [n], shift float32 [n]) with parameter = stored[order] + shift, as transformers' reader has it.

    It is determined on zeros and on 0, 1, 2, …. Raises InputError where the reader does something else.
    """
    count = tensor.shape[-1]
    found = []
    for cells in (np.zeros(count, dtype=np.float32), np.arange(count, dtype=np.float32)):
        done: Any = naming.processor.process(
            weights=cells, name=tensor.name, tensor_key_mapping=naming.names, parsed_parameters={"tensors": {}}
        )
        if done.name != tensor.name or np.shape(done.weights) != (count,):
            raise InputError(f"{tensor.name} is put together with others by transformers' reader")
        found.append(torch.from_numpy(np.array(done.weights, dtype=np.float32)))
    order = (found[1] - found[0]).long()
    if tensor.kind in TYPES or not torch.equal(order.sort().values, torch.arange(count)):
        raise InputError(f"{tensor.name} is computed from the file's numbers, which cannot be undone")
    return order, found[0]
