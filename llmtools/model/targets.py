"""What is to be quantized in a model, and how: decided, and refused if need be, before anything is touched.

The rules are the same whether a model in memory is quantized or one that is just being loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError
from ..nn.swap import altered, computes_otherwise, quantized_linears
from ..quant import Quantizer
from ..quant import quantizer as named_quantizer
from .blocks import Block, Leftover, Stack, find_blocks, find_stacks, leftovers, linears

log = logging.getLogger(__name__)

Overrides = Mapping[str, Mapping[str, Any] | None]
"""Pattern of module paths → options that differ, ``{"name": …, …}`` for another quantizer, None to leave dense."""


MIN_FEATURES = 8
"""Linears with fewer inputs stay dense unless an override names them: mixing coefficients, such as Gemma 3n's, which it
clamps in place while it trains."""


class Left(NamedTuple):
    """A weight matrix that stays as it was, and why."""

    path: str
    shape: tuple[int, ...]
    reason: str


@dataclass
class Plan:
    """Each linear's quantizer, and what stays as it is."""

    quantizers: dict[str, Quantizer]
    """path → quantizer, in the model's order; no modules, which would keep dense weights alive."""
    blocks: list[str]
    stacks: list[str]
    """The lists that the blocks are in."""
    left: list[Left]

    @staticmethod
    def of(model: nn.Module, base: Quantizer, overrides: Overrides, skip: Sequence[str] | None) -> Plan:
        """The plan for `base` everywhere but in `overrides` and `skip`, as `quantize` explains them.

        Raises InputError for a pattern that matches nothing, and for a model that cannot be quantized.
        """
        _refuse_strangers(model)
        stacks = find_stacks(model)
        blocks = find_blocks(model)
        inside = {path for block in blocks for path, _ in linears(block.module, block.path)}
        quantizers: dict[str, Quantizer] = {}
        left: list[Left] = []
        unused = dict(overrides)
        variants = {pattern: _variant(base, pattern, options) for pattern, options in overrides.items()}
        for path, linear in linears(model):
            shape = (linear.out_features, linear.in_features)
            reason = _skipped(path, path in inside, skip)
            if reason is not None:
                left.append(Left(path, shape, reason))
                continue
            matching = [pattern for pattern in overrides if _matches(path, pattern)]
            for pattern in matching:
                unused.pop(pattern, None)
            chosen = variants[matching[0]] if matching else base
            if not matching and linear.in_features < MIN_FEATURES:
                left.append(Left(path, shape, f"{linear.in_features} inputs, too few for codes and scales to save"))
            elif chosen is None:
                left.append(Left(path, shape, f"left dense by the override {matching[0]!r}"))
            else:
                quantizers[path] = chosen
        if unused:
            raise InputError(_no_match(next(iter(unused)), list(quantizers), [each.path for each in left]))
        if not quantizers:
            raise InputError("every linear is skipped or left dense by an override, so that nothing is quantized")
        _refuse_altered(model, quantizers)
        _refuse_tied(model, quantizers)
        _settle_rescaling(model)
        left += _said_leftovers(model, blocks)
        if skip is None:
            _say_what_is_taken(model, stacks, inside)
        return Plan(quantizers, [block.path for block in blocks], [stack.path for stack in stacks], left)


def base_quantizer(quantizer: str | Quantizer, options: dict[str, Any]) -> Quantizer:
    """The quantizer of that name with these options, or the one that was given."""
    if isinstance(quantizer, str):
        return named_quantizer(quantizer, **options)
    if options:
        raise InputError(
            f"options {', '.join(sorted(options))} come with a name, and {quantizer.name} is a quantizer already; "
            f"pass them to it, or see dataclasses.replace"
        )
    return quantizer


def _variant(base: Quantizer, pattern: str, options: Mapping[str, Any] | None) -> Quantizer | None:
    """The quantizer of one override: another one if the options have a name, else `base` with options changed."""
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise InputError(f"override {pattern!r}: {options!r} is neither options such as {{'bits': 4}} nor None")
    spec = dict(options)
    name = spec.pop("name", None)
    try:
        if name is not None:
            return named_quantizer(name, **spec)
        known = [each.name for each in dataclasses.fields(base) if each.init]  # type: ignore[arg-type]
        if set(spec) <= set(known):
            return dataclasses.replace(base, **spec)  # type: ignore[type-var]
        return named_quantizer(base.name, **spec)  # raises the error about the unknown option
    except InputError as error:
        raise InputError(f"override {pattern!r}: {error}") from error


