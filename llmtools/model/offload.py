"""Weights that stay in files: a model larger than the memory, on a CPU.

A packed weight is read once in a forward and once in a backward, a block of the network at a time, so it need not be
memory of the process: its tensors are views of the mapped checkpoint, and the page cache is what streams them. Three
things are added to that:

* `keep_in_files` moves what is not a view of a file, because a format had to be repacked, into an unnamed file
  (`Spill`), so that a model needs memory for its activations and adapters alone.
* `Schedule` asks for the pages of the blocks that come next while the current one computes, and, where the page cache
  cannot hold the model, lets those behind go first.
* The files are compared with their former size and time while they are used: a mapped file that is changed changes the
  model, and one that is truncated ends the process.

Which block is next is observed: hooks of the modules that own tensors, before their forward (also one that gradient
checkpointing repeats) and before their backward, tell which block is at work, and what followed the last two blocks
once follows them again. Results are those of resident weights, bit for bit, since the same numbers are at other
addresses.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..content import file_state
from ..errors import CheckpointError, InputError, did_you_mean
from ..files import disk_error
from ..kernels.build import cache_home
from ..nn.embedding import TiedLinear
from ..nn.experts import is_unfused, unfused_experts
from ..pages import Span, ask_for, file_pages, free_memory, joined, let_go
from ..ranks import processes

PLACES = ("disk", "cpu")
"""Places for weights that do not fit: the values of `offload`."""
AHEAD = 2
"""Number of blocks that are asked for ahead of the current one."""
SMALLEST = 2**16
"""Size, in bytes, below which a tensor that is no view of a file stays in memory."""
SEGMENT = 2**28
"""Least size of a mapped part of a spill file, in bytes. Each takes a file descriptor."""

_ALIGNMENT = 64

Keep = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Moves tensors [...] by name to where they stay. Tensors that share memory share it afterwards."""


def check_place(offload: str) -> None:
    """Raises InputError for another place than those of `PLACES`."""
    if offload not in PLACES:
        raise InputError(f"offload={offload!r}; {did_you_mean(str(offload), PLACES)}")


def check_offload(offload: str | None, *, load: str | None = None, device_map: Any = None) -> None:
    """Raises InputError for another place than those of `PLACES`, and for what does not go with it."""
    if offload is None:
        return
    check_place(offload)
    if load is not None:
        raise InputError(
            f"--offload {offload} does not go with --load {load}, whose weights are in no file; quantize the model "
            "first (llmtools quantize)"
        )
    if device_map is not None:
        raise InputError(f"offload={offload!r} does not go with device_map, which places weights itself; omit one")
    if offload == "disk" and has_gpu():
        raise InputError(
            "--offload disk computes on the CPU, and there is a GPU; pass --offload cpu, or hide the GPU with "
            "CUDA_VISIBLE_DEVICES=-1"
        )
    if offload == "cpu" and not has_gpu():
        raise InputError(
            "--offload cpu keeps weights in host memory for a GPU, and there is none; leave it out, or pass --offload "
            "disk for a model larger than the memory"
        )
    if offload == "cpu" and processes() > 1:
        raise InputError(
            f"--offload cpu works in one process, and this run has {processes()}; start it without torchrun, or shard "
            "the weights with FSDP2 (--training.fsdp full_shard)"
        )


def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


# ----------------------------------------------------------------------------------------------------- tensors in files


