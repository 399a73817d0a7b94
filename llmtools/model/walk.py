"""Run calibration text through a network block by block, and let a visitor change each block.

Quantizers with calibration need the inputs of every linear, in a network whose earlier part is quantized already.
Running the whole network for each of them is quadratic in its depth; so one block at a time is run over all batches,
and its outputs are the inputs of the next (arXiv:2210.17323, section 4).

The data flow between blocks is observed. In a first run, on one batch, every input tensor of a block is one of three: a
tensor that an earlier block returned (the hidden states, or a second value such as attention indices or the state of a
router), a tensor computed from such tensors between blocks, or neither (masks, rotary embeddings). By that the blocks
are divided into *segments*. Within a segment everything that depends on earlier blocks is passed on as it was returned,
so a dry run, which records each block's arguments, gives all that the blocks need later: the tensors themselves, and
for what blocks return to one another the slot that it comes from. To record the arguments of the first block alone and
reuse them for all is shorter, and wrong for Gemma 3, whose layers differ in mask and rotary embedding. Most decoders
are one segment, and the dry run costs little: a block that returns its hidden states and nothing else is not even run.
Where a network computes something *between* blocks (the norm behind T5's encoder) a new segment begins, whose dry run
goes through the changed network before it. A block that runs more than once in a forward pass (a looped network, the
shared block of Zamba) is a segment of its own. So in every case the inputs of blocks are those in ``model(ids)``.

Memory: what blocks return to one another for all batches once (twice with ``propagate=False``), and their other
arguments; tensors that are equal from batch to batch, such as masks and rotary tables, are kept once.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import InputError
from ..nn.wide import computed_in, run_wide
from .blocks import Block, find_blocks, merged_groups, observe
from .processes import Processes
from .remembered import Remembered
from .storage import AROUND, Storage

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, str], None]
"""Callback ``on_step(done, total, what)`` after each step of a long job: 3, 22, ``"model.layers.2"``."""

Batch = Tensor | Mapping[str, Any]
"""Token ids [batch, t], or keyword arguments of the model: ``{"input_ids": …, "attention_mask": …}``."""


class Slot(NamedTuple):
    """Key of a value that flows from block to block: the n-th tensor that a block returned, or the n-th object that
    blocks write into (such as a cache of keys and values that later layers share)."""

    owner: str
    """Path of the block, or ``"state"``."""
    number: int
    """Index n."""


Stream = list[dict[Slot, Any]]
"""Values that flow from block to block, one dict per batch."""


class Enough(BaseException):
    """Raised by a hook in `Calls.run`: what the rest of the block computes for this batch is not needed."""


class Calls:
    """The arguments of one block, one call per batch; more where the block runs several times in a forward pass.

    Shapes: batch × t tokens × features, as the model has them.
    """

    def __init__(
        self,
        path: str,
        block: nn.Module,
        recording: _Recording,
        stream: Stream,
        device: torch.device | None,
    ) -> None:
        self.path, self.block, self.stream = path, block, stream
        self.segment: object = recording.segment
        """Identity of the segment: within it, tensors are passed on unchanged."""
        self._calls, self._last_use, self._device = recording.calls[path], recording.last_use, device
        self._kept = recording.storage.kept
        self._remembered: Remembered | None = None

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def hidden(self) -> list[Tensor]:
        """Hidden states [batch, t, features] of each call: the first tensor among the arguments."""
        return [call.hidden(self.stream[call.batch]) for call in self._calls]

    def on(self, block: nn.Module, stream: Stream) -> Calls:
        """The same calls of another module, with the values of another stream."""
        other = copy.copy(self)
        other.block, other.stream, other._remembered = block, stream, None
        return other

    def remember(self, layers: Iterable[nn.Module]) -> None:
        """Takes from now on what these layers of the block give for a batch, and its attention, from the first run
        that comes as far, see `Remembered`: the layers, and all before them, must not change any more. Until
        `forget`."""
        self._remembered = self._remembered or Remembered()
        self._remembered.add(layers)

    def forget(self) -> None:
        """Ends what `remember` began."""
        if self._remembered is not None:
            self._remembered.close()
            self._remembered = None

    def outputs(self) -> Iterator[Tensor]:
        """Runs the current block, one batch per step; yields its hidden states [batch, t, features]."""
        for index in range(len(self)):
            yield self.output(index)

    def run(self) -> None:
        """Runs the current block over all batches, for hooks; one that raises `Enough` ends the run of that batch."""
        for index in range(len(self)):
            self.run_one(index)

    def run_one(self, index: int) -> None:
        """`run` on one batch."""
        with suppress(Enough):
            self.output(index)

    def output(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Runs the block on one batch, floating arguments in `dtype`; returns its hidden states [batch, t,
        features]."""
        return hidden_of(self._output(index, self.stream, dtype), self.path)

    def advance(self, stream: Stream) -> Iterator[Tensor]:
        """Runs the current block on `stream`, one batch per step, and advances `stream` to the next block, in place;
        yields the block's hidden states [batch, t, features]."""
        for index, call in enumerate(self._calls):
            output = self._output(index, stream, None, keep=True)
            hidden = hidden_of(output, self.path)
            values = stream[call.batch]
            for number, tensor in enumerate(_tensors(output)):
                if Slot(self.path, number) in self._last_use:
                    values[Slot(self.path, number)] = self._kept(tensor.to(call.home))
            for slot in [slot for slot in values if self._last_use.get(slot) == self.path]:
                del values[slot]
            yield hidden.to(call.home)

    def _output(self, index: int, stream: Stream, dtype: torch.dtype | None, *, keep: bool = False) -> Any:
        """keep: the block's in-place writes to its arguments persist."""
        call = self._calls[index]
        args, kwargs = call.resolved(stream[call.batch], self._device, dtype, keep=keep)
        if dtype is not None:
            return self.block(*args, **kwargs)
        if self._remembered is None or stream is not self.stream:
            return run_wide(self.block, args, kwargs, _widened)
        with self._remembered.run(index):
            return run_wide(self.block, args, kwargs, _widened)


