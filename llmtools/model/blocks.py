"""Where the linears of a network are, found by looking and by running, not by a list of model families.

Two observations are enough. The *blocks* are the members of a `ModuleList` with linears in them, whatever the family
calls it (``model.layers``, ``transformer.h``, ``decoder.layers``); there may be several such *stacks*, as in an
encoder-decoder. Of a model that also sees or hears, those of the part that reads and writes text are taken, which
transformers names (`get_decoder`). Linears that *read the same tensor* are found by running a
block once with a hook on each: the tensors that arrive are compared by storage, offset, shape and version. Such a
group (query, key and value; gate and up) shares one Hessian, and the order of the calls is the order of the work
(arXiv:2210.17323, "true sequential" in its code).

What cannot be found is said: a network with its weights outside `nn.Linear` (GPT-2's ``Conv1D``, the fused experts of a
mixture) is refused, or its `unsupported_weights` are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import InputError
from ..nn.linear import QuantizedLinear
from ..nn.swap import computes_otherwise


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor, hence share a Hessian: ``["….q_proj", "….k_proj", "….v_proj"]``."""

    paths: list[str]


@dataclass
class Block:
    """One of the repeated parts of a network."""

    path: str
    """Where it is: ``"model.layers.7"``."""
    module: nn.Module
    groups: list[Group] = field(default_factory=list)
    """Its linears by the tensor that they read, in call order. Empty until `observe` saw the block run."""
    idle: list[str] = field(default_factory=list)
    """Linears that no batch reached, such as an expert to which nothing was routed."""


class UnsupportedWeight(NamedTuple):
    """A weight inside the blocks that is no linear's, so that no quantizer sees it."""

    path: str
    owner: str
    """The class of the module that holds it: ``Conv1D``, ``MixtralExperts``."""
    shape: tuple[int, ...]


class Stack(NamedTuple):
    """Blocks that follow one another."""

    path: str
    """Where their list is: ``"model.layers"``."""
    blocks: list[Block]
    weights: int
    """How many weights their linears hold."""


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of all stacks, in the order in which they are listed; one that is listed twice counts once.

    Raises InputError when no list has a linear in it, saying which modules hold the weights instead.
    """
    blocks = {id(block.module): block for stack in reversed(find_stacks(model)) for block in reversed(stack.blocks)}
    return list(reversed(blocks.values()))


def main_stack(model: nn.Module) -> Stack:
    """The stack with the most weights in linears. Raises InputError as `find_blocks`."""
    return max(find_stacks(model), key=lambda stack: stack.weights)  # the first of equals


def find_stacks(model: nn.Module) -> list[Stack]:
    """The outermost `ModuleList`s with linears in them, in the part of the model that reads and writes text.

    A list of bare linears is no stack, unless there is nothing else. Raises InputError when there is no list.
    """
    parts = text_parts(model)
    stacks: dict[int, Stack] = {}
    for prefix, part in parts:
        for path, found in _outermost_lists(part, prefix):
            blocks = [Block(f"{path}.{name}", block) for name, block in found.named_children()]
            size = sum(linear.in_features * linear.out_features for _, linear in linears(found))
            stacks.setdefault(id(found), Stack(path, blocks, size))
    deep = [stack for stack in stacks.values() if not all(isinstance(b.module, nn.Linear) for b in stack.blocks)]
    if not stacks:
        raise InputError(_no_blocks(model))
    return deep or list(stacks.values())


def text_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of what reads and writes text: all of a plain language model, else its decoder, and the encoder
    of an encoder-decoder that reads text."""
    network: Any = model
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(model, "get_decoder"):
        return [("", model)]
    reads_text = getattr(model, "main_input_name", "input_ids") in ("input_ids", "inputs_embeds")
    if text_config(config) is config and reads_text:
        return [("", model)]
    parts = [network.get_decoder()]
    if getattr(config, "is_encoder_decoder", False) and reads_text and hasattr(model, "get_encoder"):
        parts.insert(0, network.get_encoder())
    paths = {id(module): path for path, module in model.named_modules()}
    found = [(paths[id(part)], part) for part in parts if id(part) in paths and part is not model]
    return found if any(True for path, part in found for _ in _outermost_lists(part, path)) else [("", model)]


