"""The plan of a quantization: which linears, with which quantizer; checked before the model is changed.

The rules are the same for a model in memory and for one that is quantized while it is loaded.
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
from .blocks import Block, Stack, UnsupportedWeight, find_blocks, find_stacks, linear_at, linears, unsupported_weights

log = logging.getLogger(__name__)

Overrides = Mapping[str, Mapping[str, Any] | None]
"""Pattern of module paths → options that differ, ``{"name": …, …}`` for another quantizer, None to keep dense."""


MIN_FEATURES = 8
"""Number of inputs below which linears stay dense unless an override names them: mixing coefficients, such as Gemma
3n's, which it clamps in place while it trains."""


class NotQuantized(NamedTuple):
    """A weight matrix that is not quantized, and why."""

    path: str
    """Path of the module or parameter."""
    shape: tuple[int, ...]
    """Shape of the weight."""
    reason: str
    """Reason, for the report."""


@dataclass
class Plan:
    """Each linear's quantizer, and the weights that are not quantized."""

    quantizers: dict[str, Quantizer]
    """Path → quantizer, in the model's order; no modules, which would keep dense weights alive."""
    blocks: list[str]
    """Paths of the blocks."""
    stacks: list[str]
    """Paths of the lists that hold the blocks."""
    not_quantized: list[NotQuantized]
    """Weights that stay dense."""

    @staticmethod
    def of(model: nn.Module, base: Quantizer, overrides: Overrides, skip: Sequence[str] | None) -> Plan:
        """The plan for `base` everywhere but in `overrides` and `skip`, as `quantize` explains them.

        Raises InputError for a pattern that matches nothing, and for a model that cannot be quantized.
        """
        _refuse_quantized(model)
        stacks = find_stacks(model)
        blocks = find_blocks(model)
        inside = {path for block in blocks for path, _ in linears(block.module, block.path)}
        quantizers: dict[str, Quantizer] = {}
        not_quantized: list[NotQuantized] = []
        unused = dict(overrides)
        globs = [pattern for pattern in overrides if set(pattern) & set("*?[")]
        variants = {pattern: _variant(base, pattern, options) for pattern, options in overrides.items()}
        for path, linear in linears(model):
            shape = (linear.out_features, linear.in_features)
            reason = _skipped(path, path in inside, skip)
            if reason is not None:
                not_quantized.append(NotQuantized(path, shape, reason))
                continue
            matching = _matching(path, overrides, globs)
            for pattern in matching:
                unused.pop(pattern, None)
            chosen = variants[matching[0]] if matching else base
            if not matching and linear.in_features < MIN_FEATURES:
                not_quantized.append(
                    NotQuantized(path, shape, f"{linear.in_features} inputs, too few for codes and scales to save")
                )
            elif chosen is None:
                not_quantized.append(NotQuantized(path, shape, f"kept dense by the override {matching[0]!r}"))
            else:
                quantizers[path] = chosen
        if unused:
            raise InputError(_no_match(next(iter(unused)), list(quantizers), [each.path for each in not_quantized]))
        if not quantizers:
            raise InputError("every linear is skipped or kept dense by an override, so that nothing is quantized")
        _refuse_altered(model, quantizers)
        _refuse_tied(model, quantizers)
        _disable_rescaling(model)
        not_quantized += _unsupported(model, blocks)
        if skip is None:
            _log_coverage(model, stacks, inside)
        return Plan(quantizers, [block.path for block in blocks], [stack.path for stack in stacks], not_quantized)


def base_quantizer(quantizer: str | Quantizer, options: dict[str, Any]) -> Quantizer:
    """The quantizer of that name with these options, or the given quantizer itself."""
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


def _matching(path: str, overrides: Overrides, globs: Sequence[str]) -> list[str]:
    """The patterns that match a path, in their order. globs: those with wildcards; the others are looked up, since
    there may be one for each of thousands of experts."""
    parts = path.split(".")
    ends = {".".join(parts[start:]) for start in range(len(parts))}
    found = {end for end in ends if end in overrides} | {each for each in globs if _matches(path, each)}
    return [pattern for pattern in overrides if pattern in found] if len(found) > 1 else list(found)


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


