"""The C files beside the kernels, as loaded libraries: built once, at first use, and kept.

`library("grouped")` compiles `grouped/native.c` with the machine's C compiler for the machine's processor, in a few
seconds, and loads it with ctypes; later processes find it in a cache. Nothing here is necessary: without a compiler,
and wherever a build fails, callers get None and compute in plain torch, and one log line says so and what to do.

A library in a cache is code that will run as the user, so the cache is a directory that only the user can write. It is
$LLMTOOLS_CACHE, $XDG_CACHE_HOME/llmtools or ~/.cache/llmtools. A file is named after everything that went into it
(source, compiler, flags, processor) and after its contents, appears by renaming, and is never changed, so processes
cannot disturb each other; of those that start together one builds. Loading what a power cut left of a library would
end the process, so the contents are compared with the name first. A failed build is recorded beside the
libraries, and not tried again for some hours.

Environment: CC names the compiler (default: cc, gcc or clang, whichever is found first); LLMTOOLS_NATIVE=0 turns C off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..files import sync

log = logging.getLogger(__name__)

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the output types in the C files: `enum type` of native.h."""

HERE = Path(__file__).parent
# Contracting a·b + c to a fused operation would round once where the reference rounds twice.
_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
# Linking against OpenMP resolves to the runtime that torch has loaded, so both share one pool of threads.
_VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
_BUILD_SECONDS = 120
_VERSION_SECONDS = 10
_RETRY_SECONDS = 3 * 3600


class Unavailable(Exception):
    """No library can be built or loaded, or nothing be kept beside them; the message, for the log, names the reason and
    the remedy."""


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The library built from `kernels/<name>/native.c`, or None where the reference has to do the work.

    The answer holds for the life of the process. The caller declares `argtypes` of the functions that it uses.
    """
    if os.environ.get("LLMTOOLS_NATIVE", "1") == "0" or not hasattr(os, "getuid"):
        return None
    try:
        return _load(HERE / name / "native.c")
    except (Unavailable, OSError) as reason:
        _say(str(reason))
        return None


def weight_library(name: str, weight: type[ctypes.Structure]) -> Any:
    """`library(name)` with the functions declared that decode a weight and multiply by it; None where there is none.

    weight: the structure by which C takes the weight. ``dequantize(weight, rows, type, out, threads)``;
    ``multiply`` and ``multiply_transposed(weight, rows, x, tokens, type, y, threads)``, 0 where memory lacks.
    """
    found = library(name)
    if found is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        taken = ctypes.POINTER(weight)
        found.dequantize.argtypes = [taken, size, number, pointer, number]
        found.multiply.argtypes = [taken, size, pointer, size, number, pointer, number]
        found.multiply_transposed.argtypes = found.multiply.argtypes
        found.dequantize.restype = found.multiply.restype = found.multiply_transposed.restype = number
    return found


@functools.cache
def _say(reason: str) -> None:
    log.warning("kernels run in plain torch, several times slower: %s (LLMTOOLS_NATIVE=0 silences this line)", reason)


def _load(source: Path) -> ctypes.CDLL:
    compiler, folder = _compiler(), cache()
    headers = [*sorted(HERE.glob("*.h")), *sorted(source.parent.glob("*.h"))]
    texts = [path.read_bytes() for path in (source, *headers)]
    ingredients = [*texts, _version(compiler).encode(), repr((compiler, _FLAGS, _VARIANTS)).encode(), processor()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in ingredients)).hexdigest()
    stem = folder / f"{source.parent.name}-{digest[:32]}"
    if (found := _kept(stem)) is not None:
        return found
    with alone(folder):
        if (found := _kept(stem)) is not None:  # another process has built it in the meantime
            return found
        _check_not_failed(stem)
        path = _build(compiler, source, stem)
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise _failed(
                stem,
                f"{path} was built and does not load ({error}); if its disk forbids execution, "
                "set LLMTOOLS_CACHE to a folder on another",
            ) from error


def _kept(stem: Path) -> ctypes.CDLL | None:
    """The library of an earlier build, if it is there and whole."""
    for path in _files(stem):
        try:
            check_private(path)
            if path.stem.rpartition("-")[2] == _sum(path):
                return ctypes.CDLL(str(path))
            log.debug("%s is damaged and is rebuilt", path)
        except OSError as error:  # made by this user on another system, say with a newer libc; or just replaced
            log.debug("%s does not load and is rebuilt: %s", path, error)
    return None


def _files(stem: Path) -> list[Path]:
    return sorted(stem.parent.glob(f"{stem.name}-*.so"))


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time into the block; where the disk knows no locks, or another takes too long, all."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + 2 * _BUILD_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.05)
                    continue
            except OSError as error:
                log.debug("%s cannot be locked: %s", folder, error)
            break
        yield
    finally:
        os.close(descriptor)


def _build(compiler: tuple[str, ...], source: Path, stem: Path) -> Path:
    """Compiles in a folder of its own in the cache, and renames the result once it is on the disk; returns its path."""
    try:
        with tempfile.TemporaryDirectory(dir=stem.parent) as folder:
            made = Path(folder) / f"{stem.name}.so"
            for variant in _VARIANTS:
                command = [*compiler, *_FLAGS, *variant, "-o", str(made), str(source), "-lm"]
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_BUILD_SECONDS)
                if done.returncode == 0:
                    return _put(made, stem)
                log.debug("%s\n%s", shlex.join(command), done.stderr)
    except subprocess.TimeoutExpired as error:
        raise _failed(stem, f"building {source.parent.name}/native.c in {stem.parent} failed: {error}") from error
    except OSError as error:
        raise Unavailable(f"building {source.parent.name}/native.c in {stem.parent} failed: {error}") from error
    first = done.stderr.strip().splitlines()[:1]
    raise _failed(
        stem,
        f"{shlex.join(compiler)} could not compile {source} ({''.join(first) or 'no message'}); "
        "name another compiler in CC",
    )


def _put(made: Path, stem: Path) -> Path:
    """Renames a library to its place in the cache, in place of damaged ones."""
    path = stem.with_name(f"{stem.name}-{_sum(made)}.so")
    former = _files(stem)
    made.chmod(0o700)
    sync(made)
    made.replace(path)
    sync(path.parent)
    for each in (*former, _failure_record(stem)):
        if each != path:
            with suppress(OSError):
                each.unlink()
    return path


def _failure_record(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.failed")


def _failed(stem: Path, reason: str) -> Unavailable:
    """The error of a failed build, recorded beside the libraries for later processes."""
    with suppress(OSError):
        put_text(_failure_record(stem), reason)
    return Unavailable(reason)


def put_text(path: Path, text: str) -> None:
    """Writes a file of the cache, in one step and for this user alone."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / "note"
        written.write_text(text, encoding="utf-8")
        written.chmod(0o600)
        written.replace(path)


