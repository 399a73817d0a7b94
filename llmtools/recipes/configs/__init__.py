"""The recipes that come with the package: a YAML for each task or verb, and a table of named variants of them.

``--config NAME`` takes one by its bare name; a file of that name in the current folder comes first. The rows of a
published experiment differ in the model alone, so `samsum_qlora` is ``samsum.yaml`` and then the options that
``variants.yaml`` has under `qlora`, its output folder named after both.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import InputError
from ..plain_yaml import read_yaml

FOLDER = Path(__file__).parent
ASSETS = "demo/assets"
"""Folder of the demo's model and texts in a checkout; they do not come with the package."""


class Packaged(NamedTuple):
    """A recipe that comes with the package."""

    verb: str
    """Command that runs it: finetune, quantize or sweep."""
    file: Path
    """YAML file."""
    options: dict[str, Any]
    """Top-level options of the variant, which override those of the YAML."""
    summary: str
    """Summary in one line."""

    def arguments(self) -> list[str]:
        """The command line arguments that it stands for."""
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.options.items()}
        return [f"--config={self.file}", *(f"--{key}={text}" for key, text in texts.items())]

    def __str__(self) -> str:
        changed = [f"{key}: {value}" for key, value in self.options.items()]
        return "\n".join(
            [self.file.read_text(encoding="utf-8").rstrip(), *(["", "# variant", *changed] if changed else [])]
        )


@functools.cache
def packaged() -> dict[str, Packaged]:
    """Name -> recipe, sorted by name."""
    variants = read_yaml(FOLDER / "variants.yaml")
    found = {}
    for file in FOLDER.glob("*.yaml"):
        title = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").rstrip(".")
        verb = next((verb for verb in ("quantize", "sweep") if file.stem.startswith(verb)), "finetune")
        if file.stem == "variants":
            continue
        if verb == "sweep":
            found[file.stem] = Packaged(verb, file, {}, f"{title}.")
            continue
        base = read_yaml(file)["out"]
        for variant, options in variants[verb].items():
            own = {key: value for key, value in options.items() if key != "title"}
            own["out"] = f"{base}-{variant.replace('_', '-')}"
            found[f"{file.stem}_{variant}"] = Packaged(verb, file, own, f"{title}: {options['title']}.")
    return dict(sorted(found.items()))


def with_packaged(args: list[str]) -> list[str]:
    """Command line arguments with the names of packaged recipes after ``--config`` replaced by their arguments.

    Raises InputError for a recipe on files of a checkout, such as sweep_demo's, that is not run in one.
    """
    out: list[str] = []
    for index, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        if index and args[index - 1] == "--config" and _is_name(arg):
            out[-1:] = _arguments(arg) or ["--config", arg]
        elif flag == "--config" and _is_name(value):
            out += _arguments(value) or [arg]
        else:
            out.append(arg)
    return out


def _arguments(name: str) -> list[str]:
    """The arguments of the packaged recipe of that name; none where there is none."""
    recipe = packaged().get(name)
    if recipe is None:
        return []
    if ASSETS in recipe.file.read_text(encoding="utf-8") and not os.path.isdir(ASSETS):
        checkout = FOLDER.parents[2]
        where = f"cd {checkout}" if (checkout / ASSETS).is_dir() else "run it in a clone of the repository"
        raise InputError(
            f"{name} works on {ASSETS} of a checkout of llmtools, which is not here ({os.getcwd()}): {where}, or write "
            f"a recipe for a model and data of yours (`llmtools list {name}` shows this one)"
        )
    return recipe.arguments()


def _is_name(text: str) -> bool:
    return bool(text) and not os.path.exists(text)  # unlike Path.exists, also for invalid file names
