"""Results that are kept: a JSON file each, written whole or not at all, with the settings that it belongs to."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..content import model_content
from ..errors import InputError
from ..files import write_whole
from .record import as_json

log = logging.getLogger(__name__)

Result = dict[str, Any]


class Kept:
    """Results on the disk. What is there with the same settings is not made again; what failed is tried again, once."""

    def __init__(self, *, make: bool = True) -> None:
        self.make = make
        """whether what is missing is made"""
        self.made: set[str] = set()
        """names of what was made, or tried, this time"""
        self._tried: dict[Path, Result | None] = {}

    def get(
        self, file: Path, settings: dict[str, Any], make: Callable[[], Result], folder: Path | None = None
    ) -> Result | None:
        """What `file` says, if it was made with these settings and `folder` is still there; else what `make` gives.

        ``{"settings", …, "seconds"}``, or ``{"settings", "failed", "traceback", "seconds"}``.
        """
        if file in self._tried:
            return self._tried[file]
        found = _read(file)
        if found is not None and (changed := differences(found.get("settings"), settings)):
            log.info("%s was made with other settings (%s)", file.stem, "; ".join(changed))
            found = None
        if folder is not None and not folder.exists():
            found = None
        if (found is None or "failed" in found) and self.make:
            found = self._made(file, settings, make)
        self._tried[file] = found
        return found

    def _made(self, file: Path, settings: dict[str, Any], make: Callable[[], Result]) -> Result:
        began = time.monotonic()
        try:
            made = make()
        except Exception as error:  # whatever it is, the others go on
            reason = " ".join(str(error).split()) or type(error).__name__
            made = {"failed": reason, "traceback": traceback.format_exc()}
            log.debug("%s", made["traceback"])
        made = {"settings": settings, **made, "seconds": time.monotonic() - began}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, as_json(made))
        self.made.add(file.stem)
        return made


def content_of_model(name: str) -> dict[str, str]:
    """What a model is, whatever its folder is called: the hashes of its parts, or its revision on the hub."""
    if Path(name).expanduser().is_dir():
        return model_content(name)
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
    return [] if before == now else [f"{name} {before!r}, now {now!r}"]


def _read(file: Path) -> Result | None:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
