"""The recipes that come with the package: one YAML for each published experiment, in `configs/`.

``--config NAME`` takes one by its bare name; a file of that name in the current folder comes first.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError

FOLDER = Path(__file__).parent / "configs"
ASSETS = "demo/assets"
"""the model and the texts of a checkout; they do not come with the package"""


def packaged() -> dict[str, Path]:
    """name → file, sorted by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def summary(file: Path) -> str:
    """The first line of a YAML's opening comment."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def with_packaged(args: list[str]) -> list[str]:
    """Command line arguments in which the name of a packaged recipe, after ``--config``, is the path of its file.

    Raises InputError for a recipe on files of a checkout, such as sweep_demo's, that is not run in one.
    """
    out = []
    for index, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        if index and args[index - 1] == "--config" and _is_name(arg):
            arg = _file_of(arg)
        elif flag == "--config" and _is_name(value):
            arg = f"{flag}={_file_of(value)}"
        out.append(arg)
    return out


def _file_of(name: str) -> str:
    file = packaged().get(name)
    if file is None:
        return name
    if ASSETS in file.read_text(encoding="utf-8") and not os.path.isdir(ASSETS):
        checkout = FOLDER.parents[2]
        where = f"cd {checkout}" if (checkout / ASSETS).is_dir() else "run it in a clone of the repository"
        raise InputError(
            f"{name} works on {ASSETS} of a checkout of llmtools, which is not here ({os.getcwd()}): {where}, or write "
            f"a recipe for a model and data of yours (`llmtools list {name}` shows this one)"
        )
    return str(file)


def _is_name(word: str) -> bool:
    return bool(word) and not os.path.exists(word)  # unlike Path's, also of names that no file can have