Visit = Callable[[Block, Calls], None]


@contextmanager
def on_inputs(watched: Iterable[tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Calls a function with the input of its linear, [..., in], before each run of it; for the length of the context.

    The functions of one linear are called in their order; one that raises `Enough` ends the block's run (`Calls.run`).
    """
    with ExitStack() as stack:
        for linear, function in watched:
            stack.callback(linear.register_forward_pre_hook(_with_input(function), with_kwargs=True).remove)
        yield


def _with_input(function: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        function(args[0] if args else kwargs["input"])

    return hook


@torch.no_grad()
def walk(
    model: nn.Module,
    batches: Sequence[Batch],
    visit: Visit,
    *,
    propagate: bool = True,
    on_step: OnStep | None = None,
    device: torch.device | str | None = None,
    storage: Storage | None = None,
    processes: Processes | None = None,
) -> None:
    """Calls ``visit(block, calls)`` for each block in the order of execution; `visit` may change the block.

    batches: token ids [batch, t] or keyword arguments of the model, of any sizes; a batch goes to the model unchanged,
    so blocks also run on padding under a mask. propagate: the inputs of the next block are the outputs of the changed
    block; otherwise those of the original one. device: blocks, one at a time, and their inputs are moved there.
    storage: where the weights are; by default in memory. processes: of several, each walks with its share of the
    batches, and all with the same groups of linears. With a visitor that does nothing the inputs of every block are,
    bit for bit, those in ``model(ids)``, or in the same model in float32 where that is faster (`nn/wide.py`). The model
    is put in evaluation mode; the former mode is restored, also after an error.

    Raises InputError where no block runs, or where one runs for some batches only.
    """
    if len(batches) == 0:
        raise InputError("no batches to walk with; give at least one sequence of token ids")
    device = torch.device(device) if device is not None else None
    storage, processes = storage or Storage(), processes or Processes()
    blocks = {block.path: block for block in find_blocks(model)}
    inputs = [_complete(model, batch) for batch in processes.share(batches)]
    with evaluating(model):
        trunk = _trunk(model, blocks)
        with storage.holding(AROUND):
            segments = _segments(trunk, blocks, _complete(model, batches[0]), storage)
        if len(segments) > 1 and not propagate:
            raise InputError(
                f"{type(model).__name__} is walked in {len(segments)} segments, each after the one before it was "
                f"changed; propagate=False needs a network that is a plain chain of blocks"
            )
        if len(segments) > 4:
            log.warning(
                "%s computes something between its blocks, or runs them more than once; the network is run again for "
                "each of %d segments, which takes longer",
                type(model).__name__,
                len(segments),
            )
        total, done = sum(len(segment.paths) for segment in segments), 0
        for segment in segments:
            recording = _Recording(segment, storage)
            with storage.holding(AROUND):
                recording.record(trunk, blocks, inputs)
            stream = recording.stream
            for path in segment.paths:
                block = blocks[path]
                last = path == segment.paths[-1]
                with storage.holding(path), _moved_to(block.module, device):
                    calls = Calls(path, block.module, recording, stream, device)
                    observe(block, calls.outputs())
                    _agree(block, processes)
                    following = stream
                    if not propagate and not last:
                        following = copied(stream)
                        for _ in calls.advance(following):
                            pass
                    try:
                        visit(block, calls)
                        if propagate and not last:
                            for _ in calls.advance(stream):
                                pass
                    finally:
                        calls.forget()
                stream = following
                recording.calls[path].clear()
                done += 1
                if on_step is not None:
                    on_step(done, total, path)


def _agree(block: Block, processes: Processes) -> None:
    """Gives a block the groups that all processes observed, each on its own batches."""
    if processes.count > 1:
        block.groups = merged_groups(processes.gathered(block.groups))
        reached = {path for group in block.groups for path in group.paths}
        block.idle = [path for path in block.idle if path not in reached]


def run_network(model: nn.Module, batch: Batch) -> Any:
    """``model(input_ids=…)`` on one batch, on the model's device, without a cache of keys and values, by `run_wide`.

    batch: token ids [batch, t] or keyword arguments. An encoder-decoder without `decoder_input_ids` gets the text
    itself there, shifted by one.
    """
    return run_wide(model, (), _arguments(model, _complete(model, batch)))


def _complete(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of a batch, with the decoder's inputs for an encoder-decoder."""
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    given = inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
    ids = inputs.get("input_ids")
    if "decoder_input_ids" in inspect.signature(model.forward).parameters and not given and isinstance(ids, Tensor):
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(model, "_shift_right", None)
        inputs["decoder_input_ids"] = ids if shift is None else shift(ids)
    return inputs


def _arguments(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments on the module's device, and that it is to keep no cache."""
    home = _first_device(module)
    moved = {name: value.to(home) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    accepted = inspect.signature(module.forward).parameters
    if "use_cache" in accepted or any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
        moved["use_cache"] = False
    return moved


def copied(stream: Stream) -> Stream:
    """A copy of a stream that can be advanced by itself; tensors are shared, objects that blocks write into are not."""
    return [
        {slot: value if isinstance(value, Tensor) else copy.deepcopy(value) for slot, value in values.items()}
        for values in stream
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Data flow between blocks


class _Segment(NamedTuple):
    """Consecutive blocks that pass on what they return, and nothing that was computed from it."""

    paths: list[str]
    """Paths of the blocks, in the order of execution."""
    light: set[str]
    """Paths of blocks that return their hidden states alone, in the shape and dtype of the input."""
    written: set[int | str]
    """Positions and names of arguments that blocks write into."""
    repeated: bool = False
    """Whether this is one block that runs several times in a forward pass."""


class _Event(NamedTuple):
    """One call of a block in the first run."""

    path: str
    """Path of the block."""
    sources: list[tuple[int, int | None]]
    """Pair for each input tensor: the latest event that it depends on, or -1; the event that returned it."""
    light: bool
    """Whether the block returned its hidden states alone."""
    written: set[int | str]
    """Positions and names of arguments that the block wrote into."""


def _segments(
    trunk: nn.Module, blocks: Mapping[str, Block], batch: Mapping[str, Any], storage: Storage
) -> list[_Segment]:
    """The blocks in the order of execution, divided where something is computed between them; runs one batch."""
    events = _observe_data_flow(trunk, blocks, batch, storage)
    if not events:
        raise InputError(f"the network ran without {next(iter(blocks))} or any other of its blocks")
    order = [event.path for event in events]
    written = set().union(*(event.written for event in events))
    segments: list[_Segment] = []
    members: set[int] | None = None  # events of the current segment
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


def _observe_data_flow(
    trunk: nn.Module, blocks: Mapping[str, Block], batch: Mapping[str, Any], storage: Storage
) -> list[_Event]:
    events: list[_Event] = []
    origins, returned = _Origins(), _Returned()

    def stub(path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments: dict[int | str, Any] = dict(enumerate(args))
        arguments.update(kwargs)
        sources = [(origins.of(tensor), returned.find(tensor)) for tensor in _tensors(arguments)]
        before = {name: _fingerprint(value) for name, value in arguments.items()}
        with origins.paused(), storage.holding(path):
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
            origins.record(tensor, len(events))
            returned.record(tensor, len(events))
        events.append(_Event(path, sources, light, written))
        return output

    with _stubs(blocks, stub), origins:
        trunk(**_arguments(trunk, batch))
    return events


class _Origins(TorchDispatchMode):
    """Tensors computed from blocks' outputs, with the latest event that each depends on; by storage."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def of(self, tensor: Tensor) -> int:
        """The latest event that a tensor of any shape [...] depends on, -1 for none."""
        storage = tensor.untyped_storage()
        reference, latest = self._latest.get(id(storage), (None, -1))
        return latest if reference is not None and reference() is storage else -1

    def record(self, tensor: Tensor, event: int) -> None:
        storage = tensor.untyped_storage()
        self._latest[id(storage)] = weakref.ref(storage), event

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Disabled while a block runs: nothing in it needs tracking, and not all of its ops may support such a mode."""
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
                self.record(tensor, max(latest, self.of(tensor)))
        return result


class _Returned:
    """Tensors that blocks returned, by identity, unless they were modified in place since."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Any]] = {}

    def record(self, tensor: Tensor, what: Any) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), _version(tensor), what

    def find(self, tensor: Tensor) -> Any:
        """The value recorded for a tensor of any shape [...]; None where no block returned it."""
        reference, version, what = self._known.get(id(tensor), (None, 0, None))
        return what if reference is not None and reference() is tensor and version == _version(tensor) else None


def _version(tensor: Tensor) -> int:
    """Version counter: changes when the tensor is modified in place."""
    return 0 if tensor.is_inference() else tensor._version


def _fingerprint(value: Any, depth: int = 6) -> object:
    """A value that changes when a container or another object, or a tensor in it, is modified."""
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
# Arguments of the blocks


class _SegmentDone(BaseException):
    """Ends a dry run when the call of the segment's last block is recorded."""


class _Recording:
    """The calls of a segment's blocks, recorded in one dry run per batch."""

    def __init__(self, segment: _Segment, storage: Storage) -> None:
        self.segment, self.storage = segment, storage
        self.calls: dict[str, list[_Call]] = {path: [] for path in segment.paths}
        self.stream: Stream = []
        self.last_use: dict[Slot, str] = {}
        """Path of the last block that reads a slot."""
        self._returned = _Returned()
        self._states: list[Any] = []
        self._seen: dict[tuple[Any, ...], Tensor] = {}

    def record(self, trunk: nn.Module, blocks: Mapping[str, Block], batches: Sequence[Mapping[str, Any]]) -> None:
        """Runs each batch dry."""
        with _stubs(blocks, self._stub):
            for batch in batches:
                self.stream.append({})
                self._returned, self._states = _Returned(), []
                with suppress(_SegmentDone):
                    trunk(**_arguments(trunk, batch))
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
        if path not in self.calls:  # of a segment before this one
            with self.storage.holding(path):
                return forward(*args, **kwargs)
        batch = len(self.stream) - 1
        self.calls[path].append(
            _Call(
                batch,
                [self._recorded(path, position, value) for position, value in enumerate(args)],
                {name: self._recorded(path, name, value) for name, value in kwargs.items()},
                next((tensor.device for tensor in _tensors((args, kwargs))), torch.device("cpu")),
                bool(self.segment.written & {0, "hidden_states"}),
            )
        )
        if path == self.segment.paths[-1] and not self.segment.repeated:
            raise _SegmentDone
        light = path in self.segment.light
        if light:
            output: Any = next(_tensors((args, kwargs))).clone()
        else:
            with self.storage.holding(path):
                output = forward(*args, **kwargs)
        for number, tensor in enumerate(_tensors(output)):
            self._returned.record(tensor, Slot(path, number))
        return output

    def _recorded(self, path: str, name: int | str, value: Any) -> Any:
        """An argument, with slots in place of values from other blocks; equal tensors of earlier batches are kept
        once."""
        if name in self.segment.written and not isinstance(value, Tensor):
            return self._state(value)

        def recorded(tensor: Any) -> Any:
            slot = None if self.segment.repeated else self._returned.find(tensor)
            if slot is not None:
                self.last_use[slot] = path
                return slot
            if name in self.segment.written:
                return tensor.clone()
            earlier = self._seen.setdefault((name, tensor.shape, tensor.dtype, tensor.device), tensor)
            return earlier if earlier is tensor or torch.equal(earlier, tensor) else self.storage.kept(tensor)

        return _mapped(value, recorded)

    def _state(self, value: Any) -> Slot:
        """The slot of an object that blocks write into, with a copy of its state at the beginning of the segment."""
        number = next((n for n, each in enumerate(self._states) if each is value), None)
        if number is None or self.segment.repeated:
            number = len(self._states)
            self._states.append(value)
            self.stream[-1][Slot("state", number)] = copy.deepcopy(value)
        return Slot("state", number)


class _Call(NamedTuple):
    """The arguments of one call, with a `Slot` for each value that flows from block to block."""

    batch: int
    """Index of the batch."""
    args: list[Any]
    """Positional arguments."""
    kwargs: dict[str, Any]
    """Keyword arguments."""
    home: torch.device
    """Device of the tensors."""
    writes: bool
    """Whether the block writes into its hidden states, and so needs a copy."""

    def hidden(self, values: Mapping[Slot, Any]) -> Tensor:
        """The first tensor, [batch, t, features]."""
        return next(_tensors(self.resolved(values, None, None)))

    def resolved(
        self,
        values: Mapping[Slot, Any],
        device: torch.device | None,
        dtype: torch.dtype | None,
        *,
        keep: bool = False,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with the values of the slots; on `device`, floating tensors in `dtype`.

        keep: objects that blocks write into are passed themselves, not copies.
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
    """``stub(path, forward, args, kwargs)`` in place of each block's ``forward`` within the context."""

    def stubbed(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: stub(path, forward, args, kwargs)

    saved = {path: vars(block.module).get("forward") for path, block in blocks.items()}
    for path, block in blocks.items():
        # Set on the instance; the module stays, since the network may read other attributes of its blocks.
        vars(block.module)["forward"] = stubbed(path, block.module.forward)
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
    """A copy of nested containers with `change` applied to each tensor and `Slot`."""
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


def _widened(value: Any) -> Any:
    """Arguments with their half-precision tensors in the type that a model is computed in."""

    def wide(leaf: Any) -> Any:
        return leaf.to(computed_in(leaf.dtype, leaf.device)) if isinstance(leaf, Tensor) else leaf

    return _mapped(value, wide)


def has_head(model: nn.Module) -> bool:
    """Whether a model predicts something; an embedding model gives hidden states alone."""
    bare = getattr(model, "base_model", None) is model
    return not bare or model.get_output_embeddings() is not None  # type: ignore[operator]


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """The logits in the model's output. Raises InputError where there are none."""
    found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise InputError(f"{type(model).__name__} gives no logits, which two-sided rounding and recovery need")
    return found


def hidden_of(output: Any, path: str) -> Tensor:
    """The hidden states [batch, t, features] in a block's output: its first tensor."""
    hidden = next(_tensors(output), None)
    if hidden is None:
        raise InputError(f"{path} returned {type(output).__name__} without a tensor; such a network cannot be walked "
                         f"block by block: use a quantizer that needs no calibration")  # fmt: skip
    return hidden


# ---------------------------------------------------------------------------------------------------------------------
# Devices and modes


def _trunk(model: nn.Module, blocks: Mapping[str, Block]) -> nn.Module:
    """The model without its head, whose logits are not needed."""
    trunk = getattr(model, "base_model", model)
    within = {id(module) for module in trunk.modules()}
    return trunk if all(id(block.module) in within for block in blocks.values()) else model


def _first_device(module: nn.Module) -> torch.device:
    """Device of the first weights in memory, which are the embeddings', for token ids."""
    return next((each.device for each in module.parameters() if not each.is_meta), torch.device("cpu"))


@contextmanager
def _moved_to(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The block on `device` within the context, then on its own device again."""
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
    """Evaluation mode within the context, then each module's former mode; by path, since modules may be replaced."""
    modes = {path: module.training for path, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for path, module in model.named_modules():
            module.training = modes.get(path, module.training)
