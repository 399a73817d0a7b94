"""Building C: once, in a folder that only the user can write, and never at the price of a working program."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmtools.kernels import build

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

# Every branch of the C files, against the reference. "native" or "reference" says which of the two ran.
PROGRAM = """
import torch
from llmtools.kernels.grouped import dequantize_grouped, multiply_grouped, native, reference
from llmtools.kernels.bits import pack

torch.manual_seed(0)
for bits in (2, 3, 4, 8):
    for n, group in ((1, 1), (33, 33), (100, 31), (256, 64), (300, 96)):
        groups = -(-n // group)
        codes, scales = torch.randint(0, 2**bits, (5, n)), torch.randn(5, groups).half()
        zeros = pack(torch.randint(0, 2**bits, (5, groups)), bits, torch.uint8)
        weight = pack(codes, bits), scales, zeros, None, bits, group, n
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(dequantize_grouped(*weight, dtype), reference.dequantize_grouped(*weight, dtype))
        x = torch.randn(6, n)
        expected = x.double() @ reference.dequantize_grouped(*weight).double().T
        assert (multiply_grouped(x, *weight, False) - expected).abs().max() < 1e-5 * expected.abs().max()
print("native" if native.library() else "reference")
"""


LOADS = 'from llmtools.kernels import build; print("native" if build.library("hadamard") else "reference")'


def start(cache: Path, code: str = PROGRAM, **environment: str) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "LLMTOOLS_NATIVE", "LLMTOOLS_CACHE")}
    given = {**kept, "LLMTOOLS_CACHE": str(cache), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.Popen(command, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed, and what it logged."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


@needs_compiler
def test_processes_at_the_same_time_build_what_later_ones_find(tmp_path: Path) -> None:
    assert [finish(process) for process in [start(tmp_path) for _ in range(3)]] == [("native", "")] * 3
    (made,) = (tmp_path / "native").iterdir()
    assert stat.S_IMODE(made.stat().st_mode) == stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    before = made.stat().st_mtime_ns
    assert finish(start(tmp_path)) == ("native", "")
    assert made.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "compiler, says",
    [
        ("/nonexistent", "CC=/nonexistent does not exist; install one, or name one in CC"),
        ("false", "could not compile"),
    ],
)
def test_without_a_compiler_the_reference_runs_and_one_line_says_so(compiler: str, says: str, tmp_path: Path) -> None:
    if compiler == "false":
        script = tmp_path / "fails"
        script.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
        script.chmod(0o700)
        compiler = str(script)
    out, err = finish(start(tmp_path, CC=compiler))
    assert out == "reference"
    assert len(err.splitlines()) == 1 and says in err and "LLMTOOLS_NATIVE=0" in err


def test_c_can_be_turned_off(tmp_path: Path) -> None:
    assert finish(start(tmp_path, LLMTOOLS_NATIVE="0")) == ("reference", "")
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "native"
    folder.mkdir()
    folder.chmod(0o777)
    out, err = finish(start(tmp_path))
    assert out == "reference" and "could be written by others" in err and "LLMTOOLS_CACHE" in err
    assert len(err.splitlines()) == 1 and not list(folder.iterdir())


@needs_compiler
def test_a_library_that_others_can_write_is_refused(tmp_path: Path) -> None:
    assert finish(start(tmp_path)) == ("native", "")
    (made,) = (tmp_path / "native").iterdir()
    made.chmod(0o777)
    out, err = finish(start(tmp_path))
    assert out == "reference" and f"{made} could be written by others" in err


@needs_compiler
def test_half_a_library_ends_no_process(tmp_path: Path) -> None:
    """What a power cut leaves. To load it ends the process by a signal, hence processes of their own."""
    assert finish(start(tmp_path, LOADS)) == ("native", "")
    (made,) = (tmp_path / "native").iterdir()
    os.truncate(made, made.stat().st_size // 2)
    assert finish(start(tmp_path, LOADS)) == ("native", "")
    assert sum_of(made) in made.name


def sum_of(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:32]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A compiler that is quick, and notes in the file "builds" beside it how often it is asked to build."""
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || echo build >> {script.parent}/builds\nexec {COMPILER} "$@" -O0\n'
    )
    script.chmod(0o700)
    (tmp_path / "builds").touch()
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("LLMTOOLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMTOOLS_NATIVE", raising=False)
    build._say.cache_clear()
    yield script
    build.library.cache_clear()


