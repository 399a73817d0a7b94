"""Machine code for Ampere and Hopper from the Triton kernels, on a machine without either; `test_triton.py` runs this.

Triton compiles for any GPU that a driver names. Here a stand-in names one, and each launch ends after compiling.
"""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from llmtools.kernels import grouped, hadamard, lattice

CAPABILITIES = {"ampere": 80, "hopper": 90}
OUT, IN, TOKENS = 512, 2048, 16


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=CAPABILITIES)
def compiled(request, monkeypatch):
    """The kernels compiled so far."""
    kernels, run = [], JITFunction.run

    def only_compile(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", only_compile)
    driver.set_active(Driver(CAPABILITIES[request.param]))
    return kernels


def check(kernels, count, tmp_path):
    """All have machine code, fit in shared memory, and none keeps variables in memory for want of registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    assert len(kernels) == count
    for kernel in kernels:
        assert kernel.metadata.shared <= 99 * 1024, kernel.name  # the least of Ampere and later
        file = tmp_path / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        assert " STACK:0 " in usage and " LOCAL:0 " in usage, usage


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def test_uniform_grids(compiled, tmp_path):
    kernels = import_module(f"{grouped.__name__}.triton")
    weight = zeros(OUT, IN * 3 // 32, dtype=torch.int32), zeros(OUT, IN // 64, dtype=torch.float16)
    weight += zeros(OUT, IN // 64 * 3 // 8, dtype=torch.uint8), None, 3, 64, IN
    kernels.dequantize_grouped(*weight, torch.bfloat16)
    for tokens in (1, TOKENS):
        kernels.multiply_grouped(zeros(tokens, IN), *weight, False)
        kernels.multiply_grouped(zeros(tokens, OUT), *weight, True)
    check(compiled, 5, tmp_path)


def test_codebooks(compiled, tmp_path):
    kernels = import_module(f"{grouped.__name__}.triton")
    weight = zeros(OUT, IN // 8, dtype=torch.int32), zeros(OUT, IN // 64, dtype=torch.float32), None, zeros(16)
    weight += 4, 64, IN
    kernels.dequantize_grouped(*weight, torch.float16)
    kernels.multiply_grouped(zeros(TOKENS, IN), *weight, False)
    kernels.multiply_grouped(zeros(TOKENS, OUT), *weight, True)
    check(compiled, 3, tmp_path)


def test_lattice(compiled, tmp_path):
    kernels = import_module(f"{lattice.__name__}.triton")
    weight = zeros(OUT, IN // 8, dtype=torch.int16), zeros(OUT, IN // 8, dtype=torch.int16), 3.45
    kernels.dequantize_lattice(*weight, torch.bfloat16)
    kernels.multiply_lattice(zeros(TOKENS, IN), *weight, False)
    kernels.multiply_lattice(zeros(TOKENS, OUT), *weight, True)
    check(compiled, 3, tmp_path)


@pytest.mark.parametrize("n", [4096, 11008])
def test_hadamard(compiled, tmp_path, n):
    import_module(f"{hadamard.__name__}.triton").hadamard(zeros(16, n), hadamard.rule_for(n), False)
    check(compiled, 1, tmp_path)
