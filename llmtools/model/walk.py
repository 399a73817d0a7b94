"""Stream text through a network block by block, and let a visitor change each block on the way.

Quantizers that learn from data want the inputs of every linear, in a network whose earlier part is quantized already.
Running the whole network for each of them is quadratic in its depth; so one block at a time is run over all batches,
and its outputs are the inputs of the next (arXiv:2210.17323, section 4).

What a block is called *with* is taken down in a dry run, in which every block is replaced by a stub that notes its
arguments and returns the hidden states as they came. It costs one block (the first, run once to see whether blocks
return a tensor or a tuple) plus embeddings and masks, and gives each block its own keyword arguments. To catch those of
the first block alone and reuse them for all is shorter, and wrong for Gemma 3, whose layers differ in mask and rotary
embedding. The stub also notices a network that does something to the hidden states *between* blocks, which cannot be
streamed: that is an error, not a wrong answer.

Memory: the hidden states of all batches once (twice with ``propagate=False``), and whatever else blocks are called
with; tensors that are equal from batch to batch, such as masks and rotary tables, are kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .blocks import Block, find_blocks, observe

OnStep = Callable[[int, int, str], None]
"""``on_step(done, total, what)`` after each piece of a long job: 3, 22, ``"model.layers.2"``."""


class Calls:
    """What one block is called with: its hidden states and other arguments, one call a batch."""

    def __init__(self, block: nn.Module, calls: list[_Call], hidden: list[Tensor], device: torch.device | None) -> None:
        self.block, self.hidden, self._calls, self._device = block, hidden, calls, device

    def __len__(self) -> int:
        return len(self._calls)

    def outputs(self) -> Iterator[Tensor]:
        """Runs the block, as it is now, on one batch a step; gives its hidden states [batch, t, features]."""
        for index in range(len(self)):
            yield self.output(index)

    def run(self) -> None:
        """Runs the block, as it is now, over all batches; for what hooks see."""
        for _ in self.outputs():
            pass

    def output(self, index: int, hidden: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Runs the block on one batch, or on other hidden states of its shape, with all that it is given in `dtype`."""
        hidden = self.hidden[index] if hidden is None else hidden
        args, kwargs = self._calls[index].with_hidden(hidden)
        if self._device is not None or dtype is not None:
            args, kwargs = _moved(args, self._device, dtype), _moved(kwargs, self._device, dtype)
        return _hidden_of(self.block(*args, **kwargs)).to(hidden.device)


Visit = Callable[[Block, Calls], None]


