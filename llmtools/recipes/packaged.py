"""The recipes that come with the package: one YAML for each published experiment, in `configs/`.

``--config NAME`` takes one by its bare name; a file of that name in the current folder comes first.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "configs"


def packaged() -> dict[str, Path]:
    """name → file, sorted by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def summary(file: Path) -> str:
    """The first line of a YAML's opening comment."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def with_packaged(args: list[str]) -> list[str]:
    """Command line arguments in which the name of a packaged recipe, after ``--config``, is the path of its file."""
    known = packaged()
    out = []
    for index, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        if index and args[index - 1] == "--config" and _is_name(arg):
            arg = str(known.get(arg, arg))
        elif flag == "--config" and _is_name(value):
            arg = f"{flag}={known.get(value, value)}"
        out.append(arg)
    return out


def _is_name(word: str) -> bool:
    return bool(word) and not os.path.exists(word)  # unlike Path's, also of names that no file can have
