"""The tensors of a folder's safetensors files: read one at a time, written in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..model.integrity import reading, refuse_pickles, shards_of


class Tensors(Mapping[str, Tensor]):
    """Name → tensor of a folder. Names are read from the files' headers; each tensor is read on access."""

    def __init__(self, folder: Path) -> None:
        self._files = {}
        refuse_pickles(folder)
        for path in shards_of(folder):
            with reading(path):
                file = safe_open(path, framework="pt")
                names = list(file.keys())
            self._files.update(dict.fromkeys(names, file))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without its values."""
        return list(self._files[name].get_slice(name).get_shape())

    def row(self, name: str, index: int) -> Tensor:
        """``tensor[index]``, without reading the rest."""
        tensor: Tensor = self._files[name].get_slice(name)[index]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Module:
    """The tensors of one module, by names relative to its path; `seen` collects the names that were accessed."""

    def __init__(self, tensors: Mapping[str, Tensor], path: str) -> None:
        self._tensors, self.path = tensors, path
        self.seen: set[str] = set()

    def __contains__(self, name: str) -> bool:
        self.seen.add(name)
        return f"{self.path}.{name}" in self._tensors

    def get(self, name: str, *shape: int | None, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
        """The tensor of that name. Raises CheckpointError unless shape (None: any size) and type are as expected."""
        self.seen.add(name)
        full = f"{self.path}.{name}"
        if full not in self._tensors:
            raise CheckpointError(f"the checkpoint is damaged: {full} is missing")
        tensor = self._tensors[full]
        fits = len(shape) == tensor.ndim and all(
            want is None or want == size for want, size in zip(shape, tensor.shape, strict=True)
        )
        if shape and not fits:
            expected = ["any" if size is None else size for size in shape]
            raise CheckpointError(
                f"the checkpoint is damaged: {full} has shape {list(tensor.shape)}, expected {expected}"
            )
        if dtypes and tensor.dtype not in dtypes:
            raise CheckpointError(
                f"the checkpoint is damaged: {full} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}"
            )
        return tensor


def write_shards(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: str | int) -> None:
    """Writes tensors […], of any dtypes, as ``model*.safetensors``, with an index for more than one file."""
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": split.metadata, "weight_map": split.tensor_to_filename},
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
