"""Where the linears of a network are, found by looking and by running, not by a list of model families.

Two observations are enough. The *blocks* are the largest `ModuleList` with linears in it, whatever the family calls it
(``model.layers``, ``transformer.h``, ``decoder.layers``). Linears that *read the same tensor* are found by running a
block once with a hook on each: the tensors that arrive are compared by storage, offset, shape and version. Such a
group (query, key and value; gate and up) shares one Hessian, and the order of the calls is the order of the work
(arXiv:2210.17323, "true sequential" in its code).

What cannot be found is said: a network with its weights outside `nn.Linear` (GPT-2's ``Conv1D``, the fused experts of a
mixture) is refused, or its `leftovers` are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import InputError
from ..nn.linear import QuantizedLinear


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


class Leftover(NamedTuple):
    """A weight inside the blocks that is no linear's, so that no quantizer sees it."""

    path: str
    owner: str
    """The class of the module that holds it: ``Conv1D``, ``MixtralExperts``."""
    shape: tuple[int, ...]


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks in the order in which they are listed: the `ModuleList` with the most weights in linears.

    Raises InputError when no list has a linear in it, saying which modules hold the weights instead.
    """
    best: nn.ModuleList | None = None
    best_path, most = "", 0
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(linear.in_features * linear.out_features for _, linear in linears(module))
            if size > most:  # on a tie the outer list, which comes first
                best, best_path, most = module, path, size
    if best is None:
        raise InputError(_no_blocks(model))
    return [Block(f"{best_path}.{index}", module) for index, module in enumerate(best)]


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """The linears below `module` that can be quantized, with their paths: `nn.Linear` or a subclass, still dense."""
    for path, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear) and not isinstance(child, QuantizedLinear):
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
            linear.register_forward_pre_hook(_note(path, batch, calls, kept))
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
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        kept.append(x)
        version = 0 if x.is_inference() else x._version  # moves when the tensor is written in place
        where = (batch, x.device, x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), version)
        calls.setdefault(path, []).append(where)

    return hook


def leftovers(model: nn.Module, blocks: list[Block]) -> list[Leftover]:
    """Weights inside the blocks, matrices or larger, that belong to no linear."""
    found = []
    for block in blocks:
        for path, module in block.module.named_modules(prefix=block.path):
            if isinstance(module, nn.Linear | nn.Embedding):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2:
                    found.append(Leftover(f"{path}.{name}", type(module).__name__, tuple(parameter.shape)))
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