class Spill:
    """An unnamed file in the cache (`cache_home`) for tensors that are no views of a checkpoint's files.

    It exists as long as one of its tensors, at most as long as the process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """folder: where the file is made, once there is a tensor for it."""
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._segment: mmap.mmap | None = None
        self._start = self._used = 0
        """Offset of the segment in the file, and the bytes of it that are used."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors [...] as views of the file; small ones, and those that are views of a file already, as they are.

        Raises CheckpointError where the disk refuses.
        """
        backed, moved, kept = file_pages(), dict[tuple[int, torch.Size, torch.dtype], Tensor](), dict[str, Tensor]()
        for name, tensor in tensors.items():
            if tensor.nbytes < SMALLEST or tensor.is_meta or _is_backed(backed, tensor):
                kept[name] = tensor
                continue
            key = tensor.data_ptr(), tensor.shape, tensor.dtype
            if key not in moved:
                moved[key] = self._moved(tensor)
            kept[name] = moved[key]
        return kept

    def _moved(self, tensor: Tensor) -> Tensor:
        folder = self._folder or _cache()
        data = tensor.detach().contiguous()
        try:
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the spill)
                weakref.finalize(self, self._file.close)
            segment = self._room(self._file, data.nbytes)
            self._file.seek(self._start + self._used)
            self._file.write(data.flatten().view(torch.uint8).numpy().data)  # by the mapping a full disk would kill us
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{folder}: no room for weights that have to be repacked ({disk_error(error) or error.strerror}); set "
                "LLMTOOLS_CACHE to a folder on another disk, or write the model with llmtools.save on a machine that "
                "holds it, whose folders need no repacking"
            ) from error
        view = torch.frombuffer(segment, dtype=data.dtype, count=data.numel(), offset=self._used).view(data.shape)
        self._used += -(-data.nbytes // _ALIGNMENT) * _ALIGNMENT
        return view

    def _room(self, file: IO[bytes], size: int) -> mmap.mmap:
        """The mapped segment of the file, a new one where it has no room for so many bytes."""
        if self._segment is None or len(self._segment) < self._used + size:
            self._start = file.seek(0, os.SEEK_END)
            length = max(SEGMENT, -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY)
            file.truncate(self._start + length)  # a hole, until it is written
            self._segment = mmap.mmap(file.fileno(), length, offset=self._start)
            self._used = 0
        return self._segment


def _cache() -> Path:
    try:
        return cache_home()
    except RuntimeError as error:
        raise CheckpointError(
            f"no folder for weights that have to be repacked ({error}); set LLMTOOLS_CACHE"
        ) from error


def keep_in_files(model: nn.Module, keep: Keep) -> None:
    """Replaces the parameters of a model that are no views of a file by what `keep` makes of them, in place.

    Tied parameters stay tied. Parameters of another class than `nn.Parameter` (other libraries' packed ones) stay.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if type(parameter) is nn.Parameter:
                owners.setdefault(id(parameter), []).append((module, name))
    backed = file_pages()
    for places in owners.values():
        module, name = places[0]
        former: Any = module._parameters[name]
        if _is_backed(backed, former):
            continue
        (kept,) = keep({name: former.data}).values()
        replaced = nn.Parameter(kept, requires_grad=former.requires_grad)
        for module, name in places:
            module._parameters[name] = replaced


def bytes_in_files(model: nn.Module) -> tuple[int, int]:
    """(bytes of parameters that are views of files, bytes of all); (0, …) where the system does not say."""
    backed, parameters = file_pages(), list(model.parameters())
    inside = sum(each.nbytes for each in parameters if backed is not None and backed.hold(_span(each)))
    return inside, sum(each.nbytes for each in parameters)


def _is_backed(backed: Any, tensor: Tensor) -> bool:
    if backed is None:  # macOS, whose safetensors are mapped; transformers reads them on Windows
        return sys.platform != "win32"
    return bool(backed.hold(_span(tensor)))


def _span(tensor: Tensor) -> Span:
    return Span(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


# ------------------------------------------------------------------------------------------------------------- schedule


class Unit(NamedTuple):
    """Modules whose tensors are asked for together: a block of the network, or all that is outside of blocks."""

    path: str
    modules: list[nn.Module]


class Order:
    """Which unit is next, as learned from the run.

    What followed the last two different units before follows them again; what was never seen is guessed to go on in the
    same direction. Two suffice: forward and backward pass the blocks in opposite directions.
    """

    def __init__(self, units: int) -> None:
        self._units = units
        self._after: dict[tuple[int, int], int] = {}
        self._before, self._now = -1, -1

    def at(self, unit: int) -> bool:
        """Notes that a unit is at work; whether it is another than before."""
        if unit == self._now:
            return False
        self._after[self._before, self._now] = unit
        self._before, self._now = self._now, unit
        return True

    def upcoming(self, count: int) -> list[int]:
        """The units that are expected next, at most so many, the nearest first."""
        before, now, found = self._before, self._now, list[int]()
        for _ in range(count):
            guess = now + (1 if now >= before else -1)
            following = self._after.get((before, now), guess)
            if not 0 <= following < self._units:
                break
            before, now = now, following
            found.append(following)
        return list(dict.fromkeys(found))


class Schedule:
    """The hints that the kernel gets for the pages of the units, in their `Order`."""

    def __init__(
        self,
        spans: Sequence[Sequence[Span]],
        *,
        release: bool,
        ahead: int = AHEAD,
        check: Callable[[], None] = lambda: None,
        ask: Callable[[Iterable[Span]], None] = ask_for,
        let: Callable[[Iterable[Span]], None] = let_go,
    ) -> None:
        """spans: those of each unit's tensors. release: whether units behind are let go. check: called at each change
        of the unit."""
        self._spans, self._release, self._ahead = spans, release, ahead
        self._check, self._ask, self._let = check, ask, let
        self._order = Order(len(spans))
        self._asked: set[int] = set()

    def at(self, unit: int) -> None:
        """Notes that a unit is at work, and gives the hints that follow."""
        if not self._order.at(unit):
            return
        self._check()
        wanted = [unit, *self.upcoming()]
        for each in self._asked.difference(wanted) if self._release else ():
            self._let(self._spans[each])
        for each in wanted:
            if each not in self._asked:
                self._ask(self._spans[each])
        self._asked = set(wanted)

    def upcoming(self) -> list[int]:
        """The units that are expected next, the nearest first."""
        return self._order.upcoming(self._ahead)


def stream(model: nn.Module, watch: Callable[[], None] = lambda: None) -> None:
    """Gives the kernel hints about the model's tensors whenever it runs, by hooks on its modules.

    watch: called whenever another block begins. Call it before adapters are added: they wrap the modules.
    """
    units = units_of(model)
    spans = [joined(_spans(unit.modules)) for unit in units]
    total, free = sum(each.stop - each.start for unit in spans for each in unit), free_memory()
    schedule = Schedule(spans, release=free is None or total > free, check=watch)
    # The hooks of a mixture serve its experts: of their own, 1.4 kB each, there would be tens of thousands.
    mixtures = unfused_experts(model).values()
    experts = {id(each) for mixture in mixtures for each in mixture.modules() if each is not mixture}
    for number, unit in enumerate(units):
        for module in unit.modules:
            if id(module) not in experts:
                _hook(module, number, schedule)


def units_of(model: nn.Module) -> list[Unit]:
    """What is outside of blocks (embeddings, head, norms), then the blocks: the members of the outermost lists of
    modules. Where there are none each module is a unit."""
    leaves = ((path, module) for path, module in model.named_modules() if not list(module.children()))
    blocks = list(_members(model, "")) or list(leaves)
    known: set[int] = set()
    inside: list[Unit] = []
    for path, block in blocks:
        modules = [each for each in block.modules() if _reads(each) and id(each) not in known]
        known |= {id(each) for each in modules}
        inside += [Unit(path, modules)] if modules else []
    outside = [each for each in model.modules() if _reads(each) and id(each) not in known]
    return [Unit("", outside), *inside]


def _members(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList) and not any(isinstance(each, nn.ModuleList) for each in child):
            yield from ((f"{path}.{number}", member) for number, member in child.named_children())
        else:
            yield from _members(child, path)


def _reads(module: nn.Module) -> bool:
    """Whether a module computes with tensors of its own, its experts' or those of an embedding that it is tied to."""
    if isinstance(module, TiedLinear) or is_unfused(module):
        return True
    return any(each is not None for each in module._parameters.values())


def _spans(modules: Iterable[nn.Module]) -> Iterator[Span]:
    """Spans of the modules' tensors but those of embeddings alone, of which a few rows are read."""
    for module in modules:
        if not isinstance(module, nn.Embedding):
            held = module.packed if isinstance(module, TiedLinear) else module._parameters
            for tensor in held.values():
                if tensor is not None and tensor.device.type == "cpu" and tensor.numel():
                    yield _span(tensor)


def _hook(module: nn.Module, unit: int, schedule: Schedule) -> None:
    def backward(_: Tensor) -> None:
        schedule.at(unit)

    def before(_: nn.Module, args: Any) -> None:
        schedule.at(unit)

    def after(_: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(backward)  # a module's own backward hooks would make its output a view

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


class Watch:
    """Raises CheckpointError when a file has another size or time than at first.

    A file that was removed, or replaced by another of its name, is no matter: what was mapped lasts.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        self._former = {str(file): file_state(file) for file in files}

    def __call__(self) -> None:
        for file, former in self._former.items():
            now = file_state(file)
            if now != former and now is not None and former is not None and now.inode == former.inode:
                raise CheckpointError(
                    f"{file} was changed while its weights were in use (--offload disk reads them from it all the "
                    "time); copy it again, keep it as it is, and repeat the run"
                )
