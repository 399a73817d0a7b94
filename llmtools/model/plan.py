"""What is to be quantized in a model, and how: decided, and refused if need be, before anything is touched.

The rules are the same whether a model in memory is quantized or one that is just being loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from ..errors import InputError
from ..nn.swap import quantized_linears
from ..quant import Quantizer
from ..quant import quantizer as named_quantizer
from .blocks import Block, find_blocks, leftovers, linears

log = logging.getLogger(__name__)

Overrides = Mapping[str, Mapping[str, Any] | None]
"""Pattern of module paths → options that differ, ``{"name": …, …}`` for another quantizer, None to leave dense."""


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
    left: list[Left]

    @staticmethod
    def of(model: nn.Module, base: Quantizer, overrides: Overrides, skip: Sequence[str] | None) -> Plan:
        """The plan for `base` everywhere but in `overrides` and `skip`, as `quantize` explains them.

        Raises InputError for a pattern that matches nothing, and for a model that cannot be quantized.
        """
        _refuse_strangers(model)
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
            if chosen is None:
                left.append(Left(path, shape, f"left dense by the override {matching[0]!r}"))
            else:
                quantizers[path] = chosen
        if unused:
            raise InputError(_no_match(next(iter(unused)), list(quantizers), [each.path for each in left]))
        if not quantizers:
            raise InputError("every linear is skipped or left dense by an override, so that nothing is quantized")
        _refuse_tied(model, quantizers)
        left += _said_leftovers(model, blocks)
        return Plan(quantizers, [block.path for block in blocks], left)


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


def _refuse_tied(model: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
    """A weight with two owners cannot be packed in one and stay dense in the other."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
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
    return [Left(each.path, each.shape, f"a parameter of {each.owner}, which is no nn.Linear") for each in found]


def any_index(path: str) -> str:
    """``model.layers.*.mlp.up_proj``: the path with its numbers left open."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
