"""Building C: once, in a folder that only the user can write, and never at the price of a working program."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llmtools.kernels import native

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

# Every branch of the C files, against the reference. "native" or "reference" says which of the two ran.
PROGRAM = """
import torch
from llmtools.kernels import grouped
from llmtools.kernels.affine import dequantize_affine, multiply_affine, reference
from llmtools.kernels.bits import pack

torch.manual_seed(0)
for bits in (2, 3, 4, 8):
    for n, group in ((1, 1), (33, 33), (100, 31), (256, 64), (300, 96)):
        groups = -(-n // group)
        codes, scales = torch.randint(0, 2**bits, (5, n)), torch.randn(5, groups).half()
        zeros = pack(torch.randint(0, 2**bits, (5, groups)), bits, torch.uint8)
        weight = pack(codes, bits), scales, zeros, bits, group, n
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(dequantize_affine(*weight, dtype), reference.dequantize_affine(*weight, dtype))
        x = torch.randn(6, n)
        expected = x.double() @ reference.dequantize_affine(*weight).double().T
        assert (multiply_affine(x, *weight) - expected).abs().max() < 1e-5 * expected.abs().max()
print("native" if grouped._functions() else "reference")
"""


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


@needs_compiler
@pytest.mark.parametrize("processor", ["haswell", "x86-64"])
def test_other_processors_get_the_same_bits(processor: str, tmp_path: Path) -> None:
    """AVX2 and plain loops, on a machine that has more; the wrapper's -march is the last and holds."""
    if processor == "x86-64" and "sse2" not in native.features():
        pytest.skip("not an x86")
    if processor == "haswell" and not {"avx2", "fma", "f16c", "bmi2"} <= native.features():
        pytest.skip("no AVX2")
    wrapper = tmp_path / "compiler"
    wrapper.write_text(f'#!/bin/sh\nexec "{COMPILER}" "$@" -march={processor}\n')
    wrapper.chmod(0o700)
    assert finish(start(tmp_path, CC=str(wrapper))) == ("native", "")


@pytest.mark.parametrize(
    "compiler, says",
    [("/nonexistent", "CC=/nonexistent is not there; install one, or name one in CC"), ("false", "could not compile")],
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
def test_a_damaged_library_is_built_anew(tmp_path: Path) -> None:
    assert finish(start(tmp_path)) == ("native", "")
    (made,) = (tmp_path / "native").iterdir()
    made.write_bytes(b"not a library")
    assert finish(start(tmp_path)) == ("native", "")


def test_importing_builds_nothing(tmp_path: Path) -> None:
    finish(start(tmp_path, "import llmtools.kernels.affine, llmtools.kernels.codebook, llmtools.quant, llmtools.nn"))
    assert not list(tmp_path.iterdir())
