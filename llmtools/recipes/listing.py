"""List quantizers, tasks and packaged recipes, a line each; or the options of one."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import InputError, did_you_mean


@dataclass(frozen=True)
class List:
    """Show the quantizers, qualities, tasks and packaged recipes, plug-ins included; with a name, the options of that
    one."""

    name: str | None = None
    """Quantizer, quality, task (module:Class too) or recipe whose options are listed; by default all names."""
    plugin: str | list[str] | None = None
    """Quantizer of your own to register, as module:Class, or a list of them."""


@dataclass(frozen=True)
class Option:
    """An option of a quantizer or task."""

    name: str
    """Name of the option."""
    type: str
    """Annotation of the option."""
    default: Any
    """Default value, or "required"."""
    doc: str
    """Docstring of the option."""


@dataclass(frozen=True)
class Entry:
    """A quantizer, a quality, a task or a packaged recipe."""

    kind: str
    """Kind of the entry: quantizer, quality, task or recipe."""
    name: str
    """Name of the entry."""
    doc: str
    """Docstring of the class; summary or contents of the recipe; the quality's sets of options."""
    options: list[Option]
    """Options of the class."""


@dataclass(frozen=True)
class Listing:
    """The requested entries."""

    entries: list[Entry]
    """Entries by kind and name."""
    detailed: bool
    """Whether the options are printed."""

    def __str__(self) -> str:
        if self.detailed:
            return "\n\n".join(_details(entry) for entry in self.entries)
        kinds = dict.fromkeys(entry.kind for entry in self.entries)
        shown = (_table(kind, [entry for entry in self.entries if entry.kind == kind]) for kind in kinds)
        return "\n\n".join(shown) + "\n\n`llmtools list NAME` shows the options of one."


def listing(recipe: List) -> Listing:
    """Everything that is registered, or the options of one. Raises InputError, with the nearest name, if unknown."""
    from ..checkpoint.loading import import_plugins, with_current_folder
    from ..data.tasks import tasks
    from ..quant import quantizers
    from .configs import packaged
    from .quality import BUNDLES, SUMMARIES, described

    import_plugins(recipe.plugin)
    registries: list[tuple[str, Any]] = [("quantizer", quantizers), ("task", tasks)]
    if recipe.name is None:
        entries = [
            entry_of(kind, name, cls)
            for kind, registry in registries
            for name in registry.names()
            if not _is_format(cls := registry.get(name))
        ]
        at = sum(entry.kind == "quantizer" for entry in entries)
        entries[at:at] = [Entry("quality", name, SUMMARIES[name], []) for name in BUNDLES]
        entries += [Entry("recipe", name, each.summary, []) for name, each in packaged().items()]
        return Listing(entries, detailed=False)
    if ":" in recipe.name:
        with_current_folder()
        cls = quantizers.get(recipe.name)
        from ..data.tasks import Task

        return Listing([entry_of("task" if issubclass(cls, Task) else "quantizer", recipe.name, cls)], detailed=True)
    found = [
        entry_of(kind, recipe.name, registry.get(recipe.name))
        for kind, registry in registries
        if recipe.name in registry.names()
    ]
    if recipe.name in BUNDLES:
        found.append(Entry("quality", recipe.name, f"{SUMMARIES[recipe.name]}\n{described(recipe.name)}", []))
    if recipe.name in packaged():
        found.append(Entry("recipe", recipe.name, str(packaged()[recipe.name]), []))
    if not found:
        names = [name for _, registry in registries for name in registry.names()] + [*BUNDLES, *packaged()]
        raise InputError(
            f"there is no quantizer, quality, task or recipe {recipe.name!r}; {did_you_mean(recipe.name, names)}"
        )
    return Listing(found, detailed=True)


def entry_of(kind: str, name: str, cls: type[Any]) -> Entry:
    """The entry of a class, with the docstrings of the class and of its fields."""
    docs = field_docs(cls)
    options = [
        Option(
            name=field.name,
            type=str(field.type),
            default=_default(field),
            doc=docs.get(field.name, ""),
        )
        for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
    ]
    return Entry(kind, name, inspect.getdoc(cls) or "", options)


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Field of a dataclass, or of its bases → the docstring below it, read from the source."""
    import ast
    import textwrap

    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = getattr(tree.body[0], "body", [])
        for statement, following in pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required"


USE = {
    "quantizer": "llmtools quantize --quantizer NAME",
    "quality": "llmtools quantize --quality NAME",
    "task": "llmtools finetune | evaluate --task NAME",
    "recipe": "llmtools quantize | finetune | sweep --config NAME",
}
"""Kind → the command that takes its names."""


def _table(kind: str, entries: list[Entry]) -> str:
    width = max(len(entry.name) for entry in entries)
    lines = (f"  {entry.name:<{width}}  {entry.doc.partition(chr(10))[0]}".rstrip() for entry in entries)
    plural = "qualities" if kind == "quality" else f"{kind}s"
    return "\n".join([f"{plural} ({USE[kind]})", *lines])


def _is_format(cls: type[Any]) -> bool:
    """Whether a quantizer represents an external format, and cannot be chosen for quantizing."""
    from ..quant import external

    return cls.__module__ == external.__name__


def _details(entry: Entry) -> str:
    lines = [f"{entry.kind} {entry.name}", *(f"  {line}".rstrip() for line in entry.doc.splitlines())]
    if entry.options:
        lines += ["", "options"]
        width = max(len(option.name) for option in entry.options)
        lines += [
            f"  {option.name:<{width}}  {option.doc}{' ' if option.doc else ''}({option.type}, "
            f"{'required' if option.default == 'required' else f'default {option.default!r}'})"
            for option in entry.options
        ]
    return "\n".join(lines)
