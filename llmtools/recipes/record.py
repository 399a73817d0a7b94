"""What was run, written beside its result: the resolved recipe, versions, platform, time."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("llmtools", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", "numpy")


def record(command: str, recipe: Any, **more: Any) -> dict[str, Any]:
    """One run as JSON: ``{"command", "recipe", "versions", "python", "platform", "started", …}`` and `more`."""
    return {
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "versions": versions(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    }


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "llmtools" not in found:
        from .. import __version__

        found["llmtools"] = __version__
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON; what JSON does not know is written as its string."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
