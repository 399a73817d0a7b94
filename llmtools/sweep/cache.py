"""Results that are kept: a JSON file each, written whole or not at all, with the settings that it belongs to.

Settings name files and folders; what these hold is part of them, too, as hashes (`checkpoint.inputs.contents`).
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.inputs import differences
from ..checkpoint.run_info import as_json
from ..content import model_content
from ..errors import InputError
from ..files import read_json, write_whole
from ..options import with_current_names

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
        if found is not None and (changed := differences(_settings(found), settings)):
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


def needed(result: Result | None, what: str) -> Result:
    """The result that another is made from. Raises InputError, led by `what`, where there is none."""
    if result is None or "failed" in result:
        raise InputError(f"{what}: {result['failed'] if result else 'it is not there'}")
    return result


def _settings(found: Result) -> Any:
    """The settings of a stored result, with the options' names of today."""
    settings = found.get("settings")
    if not isinstance(settings, dict):
        return settings
    return {
        key: with_current_names(key, value) if isinstance(value, dict) else value for key, value in settings.items()
    }


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
