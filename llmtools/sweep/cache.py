"""The cache of a sweep's results: one JSON file per result, written atomically, with the settings it was computed with.

Settings name files and folders; hashes of their contents are part of them (`checkpoint.inputs.contents`). What is known
by its content is compared by that alone: results are valid wherever the sweep, its model and its data were moved.
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


class ResultCache:
    """Results on the disk. A result with equal settings is reused; a failed one is tried again, once per process.

    A result with an output folder is valid as long as the folder holds the same weights.
    """

    def __init__(self, *, compute: bool = True) -> None:
        self.compute = compute
        """Whether missing results are computed."""
        self.computed: set[str] = set()
        """Names of the results computed, or tried, by this process."""
        self._tried: dict[Path, Result | None] = {}

    def get(
        self, file: Path, settings: dict[str, Any], make: Callable[[], Result], folder: Path | None = None
    ) -> Result | None:
        """The result in `file` if its settings are these and `folder` holds its weights; else that of `make`.

        ``{"settings", …, "seconds"}`` and, with a folder, ``"weights"``, the hash of the weights in it; or
        ``{"settings", "failed", "traceback", "seconds"}``. None where there is none and nothing is to be computed.
        """
        if file in self._tried:
            return self._tried[file]
        found = _read(file)
        if found is not None and (changed := differences(_compared(_settings(found)), _compared(settings))):
            log.info("%s was computed with other settings (%s)", file.stem, "; ".join(changed))
            found = None
        if found is not None and "failed" not in found and folder is not None and not _holds_weights(found, folder):
            log.info("%s: %s does not hold the weights of this result any more", file.stem, folder)
            found = None
        if (found is None or "failed" in found) and self.compute:
            found = self._compute(file, settings, make, folder)
        self._tried[file] = found
        return found

    def _compute(
        self, file: Path, settings: dict[str, Any], make: Callable[[], Result], folder: Path | None = None
    ) -> Result:
        began = time.monotonic()
        try:
            result = make()
            if folder is not None:
                result = {**result, "weights": _weights(folder)}
        except Exception as error:  # one failure must not stop the other runs
            reason = " ".join(str(error).split()) or type(error).__name__
            result = {"failed": reason, "traceback": traceback.format_exc()}
            log.debug("%s", result["traceback"])
        result = {"settings": settings, **result, "seconds": time.monotonic() - began}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, as_json(result))
        self.computed.add(file.stem)
        return result


def required(result: Result | None, what: str) -> Result:
    """The result that another depends on. Raises InputError, led by `what`, where it is missing or failed."""
    if result is None or "failed" in result:
        raise InputError(f"{what}: {result['failed'] if result else 'there is no result'}")
    return result


def _holds_weights(found: Result, folder: Path) -> bool:
    """Whether a folder still holds the weights of a result."""
    present = _weights(folder)
    return present is not None and present == found.get("weights")


def _settings(found: Result) -> Any:
    """The settings of a stored result, with the options' names of today."""
    settings = found.get("settings")
    if not isinstance(settings, dict):
        return settings
    return {
        key: with_current_names(key, value) if isinstance(value, dict) else value for key, value in settings.items()
    }


def _compared(settings: Any) -> Any:
    """The settings without the places of what is known otherwise.

    The model and the files of a recipe are known by their hashes, under `model reads` and `RECIPE reads`; its model,
    adapter and output folder are parts of the sweep.
    """
    if not isinstance(settings, dict):
        return settings
    kept = dict(settings)
    if settings.get("model reads"):
        kept.pop("model", None)
    for name, recipe in settings.items():
        if isinstance(recipe, dict) and f"{name} reads" in settings:
            kept[name] = _without(recipe, {"model", "adapter", "out", *(settings[f"{name} reads"] or {})})
    return kept


def _without(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The options without those named, `options.data` being the option `data` of the group `options`."""
    inner = {name.partition(".")[0] for name in names if "." in name}
    return {
        key: _without(value, {name.partition(".")[2] for name in names if name.startswith(f"{key}.")})
        if key in inner and isinstance(value, dict)
        else value
        for key, value in options.items()
        if key not in names
    }


def _weights(folder: Path) -> str | None:
    return model_content(folder).get("model's weights")


def _read(file: Path) -> Result | None:
    try:
        return read_json(file) if file.exists() else None
    except (OSError, InputError):
        return None
