"""Validation of a registered class's options by its declaration: names, and types as in JSON and YAML."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import InputError, did_you_mean

T = TypeVar("T")


def built(what: str, cls: type[T], options: Mapping[str, Any]) -> T:
    """``cls(**options)`` of a dataclass. Raises InputError, led by `what`, for an unknown name or an invalid value.

    The class's own error about a value comes first, since it knows more than the type.
    """
    known = [each.name for each in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    for option in options:
        if option not in known:
            raise InputError(f"{what}: no option {option!r}; {did_you_mean(str(option), known)}")
    options = nested(what, cls, options)
    try:
        made = cls(**options)
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        _check_types(what, cls, options)
        raise InputError(f"{what}: {dict(options)} is invalid ({error})") from error
    _check_types(what, cls, options)
    return made


def nested(what: str, cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a dataclass, with mappings as the dataclasses that are declared for them. Raises InputError as
    `built`."""
    hints = _hints(cls)
    return {
        option: built(f"{what}: {option}", hints[option], value)
        if dataclasses.is_dataclass(hints.get(option)) and isinstance(value, Mapping)
        else value
        for option, value in options.items()
    }


def _hints(cls: type) -> dict[str, Any]:
    """The declared types of a class; none where an annotation is one that only a type checker can resolve."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


def _check_types(what: str, cls: type, options: Mapping[str, Any]) -> None:
    hints = _hints(cls)
    for option, value in options.items():
        if option in hints and not fits(value, hints[option]):
            raise InputError(f"{what}: {option}={value!r}; {type_name(hints[option])} is expected")


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`; true for unsupported hints.

    Stricter than Python: a bool is no number. As JSON has it: an int passes for a float, a list for a tuple.

    >>> fits(True, int), fits(3, float | None), fits([1, 2.5], tuple[float, ...]), fits("4", int)
    (False, True, True, False)
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(_float(value))
    if hint is int:
        return not isinstance(value, bool) and isinstance(value, int)
    if hint in (bool, str) or dataclasses.is_dataclass(hint):
        return isinstance(value, hint)
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        return not inner or all(fits(each, inner[0]) for each in value) or (origin is tuple and Ellipsis not in inner)
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            return False
        return not inner or all(fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items())
    return True


def type_name(hint: Any) -> str:
    """``"int or null"``: a declared type, for messages."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is type(None):
        return "null"
    return str(getattr(hint, "__name__", hint))


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


# --------------------------------------------------------------------------------------------------- renamed options

_OF_QUANTIZE = {"samples": "num_samples", "tokens": "max_length"}
_OF_FINETUNE = {"limit": "num_samples"}
_OF_EVALUATE = {"limit": "num_samples", "context": "max_length"}
FORMER_NAMES = {
    "quantize": _OF_QUANTIZE,
    "finetune": _OF_FINETUNE,
    "evaluate": _OF_EVALUATE,
    "plan": {"batch": "batch_size", "eval_batch": "eval_batch_size", "length": "max_length"},
    "sweep": {
        **{f"quantize.{former}": name for former, name in _OF_QUANTIZE.items()},
        **{f"tasks.*.{former}": name for former, name in _OF_FINETUNE.items()},
        **{f"tasks.*.finetune.{former}": name for former, name in _OF_FINETUNE.items()},
        **{f"tasks.*.evaluate.{former}": name for former, name in _OF_EVALUATE.items()},
    },
}
"""Command → dotted former name of an option (``*`` stands for any key) → the last part of its name. Former names are
still read everywhere: on the command line, in YAMLs, and in recipes that were stored beside results."""


def current_name(command: str, name: str) -> str:
    """The dotted name of a command's option, whichever of its names is given.

    >>> current_name("quantize", "samples"), current_name("sweep", "tasks.mnli.evaluate.limit")
    ('num_samples', 'tasks.mnli.evaluate.num_samples')
    """
    *outer, last = parts = name.split(".")
    for former, current in FORMER_NAMES.get(command, {}).items():
        pattern = former.split(".")
        if len(pattern) == len(parts) and all(a in ("*", b) for a, b in zip(pattern, parts, strict=True)):
            last = current
    return ".".join([*outer, last])


def with_current_names(command: str, options: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """A command's options, as a YAML or a stored recipe has them, with former names replaced by today's.

    group: dotted name of the mapping within the command's options. Raises InputError where both names are given.
    """
    found: dict[str, Any] = {}
    for key, value in options.items():
        path = f"{group}.{key}" if group else key
        name = current_name(command, path)
        if name != path:
            key = name.rpartition(".")[2]
            if key in options:
                raise InputError(f"{path} is the former name of {name}, and both are given; give one of the two")
        found[key] = with_current_names(command, value, name) if isinstance(value, Mapping) else value
    return found