def _check_not_failed(stem: Path) -> None:
    """Raises the reason of a build that failed lately, with the same compiler, flags and processor."""
    try:
        age = time.time() - _failure_record(stem).stat().st_mtime
        reason = _failure_record(stem).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    if 0 <= age < _RETRY_SECONDS:
        raise Unavailable(f"{' '.join(reason.split())}; tried again in some hours, or without {_failure_record(stem)}")


def _compiler() -> tuple[str, ...]:
    """The command that compiles C: CC with its arguments, or the first of the usual names that exists."""
    named = os.environ.get("CC", "").strip()
    for command in [named] if named else ["cc", "gcc", "clang"]:
        try:
            program, *arguments = shlex.split(command)
        except ValueError as error:
            raise Unavailable(f"CC={named} is no command ({error})") from error
        found = shutil.which(program)
        if found:
            return found, *arguments
    looked = f"CC={named} does not exist" if named else "no C compiler (cc, gcc, clang) was found"
    raise Unavailable(f"{looked}; install one, or name one in CC")


def _version(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=_VERSION_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{shlex.join(compiler)} does not run ({error}); name another compiler in CC") from error
    return done.stdout


@functools.cache
def features() -> frozenset[str]:
    """The processor's flags as Linux names them ("avx512_bf16", "amx_bf16", "bf16"), and its vendor; else empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    keys = ("flags", "Features", "vendor_id")
    return frozenset(word for line in lines if line.startswith(keys) for word in line.partition(":")[2].split())


def has_bfloat16() -> bool:
    """Whether the processor has products of bfloat16; taken for granted where its features are not known."""
    return not features() or bool(features() & {"avx512_bf16", "amx_bf16", "bf16"})


def has_float16() -> bool:
    """Whether it has products of float16, likewise."""
    return not features() or bool(features() & {"avx512_fp16", "amx_fp16", "asimdhp"})


def processor() -> bytes:
    """What `-march=native` depends on: homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return "\0".join((platform.machine(), platform.processor(), platform.node())).encode()
    keys = (b"flags", b"Features", b"model name", b"CPU part", b"isa")
    return platform.machine().encode() + b"\n".join(sorted({line for line in lines if line.startswith(keys)}))


def cache() -> Path:
    """The directory of the built libraries, made if need be, after checking that only this user can write it."""
    try:
        folder = cache_home().resolve() / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"no cache for built kernels: {error}; set LLMTOOLS_CACHE to a folder of yours") from error
    check_private(folder)
    return folder


def cache_home() -> Path:
    """$LLMTOOLS_CACHE, $XDG_CACHE_HOME/llmtools or ~/.cache/llmtools. Raises RuntimeError where there is no home."""
    home, xdg = os.environ.get("LLMTOOLS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(home).expanduser() if home else (Path(xdg) if xdg else Path.home() / ".cache") / "llmtools"


def check_private(path: Path) -> None:
    """Raises unless `path` belongs to this user and is not writable by others."""
    found = path.lstat()
    kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    if not (kind and found.st_uid == os.getuid() and not found.st_mode & 0o022):
        raise Unavailable(
            f"{path} could be written by others (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}), so it is "
            "no place for code; chmod go-w it, remove it, or set LLMTOOLS_CACHE to a folder of yours"
        )
