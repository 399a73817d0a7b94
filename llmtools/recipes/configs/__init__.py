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

from ..plain_yaml import read_yaml

FOLDER = Path(__file__).parent


class Packaged(NamedTuple):
    """A recipe that comes with the package."""

    verb: str
    """Command that runs it: finetune, quantize or sweep."""
    file: Path
    """Its YAML."""
    options: dict[str, Any]
    """Top-level options of its variant, which override those of the YAML."""
    summary: str
    """One line for a list."""

    def arguments(self) -> list[str]:
        """What stands for it on a command line."""
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
    """Command line arguments in which what a packaged recipe says replaces its name after ``--config``."""
    known = packaged()
    out: list[str] = []
    for index, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        if index and args[index - 1] == "--config" and arg in known and _is_name(arg):
            out[-1:] = known[arg].arguments()
        elif flag == "--config" and value in known and _is_name(value):
            out += known[value].arguments()
        else:
            out.append(arg)
    return out


def _is_name(word: str) -> bool:
    return bool(word) and not os.path.exists(word)  # unlike Path's, also of names that no file can have
