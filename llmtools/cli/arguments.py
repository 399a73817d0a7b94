"""A command's arguments, prepared for jsonargparse: files are read, and each value is joined to its flag.

jsonargparse converts by the recipe's annotations. What an annotation leaves open (``dict[str, Any]``: options of
quantizers, tasks and libraries) it would guess from the text, and guess again from strings within a YAML; so these
values are kept here as they were given, and put into the recipe afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..options import current_name, with_current_names
from ..recipes.plain_yaml import leaves, parse_yaml, read_config, read_value, read_yaml, shown, without_code
from ..redaction import is_secret, redacted

_ALONE = ("--json", "--debug", "--help", "--help_all", "-h")
_SEEDS = 2**32
"""Number of seeds: numpy accepts none larger."""


class Arguments(NamedTuple):
    """Arguments for jsonargparse, and the values that bypass it."""

    args: list[str]
    """Arguments for jsonargparse."""
    open_options: dict[str, Any]
    """Dotted name → mapping or list, of the options that may hold any value."""
    texts: dict[str, str]
    """Name of a flag → its value as it was typed."""


def read_arguments(args: list[str], options: type[Any], command: str = "") -> Arguments:
    """Reads the files that the arguments of a command name, and the values of its flags; former names are replaced.

    Raises InputError where a file is not a mapping of plain values, or runs code that the command line does not name.
    """
    pairs = [(_current(command, word), value) for word, value in _split(args, options)]
    flags = {word[2:]: value for word, value in pairs if value is not None and word.startswith("--")}
    typed = {each for key, text in flags.items() if key != "config" for each in _strings(text)}
    trust = flags.pop("trust_plugins", "false").lower()
    if trust not in ("true", "false"):
        raise InputError(f"--trust_plugins {trust}: true or false is expected")
    prints_config = any(word.startswith("--print_config") for word, _ in pairs)
    reader = _Reader(options, command)

    def checked(file: Path, contents: dict[str, Any]) -> dict[str, Any]:
        if trust == "false":
            without_code(contents, file, flags.keys(), typed)
        return dict(redacted(contents)) if prints_config else contents

    for word, text in pairs:
        name = word.removeprefix("--")
        if text is None:
            reader.args.append(word)
        elif name == "config":
            for file, contents in read_config(Path(text).expanduser()):
                reader.mapping("config", checked(file, contents), str(file))
        elif name in reader.groups and os.path.isfile(os.path.expanduser(text)):
            file = Path(text).expanduser()
            reader.mapping(name, checked(file, {name: read_yaml(file)})[name], str(file))
        elif name != "trust_plugins" and not (prints_config and is_secret(name.rpartition(".")[2])):
            reader.flag(name, text)
    return Arguments(reader.args, reader.open_options, flags)


class _Reader:
    """Collects the values of mappings and flags in their order; later ones win."""

    def __init__(self, options: type[Any], command: str = "") -> None:
        self.command = command
        self.args: list[str] = []
        self.open_options: dict[str, Any] = {}
        hints = dict(_hints(options))
        self.groups = {name for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
        self.dicts = {name for name, hint in hints.items() if typing.get_origin(hint) is dict}
        self.open = {name for name, hint in hints.items() if _is_open(hint)}

    def mapping(self, name: str, contents: dict[str, Any], where: str) -> None:
        """The contents of a configuration, or of the group of options `name`."""
        if name == "config":
            whole = contents = self._renamed(_nested(contents), where)
        else:
            whole = self._renamed({name: contents}, where)
            contents = whole[name]
        for group in self.groups:
            for found in _at(whole, group):
                if not isinstance(found, dict):
                    raise InputError(f"{where}: {group}: a mapping (key: value) is expected, not {shown(found)}")
        for key in self.open:
            for found in _at(whole, key):
                self._store(key, found)
        self.args.append(f"--{name}={json.dumps(contents)}")

    def flag(self, name: str, text: str) -> None:
        """A flag with its value."""
        if "class_path" in name.split("."):
            raise InputError(f"--{name}: class_path is not an option: data cannot name classes to instantiate")
        if name in self.groups | self.dicts:
            contents = parse_yaml(text, f"--{name} {text}")
            if not isinstance(contents, dict):
                raise InputError(f"--{name} {text}: a mapping is expected ({{key: value}}), or --{name}.key value")
            if name in self.groups:
                return self.mapping(name, contents, "command line")
            text = json.dumps(self._renamed({name: contents}, f"--{name}")[name])
        for key in self.open:
            if name == key:
                self._store(key, read_value(text))
            elif name == f"{key}+":
                self.open_options.pop(key, None)
            elif name.startswith(f"{key}."):
                self._store(key, _with(self.open_options.get(key), name[len(key) + 1 :].split("."), read_value(text)))
        self.args.append(f"--{name}={text}")

    def _renamed(self, contents: dict[str, Any], where: str) -> dict[str, Any]:
        try:
            return with_current_names(self.command, contents)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    def _store(self, key: str, value: Any) -> None:
        self.open_options.pop(key, None)
        if isinstance(value, dict | list):
            self.open_options[key] = value


def _split(args: list[str], options: type[Any]) -> Iterator[tuple[str, str | None]]:
    """(flag, value) for each flag that has one, and (argument, None) for all others.

    ``--resume`` alone means true, ``--recover``, a group of options, its defaults; and a text may begin with a dash:
    ``--prompt "- item"``.
    """
    hints = {f"--{name}": hint for name, hint in _hints(options)} | {"--trust_plugins": bool}
    following = [*args, None][1:]
    is_value = False
    for word, after in zip(args, following, strict=True):
        name, equals, value = word.partition("=")
        if is_value:
            is_value = False
        elif not word.startswith("--") or name in _ALONE or name == "--print_config":
            yield word, None
        elif equals:
            yield name, value
        elif bool in (hints.get(word), *typing.get_args(hints.get(word))):
            is_value = after is not None and after.lower() in ("true", "false")
            yield word, after if is_value else "true"
        elif dataclasses.is_dataclass(hints.get(word)) and (after is None or after.startswith("-")):
            yield word, json.dumps(dataclasses.asdict(hints[word]()))
        elif after is None or after == "-h" or (after.startswith("--") and not after[2:].count(" ")):
            yield word, None
        else:
            is_value = True
            yield word, after


def _current(command: str, word: str) -> str:
    """The flag with the option's current name."""
    return f"--{current_name(command, word[2:])}" if word.startswith("--") else word


