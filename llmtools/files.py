"""Atomic output folders: written by one run at a time, complete or absent, and replacing only outputs of llmtools.

A run locks its output first: ``.OUT.lock`` beside it excludes a second run and is released with the process, however
that ends. Files are written to ``.OUT.….partial``, which is renamed at the end. The next run of the same output removes
what a killed one left.

Every output holds ``llmtools.json`` with the list of its files. `--overwrite` deletes only such folders, and only if no
file in them is another program's or an input of the run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CheckpointError, InputError
from .signals import interruptible

if sys.platform != "win32":  # which has other locks
    import fcntl

log = logging.getLogger(__name__)

METADATA = "llmtools.json"
"""Name of the metadata file of an output; it lists the output's ``files``."""
RUN = "run.json"
"""Name of the file that a run writes while it is active; in outputs, of earlier versions."""

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}")
"""Pattern of the temporary files of `write_whole`, which a killed run leaves."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_TORCH_DISK_ERRORS = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
"""Messages of torch.save where a file cannot be written."""
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
_EARLIER_OUTPUTS = (
    *("llmtools.json", "run.json", "metrics.jsonl", "loss.png", "README.md", "checkpoints/*", "base_fingerprint.json"),
    *("config.json", "generation_config.json", "quantize_config.json", "adapter_config.json", "*.py"),
    *("*.safetensors", "*.safetensors.index.json", "model.gguf"),
    *(
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "spiece*",
    ),
)
"""Patterns of files in outputs without a list of files: those of earlier versions, and of resumed runs."""


class NameTaken(InputError):
    """A finished output could not be renamed to its name, and is kept under another one."""


@contextmanager
def writing(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `folder` to write into, and renames it to `folder` at the end.

    If the block ends early (no space left, Ctrl-C, an error) the new files are removed and a former `folder` is
    unchanged. With `overwrite` a former folder is replaced as a whole, after the new one is on the disk.
    ``llmtools.json`` gets the list of files.

    Raises InputError where `claim` does and where the disk cannot be written; NameTaken where `folder` appeared
    meanwhile and may not be replaced: then the output is in `folder`.1.
    """
    folder = Path(folder).expanduser()
    with claim(folder, overwrite=overwrite):
        target = folder.resolve()
        partial = partial_of(target)
        try:
            partial.mkdir(parents=True)
            yield partial
            sort_metadata(partial)
            _list_files(partial)
            _sync(partial)
            _put(partial, folder, target, overwrite=overwrite)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)  # after an interrupted exchange: the former folder
            if (reason := disk_error(error)) is not None:
                raise InputError(f"{folder}: cannot be written ({reason}); nothing was kept") from error
            raise


@contextmanager
def claim(
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    reads: Iterable[str | os.PathLike[str] | None] = (),
    called: str | os.PathLike[str] | None = None,
    adding: bool = False,
) -> Iterator[None]:
    """Locks an output folder for the length of the block, in which SIGTERM cleans up as Ctrl-C does.

    To be entered before hours of work; `writing` within reuses the claim. Leftovers of killed runs of the same output
    are removed. called: name of the output in the message to a second run, if not `folder` itself. adding: the run
    replaces nothing, and `folder` may exist.

    Raises InputError where another run writes there, and where `check_free` does, unless `adding`.
    """
    folder = Path(folder).expanduser()
    target, reads = folder.resolve(), list(reads)
    if target in _held.get():  # `_put` checks `folder` again
        yield
        return
    _check_name(folder, target)
    if not adding:
        check_free(folder, overwrite=overwrite, reads=reads)
    parents = [parent for parent in target.parents if not parent.exists()]  # created here, hence removed here
    try:
        with interruptible(), ExitStack() as stack:
            try:
                if stack.enter_context(_lock(target, called or folder)):
                    _clear(target)
            except OSError as error:
                if (reason := disk_error(error)) is not None:
                    raise InputError(f"{folder}: cannot be written ({reason})") from error
                raise
            if not adding:
                check_free(folder, overwrite=overwrite, reads=reads)  # `_clear` may have restored a folder
            yield
    finally:
        for parent in parents:
            with suppress(OSError):  # not empty: keep it
                parent.rmdir()