@torch.no_grad()
def walk(
    model: nn.Module,
    batches: Sequence[Tensor],
    visit: Visit,
    *,
    propagate: bool = True,
    on_step: OnStep | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Calls ``visit(block, calls)`` for each block in the order of execution; `visit` may change the block.

    batches: token ids [batch, t], of any lengths. propagate: the next block reads the outputs of the block as `visit`
    left it; otherwise those of the block as it was. device: blocks, one at a time, and what they read are moved there.
    With a visitor that does nothing every block sees, bit for bit, what it sees in ``model(ids)``. The model is put in
    evaluation mode and, when done or on an error, back.

    Raises InputError where streaming would not be the network: hidden states changed between blocks, a block run twice.
    """
    if len(batches) == 0:
        raise InputError("no batches to walk with; give at least one sequence of token ids")
    device = torch.device(device) if device is not None else None
    with evaluating(model):
        steps, hidden = _dry_run(model, batches)
        for done, (block, calls_of_block) in enumerate(steps):
            with _resident(block.module, device):
                calls = Calls(block.module, calls_of_block, hidden, device)
                observe(block, calls.outputs())
                last = done + 1 == len(steps)
                following = [] if propagate or last else list(calls.outputs())
                visit(block, calls)
                if propagate and not last:
                    for index, output in enumerate(calls.outputs()):
                        hidden[index] = output
            if not propagate:
                hidden = following
            calls_of_block.clear()
            if on_step is not None:
                on_step(done + 1, len(steps), block.path)


class _Call:
    """The arguments of one call, with a hole where the hidden states go."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> None:
        self.args, self.kwargs = list(args), kwargs
        if self.args and isinstance(self.args[0], Tensor):
            self.place: int | str = 0
        elif isinstance(kwargs.get("hidden_states"), Tensor):
            self.place = "hidden_states"
        else:
            raise InputError(
                f"{path}: called without hidden states, neither first nor as `hidden_states`; such a network cannot "
                f"be streamed block by block: use a quantizer that needs no calibration"
            )

    def take_hidden(self) -> Tensor:
        slots: Any = self.args if isinstance(self.place, int) else self.kwargs
        hidden: Tensor = slots[self.place]
        slots[self.place] = None
        return hidden

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(self.place, int):
            return (hidden, *self.args[1:]), dict(self.kwargs)
        return tuple(self.args), {**self.kwargs, self.place: hidden}


def _dry_run(model: nn.Module, batches: Sequence[Tensor]) -> tuple[list[tuple[Block, list[_Call]]], list[Tensor]]:
    """Each block that runs, in call order, with its calls; and the hidden states that the first one reads."""
    blocks = find_blocks(model)
    trunk = getattr(model, "base_model", model)  # without the head, whose logits nobody reads here
    if not any(module is blocks[0].module for module in trunk.modules()):
        trunk = model
    recorder = _Recorder(blocks)
    first_hidden = []
    with recorder:
        for ids in batches:
            trunk(input_ids=ids.to(_first_device(trunk)), use_cache=False)
            first_hidden.append(recorder.finish_batch())
    by_path = {block.path: block for block in blocks}
    return [(by_path[path], calls) for path, calls in recorder.calls.items()], first_hidden


class _Recorder:
    """Stubs in place of the blocks' ``forward``, for as long as the context lasts."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.calls: dict[str, list[_Call]] = {}
        self.count = 0  # finished batches
        self.first: Tensor | None = None  # what the first block of this batch was given
        self.returned: tuple[str, Tensor] | None = None  # the last stub of this batch, and what it returned
        self.like: Any = None  # what a block returns: a tensor, or a tuple that starts with one
        self.seen: dict[tuple[Any, ...], Tensor] = {}

    def __enter__(self) -> None:
        self.saved = [vars(block.module).get("forward") for block in self.blocks]
        for block in self.blocks:
            # On the instance, not in place of the module: the network may read other attributes of its blocks.
            vars(block.module)["forward"] = self._stub(block, block.module.forward)

    def __exit__(self, *error: object) -> None:
        for block, forward in zip(self.blocks, self.saved, strict=True):
            if forward is None:
                vars(block.module).pop("forward", None)
            else:
                vars(block.module)["forward"] = forward
        self.seen.clear()

    def _stub(self, block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stub(*args: Any, **kwargs: Any) -> Any:
            if self.like is None:
                self.like = forward(*args, **kwargs)
                _hidden_of(self.like)
            call = _Call(args, kwargs, block.path)
            hidden = call.take_hidden()
            self._check_chain(block, hidden)
            calls = self.calls.setdefault(block.path, [])
            if len(calls) > self.count:
                raise InputError(
                    f"{block.path} runs more than once in a pass; such a network cannot be streamed block by block: "
                    f"use a quantizer that needs no calibration"
                )
            call.args = [self._shared(position, value) for position, value in enumerate(call.args)]
            call.kwargs = {name: self._shared(name, value) for name, value in call.kwargs.items()}
            calls.append(call)
            self.returned = (block.path, hidden)
            return hidden if isinstance(self.like, Tensor) else (hidden, *self.like[1:])

        return stub

    def _check_chain(self, block: Block, hidden: Tensor) -> None:
        if self.returned is None:
            self.first = hidden
            return
        path, returned = self.returned
        if hidden is not returned and not torch.equal(hidden, returned.to(hidden.device)):
            raise InputError(
                f"the hidden states change between {path} and {block.path}; such a network cannot be streamed block "
                f"by block: use a quantizer that needs no calibration"
            )

    def _shared(self, name: object, value: Any) -> Any:
        """The same value, or an equal one from an earlier batch, so that equal masks are kept once."""
        if type(value) is tuple:
            return tuple(self._shared((name, position), item) for position, item in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        earlier = self.seen.setdefault((name, value.shape, value.dtype, value.device), value)
        return earlier if torch.equal(earlier, value) else value

    def finish_batch(self) -> Tensor:
        if self.first is None:
            raise InputError(f"the network ran without {self.blocks[0].path} or any other of its blocks")
        hidden, self.first, self.returned = self.first, None, None
        self.count += 1
        short = [path for path, calls in self.calls.items() if len(calls) != self.count]
        if short:
            raise InputError(
                f"{short[0]} runs for some batches and not for others; such a network cannot be streamed block by "
                f"block: use a quantizer that needs no calibration"
            )
        return hidden


def _hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returned: the tensor, or the first of the tuple."""
    hidden = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple | list) else None
    if not isinstance(hidden, Tensor):
        raise InputError(
            f"a block returned {type(output).__name__}, neither a tensor nor a tuple that starts with one; such a "
            f"network cannot be streamed block by block: use a quantizer that needs no calibration"
        )
    return hidden


def _moved(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """`value` with its tensors on `device`, floating ones in `dtype`; containers other than plain ones, which may be
    shared, stay as they are."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device, dtype) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    return value


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
