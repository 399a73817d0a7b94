"""Reads YAML files and the values of flags as plain data: no object is instantiated, no module imported.

A recipe is a file that people pass on, and must not bring code along. So every text that a user gives is read here: the
files of ``--config`` by `read_config`, the value of a flag by `read_value`, which is also the loader of our parsers
(jsonargparse's own imports any class that a ``class_path`` names). A text that is made to exhaust memory or the stack,
by aliases of aliases or endless brackets, is refused before it is constructed.

Options that run code (`CODE`) are accepted on the command line alone, unless it has ``--trust_plugins true``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from ..errors import InputError

MOST_BYTES = 2**20
"""Maximum size of a file in bytes."""
MOST_NODES = 100_000
"""Maximum number of scalars, lists and mappings in a text, with its aliases expanded."""
DEEPEST = 50
"""Maximum depth of nested lists and mappings."""

CODE = {
    "plugin": "imports a module",
    "trust_remote_code": "runs code that comes with a model or data set",
    "confirm_run_unsafe_code": "runs code that a model generates",
    "megatron_core": "imports a module",
    "use_cache": "unpickles a file",
}
"""Options that run code, of recipes and of PEFT and lm_eval → what they do."""

CLASSES = ("quantizer", "task", "name")
"""Options that may be ``module:Class``, which imports the module."""

_INT = re.compile(r"[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$"
)
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:null|Null|NULL)$")
_OCTAL = re.compile(r"0o[0-7]+$")  # in YAML 1.2
_YES = re.compile(r"(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$")  # in YAML 1.1, so in files, not in flags


class _Refused(InputError):
    """A text that is refused, whatever it was meant to be."""


class _NotPlain(ValueError):
    """YAML that is more than strings, numbers, booleans, null, lists, and mappings from strings."""


# --------------------------------------------------------------------------------------------------------------- files


def read_config(path: Path, under: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, contents) of a configuration, preceded by the one that it is based on (its own key ``config``).

    Raises InputError, in one line with the file's name, where it is not a mapping of plain values.
    """
    contents = read_yaml(path)
    base = contents.pop("config", None)
    if base is not None:
        if not isinstance(base, str):
            raise InputError(f"{path}: config: the path of another YAML is expected, not {shown(base)}")
        chain = (*under, path.resolve())
        if (path.parent / base).resolve() in chain:
            raise InputError(f"{path}: config: {base} is based on this file itself")
        yield from read_config(path.parent / base, chain)
    yield path, contents


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises InputError, with the file's name, where it holds none."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; a YAML file is expected")
    if not path.exists():
        raise InputError(f"{path} does not exist (looked in {Path.cwd()})")
    contents = parse_yaml(read_text(path), str(path))
    if not isinstance(contents, dict):
        raise InputError(f"{path}: a mapping (key: value) is expected, not {shown(contents)}")
    return contents


