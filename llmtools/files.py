"""Output folders that appear whole or not at all, are written by one run at a time, and replace nothing but our own.

A run claims its output first: a lock beside it, ``.OUT.lock``, keeps a second run away and is gone with the process
that holds it, however that ends. What is written grows in ``.OUT.….partial`` and gets its name in one step at the end.
The next run of the same output clears away what a killed one left.

Every output carries ``llmtools.json`` with the list of its files. That is how `--overwrite` knows what it may delete: a
folder of ours in which nothing lies that we did not write, and nothing that is being read.
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

MARK = "llmtools.json"
RUN = "run.json"
"""What a run at work writes into its folder; in outputs, of earlier versions."""
"""what makes a folder one of ours, with the list of its ``files``"""

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{8}")
"""what a kill leaves of `write_whole`"""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_OF_TORCH = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
"""how torch.save says that a file cannot be written"""
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
_OF_EARLIER_VERSIONS = (
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
"""files of outputs that have no list of them, as earlier versions wrote them; and of a run that goes on"""


class NameTaken(InputError):
    """Finished work could not get its name, and lies under another one."""


@contextmanager
def writing(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside `folder` to write into, and renames it to `folder` at the end.

    Whatever ends the block early (no space left, Ctrl-C, an error) removes what was written and leaves a former
    `folder` as it was. With `overwrite` a former folder is replaced as a whole, after the new one is on the disk.
    ``llmtools.json`` gets the list of what was written.

    Raises InputError where `claim` does and where the disk refuses; NameTaken where `folder` came to be something in
    the meantime that may not be replaced: then the work lies in `folder`.1.
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
            shutil.rmtree(partial, ignore_errors=True)  # of an exchange that was interrupted: the former folder
            if (reason := disk_says_no(error)) is not None:
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
    """Keeps an output folder to this run for the length of the block, in which SIGTERM cleans up as Ctrl-C does.

    To be entered before hours of work; `writing` within finds the claim there. What killed runs of the same output left
    is cleared away. called: what the run writes to, if not `folder` itself, for the one who is refused.
    adding: the run replaces nothing, and `folder` may be there.

    Raises InputError where another run writes there, and where `check_free` does, unless `adding`.
    """
    folder = Path(folder).expanduser()
    target, reads = folder.resolve(), list(reads)
    if target in _held.get():  # and what became of `folder` since then, `_put` will see
        yield
        return
    _check_name(folder, target)
    if not adding:
        check_free(folder, overwrite=overwrite, reads=reads)
    parents = [parent for parent in target.parents if not parent.exists()]  # made here, so removed here
    try:
        with interruptible(), ExitStack() as stack:
            try:
                if stack.enter_context(_lock(target, called or folder)):
                    _clear(target)
            except OSError as error:
                if (reason := disk_says_no(error)) is not None:
                    raise InputError(f"{folder}: cannot be written ({reason})") from error
                raise
            if not adding:
                check_free(folder, overwrite=overwrite, reads=reads)  # what was restored counts, too
            yield
    finally:
        for parent in parents:
            with suppress(OSError):  # not empty, and so it stays
                parent.rmdir()


_LONGEST = 255
"""bytes of a name, on nearly every file system"""
_BESIDE = "..ffffff-9999999-ffff.partial.former"
"""the longest that is put around an output's name while it is not finished, see `partial_of`"""


def _check_name(folder: Path, target: Path) -> None:
    """Raises InputError for a name that leaves no room for the names of unfinished work beside it."""
    size, most = len(os.fsencode(target.name)), _LONGEST - len(_BESIDE)
    if size > most:
        raise InputError(
            f"{str(folder)[:60]}…: name too long ({size} bytes); at most {most} are possible, since unfinished work "
            f"has a longer name beside it"
        )


