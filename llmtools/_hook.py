"""How ``import llmtools`` teaches transformers to open our checkpoints, without importing transformers.

Two wishes pull apart. ``AutoModelForCausalLM.from_pretrained`` must know the method "llmtools" after a plain ``import
llmtools``, whichever of the two libraries was imported first; transformers has no entry points for that, only a
registry that somebody has to fill. And ``import llmtools`` must stay light: ``llmtools --help`` answers in a fraction
of a second, while transformers with torch takes seconds.

So we wait. A finder in ``sys.meta_path`` looks at one name only, ``transformers.quantizers.auto``, the module that
holds the registry. When somebody imports it, the module is executed as always, and then our
`llmtools.model.transformers_integration`, which registers itself by the public decorators.
If the registry is there already, that happens at once. Every route
to ``from_pretrained`` imports the registry, so nobody can be too early or too late. The finder stays in place: it
costs one string comparison per import, and serves a program that reloads transformers, too.
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
    """Registers with transformers now if its registry is loaded, and whenever it is loaded from here on. Idempotent."""
    _Finder.installed()
    if REGISTRY in sys.modules and not _is_loading(sys.modules[REGISTRY]):
        importlib.import_module(OURS)


class _Finder(MetaPathFinder):
    """Finds the registry as the other finders do, and has our module run after it."""

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
        """Puts one finder in front; one left by an earlier import of this module (a reload) gives way."""
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
        elif not _is_loading(ours):  # the registry was executed anew, and is empty of us
            importlib.reload(ours)
        # else: ours is what imports transformers just now, and registers itself in a moment

    def __getattr__(self, name: str) -> object:
        return getattr(self.original, name)


def _is_loading(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
