"""Weights in host memory, computed with on a device: a model larger than a GPU's memory.

The packed tensors of a block lie in one piece of host memory that the device copies from by itself (pinned). On the
device there are two buffers of the size of the largest block: while one block computes, the next is copied into the
other, on a queue of its own beside the computation. ZeRO-Offload and FlexGen (arXiv:2303.06865, section 3) overlap the
two likewise; what moves here is 2 to 4 bits per weight instead of 16. Embeddings, head, norms, biases and linears that
are not quantized stay on the device.

Two events order the queues: a copy begins when the computation that was queued with the buffer's former block is done,
and a block's computation begins when its copy is done. What a layer reads is what counts as use: `PackedWeight.packed`
brings the layer's block, in forward, recomputation and everywhere else (merging, a fingerprint). For the backward
autograd saves packed tensors, and views of them; those that lie in a buffer are saved as their place in a block
(`Buffers.saved`), and found where the block is by then. A buffer that is filled again under a tensor that was saved
otherwise is an error of autograd, not a wrong gradient, since filling is an operation in place.

`Device` is what is asked of the hardware, in five functions, so that all of the order is tested on a CPU.
"""

from __future__ import annotations

import logging
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.embedding import TiedLinear
from ..nn.packed import Fetch, PackedWeight
from ..quant import Packed
from .offload import Order, Unit, units_of

log = logging.getLogger(__name__)

_ALIGNMENT = 256
"""Bytes: the start of each tensor in a buffer, as that of an allocation."""

Event = Any
"""A point in a queue."""


class Device(ABC):
    """A device with a queue of computation, and one of copies beside it."""

    device: torch.device

    @abstractmethod
    def host_memory(self, size: int) -> Tensor:
        """uint8 [size] in host memory that copies are made from."""

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        """Queues target ← source, in place, after a point in the computation; the point at which it is done."""

    @abstractmethod
    def computed(self) -> Event:
        """The point in the computation at which all that is queued so far is done."""

    @abstractmethod
    def wait(self, copied: Event) -> None:
        """Has the computation that is queued from here on begin after that copy."""


class CudaDevice(Device):
    """A GPU, its current stream and a side stream."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._side = torch.cuda.Stream(self.device)

    def host_memory(self, size: int) -> Tensor:
        """Registered with the driver as it is: torch's own pinned memory is a power of two, up to twice as much."""
        memory = torch.empty(size, dtype=torch.uint8)
        runtime: Any = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(memory.data_ptr(), size, 0)):
            log.warning("the driver pins no more host memory (ulimit -l); copies wait for the computation")
            return memory
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
        return memory

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        self._side.wait_event(after)
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
        target.record_stream(self._side)
        return self._side.record_event()

    def computed(self) -> Event:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, copied: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(copied)


def this_device() -> Device:
    """The GPU of this process."""
    return CudaDevice()


class _Place(NamedTuple):
    """Where a tensor [...] is in a block's memory, in bytes."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    def within(self, memory: Tensor) -> Tensor:
        """The tensor in that memory, uint8 [bytes]."""
        return (
            memory[self.start : self.start + math.prod(self.shape) * self.dtype.itemsize]
            .view(self.dtype)
            .view(self.shape)
        )


class _Saved(NamedTuple):
    """A tensor that autograd saved, by its place in a block."""

    unit: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Buffer:
    """Memory on the device, and the block whose values it has, or will have."""

    def __init__(self, size: int, device: Device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device.device)
        self.storage = self.memory.untyped_storage()
        self.unit = -1
        self.free: Event = device.computed()
        """The end of the computation with the former block."""
        self.filled: Event = None


class Buffers:
    """Two buffers on a device, through which blocks pass in the order of the run."""

    def __init__(self, units: Sequence[Tensor], device: Device) -> None:
        """units: the memory of each block, uint8 [bytes]."""
        self._units, self._device, self._order = units, device, Order(len(units))
        self._buffers = [_Buffer(max(map(len, units)), device) for _ in range(min(2, len(units)))]
        self._now: _Buffer | None = None

    def at(self, unit: int) -> int:
        """The number of the buffer with the values of a block, for what is queued until another block is asked for;
        the copy of the block that is expected next is queued."""
        now = self._now
        if now is not None and now.unit == unit:
            return self._buffers.index(now)
        if now is not None:
            now.free = self._device.computed()
        found = self._with(unit, keep=now)
        self._device.wait(found.filled)
        self._now = found
        self._order.at(unit)
        for following in self._order.upcoming(1):
            self._with(following, keep=found)
        return self._buffers.index(found)

    def _with(self, unit: int, *, keep: _Buffer | None) -> _Buffer:
        """The buffer with a block's values, or one that they are being copied to: not `keep`."""
        for each in self._buffers:
            if each.unit == unit:
                return each
        found = next(each for each in self._buffers if each is not keep)
        source = self._units[unit]
        found.filled = self._device.copy(found.memory[: len(source)], source, found.free)
        found.unit = unit
        return found

    def memory(self, number: int) -> Tensor:
        """uint8 [bytes] of a buffer."""
        return self._buffers[number].memory

    def saved(self, tensor: Tensor) -> Tensor | _Saved:
        """What autograd keeps of a tensor: its place, where it lies in a buffer.

        Else it is detached: an operation that saved its own result, with its history, would keep itself.
        """
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device != self._device.device:
            return tensor.detach()
        storage = tensor.untyped_storage().data_ptr()
        for each in self._buffers:
            if storage == each.storage.data_ptr():
                offset = int(tensor.storage_offset())
                return _Saved(each.unit, offset, tensor.shape, tensor.stride(), tensor.dtype)
        return tensor.detach()

    def restored(self, kept: Tensor | _Saved) -> Tensor:
        """The tensor that `saved` kept."""
        if isinstance(kept, Tensor):
            return kept
        buffer = self._buffers[self.at(kept.unit)]
        empty = torch.empty(0, dtype=kept.dtype, device=self._device.device)
        return empty.set_(buffer.storage, kept.offset, kept.size, kept.stride)


