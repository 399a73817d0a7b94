"""Registries: name → class, with plug-ins from other packages.

Built-in entries register on import. A distribution adds its own by an entry point in the registry's group, read on the
first unknown name, so that nothing is scanned in the usual case. A user may also name a class of any importable module
as ``module:Class``. Names that come out of a *file* never import anything: see `Registry.known`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import InputError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """name → class of one kind, e.g. ``Registry("quantizer", "llmtools.quantizers")``."""

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._entries: dict[str, type[T]] = {}
        self._plugins_loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: registers the class under `name`, and sets its ``name``."""

        def add(entry: type[T]) -> type[T]:
            self._add(name, entry)
            return entry

        return add

    def get(self, name: str) -> type[T]:
        """The class for a name from the *user*: registered, a plug-in's, or ``module:Class`` (imported here).

        Raises InputError, with the nearest name, when there is none.
        """
        if ":" in name and name not in self._entries:
            self._import(name)
        return self.known(name)

    def __getitem__(self, name: str) -> type[T]:
        """``registry["optq"]`` is ``registry.get("optq")``, with its errors."""
        return self.get(name)

    def known(self, name: str) -> type[T]:
        """The class for a name from a *file*: registered or an installed plug-in's. Imports nothing else."""
        if name not in self._entries:
            self._load_plugins()
        if name not in self._entries:
            raise InputError(f"{self.kind} {name!r} is not known; {did_you_mean(name, self._entries)}")
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, plug-ins included, sorted."""
        self._load_plugins()
        return sorted(self._entries)

    def classes(self, *, plugins: bool = True) -> list[type[T]]:
        """All classes in the order of registration, those of plug-ins last, if at all."""
        if plugins:
            self._load_plugins()
        return list(self._entries.values())

    def _add(self, name: str, entry: type[T]) -> None:
        present = self._entries.get(name)
        if present is not None and (present.__module__, present.__qualname__) != (entry.__module__, entry.__qualname__):
            raise InputError(
                f"{self.kind} {name!r} is {present.__module__}:{present.__qualname__} already; "
                f"give {entry.__module__}:{entry.__qualname__} another name"
            )
        self._entries[name] = entry
        if "name" not in vars(entry):
            entry.name = name  # type: ignore[attr-defined]

    def _import(self, name: str) -> None:
        module_name, _, attribute = name.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                found = getattr(found, part)
        except ImportError as error:
            raise InputError(f"{self.kind} {name!r}: cannot import module {module_name!r} ({error})") from error
        except AttributeError as error:
            public = [key for key in vars(found) if not key.startswith("_")]
            raise InputError(
                f"{self.kind} {name!r}: no {attribute!r} in {module_name!r}; {did_you_mean(attribute, public)}"
            ) from error
        except Exception as error:  # the module may do anything when it is imported
            raise InputError(f"{self.kind} {name!r}: its module raises {type(error).__name__}: {error}") from error
        if not isinstance(found, type):
            raise InputError(f"{self.kind} {name!r} is not a class but {type(found).__name__}")
        self._entries[name] = found
        if "name" not in vars(found):
            with contextlib.suppress(TypeError):  # a built-in type; the caller raises the error
                found.name = name  # type: ignore[attr-defined]

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for point in entry_points(group=self.group):
            if point.name in self._entries:
                continue
            try:
                self._add(point.name, point.load())
            except Exception as error:
                raise InputError(
                    f"the plug-in {point.name!r} ({point.value}) of {point.dist and point.dist.name} cannot be loaded: "
                    f"{error}; repair or uninstall it"
                ) from error
