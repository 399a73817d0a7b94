"""Folders and files that appear whole or not at all, and JSON files as people write them."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def writing(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside `folder` to write into, and renames it to `folder` at the end.

    Whatever ends the block early (no space left, Ctrl-C, an error) removes what was written and leaves a former
    `folder` as it was. With `overwrite` a former folder is replaced as a whole, after the new one is on the disk.

    Raises InputError where `folder` exists and `overwrite` is false, and where the disk refuses.
    """
    folder = Path(folder).expanduser()
    check_free(folder, overwrite=overwrite)
    target = folder.resolve()
    parents = [parent for parent in target.parents if not parent.exists()]  # made here, so unmade here
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        _rename(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if (reason := _disk_says_no(error)) is not None:
            raise InputError(f"{folder}: cannot be written ({reason}); nothing was kept") from error
        raise


def write_whole(file: Path, text: str) -> None:
    """Writes a file, or replaces it, whole or not at all."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def read_json(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none. Raises `error` for anything else in it."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not JSON: {cause}") from cause
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}") from cause
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object but {type(value).__name__}")
    return value


def check_free(folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raises InputError unless `writing(folder)` may start: to be called before hours of work, too."""
    folder = Path(folder).expanduser()
    if not (folder.exists() or folder.is_symlink()):
        return
    if not overwrite:
        raise InputError(f"{folder} exists; choose another folder or pass --overwrite (overwrite=True) to replace it")
    target = folder.resolve()
    if not target.is_dir():
        raise InputError(f"{folder} is a file; choose another name for the output folder")
    for place in (Path.cwd(), Path.home()):
        if place.resolve().is_relative_to(target):
            raise InputError(f"{folder} holds {place}; it is not going to be overwritten, choose another output folder")
    if (target / ".git").exists():
        raise InputError(f"{folder} is a git repository; it is not going to be overwritten, choose another folder")


def _sync(folder: Path) -> None:
    """Has the system write every file to the disk, so that the rename cannot come before the contents."""
    for path in [*folder.rglob("*"), folder]:
        if os.name == "nt" and path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    former = target.with_name(f"{partial.name}.former")
    target.rename(former)
    try:
        partial.rename(target)
    except BaseException:
        former.rename(target)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _disk_says_no(error: BaseException) -> str | None:
    """What the disk said, if it is the disk that refused: out of space, read-only, no permission.

    The safetensors library reports the system's errors in words of its own, hence the look at the text.
    """
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return "no space left on the device"
    if isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}:
        return str(error.strerror).lower()
    if type(error).__name__ == "SafetensorError" and "No space left" in str(error):
        return "no space left on the device"
    return None