def check_free(
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    reads: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """Raises InputError unless `folder` may be written: it is not there, or may be replaced and is to be.

    reads: what the run reads (models, adapters, data); names that are no files or folders here do not matter.
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
    for place in (Path.cwd(), Path.home()):
        if place.resolve().is_relative_to(target):
            raise InputError(f"{folder} holds {place}; it is not going to be overwritten, choose another output folder")
    if (target / ".git").exists():
        raise InputError(f"{folder} is a git repository; it is not going to be overwritten, choose another folder")
    if json_or_empty(target / MARK).get("command") == "sweep":
        raise InputError(f"{folder} holds a sweep, which is not going to be overwritten; choose another output folder")
    if (others := strangers(target)) is None:
        raise InputError(
            f"{folder} is no output of llmtools (it has no llmtools.json or run.json of ours) and is not going to be "
            f"overwritten; choose another output folder"
        )
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise InputError(
            f"{folder} holds {others[0]}{more}, which llmtools did not write; move that away, or choose another output "
            f"folder"
        )


def check_no_input(folder: Path, reads: Iterable[str | os.PathLike[str] | None]) -> None:
    """Raises InputError where an input is, or lies in, a folder that is going to be replaced."""
    target = folder.resolve()
    if (held := next(_within(target, reads), None)) is not None:
        what = "is" if held.resolve() == target else f"holds {held}, which is"
        raise InputError(f"{folder} {what} an input of this run; choose another output folder")


def strangers(folder: Path) -> list[str] | None:
    """What lies in an output of ours that we did not write, as relative paths; None where the folder is no output."""
    found = (
        Path(place, name).relative_to(folder).as_posix()
        for place, folders, files in os.walk(folder)
        for name in [*files, *(each for each in folders if Path(place, each).is_symlink())]
    )
    note, run = json_or_empty(folder / MARK), json_or_empty(folder / "run.json")
    if not ("files" in note or "versions" in note or {"command", "recipe"} <= run.keys()):
        return [] if next(found, None) is None else None
    known = note["files"] if isinstance(note.get("files"), list) else None
    return sorted(name for name in found if not _is_ours(name, known))


def read_info(folder: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """What llmtools wrote of how a folder came to be, its ``llmtools.json``; {} where there is none.

    Earlier versions wrote a part of it into ``run.json``. Raises `error` for a damaged file.
    """
    return {**read_json(folder / RUN, error), **read_json(folder / MARK, error)}


def files_of(folder: Path, *to_come: str) -> list[str]:
    """The list of an output's files for its ``llmtools.json``, with those that are written later."""
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    return sorted({*found, *to_come, MARK})


def partial_of(target: Path) -> Path:
    """A name beside an output for what is not finished, or about to go: the output's next run clears it away."""
    return target.with_name(f".{target.name}.{_host()}-{os.getpid()}-{secrets.token_hex(2)}.partial")


LONGEST_HEADER = 100_000_000
"""bytes of a .safetensors header, by the library's own limit"""


def safetensors_header(stream: BinaryIO) -> bytes:
    """The JSON text that opens a .safetensors file: its length in 8 bytes, then which tensor lies where.

    The stream stands behind it afterwards. Raises ValueError where the file is shorter, or no file of this kind.
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
"""file → how its writer makes safetensors of it"""


def unpickled(file: str | os.PathLike[str]) -> CheckpointError:
    """The refusal of a file that only unpickling would open, with the way to a safetensors file."""
    path = Path(file)
    remedy = _UNPICKLED_BY.get(path.name, "AutoModelForCausalLM.from_pretrained, save_pretrained")
    return CheckpointError(
        f"{path.parent} holds {path.name}, which is a pickle, and we unpickle nothing, since that can run code; where "
        f"you trust it, convert it to safetensors once ({remedy})"
    )


def sort_metadata(folder: Path) -> None:
    """Puts the metadata of a folder's .safetensors files in order: their library writes them in another one each time.

    A header keeps its length, so nothing else in the file moves.
    """
    for file in folder.rglob("*.safetensors"):
        _sort_metadata(file)


def remove(folder: Path, *, of: Path) -> None:
    """Deletes a folder of the run that writes `of`. It is gone under its name at once, however long the rest takes."""
    if folder.exists():
        folder.rename(partial := folder.with_name(partial_of(of).name))
        shutil.rmtree(partial, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Deletes what kills left of `write_whole` in a folder that no other run writes to."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if _UNFINISHED.fullmatch(file.name):
            file.unlink(missing_ok=True)


def disk_says_no(error: BaseException) -> str | None:
    """What the disk said, if it is the disk that refused: out of space, read-only, no permission.

    The libraries that write files report the system's errors in words of their own, hence the look at the text.
    """
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return "no space left on the device"
    if isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}:
        return str(error.strerror).lower()
    if type(error).__name__ in ("SafetensorError", "Error") and "No space left" in str(error):  # of shutil, too
        return "no space left on the device"
    if isinstance(error, RuntimeError) and any(said in str(error) for said in _OF_TORCH):
        return "the disk refuses a file; is there space left?"
    return None


def write_whole(file: Path, text: str) -> None:
    """Writes a file, or replaces it, whole or not at all: it is on the disk before it gets its name."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Has the system write a file or a folder's entries to the disk."""
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
    """The object in a JSON file; {} where there is none, or anything else is in it."""
    try:
        return read_json(path)
    except (OSError, InputError):
        return {}


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


# --------------------------------------------------------------------------------------------------- whose folder it is


def _within(target: Path, reads: Iterable[str | os.PathLike[str] | None]) -> Iterator[Path]:
    """Those of the inputs that lie in `target`, or whose files do, by whatever links."""
    for each in reads:
        path = Path(os.path.expanduser(each or ""))
        if not each or not os.path.exists(path):
            continue
        if any(one.resolve().is_relative_to(target) for one in (path, *(path.iterdir() if path.is_dir() else ()))):
            yield path


def _is_ours(name: str, known: list[Any] | None) -> bool:
    """Whether we wrote the file of this relative path; `known`: the list that the folder has of its files."""
    place, _, last = name.rpartition("/")
    if last == ".DS_Store":
        return True
    if unfinished := _UNFINISHED.fullmatch(last):
        name = f"{place}/{unfinished[1]}".lstrip("/")
    if known is not None:
        return name in known
    return any(fnmatch(name, pattern) for pattern in _OF_EARLIER_VERSIONS if "/" in pattern or "/" not in name)


def _list_files(folder: Path) -> None:
    """Has the folder's ``llmtools.json`` list its files, if it does not yet."""
    note = read_json(folder / MARK)
    if "files" not in note:
        note["files"] = files_of(folder)
        (folder / MARK).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- one run at a time

_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
"""what this run has claimed: a claim within a claim is the same one"""


@contextmanager
def _lock(target: Path, called: str | os.PathLike[str]) -> Iterator[bool]:
    """Holds the lock of an output. False: this file system has no locks, so nobody is kept away."""
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
    """A descriptor of the file that holds its lock. The lock ends with the process; the file says who has it."""
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
        os.close(descriptor)  # of a file that its former holder has just deleted


def _host() -> str:
    """This machine in six characters, for names of files."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"[:6]


def _clear(target: Path) -> None:
    """Takes away what killed runs of this output left. A former folder that lost its name gets it back."""
    ours = re.compile(
        rf"\.{re.escape(target.name)}\.(([0-9a-f]{{6}})-\d+-[0-9a-f]{{4}}|[0-9a-f]{{8}})\.partial(\.former)?"
    )
    left = [(path, found) for path in sorted(target.parent.iterdir()) if (found := ours.fullmatch(path.name))]
    for path, found in sorted(left, key=lambda each: not each[1][3]):  # former folders first
        if found[2] not in (None, _host()):
            log.warning("%s is left of a run on another machine; delete it if that run has ended", path)
        elif found[3] and not target.exists():
            path.rename(target)
            log.warning("%s: the former folder is back, after a run that was killed while it replaced it", target)
        else:
            if found[3]:
                path = path.rename(partial_of(target))  # which is never brought back, were this the second kill
            shutil.rmtree(path, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- whole or not at all


def _put(partial: Path, folder: Path, target: Path, *, overwrite: bool) -> None:
    """Gives a finished folder its name, if that may still be had, else another one."""
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
    """Gives `new` the name `target`, and what had that name the name `new`.

    In one step where the system can. Elsewhere the former folder has a name of its own for a moment, by which `_clear`
    finds it again.
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
    former.rename(new)  # from here on it is not brought back any more


def _swapped(one: Path, other: Path) -> bool:
    """Exchanges two names by Linux' renameat2(RENAME_EXCHANGE); False where there is no such thing."""
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    sys.audit("os.rename", str(one), str(other), -1, -1)  # as Python's own renames tell it
    here, exchange = -100, 2
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _sync(folder: Path) -> None:
    """Has the system write every file to the disk, so that the rename cannot come before the contents."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _sort_metadata(file: Path) -> None:
    with file.open("r+b") as stream, suppress(ValueError, TypeError, AttributeError):  # not one of that library's
        text = safetensors_header(stream)
        header = json.loads(text)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items())) if "__metadata__" in header else {}
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(len(text))
        if header["__metadata__"] and ordered != text and len(ordered) == len(text):
            stream.seek(8)
            stream.write(ordered)
