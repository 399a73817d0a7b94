"""Find the linears of a network from its structure and one run, without a list of model families.

Two observations are enough. The *blocks* are the members of a `ModuleList` with linears in them, whatever the family
calls it (``model.layers``, ``transformer.h``, ``decoder.layers``); there may be several such *stacks*, as in an
encoder-decoder. Of a multimodal model only the text decoder's are used (transformers' `get_decoder`). Linears that
*read the same tensor* are found by running a block once with a hook on each: the inputs are compared by storage,
offset, shape and version. Such a group (query, key and value; gate and up) shares one Hessian, and groups are quantized
in the order of the calls (arXiv:2210.17323, "true sequential" in its code).

Unsupported weights are reported: a network with its weights outside `nn.Linear` (GPT-2's ``Conv1D``) is
refused, or its `unsupported_weights` are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Sequence
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
    """Paths of the linears, in call order."""
    calls: int = 1
    """Number of calls of each of them in one run of the block."""


@dataclass
class Block:
    """One of the repeated blocks (decoder layers) of a network."""

    path: str
    """Path in the model: ``"model.layers.7"``."""
    module: nn.Module
    """The block itself."""
    groups: list[Group] = field(default_factory=list)
    """Linears grouped by their input tensor, in call order. Empty until `observe` ran the block."""
    idle: list[str] = field(default_factory=list)
    """Paths of linears without input, such as an expert to which no token was routed."""

    def groups_among(self, paths: Container[str]) -> list[Group]:
        """The groups with those of their linears that are among `paths`, and none that is empty."""
        groups = [Group([path for path in group.paths if path in paths], group.calls) for group in self.groups]
        return [group for group in groups if group.paths]


class UnsupportedWeight(NamedTuple):
    """A weight inside the blocks that belongs to no `nn.Linear`, and cannot be quantized."""

    path: str
    """Path of the parameter."""
    owner: str
    """Class name of the module that holds it: ``Conv1D``, ``MixtralExperts``."""
    shape: tuple[int, ...]
    """Shape of the parameter."""


class Stack(NamedTuple):
    """Consecutive blocks: one `ModuleList`."""

    path: str
    """Path of the list: ``"model.layers"``."""
    blocks: list[Block]
    """Blocks, in the order of the list."""
    weights: int
    """Number of weights in the linears."""


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of all stacks, in the order of registration; one that is registered twice counts once.

    Raises InputError when no list has a linear in it, naming the modules that hold the weights instead.
    """
    blocks = {id(block.module): block for stack in reversed(find_stacks(model)) for block in reversed(stack.blocks)}
    return list(reversed(blocks.values()))


def main_stack(model: nn.Module) -> Stack:
    """The stack with the most weights in linears. Raises InputError as `find_blocks`."""
    return max(find_stacks(model), key=lambda stack: stack.weights)  # the first of equals


def find_stacks(model: nn.Module) -> list[Stack]:
    """The outermost `ModuleList`s with linears in them, in the text part of the model.

    A list of bare linears is a stack only if there is no other. Raises InputError when there is no list.
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
    """(path, module) of the text parts: a language model itself, else its decoder, and the encoder of an
    encoder-decoder with text inputs."""
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
    """The text part of a transformers config; the config itself for a language model."""
    try:
        return config.get_text_config()
    except ValueError:  # it has an encoder's and a decoder's
        return config.get_text_config(decoder=True)


def _outermost_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists with linears in them that are in no other one; a list of lists is searched."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if not isinstance(child, nn.ModuleList) or any(isinstance(each, nn.ModuleList) for each in child):
            yield from _outermost_lists(child, path)
        elif next(linears(child), None) is not None:
            yield path, child


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """The linears below `module` that can be quantized, with their paths: dense ones that compute y = x Wᵀ + b."""
    for path, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear) and not isinstance(child, QuantizedLinear) and not computes_otherwise(child):
            yield path, child


def unit_of(path: str, blocks: Collection[str]) -> str | None:
    """The block that a module or parameter is in; None where it is in none."""
    parts = path.split(".")
    prefixes = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if prefix in blocks), None)


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The linear at a path of the model."""
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def observe(block: Block, runs: Iterator[Any]) -> None:
    """Sets the groups of a block from hooks while it runs: each step of `runs` runs it on one batch.

    One batch is enough for most; further ones are run while some linear has had no input.
    """
    watched = dict(linears(block.module, block.path))
    seen: dict[str, list[tuple[object, ...]]] = {}
    for batch in _indices():
        if len(seen) == len(watched):
            break
        kept: list[Tensor] = []  # keeps the tensors alive: the address of a freed one could be reused
        calls: dict[str, list[tuple[object, ...]]] = {}
        hooks = [
            linear.register_forward_pre_hook(_recorder(path, batch, calls, kept), with_kwargs=True)
            for path, linear in watched.items()
            if path not in seen
        ]
        try:
            done = next(runs, _EXHAUSTED) is _EXHAUSTED
        finally:
            for hook in hooks:
                hook.remove()
        seen |= calls
        if done:
            break
    by_inputs: dict[tuple[object, ...], list[str]] = {}
    for path, inputs in seen.items():  # in the order of the first calls
        by_inputs.setdefault(tuple(inputs), []).append(path)
    block.groups = [Group(paths, len(inputs)) for inputs, paths in by_inputs.items()]
    block.idle = [path for path in watched if path not in seen]


def merged_groups(observed: Sequence[Sequence[Group]]) -> list[Group]:
    """The groups of a block that several processes ran on batches of their own: those of the first, and of each other
    one the linears that had no input before."""
    groups: list[Group] = []
    known: set[str] = set()
    for each in (group for found in observed for group in found):
        paths = [path for path in each.paths if path not in known]
        known.update(paths)
        if paths:
            groups.append(Group(paths, each.calls))
    return groups


_EXHAUSTED = object()


def _indices() -> Iterator[int]:
    index = 0
    while True:
        yield index
        index += 1


def _recorder(
    path: str, batch: int, calls: dict[str, list[tuple[object, ...]]], kept: list[Tensor]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        kept.append(x)
        version = 0 if x.is_inference() else x._version  # changes when the tensor is modified in place
        identity = (batch, x.device, x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), version)
        calls.setdefault(path, []).append(identity)

    return hook


def unsupported_weights(model: nn.Module, blocks: list[Block]) -> list[UnsupportedWeight]:
    """Weights of two or more dimensions inside the blocks that belong to no linear that can be quantized."""
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
    """The error message for a network without blocks, naming the modules that hold its weights."""
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
