"""Stream text through a network block by block, and let a visitor change each block on the way.

Quantizers that learn from data want the inputs of every linear, in a network whose earlier part is quantized already.
Running the whole network for each of them is quadratic in its depth; so one block at a time is run over all batches,
and its outputs are the inputs of the next (arXiv:2210.17323, section 4).

How blocks are wired is observed. In a first run, on one batch, every tensor that a block is called with is one of
three: a tensor that an earlier block returned (the hidden states, or a second value such as indices of attention or the
state of a router), something that was computed from such tensors on the way, or neither (masks, rotary tables). From
that the blocks are cut into *segments*. Within a segment everything that depends on earlier blocks is passed on as it
was returned, so a dry run, in which each block notes what it is called with, gives all that the blocks need later: the
tensors themselves, and for what blocks return to one another the place where it comes from. To catch the arguments of
the first block alone and reuse them for all is shorter, and wrong for Gemma 3, whose layers differ in mask and rotary
embedding. Most decoders are one segment, and the dry run costs little: a block that returns its hidden states and
nothing else is not even run. Where a network computes something *between* blocks (the norm behind T5's encoder) a new
segment begins, whose dry run goes through the changed network before it. A block that runs more than once in a pass
(a looped network, the shared block of Zamba) is a segment of its own. So in every case blocks see what they see in
``model(ids)``.

Memory: what blocks return to one another for all batches once (twice with ``propagate=False``), and whatever else
blocks are called with; tensors that are equal from batch to batch, such as masks and rotary tables, are kept once.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import InputError
from .blocks import Block, find_blocks, observe

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, str], None]
"""``on_step(done, total, what)`` after each piece of a long job: 3, 22, ``"model.layers.2"``."""

Batch = Tensor | Mapping[str, Any]
"""Token ids [batch, t], or keyword arguments of the model: ``{"input_ids": …, "attention_mask": …}``."""


class Slot(NamedTuple):
    """The place of something that flows from block to block: the n-th tensor that a block returned, or the n-th object
    that blocks write into (such as a dict of keys and values that later layers share)."""

    owner: str
    number: int


Stream = list[dict[Slot, Any]]
"""What flows from block to block, one dict a batch."""


class Calls:
    """What one block is called with, one call a batch; more where the block runs several times in a pass."""

    def __init__(
        self, path: str, block: nn.Module, recording: _Recording, stream: Stream, device: torch.device | None
    ) -> None:
        self.path, self.block, self.stream = path, block, stream
        self.segment: object = recording.segment
        """What the blocks have in common between which tensors are passed on as they are."""
        self._calls, self._last_use, self._device = recording.calls[path], recording.last_use, device

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def hidden(self) -> list[Tensor]:
        """The hidden states [batch, t, features] of each call: the first tensor that the block is given."""
        return [call.hidden(self.stream[call.batch]) for call in self._calls]

    def outputs(self) -> Iterator[Tensor]:
        """Runs the block, as it is now, on one batch a step; gives its hidden states [batch, t, features]."""
        for index in range(len(self)):
            yield self.output(index)

    def run(self) -> None:
        """Runs the block, as it is now, over all batches; for what hooks see."""
        for _ in self.outputs():
            pass

    def output(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Runs the block on one batch, with all that it is given in `dtype`; its hidden states."""
        return _hidden_of(self._output(index, self.stream, dtype), self.path)

    def advance(self, stream: Stream) -> Iterator[Tensor]:
        """Runs the block, as it is now, on what flows in `stream`, a batch a step, and moves `stream` on to the next
        block, in place; gives the block's hidden states."""
        for index, call in enumerate(self._calls):
            output = self._output(index, stream, None, keep=True)
            hidden = _hidden_of(output, self.path)
            values = stream[call.batch]
            for number, tensor in enumerate(_tensors(output)):
                if Slot(self.path, number) in self._last_use:
                    values[Slot(self.path, number)] = tensor.to(call.home)
            for slot in [slot for slot in values if self._last_use.get(slot) == self.path]:
                del values[slot]
            yield hidden.to(call.home)

    def _output(self, index: int, stream: Stream, dtype: torch.dtype | None, *, keep: bool = False) -> Any:
        """keep: what the block writes into stays written."""
        call = self._calls[index]
        args, kwargs = call.filled(stream[call.batch], self._device, dtype, keep=keep)
        return self.block(*args, **kwargs)


