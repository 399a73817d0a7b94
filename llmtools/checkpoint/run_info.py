"""The record of a run, written beside its result: the resolved recipe, versions, platform, time.

Secrets among the options (a hub token) are removed, see `redaction`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..redaction import redacted

PACKAGES = (
    "llmtools",
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "numpy",
)


def record(command: str, recipe: Any, **more: Any) -> dict[str, Any]:
    """One run as JSON: ``{"command", "recipe", "versions", "python", "platform", "started", …}`` and `more`.

    `more` may have ``facts``, see `facts_of`.
    """
    run = {
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "versions": versions(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    }
    return dict(redacted(run))


def versions() -> dict[str, str]:
    """The installed versions of the packages that a result depends on."""
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


def facts_of(info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The facts about a run that its model card shows.

    ``calibration`` {text, windows, seed}; ``training`` {data, task, seed, examples, steps, training loss,
    validation loss}; ``base`` {loaded as}, of a GGUF file {file, sha256, types, bits per weight}. Unknown ones are
    omitted. A command passes them to `record`; for records of earlier versions they follow from recipe and result.
    """
    if isinstance(info.get("facts"), Mapping):
        return {name: dict(facts) for name, facts in info["facts"].items()}
    recipe, result = (dict(info.get(key) or {}) for key in ("recipe", "result"))
    facts: dict[str, dict[str, Any]] = {"base": {"loaded as": recipe.get("load")}}
    if info.get("command") == "quantize" and recipe.get("calibration"):
        facts["calibration"] = {
            "text": recipe["calibration"],
            "windows": recipe.get("samples"),
            "seed": recipe.get("seed"),
        }
    if info.get("command") == "finetune":
        facts["training"] = {
            **{key: recipe.get(key) for key in ("data", "task", "seed")},
            **{key: result.get(key) for key in ("examples", "steps")},
            "training loss": result.get("train_loss"),
            "validation loss": result.get("validation_loss"),
        }
    return {name: {key: value for key, value in each.items() if value is not None} for name, each in facts.items()}


def as_json(value: Any) -> str:
    """Indented JSON with a final newline, without secrets; values unknown to JSON as strings."""
    text = json.dumps(redacted(value), indent=2, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # a file's name may not be valid Unicode


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON in UTF-8."""
    path.write_text(as_json(value), encoding="utf-8")


def given(recipe: Any) -> dict[str, Any]:
    """The options of a recipe that differ from their defaults, as JSON values, without secrets.

    It does not change when a later version adds an option.
    """
    found = {}
    for each in dataclasses.fields(recipe):
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        if (value := getattr(recipe, each.name)) != default:
            found[each.name] = given(value) if dataclasses.is_dataclass(value) else value
    return dict(json.loads(json.dumps(redacted(found), default=str)))


def command(verb: str, recipe: Any) -> str:
    """The command line of a recipe."""
    return " ".join(["llmtools", verb, *_flags(given(recipe))])


def _flags(options: dict[str, Any], name: str = "") -> Iterator[str]:
    for key, value in options.items():
        if isinstance(value, dict) and f"{name}{key}" in ("lora", "lora.options", "options", "training"):
            yield from _flags(value, f"{name}{key}.")
        else:
            yield f"--{name}{key} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