def read_text(path: Path) -> str:
    """The text of a small file. Raises InputError where it is large, or not UTF-8."""
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise InputError(f"{path} has more than {MOST_BYTES} bytes, the limit for a file of options")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def parse_yaml(text: str, where: str) -> Any:
    """The plain value of a text in YAML or JSON. Raises InputError, whose message begins with `where`."""
    import yaml

    try:
        return _parsed(text)
    except (_Refused, _NotPlain) as error:
        raise InputError(f"{where}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = ", ".join(filter(None, (error.context, error.problem)))
        raise InputError(f"{where} is not YAML: {place}{reason}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def as_yaml(value: Any) -> str:
    """Plain data as YAML that reads back as the same here, and in any reader of YAML 1.1 or 1.2.

    >>> as_yaml({"rate": 1e-4, "name": "1e-4"})
    'rate: 0.0001\\nname: "1e-4"\\n'
    """
    import yaml

    return str(yaml.dump(value, Dumper=_dumper(), sort_keys=False, allow_unicode=True))


def without_code(contents: dict[str, Any], where: Path, given: Collection[str], typed: Collection[str]) -> None:
    """Checks that a configuration runs no code but what the command line names.

    given: the options on the command line; those in `CODE` override the configuration, and are removed from `contents`.
    typed: the strings that are values on the command line.

    Raises InputError for other options in `CODE`, for ``module:Class``, and for files of lm_eval, which may hold code.
    """
    if "trust_plugins" in contents:
        raise InputError(f"{where}: trust_plugins can be given on the command line only")
    for key in CODE.keys() & set(given) & contents.keys():
        del contents[key]
    for key, value in leaves(contents):
        last, named = key.rpartition(".")[2], isinstance(value, str) and value in typed
        if value in (None, False, "") or (last == "use_cache" and value is True):
            continue
        if last in CODE and not (last == "plugin" and named):
            does = CODE[last]
        elif last in CLASSES and ":" in str(value) and not named:
            does = "imports a module"
        elif last == "harness" and re.search(r"\.ya?ml\s*(,|$)", str(value)) and not named:
            does = "runs code that comes with a task of lm_eval"
        else:
            continue
        itself = "" if "." in key else f"--{key} {value}, or "
        raise InputError(
            f"{where}: {key}: {shown(value)} {does}, and a YAML may not run code; on the command line, pass "
            f"{itself}--trust_plugins true if you trust this file"
        )


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every scalar in nested mappings and lists; the items of a list have the list's name."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each, name)
    else:
        yield name, value


# --------------------------------------------------------------------------------------------------------------- flags


def read_value(text: str) -> Any:
    """The value of a flag's text: a number, true, false, null, a [list], a {mapping: …}; anything else is a string.

    Prose is unchanged, also where YAML would see a mapping, a comment or a boolean.

    >>> [read_value(text) for text in ("1e-4", "true", "[a, b]", "{a: 1}", "Q: {q}", "{q}", "# {q}", "no")]
    [0.0001, True, ['a', 'b'], {'a': 1}, 'Q: {q}', '{q}', '# {q}', 'no']

    Raises InputError for what can only do harm: a ``class_path``, endless brackets.
    """
    import yaml

    bare = text.strip()
    try:
        for pattern, make in ((_INT, _int), (_FLOAT, _float), (_BOOL, _bool), (_NULL, _null)):
            if pattern.match(bare):
                return make(bare)
        if (bare[:1], bare[-1:]) not in (("[", "]"), ("{", "}")) or _names_fields(bare):
            _measure(bare)  # for a numeric option jsonargparse reads the text as YAML, too
            return text
        found = _parsed(bare)
        return text if _has_rest(bare) else found
    except _Refused as error:
        raise InputError(f"{shown(text)}: {error}") from error
    except (yaml.YAMLError, ValueError):
        return text


def _names_fields(text: str) -> bool:
    """Whether a text holds a ``{field}`` of a template, and no mapping."""
    return ":" not in text and re.search(r"\{\s*[^\s}]", text) is not None


def _has_rest(text: str) -> bool:
    """Whether YAML ends before the end of a text, because of a comment."""
    import yaml

    with suppress(ValueError):
        return not isinstance(json.loads(text), list | dict)
    ends: list[Any] = [each for each in yaml.parse(text, Loader=_loader()) if isinstance(each, yaml.CollectionEndEvent)]
    return bool(ends[-1].end_mark.index != len(text))


def shown(value: Any) -> str:
    """A value for a message, truncated to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


# ---------------------------------------------------------------------------------------------------------------- YAML


def _parsed(text: str) -> Any:
    """The plain value of a text. Raises YAMLError or ValueError (_Refused, _NotPlain) if it has none."""
    import yaml

    if text.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            pass  # YAML, perhaps
        else:
            return _plain(found)
    _measure(text)
    return _plain(yaml.load(text, Loader=_loader()))


def _measure(text: str) -> None:
    """Raises _Refused for a text that is too large, with its aliases expanded, and _NotPlain for one with tags.

    The parser's events come one at a time, so nothing of a refused text is constructed.
    """
    import yaml

    nodes = 0
    known: dict[str, tuple[int, int]] = {}  # anchor -> (nodes, depth) of its value
    within: list[tuple[str | None, int, int]] = []  # each open collection: anchor, nodes before it, depth so far
    for event in yaml.parse(text, Loader=_loader()):
        if (tag := getattr(event, "tag", None)) not in (None, "!", "tag:yaml.org,2002:str"):
            tag = str(tag).replace("tag:yaml.org,2002:", "!!")
            raise _NotPlain(f"{tag}: plain strings, numbers, lists and mappings are expected, without tags")
        anchor, size, depth = getattr(event, "anchor", None), 1, 0
        if isinstance(event, yaml.CollectionStartEvent):
            within.append((anchor, nodes, 0))
            anchor = None
        elif isinstance(event, yaml.AliasEvent):
            size, depth = known.get(anchor or "", (1, 0))
            anchor = None
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, depth = within.pop()
            size, depth = 0, depth + 1
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        nodes += size
        if anchor is not None:
            known[anchor] = (nodes - before, depth) if size == 0 else (1, 0)
        if within:
            outer, start, deepest = within[-1]
            within[-1] = (outer, start, max(deepest, depth))
        if len(within) + depth > DEEPEST:
            raise _Refused(f"more than {DEEPEST} nested lists and mappings")
        if nodes > MOST_NODES:
            raise _Refused(f"more than {MOST_NODES} values (with its aliases expanded)")


def _plain(value: Any, depth: int = 0) -> Any:
    """The value itself. Raises _Refused or _NotPlain if it is not plain data."""
    if depth > DEEPEST:
        raise _Refused(f"more than {DEEPEST} nested lists and mappings")
    if isinstance(value, str) and "\0" in value:
        raise _Refused("a string with a NUL character")
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise _NotPlain(f"the key {shown(key)} is not a string; put it in quotes")
            if "class_path" in key.split("."):
                raise _Refused(f"{key} is not an option: data cannot name classes to instantiate")
            _plain(each, depth + 1)
    elif isinstance(value, list):
        for each in value:
            _plain(each, depth + 1)
    return value


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader for plain data alone, with JSON's numbers (1e-4) and without dates and times."""
    import yaml

    class Plain(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    kinds = (("null", _NULL), ("bool", _BOOL), ("bool", _YES), ("int", _INT), ("float", _FLOAT))
    for kind, pattern in (*kinds, ("null", re.compile("~?$")), ("merge", re.compile("<<$"))):
        Plain.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", pattern, None)
    for kind, make in (("int", _int), ("float", _float)):
        Plain.add_constructor(
            f"tag:yaml.org,2002:{kind}", lambda loader, node, make=make: make(loader.construct_scalar(node))
        )
    return Plain


@functools.cache
def _dumper() -> Any:
    """PyYAML's safe dumper, which also quotes strings that YAML 1.2 or other readers take for another type."""
    import yaml

    class Quoting(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        quoted = any(pattern.match(value) for pattern in (_INT, _FLOAT, _BOOL, _NULL, _YES, _OCTAL))
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if quoted else None)

    Quoting.add_representer(str, text)
    return Quoting


def _bool(text: str) -> bool:
    return text.lower() == "true"


def _null(text: str) -> None:
    return None


def _int(text: str) -> int:
    return int(text.replace("_", ""))


def _float(text: str) -> float:
    return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
