"""Results that are kept: a JSON file each, written whole or not at all, with the settings that it belongs to.

Settings name files and folders; what these hold is part of them, too, as hashes (`contents`).
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoint.run_info import as_json
from ..content import content, model_content
from ..errors import InputError
from ..files import read_json, write_whole

log = logging.getLogger(__name__)

Result = dict[str, Any]


class Kept:
    """Results on the disk. What is there with the same settings is not made again; what failed is tried again, once.

    The settings hold what the inputs hold, not only where they lie; and a result that left a folder is there as long as
    the folder has the same weights.
    """

    def __init__(self, *, make: bool = True) -> None:
        self.make = make
        """whether what is missing is made"""
        self.made: set[str] = set()
        """names of what was made, or tried, this time"""
        self._tried: dict[Path, Result | None] = {}

    def get(
        self, file: Path, settings: dict[str, Any], make: Callable[[], Result], folder: Path | None = None
    ) -> Result | None:
        """What `file` says, if it was made with these settings and `folder` is still the same; else what `make` gives.

        ``{"settings", …, "seconds"}`` and, with a folder, ``"weights"``, the hash of those in it; or
        ``{"settings", "failed", "traceback", "seconds"}``.
        """
        if file in self._tried:
            return self._tried[file]
        found = _read(file)
        if found is not None and (changed := differences(found.get("settings"), settings)):
            log.info("%s was made with other settings (%s)", file.stem, "; ".join(changed))
            found = None
        if found is not None and "failed" not in found and folder is not None and not _is_there(found, folder):
            log.info("%s: what was made is not in %s any more", file.stem, folder)
            found = None
        if (found is None or "failed" in found) and self.make:
            found = self._made(file, settings, make, folder)
        self._tried[file] = found
        return found

    def _made(
        self, file: Path, settings: dict[str, Any], make: Callable[[], Result], folder: Path | None = None
    ) -> Result:
        began = time.monotonic()
        try:
            made = make()
            if folder is not None:
                made = {**made, "weights": _weights(folder)}
        except Exception as error:  # whatever it is, the others go on
            reason = " ".join(str(error).split()) or type(error).__name__
            made = {"failed": reason, "traceback": traceback.format_exc()}
            log.debug("%s", made["traceback"])
        made = {"settings": settings, **made, "seconds": time.monotonic() - began}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, as_json(made))
        self.made.add(file.stem)
        return made


def contents(recipe: Any) -> dict[str, str]:
    """The hashes of the files that a recipe names, but for its model: data, calibration text, code of plug-ins."""
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
    """What a model is, whatever its folder is called: the hashes of its parts, or its revision on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return model_content(name)
    if path.is_file():
        return {"model's weights": str(content(name))}
    from transformers.utils import cached_file

    with suppress(OSError, ValueError):
        parts = Path(cached_file(name, "config.json")).parts
        return {"model's revision on the hub": parts[parts.index("snapshots") + 1]}
    return {}


def needed(result: Result | None, what: str) -> Result:
    """The result that another is made from. Raises InputError, led by `what`, where there is none."""
    if result is None or "failed" in result:
        raise InputError(f"{what}: {result['failed'] if result else 'it is not there'}")
    return result


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two settings, in words, at most three."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        found = [differences(before.get(key), now.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [each for some in found for each in some][:3]
    if before == now:
        return []
    if {str(each)[:7] for each in (before, now)} <= {"sha256:", "sampled"}:  # hashes say nothing to people
        return [f"{name} changed"]
    return [f"{name} {before!r}, now {now!r}"]


def _is_there(found: Result, folder: Path) -> bool:
    """Whether a folder still holds what was made."""
    there = _weights(folder)
    return there is not None and there == found.get("weights")


def _weights(folder: Path) -> str | None:
    return model_content(folder).get("model's weights")


def _read(file: Path) -> Result | None:
    try:
        return read_json(file) if file.exists() else None
    except (OSError, InputError):
        return None