_LONGEST = 255
"""Longest file name, in bytes, on nearly every file system."""
_BESIDE = "..ffffff-9999999-ffff.partial.former"
"""Longest affix of a temporary name, see `partial_of`."""


def _check_name(folder: Path, target: Path) -> None:
    """Raises InputError for a name that is too long for the temporary names beside it."""
    size, most = len(os.fsencode(target.name)), _LONGEST - len(_BESIDE)
    if size > most:
        raise InputError(
            f"{str(folder)[:60]}…: name too long ({size} bytes); at most {most} are possible, since the temporary "
            f"folder has a longer name"
        )


def check_free(
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    reads: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """Raises InputError unless `folder` may be written: it does not exist, or may be replaced, with `overwrite`.

    reads: inputs of the run (models, adapters, data); names that are no local files or folders are ignored.
    """
    folder = Path(folder).expanduser()
    if not (folder.exists() or folder.is_symlink()):
        return
    target = folder.resolve()
    check_no_input(folder, reads)
    if not overwrite:
        raise InputError(f"{folder} exists; choose another folder or pass --overwrite (overwrite=True) to replace it")
    if not target.is_dir():
        raise InputError(f"{folder} is a file; choose another name for the output folder")
    for each in (Path.cwd(), Path.home()):
        if each.resolve().is_relative_to(target):
            raise InputError(f"{folder} holds {each}; it will not be overwritten, choose another output folder")
    if (target / ".git").exists():
        raise InputError(f"{folder} is a git repository; it will not be overwritten, choose another folder")
    if json_or_empty(target / METADATA).get("command") == "sweep":
        raise InputError(f"{folder} holds a sweep, which will not be overwritten; choose another output folder")
    if (others := unknown_files(target)) is None:
        raise InputError(
            f"{folder} is no output of llmtools (it has no llmtools.json or run.json of ours) and will not be "
            f"overwritten; choose another output folder"
        )
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise InputError(
            f"{folder} holds {others[0]}{more}, which llmtools did not write; move that away, or choose another output "
            f"folder"
        )


def check_no_input(folder: Path, reads: Iterable[str | os.PathLike[str] | None]) -> None:
    """Raises InputError where an input is, or is in, a folder that would be replaced."""
    target = folder.resolve()
    if (held := next(_within(target, reads), None)) is not None:
        what = "is" if held.resolve() == target else f"holds {held}, which is"
        raise InputError(f"{folder} {what} an input of this run; choose another output folder")


def unknown_files(folder: Path) -> list[str] | None:
    """Relative paths of files in an output that llmtools did not write; None where the folder is no output."""
    found = (
        Path(place, name).relative_to(folder).as_posix()
        for place, folders, files in os.walk(folder)
        for name in [*files, *(each for each in folders if Path(place, each).is_symlink())]
    )
    info, run = json_or_empty(folder / METADATA), json_or_empty(folder / "run.json")
    if not ("files" in info or "versions" in info or {"command", "recipe"} <= run.keys()):
        return [] if next(found, None) is None else None
    known = info["files"] if isinstance(info.get("files"), list) else None
    return sorted(name for name in found if not _is_ours(name, known))


def read_info(folder: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """The metadata of an output, its ``llmtools.json``; {} where there is none.

    Earlier versions wrote a part of it into ``run.json``. Raises `error` for a damaged file.
    """
    return {**read_json(folder / RUN, error), **read_json(folder / METADATA, error)}


def files_of(folder: Path, *to_come: str) -> list[str]:
    """The list of an output's files for its ``llmtools.json``, including `to_come`, which are written later."""
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    return sorted({*found, *to_come, METADATA})


def partial_of(target: Path) -> Path:
    """A temporary name beside an output, for files being written or deleted; the output's next run removes it."""
    return target.with_name(f".{target.name}.{_host()}-{os.getpid()}-{secrets.token_hex(2)}.partial")


LONGEST_HEADER = 100_000_000
"""Longest .safetensors header, in bytes, the library's own limit."""


def safetensors_header(stream: BinaryIO) -> bytes:
    """The JSON header of a .safetensors file, which follows its length in 8 bytes.

    The stream is behind it afterwards. Raises ValueError for a truncated file or another format.
    """
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= LONGEST_HEADER or len(text := stream.read(length)) < length:
        raise ValueError("no safetensors file, or a truncated one")
    return text


_UNPICKLED_BY = {
    "qmodel.pt": "write it again with hqq's save_to_safetensors, or with save_pretrained of a model that transformers "
    "quantized (HqqConfig)",
    "adapter_model.bin": "load it with peft and save_pretrained",
}
"""File → how its writer converts it to safetensors."""


def unpickled(file: str | os.PathLike[str]) -> CheckpointError:
    """The error for a file that only unpickling would open, with a way to convert it to safetensors."""
    path = Path(file)
    remedy = _UNPICKLED_BY.get(path.name, "AutoModelForCausalLM.from_pretrained, save_pretrained")
    return CheckpointError(
        f"{path.parent} holds {path.name}, which is a pickle, and we unpickle nothing, since that can run code; "
        f"if you trust it, convert it to safetensors once ({remedy})"
    )


def sort_metadata(folder: Path) -> None:
    """Sorts the metadata in a folder's .safetensors files, which the library writes in random order.

    A header keeps its length, so the rest of the file is unchanged.
    """
    for file in folder.rglob("*.safetensors"):
        _sort_metadata(file)


def remove(folder: Path, *, of: Path) -> None:
    """Deletes a folder of the run that writes `of`: renames it at once, then deletes the files."""
    if folder.exists():
        folder.rename(partial := folder.with_name(partial_of(of).name))
        shutil.rmtree(partial, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Deletes temporary files of `write_whole` from killed runs, in a folder that no other run writes to."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(file.name):
            file.unlink(missing_ok=True)


def disk_error(error: BaseException) -> str | None:
    """The reason if the disk cannot be written: out of space, read-only, no permission; else None.

    The libraries that write files report the system's errors with messages of their own, hence the checks of the text.
    """
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return "no space left on the device"
    if isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}:
        return str(error.strerror).lower()
    if type(error).__name__ in ("SafetensorError", "Error") and "No space left" in str(error):  # also shutil's
        return "no space left on the device"
    if isinstance(error, RuntimeError) and any(said in str(error) for said in _TORCH_DISK_ERRORS):
        return "a file cannot be written; is there space left?"
    return None


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yields a path to write to, which replaces `file` atomically at the end: it is on the disk before it is renamed.

    After an error it is removed, and a former `file` is unchanged.
    """
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Writes or replaces a file atomically, as `whole_file`."""
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Flushes a file or a folder's entries to the disk (fsync)."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_or_empty(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none, or it is anything else."""
    try:
        return read_json(path)
    except (OSError, InputError):
        return {}


def read_json(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none. Raises `error` where it is anything else."""
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


# ------------------------------------------------------------------------------------------------ ownership of a folder


def _within(target: Path, reads: Iterable[str | os.PathLike[str] | None]) -> Iterator[Path]:
    """The inputs that are in `target`, or whose files are, links resolved."""
    for each in reads:
        path = Path(os.path.expanduser(each or ""))
        if not each or not os.path.exists(path):
            continue
        if any(one.resolve().is_relative_to(target) for one in (path, *(path.iterdir() if path.is_dir() else ()))):
            yield path


def _is_ours(name: str, known: list[Any] | None) -> bool:
    """Whether llmtools wrote the file of this relative path; known: the list of files in the folder's metadata."""
    place, _, last = name.rpartition("/")
    if last == ".DS_Store":
        return True
    if temporary := _TEMPORARY.fullmatch(last):
        name = f"{place}/{temporary[1]}".lstrip("/")
    if known is not None:
        return name in known
    return any(fnmatch(name, pattern) for pattern in _EARLIER_OUTPUTS if "/" in pattern or "/" not in name)


def _list_files(folder: Path) -> None:
    """Adds the list of files to the folder's ``llmtools.json``, if it has none."""
    info = read_json(folder / METADATA)
    if "files" not in info:
        info["files"] = files_of(folder)
        (folder / METADATA).write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- one run at a time

_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
"""Folders that this run has claimed: a claim within a claim is the same one."""


@contextmanager
def _lock(target: Path, called: str | os.PathLike[str]) -> Iterator[bool]:
    """Holds the lock of an output. Yields False where the file system has no locks."""
    file = target.with_name(f".{target.name}.lock")
    descriptor = _locked(file, called)
    token = _held.set(_held.get() | {target})
    try:
        yield descriptor is not None
    finally:
        _held.reset(token)
        if descriptor is not None:
            file.unlink(missing_ok=True)
            os.close(descriptor)


def _locked(file: Path, called: str | os.PathLike[str]) -> int | None:
    """A descriptor of the locked file. The lock ends with the process; the file names its holder."""
    if sys.platform == "win32":
        return None
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the run that made the parent has just ended and removed it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = re.fullmatch(r"(\d+) (\S+)\n", os.read(descriptor, 300).decode(errors="replace"))
            os.close(descriptor)
            who = f" (pid {owner[1]}{'' if owner[2] == socket.gethostname() else f' on {owner[2]}'})" if owner else ""
            raise InputError(
                f"another run{who} writes to {called}; wait for its end, or choose another output folder"
            ) from None
        except OSError as error:
            os.close(descriptor)
            file.unlink(missing_ok=True)
            log.debug("%s: no locks on this file system (%s)", file, error)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)  # its former holder has just deleted the file


def _host() -> str:
    """Six characters for this machine, for file names."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"[:6]


def _clear(target: Path) -> None:
    """Removes what killed runs of this output left. A former folder under a temporary name is restored."""
    ours = re.compile(
        rf"\.{re.escape(target.name)}\.(([0-9a-f]{{6}})-\d+-[0-9a-f]{{4}}|[0-9a-f]{{8}})\.partial(\.former)?"
    )
    left = [(path, found) for path in sorted(target.parent.iterdir()) if (found := ours.fullmatch(path.name))]
    for path, found in sorted(left, key=lambda each: not each[1][3]):  # former folders first
        if found[2] not in (None, _host()):
            log.warning("%s belongs to a run on another machine; delete it if that run has ended", path)
        elif found[3] and not target.exists():
            path.rename(target)
            log.warning("%s: the former folder is restored, after a run that was killed while it replaced it", target)
        else:
            if found[3]:
                path = path.rename(partial_of(target))  # not restored again after a second kill
            shutil.rmtree(path, ignore_errors=True)


# --------------------------------------------------------------------------------------------------- atomic replacement


def _put(partial: Path, folder: Path, target: Path, *, overwrite: bool) -> None:
    """Renames a finished folder to its name, if that is still free, else to another one."""
    try:
        check_free(folder, overwrite=overwrite)
        if target.exists():
            _exchange(partial, target)
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.rename(target)
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _TAKEN:
            raise
        kept = next(path for number in range(1, 10_000) if not os.path.lexists(path := Path(f"{target}.{number}")))
        partial.rename(kept)
        why = f"{folder} appeared while this ran"
        if overwrite and isinstance(error, InputError):
            why = f"{folder} changed while this ran ({error})"
        raise NameTaken(f"{why}; the finished work is kept as {folder.with_name(kept.name)}") from error
    finally:
        with suppress(OSError):
            sync(target.parent)


def _exchange(new: Path, target: Path) -> None:
    """Exchanges the names of `new` and `target`.

    Atomically where the system can. Elsewhere the former folder has a temporary name for a moment, by which `_clear`
    finds it.
    """
    if _swapped(new, target):
        return
    former = new.with_name(f"{new.name}.former")
    try:
        target.rename(former)
        new.rename(target)
    except BaseException:
        if former.exists() and not target.exists():
            former.rename(target)
        raise
    former.rename(new)  # from here on it is not restored


def _swapped(one: Path, other: Path) -> bool:
    """Exchanges two names by Linux' renameat2(RENAME_EXCHANGE); False where that is not available."""
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    sys.audit("os.rename", str(one), str(other), -1, -1)  # as Python's own renames do
    here, exchange = -100, 2
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _sync(folder: Path) -> None:
    """Flushes every file to the disk, so that the rename cannot come before the contents."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _sort_metadata(file: Path) -> None:
    with file.open("r+b") as stream, suppress(ValueError, TypeError, AttributeError):  # not a safetensors file
        text = safetensors_header(stream)
        header = json.loads(text)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items())) if "__metadata__" in header else {}
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(len(text))
        if header["__metadata__"] and ordered != text and len(ordered) == len(text):
            stream.seek(8)
            stream.write(ordered)