class _Fetched(Fetch):
    """The packed tensors of a layer in the buffer where its block is."""

    def __init__(self, buffers: Buffers, unit: int, places: dict[str, _Place], device: torch.device) -> None:
        super().__init__(device)
        self._buffers, self._unit, self._places = buffers, unit, places
        self._views: dict[int, Packed] = {}

    def __call__(self, stored: Packed) -> Packed:
        number = self._buffers.at(self._unit)
        if number not in self._views:
            memory = self._buffers.memory(number)
            self._views[number] = {name: place.within(memory) for name, place in self._places.items()}
        return dict(self._views[number])


def keep_on_host(model: nn.Module, device: Device) -> nn.Module:
    """Moves a model to a device, in place, but the packed tensors of its blocks, which stay in host memory.

    Call it before adapters are added. Raises InputError for a model without packed weights in its blocks.
    """
    blocks = packed_blocks(model)
    if not blocks:
        raise InputError(
            "--offload cpu keeps packed weights in host memory, and the blocks of this model have none; quantize it "
            "first (llmtools quantize), or leave it out"
        )
    callers = {unit.path.rpartition(".")[0].rpartition(".")[0] for unit in units_of(model) if _packed(unit)}
    held = [_on_host(layers, device) for layers in blocks]
    model.to(device.device)
    buffers = Buffers([memory for memory, _ in held], device)
    for number, (layers, (_, places)) in enumerate(zip(blocks, held, strict=True)):
        for layer, of_layer in zip(layers, places, strict=True):
            layer.fetch = _Fetched(buffers, number, of_layer, device.device)
    for path in callers:
        _save_places(model.get_submodule(path), buffers)
    return model


def packed_blocks(model: nn.Module) -> list[list[PackedWeight]]:
    """The quantized layers of each block that has any."""
    return [layers for unit in units_of(model) if (layers := _packed(unit))]


def _packed(unit: Unit) -> list[PackedWeight]:
    if not unit.path:  # outside of blocks
        return []
    return [each for each in unit.modules if isinstance(each, PackedWeight) and not isinstance(each, TiedLinear)]


def _on_host(layers: Sequence[PackedWeight], device: Device) -> tuple[Tensor, list[dict[str, _Place]]]:
    """(the memory of a block, the places in it of each layer's tensors); the layers' parameters lie there afterwards.

    Parameters that layers share are there once.
    """
    places: dict[Tensor, _Place] = {}
    size = 0
    for layer in layers:
        for parameter in layer.stored.values():
            if parameter not in places:
                places[parameter] = _Place(size, parameter.shape, parameter.dtype)
                size += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
    memory = device.host_memory(size)
    moved: dict[Tensor, nn.Parameter] = {}
    found = []
    for layer in layers:
        found.append({name: places[parameter] for name, parameter in layer.stored.items()})
        for name, parameter in layer.stored.items():
            if parameter not in moved:
                values = places[parameter].within(memory).copy_(parameter.detach())
                moved[parameter] = nn.Parameter(values, requires_grad=False)
            layer._parameters[name] = moved[parameter]
        layer.fetch = Fetch(device.device)
    return memory, found


def _save_places(trunk: nn.Module, buffers: Buffers) -> None:
    """Has autograd save places within the forward of a module that calls the blocks.

    Checkpointing saves nothing within a block, and tensors of its own while it repeats one.
    """
    entered: list[Any] = []

    def before(*_: Any) -> None:
        entered.append(torch.autograd.graph.saved_tensors_hooks(buffers.saved, buffers.restored))
        entered[-1].__enter__()

    def after(*_: Any) -> None:
        entered.pop().__exit__()

    trunk.register_forward_pre_hook(before)
    trunk.register_forward_hook(after, always_call=True)