Visit = Callable[[Block, Calls], None]


@torch.no_grad()
def walk(
    model: nn.Module,
    batches: Sequence[Batch],
    visit: Visit,
    *,
    propagate: bool = True,
    on_step: OnStep | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Calls ``visit(block, calls)`` for each block in the order of execution; `visit` may change the block.

    batches: token ids [batch, t] or keyword arguments of the model, of any sizes; what is in a batch goes to the model
    as it is, so padding under a mask is seen by the blocks, too. propagate: the next block reads the outputs of the
    block as `visit` left it; otherwise those of the block as it was. device: blocks, one at a time, and what they read
    are moved there. With a visitor that does nothing every block sees, bit for bit, what it sees in ``model(ids)``. The
    model is put in evaluation mode and, when done or on an error, back.

    Raises InputError where no block runs, or where one runs for some batches only.
    """
    if len(batches) == 0:
        raise InputError("no batches to walk with; give at least one sequence of token ids")
    device = torch.device(device) if device is not None else None
    blocks = {block.path: block for block in find_blocks(model)}
    inputs = [_complete(model, batch) for batch in batches]
    with evaluating(model):
        trunk = _trunk(model, blocks)
        segments = _segments(trunk, blocks, inputs[0])
        if len(segments) > 1 and not propagate:
            raise InputError(
                f"{type(model).__name__} is walked in {len(segments)} parts, each after the part before it was "
                f"changed; without propagation only a network that is a plain chain of blocks can be walked"
            )
        if len(segments) > 4:
            log.warning(
                "%s computes something between its blocks, or runs them more than once; the network is run anew for "
                "each of %d parts, which takes longer",
                type(model).__name__,
                len(segments),
            )
        total, done = sum(len(segment.paths) for segment in segments), 0
        for segment in segments:
            recording = _Recording(segment)
            recording.record(trunk, blocks, inputs)
            stream = recording.stream
            for path in segment.paths:
                block = blocks[path]
                last = path == segment.paths[-1]
                with _resident(block.module, device):
                    calls = Calls(path, block.module, recording, stream, device)
                    observe(block, calls.outputs())
                    following = stream
                    if not propagate and not last:
                        following = copied(stream)
                        for _ in calls.advance(following):
                            pass
                    visit(block, calls)
                    if propagate and not last:
                        for _ in calls.advance(stream):
                            pass
                stream = following
                recording.calls[path].clear()
                done += 1
                if on_step is not None:
                    on_step(done, total, path)


def run_network(model: nn.Module, batch: Batch) -> Any:
    """``model(input_ids=…)`` on one batch, on the model's device, without a cache of keys and values.

    An encoder-decoder that is given no `decoder_input_ids` reads the text itself there, shifted by one.
    """
    return _run(model, _complete(model, batch))


def _complete(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of a batch, with what the decoder of an encoder-decoder reads."""
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    given = inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
    ids = inputs.get("input_ids")
    if "decoder_input_ids" in inspect.signature(model.forward).parameters and not given and isinstance(ids, Tensor):
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(model, "_shift_right", None)
        inputs["decoder_input_ids"] = ids if shift is None else shift(ids)
    return inputs


def _run(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    home = _first_device(module)
    moved = {name: value.to(home) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    accepted = inspect.signature(module.forward).parameters
    if "use_cache" in accepted or any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
        moved["use_cache"] = False
    return module(**moved)


def copied(stream: Stream) -> Stream:
    """A stream that can be moved on while the other stays; tensors are shared, what blocks write into is not."""
    return [
        {slot: value if isinstance(value, Tensor) else copy.deepcopy(value) for slot, value in values.items()}
        for values in stream
    ]


# ---------------------------------------------------------------------------------------------------------------------
# How the blocks are wired


class _Segment(NamedTuple):
    """Blocks in a row that pass on what they return, and nothing that was computed from it."""

    paths: list[str]
    light: set[str]
    """Those that return their hidden states and nothing else, in the shape and type that they came in."""
    written: set[int | str]
    """Positions and names of arguments that blocks write into."""
    repeated: bool = False
    """One block that runs several times in a pass."""


class _Event(NamedTuple):
    """One call of a block in the first run."""

    path: str
    sources: list[tuple[int, int | None]]
    """Of each tensor that it was given: the latest event that it depends on, or -1; the event that returned it."""
    light: bool
    written: set[int | str]


def _segments(trunk: nn.Module, blocks: Mapping[str, Block], batch: Mapping[str, Any]) -> list[_Segment]:
    """The blocks in the order of execution, cut where something is computed between them, from a run on one batch."""
    events = _observe_wiring(trunk, blocks, batch)
    if not events:
        raise InputError(f"the network ran without {next(iter(blocks))} or any other of its blocks")
    order = [event.path for event in events]
    written = set().union(*(event.written for event in events))
    segments: list[_Segment] = []
    members: set[int] | None = None  # events of the segment at hand
    for time, event in enumerate(events):
        if order.count(event.path) > 1:
            if event.path not in order[:time]:
                segments.append(_Segment([event.path], set(), written, repeated=True))
                members = None
            continue
        if members is None or any(
            latest >= min(members) and returned not in members for latest, returned in event.sources
        ):
            members = set()
            segments.append(_Segment([], set(), written))
        members.add(time)
        segments[-1].paths.append(event.path)
        if event.light:
            segments[-1].light.add(event.path)
    return segments


def _observe_wiring(trunk: nn.Module, blocks: Mapping[str, Block], batch: Mapping[str, Any]) -> list[_Event]:
    events: list[_Event] = []
    origins, returned = _Origins(), _Returned()

    def stub(path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments: dict[int | str, Any] = dict(enumerate(args))
        arguments.update(kwargs)
        sources = [(origins.of(tensor), returned.find(tensor)) for tensor in _tensors(arguments)]
        before = {name: _fingerprint(value) for name, value in arguments.items()}
        with origins.paused():
            output = forward(*args, **kwargs)
        written = {name for name, value in arguments.items() if _fingerprint(value) != before[name]}
        hidden = next(_tensors(arguments), None)
        light = (
            isinstance(output, Tensor)
            and hidden is not None
            and (output.shape, output.dtype, output.device) == (hidden.shape, hidden.dtype, hidden.device)
            and not written
        )
        for tensor in _tensors(output):
            origins.mark(tensor, len(events))
            returned.note(tensor, len(events))
        events.append(_Event(path, sources, light, written))
        return output

    with _stubs(blocks, stub), origins:
        _run(trunk, batch)
    return events


class _Origins(TorchDispatchMode):
    """Which tensors were computed from blocks' outputs, and from those of which event at the latest; by storage."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def of(self, tensor: Tensor) -> int:
        """The latest event that the tensor depends on, -1 for none."""
        storage = tensor.untyped_storage()
        reference, latest = self._latest.get(id(storage), (None, -1))
        return latest if reference is not None and reference() is storage else -1

    def mark(self, tensor: Tensor, event: int) -> None:
        storage = tensor.untyped_storage()
        self._latest[id(storage)] = weakref.ref(storage), event

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Out of the way while a block runs: what it computes is its own affair, and not all that it calls may know
        of such a mode."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not name.endswith("_like") and not name.startswith("new_"):  # these read no values
            latest = max((self.of(tensor) for tensor in _tensors((args, kwargs))), default=-1)
            for tensor in _tensors(result) if latest >= 0 else ():
                self.mark(tensor, max(latest, self.of(tensor)))
        return result


class _Returned:
    """Tensors that blocks returned, as the very objects, unless they were written to since."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Any]] = {}

    def note(self, tensor: Tensor, what: Any) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), _version(tensor), what

    def find(self, tensor: Tensor) -> Any:
        """What was noted of the tensor; None where it is no block's."""
        reference, version, what = self._known.get(id(tensor), (None, 0, None))
        return what if reference is not None and reference() is tensor and version == _version(tensor) else None


def _version(tensor: Tensor) -> int:
    """Moves when the tensor is written in place."""
    return 0 if tensor.is_inference() else tensor._version


def _fingerprint(value: Any, depth: int = 6) -> object:
    """Changes when a container or another object, or a tensor in it, is written to."""
    if isinstance(value, Tensor):
        return id(value), _version(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return [(str(key), _fingerprint(item, depth)) for key, item in value.items()]
    if isinstance(value, tuple | list):
        return [_fingerprint(item, depth) for item in value]
    if depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
        return id(value), _fingerprint(vars(value), depth - 1)  # a cache of keys and values
    return id(value)


# ---------------------------------------------------------------------------------------------------------------------
# What the blocks are called with


class _Reached(BaseException):
    """Ends a dry run when the last block of the segment has noted its call."""


class _Recording:
    """The calls of a segment's blocks, noted in a dry run a batch."""

    def __init__(self, segment: _Segment) -> None:
        self.segment = segment
        self.calls: dict[str, list[_Call]] = {path: [] for path in segment.paths}
        self.stream: Stream = []
        self.last_use: dict[Slot, str] = {}
        """The last block that reads what is in a slot."""
        self._returned = _Returned()
        self._states: list[Any] = []
        self._seen: dict[tuple[Any, ...], Tensor] = {}

    def record(self, trunk: nn.Module, blocks: Mapping[str, Block], batches: Sequence[Mapping[str, Any]]) -> None:
        """A dry run on each batch."""
        with _stubs({path: blocks[path] for path in self.segment.paths}, self._stub):
            for batch in batches:
                self.stream.append({})
                self._returned, self._states = _Returned(), []
                with suppress(_Reached):
                    _run(trunk, batch)
                self._check_complete()
        self._seen.clear()

    def _check_complete(self) -> None:
        last = len(self.stream) - 1
        for path, calls in self.calls.items():
            if not calls or calls[-1].batch != last:
                raise InputError(
                    f"{path} runs for some batches and not for others; such a network cannot be walked block by "
                    f"block: use a quantizer that needs no calibration"
                )

    def _stub(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = len(self.stream) - 1
        self.calls[path].append(
            _Call(
                batch,
                [self._noted(path, position, value) for position, value in enumerate(args)],
                {name: self._noted(path, name, value) for name, value in kwargs.items()},
                next((tensor.device for tensor in _tensors((args, kwargs))), torch.device("cpu")),
                bool(self.segment.written & {0, "hidden_states"}),
            )
        )
        if path == self.segment.paths[-1] and not self.segment.repeated:
            raise _Reached
        light = path in self.segment.light
        output = next(_tensors((args, kwargs))).clone() if light else forward(*args, **kwargs)
        for number, tensor in enumerate(_tensors(output)):
            self._returned.note(tensor, Slot(path, number))
        return output

    def _noted(self, path: str, name: int | str, value: Any) -> Any:
        """An argument, with slots in place of what comes from other blocks; equal tensors of earlier batches are kept
        once."""
        if name in self.segment.written and not isinstance(value, Tensor):
            return self._state(value)

        def noted(tensor: Any) -> Any:
            slot = None if self.segment.repeated else self._returned.find(tensor)
            if slot is not None:
                self.last_use[slot] = path
                return slot
            if name in self.segment.written:
                return tensor.clone()
            earlier = self._seen.setdefault((name, tensor.shape, tensor.dtype, tensor.device), tensor)
            return earlier if earlier is tensor or torch.equal(earlier, tensor) else tensor

        return _mapped(value, noted)

    def _state(self, value: Any) -> Slot:
        """The slot of an object that blocks write into, and a copy in it of what it was when the segment began."""
        number = next((n for n, each in enumerate(self._states) if each is value), None)
        if number is None or self.segment.repeated:
            number = len(self._states)
            self._states.append(value)
            self.stream[-1][Slot("state", number)] = copy.deepcopy(value)
        return Slot("state", number)


class _Call(NamedTuple):
    """The arguments of one call; `Slot` stands for what flows from block to block."""

    batch: int
    args: list[Any]
    kwargs: dict[str, Any]
    home: torch.device
    """Where the tensors are."""
    writes: bool
    """Whether the block writes into its hidden states, and so is given a copy."""

    def hidden(self, values: Mapping[Slot, Any]) -> Tensor:
        """The first tensor."""
        return next(_tensors(self.filled(values, None, None)))

    def filled(
        self,
        values: Mapping[Slot, Any],
        device: torch.device | None,
        dtype: torch.dtype | None,
        *,
        keep: bool = False,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with what flows now; on `device`, floating tensors in `dtype`.

        keep: what blocks write into is the very object, not a copy.
        """

        hidden = self.writes

        def fill(leaf: Any) -> Any:
            nonlocal hidden
            value = values[leaf] if isinstance(leaf, Slot) else leaf
            if isinstance(value, Tensor):
                value, hidden = value.clone() if hidden else value, False
                return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            if keep:
                return value
            return _mapped(copy.deepcopy(value), fill) if isinstance(leaf, Slot) else value

        return _mapped(tuple(self.args), fill), _mapped(self.kwargs, fill)


@contextmanager
def _stubs(
    blocks: Mapping[str, Block], stub: Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """``stub(path, forward, args, kwargs)`` in place of each block's ``forward``, for as long as the context lasts."""

    def standing_for(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: stub(path, forward, args, kwargs)

    saved = {path: vars(block.module).get("forward") for path, block in blocks.items()}
    for path, block in blocks.items():
        # On the instance, not in place of the module: the network may read other attributes of its blocks.
        vars(block.module)["forward"] = standing_for(path, block.module.forward)
    try:
        yield
    finally:
        for path, forward in saved.items():
            if forward is None:
                vars(blocks[path].module).pop("forward", None)
            else:
                vars(blocks[path].module)["forward"] = forward


# ---------------------------------------------------------------------------------------------------------------------
# Tensors in containers


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Slot):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name, None))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same containers, new ones, with `change` of each tensor and `Slot` in them."""
    if isinstance(value, Tensor | Slot):
        return change(value)
    if isinstance(value, tuple):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is list:
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = _mapped(item, change)
        return made
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)  # type: ignore[arg-type]
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                object.__setattr__(made, field.name, _mapped(getattr(value, field.name), change))
        return made
    return value


def _hidden_of(output: Any, path: str) -> Tensor:
    """The hidden states in what a block returned: its first tensor."""
    hidden = next(_tensors(output), None)
    if hidden is None:
        raise InputError(f"{path} returned {type(output).__name__} without a tensor; such a network cannot be walked "
                         f"block by block: use a quantizer that needs no calibration")  # fmt: skip
    return hidden


# ---------------------------------------------------------------------------------------------------------------------
# Where and in which mode


def _trunk(model: nn.Module, blocks: Mapping[str, Block]) -> nn.Module:
    """The model without its head, whose logits nobody reads here."""
    trunk = getattr(model, "base_model", model)
    within = {id(module) for module in trunk.modules()}
    return trunk if all(id(block.module) in within for block in blocks.values()) else model


def _first_device(module: nn.Module) -> torch.device:
    """Where token ids go: to the first weights, which are the embeddings'."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


@contextmanager
def _resident(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The block on `device` while it is worked on, then where it was."""
    home = _first_device(module)
    if device is not None:
        module.to(device)
    try:
        yield
    finally:
        if device is not None:
            module.to(home)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module's own mode again; by path, for modules may be replaced meanwhile."""
    modes = {path: module.training for path, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for path, module in model.named_modules():
            module.training = modes.get(path, module.training)
