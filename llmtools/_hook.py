"""Registers llmtools' checkpoints with transformers at ``import llmtools``, without importing transformers.

Two requirements conflict. ``AutoModelForCausalLM.from_pretrained`` must know the method "llmtools" after a plain
``import llmtools``, whichever of the two libraries was imported first; transformers has no entry points for that, only
a registry. And ``import llmtools`` must stay light: ``llmtools --help`` answers in a fraction of a second, while
transformers with torch takes seconds.

So registration is deferred. A finder in ``sys.meta_path`` matches one name, ``transformers.quantizers.auto``, the
module of the registry. When it is imported, it is executed as always, and then
`llmtools.model.transformers_integration`, which registers itself by the public decorators. If the registry is loaded
already, that happens at once. Every route to ``from_pretrained`` imports the registry, so the order of the imports does
not matter. The finder stays: it costs one string comparison per import, and also serves a program that reloads
transformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
OURS = "llmtools.model.transformers_integration"


def install() -> None:
    """Registers with transformers now if its registry is loaded, and whenever it is loaded later. Idempotent."""
    _Finder.installed()
    if REGISTRY in sys.modules and not _is_loading(sys.modules[REGISTRY]):
        importlib.import_module(OURS)


class _Finder(MetaPathFinder):
    """Finds the registry by the other finders, and runs our module after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None or finder is self else find(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None

    @classmethod
    def installed(cls) -> None:
        """Inserts the finder in front, in place of one of an earlier import of this module (a reload)."""
        sys.meta_path[:] = [cls(), *(finder for finder in sys.meta_path if type(finder).__module__ != __name__)]


class _Loader(Loader):
    """The original loader, then ours. Everything else (source, file name, resources) is the original's."""

    def __init__(self, original: Loader) -> None:
        self.original = original

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.original.exec_module(module)
        ours = sys.modules.get(OURS)
        if ours is None:
            importlib.import_module(OURS)
        elif not _is_loading(ours):  # the registry was executed again, and has lost our entries
            importlib.reload(ours)
        # else: ours is importing transformers right now, and will register itself

    def __getattr__(self, name: str) -> object:
        return getattr(self.original, name)


def _is_loading(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
