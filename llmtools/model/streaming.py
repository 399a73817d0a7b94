"""Quantize a model that does not fit in memory: its weights stay in files, and one block at a time is read.

The model is a skeleton on the meta device. An index says for each of its parameters where the values are: in the
model's own safetensors shards at first, and in a file of the work folder when the block is finished. `holding` a module
reads its parameters, and lets go of them at the end; so memory is that of one block in its original precision. What is
around the blocks (embeddings, head) is mapped, not read, since a walk looks up a few rows of it only. Hidden states
beyond a budget are files, too, mapped and without a name: they end with the process, however that ends. Where the
network has to run as a whole (`whole`: the choice of bits, gradients, the distributions that recovery trains towards)
all weights are mapped for that time, and the page cache streams them; what has to be converted would be copied, so
float8 sources cannot (`checkpoint/streaming.py`).

A finished block is one file, written whole or not at all, with its part of the report. A later run takes such blocks
as they are (`restored`) and goes on at the first that is missing; since a block depends on nothing but the blocks
before it, the bits are those of an unbroken run.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..content import file_state
from ..errors import CheckpointError, InputError
from ..files import whole_file
from ..nn.linear import QuantizedLinear
from ..nn.lora_init import LoraInit
from ..nn.swap import aliases, set_module
from ..quant import Quantizer, from_spec
from ..quant.base import layout_bytes
from .blocks import find_blocks, linear_at, unit_of
from .float8 import Scale
from .integrity import reading
from .report import Report
from .storage import AROUND, Storage

if TYPE_CHECKING:
    from ..nn.experts import Part

REPORT = "report"
"""Key of a finished block's part of the report, as JSON, in the metadata of its file."""
_LORA = ".lora_init."
"""Separator of a module's path and the side of its LoRA initialisation in the name of a tensor."""


class Source(Protocol):
    """Where the values of a parameter are."""

    @property
    def files(self) -> list[Path]:
        """The files that they are read from."""

    def read(self, *, mapped: bool) -> Tensor:
        """The values, in the type of the model. mapped: a view of the file may be given, where they are there as they
        are."""


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    """Safetensors file."""
    name: str
    """Name of the tensor in it."""
    dtype: torch.dtype | None = None
    """Dtype in the model, if the file may have another."""
    part: Part | None = None
    """Part of the tensor, if that holds all experts of a layer."""
    scale: Scale | None = None
    """Place of its scales, if it is float8."""

    @property
    def files(self) -> list[Path]:
        return [self.file] if self.scale is None else [self.file, self.scale.file]

    def read(self, *, mapped: bool) -> Tensor:
        with reading(self.file), safe_open(self.file, framework="pt") as file:
            found: Tensor = file.get_tensor(self.name) if self.part is None else _part(file, self.name, self.part)
        if self.scale is not None:
            return self.scale.apply(found, self.dtype or torch.bfloat16)
        values = found.to(self.dtype or found.dtype)
        return values if mapped or values is not found else found.clone()