def text_config(config: Any) -> Any:
    """The part of a transformers config that describes what reads and writes text; itself for a language model."""
    try:
        return config.get_text_config()
    except ValueError:  # an encoder's and a decoder's
        return config.get_text_config(decoder=True)


def _outermost_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists with linears in them that are in no other one; a list of lists is looked into."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if not isinstance(child, nn.ModuleList) or any(isinstance(each, nn.ModuleList) for each in child):
            yield from _outermost_lists(child, path)
        elif next(linears(child), None) is not None:
            yield path, child


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """The linears below `module` that can be quantized, with their paths: still dense, and y = x Wᵀ + b all they do."""
    for path, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear) and not isinstance(child, QuantizedLinear) and not computes_otherwise(child):
            yield path, child


def observe(block: Block, runs: Iterator[Any]) -> None:
    """Fills in the groups of a block by watching it run: `runs` runs it once, on one batch, at each step.

    One batch is enough for most; as long as some linear was not reached another is drawn.
    """
    watched = dict(linears(block.module, block.path))
    seen: dict[str, list[tuple[object, ...]]] = {}
    for batch in _indices():
        if len(seen) == len(watched):
            break
        kept: list[Tensor] = []  # keeps the tensors alive: a freed one would hand its address to the next
        calls: dict[str, list[tuple[object, ...]]] = {}
        hooks = [
            linear.register_forward_pre_hook(_note(path, batch, calls, kept), with_kwargs=True)
            for path, linear in watched.items()
            if path not in seen
        ]
        try:
            done = next(runs, _NO_MORE) is _NO_MORE
        finally:
            for hook in hooks:
                hook.remove()
        seen |= calls
        if done:
            break
    by_inputs: dict[tuple[object, ...], list[str]] = {}
    for path, inputs in seen.items():  # in the order of the first calls
        by_inputs.setdefault(tuple(inputs), []).append(path)
    block.groups = [Group(paths) for paths in by_inputs.values()]
    block.idle = [path for path in watched if path not in seen]


_NO_MORE = object()


def _indices() -> Iterator[int]:
    index = 0
    while True:
        yield index
        index += 1


def _note(
    path: str, batch: int, calls: dict[str, list[tuple[object, ...]]], kept: list[Tensor]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        kept.append(x)
        version = 0 if x.is_inference() else x._version  # moves when the tensor is written in place
        where = (batch, x.device, x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), version)
        calls.setdefault(path, []).append(where)

    return hook


def unsupported_weights(model: nn.Module, blocks: list[Block]) -> list[UnsupportedWeight]:
    """Weights inside the blocks, matrices or larger, that belong to no linear, or to none that can be packed."""
    found = []
    for block in blocks:
        for path, module in block.module.named_modules(prefix=block.path):
            if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and not computes_otherwise(module)):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2:
                    found.append(UnsupportedWeight(f"{path}.{name}", type(module).__name__, tuple(parameter.shape)))
    return found


def _no_blocks(model: nn.Module) -> str:
    """Why a network without blocks cannot be quantized, from what it holds instead."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return f"{type(model).__name__} is quantized already; start from the original model"
    holders: dict[str, int] = {}
    for module in model.modules():
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() >= 2)
        if size and not isinstance(module, nn.Embedding | nn.Linear):
            holders[type(module).__name__] = holders.get(type(module).__name__, 0) + size
    largest = sorted(holders, key=lambda name: -holders[name])[:3]
    held = f"its weights are in {', '.join(largest)}" if largest else "it has no list of blocks"
    return (
        f"nothing to quantize in {type(model).__name__}: no nn.Linear inside a ModuleList; {held}. "
        f"llmtools quantizes nn.Linear only; use a model whose projections are nn.Linear (most decoders since LLaMA)"
    )