def builds(compiler: Path) -> int:
    return len((compiler.parent / "builds").read_text().splitlines())


def load() -> bool:
    """Whether there is a library for a process that has not looked yet."""
    build.library.cache_clear()
    return build.library("hadamard") is not None


@needs_compiler
@pytest.mark.parametrize("damage", ["garbage", "empty", "one bit", "no sum in its name"])
def test_a_damaged_library_is_built_anew(damage: str, compiler: Path) -> None:
    assert load() and load() and builds(compiler) == 1
    (made,) = (compiler.parent / "cache" / "native").iterdir()
    whole = made.read_bytes()
    if damage == "no sum in its name":  # as files were called before
        made.rename(made.with_name(f"{made.stem.rpartition('-')[0]}.so"))
    else:
        flipped = whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:]
        made.unlink()  # this process has it in memory
        made.write_bytes({"garbage": b"no library", "empty": b"", "one bit": flipped}[damage])
        made.chmod(0o700)
    assert load() and builds(compiler) == 2
    assert any(sum_of(each) in each.name for each in made.parent.iterdir())


@needs_compiler
def test_who_comes_at_the_same_time_waits_for_the_one_that_builds(compiler: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(build._load, Path(build.__file__).parent / "hadamard" / "native.c") for _ in range(4)]
        assert len({each.result()._name for each in loads}) == 1
    assert builds(compiler) == 1
    assert load() and builds(compiler) == 1


def test_a_build_that_failed_is_not_tried_by_every_process(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = compiler.read_text()
    compiler.write_text(script.partition("exec")[0] + '[ "$1" = --version ] || { echo broken >&2; exit 1; }\n')
    assert not load()
    tried = builds(compiler)
    assert tried == len(build._VARIANTS)
    (note,) = (compiler.parent / "cache" / "native").iterdir()
    assert not load() and builds(compiler) == tried
    assert "broken" in caplog.messages[-1] and str(note) in caplog.messages[-1] and "\n" not in caplog.messages[-1]

    past = time.time() - build._RETRY_SECONDS - 1
    os.utime(note, (past, past))
    assert not load() and builds(compiler) == 2 * tried
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DOTHER"))
    assert not load() and builds(compiler) == 3 * tried


def test_a_build_that_takes_too_long_is_not_tried_by_every_process(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.write_text(compiler.read_text().partition("exec")[0] + '[ "$1" = --version ] || exec sleep 60\n')
    monkeypatch.setattr(build, "_BUILD_SECONDS", 0.5)
    assert not load() and builds(compiler) == 1
    assert not load() and builds(compiler) == 1


@needs_compiler
def test_what_failed_is_forgotten_once_a_build_succeeds(compiler: Path) -> None:
    script = compiler.read_text()
    compiler.write_text(script.replace("exec", '[ "$1" = --version ] || exit 1\nexec'))
    assert not load()
    (note,) = (compiler.parent / "cache" / "native").iterdir()
    os.utime(note, (0, 0))
    compiler.write_text(script)
    assert load()
    assert [path.suffix for path in (compiler.parent / "cache" / "native").iterdir()] == [".so"]


@needs_compiler
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_is_one_line(
    number: int, compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(**options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuses)
    assert not load()
    assert len(caplog.messages) == 1 and os.strerror(number) in caplog.messages[0]
    assert not list((compiler.parent / "cache" / "native").iterdir())


def test_importing_builds_nothing(tmp_path: Path) -> None:
    finish(start(tmp_path, "import llmtools.kernels.grouped, llmtools.kernels.lattice, llmtools.quant, llmtools.nn"))
    assert not list(tmp_path.iterdir())