def _strings(text: str) -> set[str]:
    """The strings of a flag's value: itself, or those in a list or mapping."""
    try:
        return {each for _, each in leaves(read_value(text)) if isinstance(each, str)}
    except InputError:
        return set()


def _hints(options: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, annotation) of a recipe's options, groups before their members."""
    for name, hint in typing.get_type_hints(options).items():
        yield f"{prefix}{name}", hint
        if dataclasses.is_dataclass(hint):
            yield from _hints(typing.cast("type[Any]", hint), f"{prefix}{name}.")


def _is_open(hint: Any) -> bool:
    return hint is Any or any(_is_open(each) for each in typing.get_args(hint))


def _nested(contents: dict[str, Any]) -> dict[str, Any]:
    """The mapping with ``lora.r: 8`` written as ``lora: {r: 8}``."""
    found: dict[str, Any] = {}
    for key, value in contents.items():
        found = _with(found, key.split("."), value)
    return found


def _at(mapping: Any, key: str) -> list[Any]:
    """The value at a dotted path of keys, or none."""
    for part in key.split("."):
        if not isinstance(mapping, dict) or part not in mapping:
            return []
        mapping = mapping[part]
    return [mapping]


def _with(mapping: Any, keys: list[str], value: Any) -> dict[str, Any]:
    """The mapping with a value at the end of a path of keys."""
    inner = dict(mapping) if isinstance(mapping, dict) else {}
    inner[keys[0]] = _with(inner.get(keys[0]), keys[1:], value) if keys[1:] else value
    return inner


# -------------------------------------------------------------------------------------------------------------- values


def check_numbers(values: dict[str, Any]) -> None:
    """Raises InputError for numbers that no option of a recipe (a mapping) can have: NaN, too large, no seed."""
    for name, value in leaves(values):
        if isinstance(value, float) and math.isnan(value):
            raise InputError(f"--{name} {value}: a number is expected")
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name.endswith(("seed", "seeds")) and not 0 <= value < _SEEDS:
            raise InputError(f"--{name} {value}: a whole number from 0 to {_SEEDS - 1} is expected")
        if not -(2**63) <= value < 2**63:
            raise InputError(f"--{name} {value}: a whole number below 2^63 is expected")


def with_declared(recipe: Any, texts: dict[str, str]) -> Any:
    """The recipe with the options of its task as they were typed where the task declares them as strings.

    Without the declaration ``--options.prompt "[INST]"`` would be a list, and ``--options.answer 42`` a number.
    """
    given = {key.removeprefix("options."): text for key, text in texts.items() if key.startswith("options.")}
    if not given or not isinstance(getattr(recipe, "task", None), str) or getattr(recipe, "harness", None):
        return recipe
    from ..data.tasks import tasks

    if recipe.task not in tasks.names():
        return recipe
    hints = typing.get_type_hints(tasks.known(recipe.task))
    typed = {
        key: text
        for key, text in given.items()
        if _is_text(hints.get(key)) and recipe.options.get(key) is not None and recipe.options[key] == read_value(text)
    }
    return replace(recipe, options={**recipe.options, **typed}) if typed else recipe


def _is_text(hint: Any) -> bool:
    return str in (hint, *typing.get_args(hint)) and not {int, float, bool, list} & {hint, *typing.get_args(hint)}
