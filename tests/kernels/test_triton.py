"""The Triton kernels, without a GPU: their results by Triton's interpreter, their machine code by its compiler.

Triton decides when it is imported whether it interprets, so either half runs in a process of its own (`interpreted.py`,
`compiled.py`). Where there is a GPU the same comparisons run on it, and layers in CUDA graphs.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from llmtools.kernels import ops
from llmtools.kernels.lattice import reference

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(file: str, repository: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(
        command, env=os.environ | environment, cwd=repository, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.slow
@needs_triton
def test_kernels_agree_with_the_references_in_the_interpreter(repository):
    run("interpreted.py", repository, TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_ampere_and_hopper_without_spilling(repository):
    cache = repository / ".pytest_cache" / "triton"
    run("compiled.py", repository, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_agree_with_the_references_on_a_gpu(repository):
    run("interpreted.py", repository, TRITON_INTERPRET="0", CUBLAS_WORKSPACE_CONFIG=":4096:8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_layers_run_in_graphs_and_compiled_without_synchronising_on_a_gpu(repository):
    command = [sys.executable, "-m", "benchmarks.gpu", "ops", "layers", "graphs", "--tiny"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.fixture
def device(monkeypatch) -> torch.device:
    """A GPU that is only talked about."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    caches = ops.has_triton, ops._say
    for function in caches:
        function.cache_clear()
    yield torch.device("cuda", 0)
    for function in caches:
        function.cache_clear()


def test_an_old_gpu_runs_in_plain_torch_and_one_line_says_so(device, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with caplog.at_level(logging.WARNING):
        assert not ops.has_triton(device)
        assert not ops.has_triton(torch.device("cuda", 1))
    assert len(caplog.messages) == 1 and "older than Ampere" in caplog.messages[0]


def test_without_triton_a_gpu_runs_in_plain_torch_and_one_line_says_so(device, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.WARNING):
        assert not ops.has_triton(device)
    assert len(caplog.messages) == 1 and "pip install triton" in caplog.messages[0]


def test_triton_can_be_turned_off_silently(device, monkeypatch, caplog):
    monkeypatch.setenv("LLMTOOLS_TRITON", "0")
    with caplog.at_level(logging.WARNING):
        assert not ops.has_triton(device)
    assert not caplog.messages


@pytest.mark.parametrize("usable", [True, False])
def test_ops_reach_the_kernel_or_the_reference(device, monkeypatch, usable):
    monkeypatch.setattr(ops, "has_triton", lambda device: usable)
    module = type(sys)("stand_in.triton")
    module.dequantize_lattice = lambda *args: "kernel"
    monkeypatch.setitem(sys.modules, "stand_in", type(sys)("stand_in"))
    monkeypatch.setitem(sys.modules, "stand_in.triton", module)
    codes = torch.zeros(1, 1, dtype=torch.int16)
    result = ops.gpu("stand_in", reference.dequantize_lattice)(codes, None, 1.0, torch.float32)
    if usable:
        assert result == "kernel"
    else:
        torch.testing.assert_close(result, reference.dequantize_lattice(codes, None, 1.0, torch.float32))