def _skipped(path: str, inside: bool, skip: Sequence[str] | None) -> str | None:
    if skip is None:
        return None if inside else "outside the blocks, skipped by default"
    pattern = next((pattern for pattern in skip if _matches(path, pattern)), None)
    return None if pattern is None else f"skipped by {pattern!r}"


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def _no_match(pattern: str, quantized: list[str], skipped: list[str]) -> str:
    hidden = [path for path in skipped if _matches(path, pattern)]
    if hidden:
        return (
            f"override {pattern!r} matches only what is skipped: {hidden[0]}; pass a `skip` without it to quantize it"
        )
    near = difflib.get_close_matches(pattern, [*quantized, *skipped], n=3, cutoff=0.0)
    return f"override {pattern!r} matches no linear; paths look like {', '.join(near)}; * stands for any part"


def _refuse_strangers(model: nn.Module) -> None:
    """Models that are quantized already, or that carry adapters."""
    if quantized_linears(model) or getattr(model, "hf_quantizer", None) is not None:
        raise InputError("the model is quantized already; start from the original, or see llmtools.dequantize")
    if hasattr(model, "peft_config"):
        raise InputError("the model carries adapters; merge or unload them (merge_and_unload) before quantizing it")


def _settle_rescaling(model: nn.Module) -> None:
    """Has RWKV leave its weights alone, in place.

    With ``rescale_every`` it divides some of them by powers of two when it first infers, and multiplies them back when
    it first trains (for float16); what is packed can be neither, so the config then says that nothing is rescaled.
    """
    told: Any = model
    config: Any = getattr(model, "config", None)
    if not getattr(config, "rescale_every", 0):
        return
    if any(getattr(module, "layers_are_rescaled", False) for module in model.modules()):
        training = model.training
        model.train()
        with torch.no_grad():
            told(input_ids=torch.zeros(1, 1, dtype=torch.long, device=told.device), use_cache=False)
        model.train(training)
    log.warning("rescale_every is set from %s to 0: packed weights cannot be rescaled in place", config.rescale_every)
    config.rescale_every = 0


def _refuse_altered(model: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
    """Linears whose weight is more than a parameter, which packing would silently undo."""
    for path in quantizers:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        if (reason := altered(linear)) is not None:
            raise InputError(
                f"{path} cannot be packed as it is: {reason}; or leave it dense, overrides {{{path!r}: None}}"
            )


def _refuse_tied(model: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
    """A weight with two owners cannot be packed in one and stay dense in the other."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():  # a module that is listed twice is one owner
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    for path in quantizers:
        others = [owner for owner in owners[id(model.get_submodule(path).weight)] if owner != path]
        if others:
            raise InputError(
                f"{path} shares its weight with {others[0]}; skip it (the default for a head), or untie the two first: "
                f"give it a copy of the weight and set model.config.tie_word_embeddings = False"
            )


def _said_leftovers(model: nn.Module, blocks: list[Block]) -> list[Left]:
    """Weights in the blocks that no quantizer sees, with a line in the log when they are not negligible."""
    found = leftovers(model, blocks)
    total = sum(p.numel() for block in blocks for p in block.module.parameters() if p.dim() >= 2)
    share = sum(math.prod(each.shape) for each in found) / max(1, total)
    if share >= 0.01:
        names = sorted({f"{any_index(each.path)} ({each.owner})" for each in found})
        log.warning(
            "%.0f %% of the weights in the blocks are not in an nn.Linear and stay as they are: %s",
            100 * share,
            ", ".join(names),
        )
    return [Left(each.path, each.shape, _why_left(model, each)) for each in found]


def _why_left(model: nn.Module, each: Leftover) -> str:
    owner = model.get_submodule(each.path.rpartition(".")[0])
    reason = computes_otherwise(owner) if isinstance(owner, nn.Linear) else None
    return reason or f"a parameter of {each.owner}, which is no nn.Linear"


def _say_what_is_taken(model: nn.Module, stacks: list[Stack], inside: Collection[str]) -> None:
    """A line in the log where a good part of the model is in other stacks than those that are quantized."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    paths = [f"{stack.path}." for stack in stacks]
    rest: dict[str, int] = {}
    taken = 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            continue
        size = sum(each.numel() for each in module.parameters(recurse=False) if each.dim() >= 2)
        if path in inside:
            taken += size
        elif size and not path.startswith(tuple(paths)):
            rest[_holder(path)] = rest.get(_holder(path), 0) + size
    if taken < 0.95 * (taken + sum(rest.values())):
        log.warning(
            "%.0f %% of the weights outside embeddings and head are quantized, the linears of %s; %s stay as they are "
            "(`skip` with a list of what to leave alone quantizes all others)",
            100 * taken / (taken + sum(rest.values())),
            ", ".join(stack.path for stack in stacks),
            ", ".join(sorted(rest, key=lambda name: -rest[name])[:3]),
        )


def _holder(path: str) -> str:
    """The part of a model that a module belongs to: its path up to the first number, or its first two names."""
    return ".".join(path.split(".")[:2]) if not re.search(r"\.\d", path) else re.split(r"\.\d", path)[0]


def any_index(path: str) -> str:
    """``model.layers.*.mlp.up_proj``: the path with its numbers left open."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