def _refuse_quantized(model: nn.Module) -> None:
    """Raises InputError for a model that is quantized already, or that carries adapters."""
    if quantized_linears(model) or getattr(model, "hf_quantizer", None) is not None:
        raise InputError("the model is quantized already; start from the original, or see llmtools.dequantize")
    if hasattr(model, "peft_config"):
        raise InputError("the model carries adapters; merge or unload them (merge_and_unload) before quantizing it")


def _disable_rescaling(model: nn.Module) -> None:
    """Turns off RWKV's ``rescale_every`` in the config, in place.

    With it RWKV divides some weights by powers of two at the first inference, and multiplies them back at the first
    training step (for float16); packed weights allow neither.
    """
    network: Any = model
    config: Any = getattr(model, "config", None)
    if not getattr(config, "rescale_every", 0):
        return
    if any(getattr(module, "layers_are_rescaled", False) for module in model.modules()):
        training = model.training
        model.train()
        with torch.no_grad():
            network(input_ids=torch.zeros(1, 1, dtype=torch.long, device=network.device), use_cache=False)
        model.train(training)
    log.warning("rescale_every is set from %s to 0: packed weights cannot be rescaled in place", config.rescale_every)
    config.rescale_every = 0


def _refuse_altered(model: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
    """Raises InputError for linears whose weight is not a plain parameter: packing would silently undo that."""
    for path in quantizers:
        if (reason := altered(linear_at(model, path))) is not None:
            raise InputError(
                f"{path} cannot be packed as it is: {reason}; or leave it dense, overrides {{{path!r}: None}}"
            )


def _refuse_tied(model: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
    """Raises InputError for tied weights: they cannot be packed in one module and stay dense in the other."""
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


def _unsupported(model: nn.Module, blocks: list[Block]) -> list[NotQuantized]:
    """Weights in the blocks that are not in an nn.Linear; logs a warning when they are not negligible."""
    found = unsupported_weights(model, blocks)
    total = sum(p.numel() for block in blocks for p in block.module.parameters() if p.dim() >= 2)
    share = sum(math.prod(each.shape) for each in found) / max(1, total)
    if share >= 0.01:
        names = sorted({f"{any_index(each.path)} ({each.owner})" for each in found})
        log.warning(
            "%.0f %% of the weights in the blocks are not in an nn.Linear and are not quantized: %s",
            100 * share,
            ", ".join(names),
        )
    return [NotQuantized(each.path, each.shape, _reason(model, each)) for each in found]


def _reason(model: nn.Module, each: UnsupportedWeight) -> str:
    owner = model.get_submodule(each.path.rpartition(".")[0])
    reason = computes_otherwise(owner) if isinstance(owner, nn.Linear) else None
    return reason or f"a parameter of {each.owner}, which is no nn.Linear"


def _log_coverage(model: nn.Module, stacks: list[Stack], inside: Collection[str]) -> None:
    """Logs a warning where a large part of the model lies outside the stacks that are quantized."""
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
            "%.0f %% of the weights outside embeddings and head are quantized, the linears of %s; %s are not "
            "(`skip` with a list of linears to keep dense quantizes all others)",
            100 * taken / (taken + sum(rest.values())),
            ", ".join(stack.path for stack in stacks),
            ", ".join(sorted(rest, key=lambda name: -rest[name])[:3]),
        )


def _holder(path: str) -> str:
    """The part of a model that a module belongs to: its path up to the first index, or its first two names."""
    return ".".join(path.split(".")[:2]) if not re.search(r"\.\d", path) else re.split(r"\.\d", path)[0]


def any_index(path: str) -> str:
    """``model.layers.*.mlp.up_proj``: the path with its indices replaced by ``*``."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