def cannot_stream(model: nn.Module) -> str | None:
    """Why a model's weights cannot be read block by block, as the end of a sentence; None where they can be.

    model: on the meta device.
    """
    if twice := next(iter(aliases(model)), None):
        return f"{twice} is in the model more than once"
    blocks = [block.path for block in find_blocks(model)]
    for path, module in model.named_modules():
        if any(block.startswith(f"{path}." if path else "") for block in blocks) and module._parameters:
            return f"{path or 'the model'} has weights beside its blocks"
    owners: dict[int, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        unit = unit_of(path, blocks) or AROUND
        if owners.setdefault(id(parameter), unit) != unit:
            return f"{path} is shared between blocks"
    return None


def finished_units(folder: Path) -> list[str]:
    """Paths of the finished blocks in a work folder, and of finished linears outside the blocks."""
    return [file.stem for file in folder.glob("*.safetensors") if not file.name.startswith(".")]


class Streamed(Storage):
    """A model on the meta device, whose weights are read from files when they are needed."""

    resident = False

    def __init__(
        self, model: nn.Module, index: Mapping[str, Source], folder: Path, *, hidden_states: int | None = None
    ) -> None:
        """index: name of each parameter → where its values are. folder: of the finished blocks, which may hold some of
        an earlier run. hidden_states: bytes of hidden states to keep in memory, None for all."""
        self.model, self.folder = model, folder
        self._index = dict(index)
        self._blocks = frozenset(block.path for block in find_blocks(model))
        self._states = {file: file_state(file) for each in index.values() for file in each.files}
        self._held: list[str] = []
        self._budget = hidden_states

    def unfused(self, parts: Mapping[str, tuple[str, Part]]) -> None:
        for name, (fused, part) in parts.items():
            stored = self._index.get(fused)
            if isinstance(stored, Stored) and name not in self._index:
                self._index[name] = stored._replace(part=part)

    def planned(self, quantizers: Mapping[str, Quantizer]) -> None:
        """Raises InputError where the disk has no space for the finished blocks and the checkpoint made of them."""
        linears = {f"{path}.weight": path for path in quantizers}
        sizes = {AROUND: 0}
        for name, parameter in self.model.named_parameters():
            unit = unit_of(name, self._blocks) or AROUND
            size = parameter.nbytes
            if name in linears:
                size = layout_bytes(quantizers[linears[name]].layout(*parameter.shape))
            sizes[unit] = sizes.get(unit, 0) + size
        there = self.units()
        missing = sum(size for unit, size in sizes.items() if unit not in there and unit != AROUND)
        needed, free = missing + sum(sizes.values()), shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"{self.folder}: no space left on the device for this run, which needs about {needed / 2**30:.1f} GiB, "
                f"and {free / 2**30:.1f} GiB are free; make space, or choose another --out"
            )

    # ---- reading

    @contextmanager
    def holding(self, path: str) -> Iterator[None]:
        if self._is_held(path):
            yield
            return
        self._load(path, mapped=path == AROUND)
        self._held.append(path)
        try:
            yield
        finally:
            self._held.remove(path)
            self._release(path)

    @contextmanager
    def whole(self) -> Iterator[None]:
        mapped = self._map_all()
        try:
            yield
            self.check_unchanged()
        finally:
            for path in mapped:
                self._held.remove(path)
                self._release(path)

    def complete(self) -> None:
        self._map_all()

    def _map_all(self) -> list[str]:
        """Maps what is not held, and holds it; the paths of that."""
        found = [path for path in (AROUND, *sorted(self._blocks)) if not self._is_held(path)]
        for path in found:
            self._load(path, mapped=True)
            self._held.append(path)
        return found

    def _is_held(self, path: str) -> bool:
        unit = unit_of(path, self._blocks) or AROUND
        return any(held == unit or f"{path}.".startswith(f"{held}.") for held in self._held)

    def _slots(self, path: str) -> Iterator[tuple[nn.Module, str, str]]:
        """(module, name in it, name in the model) of the parameters below a path, or around the blocks."""
        for place, module in self.model.get_submodule(path).named_modules(prefix=path):
            if path == AROUND and unit_of(place, self._blocks) is not None:
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield module, name, f"{place}.{name}" if place else name

    def _load(self, path: str, *, mapped: bool) -> None:
        """Reads the parameters below a path that are not there; a tied one once. mapped: without a copy in memory."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module, name, full in self._slots(path):
            empty = module._parameters[name]
            assert empty is not None
            if not empty.is_meta:
                continue
            if empty not in made:
                values = self._read(full, list(empty.shape), mapped=mapped)
                made[empty] = nn.Parameter(values, requires_grad=empty.requires_grad)
            module._parameters[name] = made[empty]

    def _release(self, path: str) -> None:
        """Lets go of the parameters below a path that the index can find again."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module, name, full in self._slots(path):
            values = module._parameters[name]
            assert values is not None
            if values.is_meta or full not in self._index:
                continue
            if values not in made:
                empty = torch.empty_like(values, device="meta")
                made[values] = nn.Parameter(empty, requires_grad=values.requires_grad)
            module._parameters[name] = made[values]

    def _read(self, name: str, shape: list[int], *, mapped: bool) -> Tensor:
        if name not in self._index:
            raise CheckpointError(f"{self.model.name_or_path}: {name} is missing in the files")
        source = self._index[name]
        for file in source.files:
            self.check_unchanged(file)
        values = source.read(mapped=mapped)
        if list(values.shape) != shape:
            raise CheckpointError(f"{source.files[0]}: {name} has shape {list(values.shape)}, expected {shape}")
        if not mapped and values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{source.files[0]}: {name} holds NaN or infinite values; copy or download it again")
        return values

    def check_unchanged(self, file: Path | None = None) -> None:
        """Raises CheckpointError where a file of the model (by default: any) is not what it was at the beginning."""
        for each in self._states if file is None else [file]:
            if each in self._states and file_state(each) != self._states[each]:
                raise CheckpointError(f"{each} was changed or removed while it was read; quantize the model again")

    # ---- finished blocks

    def finished(self, path: str, report: Report) -> None:
        module = self.model.get_submodule(path)
        with self.holding(path):
            tensors = {
                f"{path}.{name}": values.detach().cpu().contiguous() for name, values in module.named_parameters()
            }
            names = list(tensors)
            for place, start in report.lora_init.items():
                tensors |= {f"{place}{_LORA}{side}": each.contiguous() for side, each in start._asdict().items()}
            with whole_file(self._file(path)) as partial:
                save_file(tensors, partial, metadata={REPORT: json.dumps(report.to_json())})
            self._moved(names, self._file(path))

    def finished_elsewhere(self, path: str) -> None:
        file = self._file(path)
        if not file.exists():
            raise InputError(f"{file} is missing here; all processes of a run need the same folder for --out")
        with reading(file), safe_open(file, framework="pt") as opened:
            self._moved([name for name in opened.keys() if _LORA not in name], file)  # noqa: SIM118
        if not self._is_held(path):
            self._release(path)

    def restored(self, path: str) -> Report | None:
        file = self._file(path)
        if not file.exists():
            return None
        report = self._record(file)
        with reading(file), safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            report.lora_init = {
                place: LoraInit(*(opened.get_tensor(f"{place}{_LORA}{side}") for side in LoraInit._fields))
                for place in dict.fromkeys(name.partition(_LORA)[0] for name in names if _LORA in name)
            }
        for row in report.rows:
            linear = linear_at(self.model, row.path)
            layer = QuantizedLinear.empty(linear, from_spec(row.quantizer), device="meta")
            set_module(self.model, row.path, layer.train(linear.training))
        self._release(path)
        self._moved([name for name in names if _LORA not in name], file)
        if self._is_held(path):
            self._load(path, mapped=False)
        return report

    def units(self) -> list[str]:
        """Paths of the modules that are finished, in this run or an earlier one."""
        return finished_units(self.folder)

    def modules(self) -> int:
        """Number of quantized linears in them."""
        return sum(len(self._record(self._file(path)).rows) for path in self.units())

    def _record(self, file: Path) -> Report:
        with reading(file), safe_open(file, framework="pt") as opened:
            return Report.from_json(json.loads((opened.metadata() or {}).get(REPORT, "{}")))

    def _file(self, path: str) -> Path:
        return self.folder / f"{path}.safetensors"

    def _moved(self, names: Collection[str], file: Path) -> None:
        self._index |= {name: Stored(file, name) for name in names}

    # ---- hidden states

    def kept(self, hidden: Tensor) -> Tensor:
        if self._budget is None:
            return hidden
        if hidden.nbytes > self._budget:
            return _in_file(hidden, self.folder)
        self._budget -= hidden.nbytes
        weakref.finalize(hidden, self._freed, hidden.nbytes)
        return hidden

    def _freed(self, size: int) -> None:
        if self._budget is not None:
            self._budget += size


def _part(file: Any, name: str, part: Part) -> Tensor:
    """One expert's part of a tensor [experts, …] in an open file; nothing else of it is read."""
    return part.within(file.get_slice(name)[part.expert])


def _in_file(tensor: Tensor, folder: Path) -> Tensor:
    """A copy of a tensor, of any shape, in a mapped file without a name; OSError where there is no space for it."""
    if not tensor.numel():
        return tensor
    file = folder / f".hidden-{secrets.token_hex(8)}"
    try:
        with file.open("wb") as stream:
            if hasattr(os, "posix_fallocate"):  # so that no page is written to that has no place on the disk
                os.posix_fallocate(stream.fileno(), 0, tensor.nbytes)
        copy = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        file.unlink(missing_ok=True)
    return copy.view(tensor.shape).copy_(tensor)
