"""Former module paths, for scripts of earlier versions: each is an alias of today's module, imported on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "llmtools.model.card": "llmtools.checkpoint.model_card",
    "llmtools.model.checkpoint": "llmtools.checkpoint.folder",
    "llmtools.model.export": "llmtools.formats.writing",
    "llmtools.model.foreign": "llmtools.formats.reading",
    "llmtools.model.hub": "llmtools.model.transformers_integration",
    "llmtools.model.share": "llmtools.checkpoint.upload",
    "llmtools.nn.start": "llmtools.nn.lora_init",
    "llmtools.recipes.loading": "llmtools.checkpoint.loading",
    "llmtools.recipes.plan": "llmtools.recipes.estimate",
    "llmtools.recipes.record": "llmtools.checkpoint.run_info",
    "llmtools.recipes.sweep": "llmtools.sweep.runner",
}
"""Former name -> today's."""


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, _Alias()) if fullname in MOVED else None


class _Alias(Loader):
    """A module without contents, whose names are looked up in the other one."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        current = importlib.import_module(MOVED[module.__name__])
        module.__doc__ = f"Former name of `{current.__name__}`."
        module.__dict__["__getattr__"] = lambda name: getattr(current, name)


def install() -> None:
    """Adds the finder behind the others. Idempotent."""
    sys.meta_path[:] = [*(finder for finder in sys.meta_path if type(finder).__module__ != __name__), _Finder()]
