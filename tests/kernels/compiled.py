"""Machine code for Ampere and Hopper from the Triton kernels, on a machine without either; `test_triton.py` runs this.

Triton compiles for any GPU that a driver names. Here a stand-in names one, and each launch ends after compiling.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels.cases import TRITON

CAPABILITIES = {"ampere": 80, "hopper": 90}


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


@pytest.mark.parametrize("case", TRITON.values(), ids=list(TRITON))
def test_every_op(compiled, case, tmp_path):
    case.of("triton")(*case.arguments())
    check(compiled, 1, tmp_path)
