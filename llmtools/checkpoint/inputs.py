"""Hashes of a run's inputs, by which a cached result or a stopped run is matched with them."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..content import content, model_content


def contents(recipe: Any) -> dict[str, str]:
    """Hashes of the files that a recipe names, except its model: data, calibration text, code of plug-ins."""
    named = {key: getattr(recipe, key, None) for key in ("data", "validation", "calibration")}
    files = {f"options.{key}": value for key, value in recipe.options.items()}
    files = {key: value for key, value in files.items() if "data" in key or os.path.isfile(str(value))}
    found = {key: content(value) for key, value in {**named, **files}.items() if isinstance(value, str)}
    plugins = recipe.plugin if isinstance(recipe.plugin, list) else [recipe.plugin]
    for code in (*plugins, getattr(recipe, "task", None), getattr(recipe, "quantizer", None)):
        if isinstance(code, str) and ":" in code:
            with suppress(ImportError, ValueError):
                spec = find_spec(code.partition(":")[0])
                found[code] = content(spec.origin) if spec is not None and spec.origin else None
    return {key: value for key, value in found.items() if value is not None}


def content_of_model(name: str) -> dict[str, str]:
    """The identity of a model, whatever its folder's name: hashes of its parts, or its revision on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return model_content(name)
    if path.is_file():
        return {"model's weights": str(content(name))}
    if name.endswith(".gguf"):
        from ..formats.gguf_reading import find

        with suppress(ValueError):
            return content_of_model(str(found.path)) if (found := find(name, {})) else {}
        return {}
    from transformers.utils import cached_file

    with suppress(OSError, ValueError):
        parts = Path(cached_file(name, "config.json")).parts
        return {"model's revision on the hub": parts[parts.index("snapshots") + 1]}
    return {}


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Descriptions of at most three differences between two settings."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        found = [differences(before.get(key), now.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [each for some in found for each in some][:3]
    if before == now:
        return []
    if {str(each)[:7] for each in (before, now)} <= {"sha256:", "sampled"}:  # hashes are not worth showing
        return [f"{name} changed"]
    return [f"{name} {before!r}, now {now!r}"]
