"""What importing costs: `import llmtools` is light, and quantizing a matrix needs torch alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterable

import pytest

from llmtools import _moved

HEAVY = ["transformers", "peft", "trl", "datasets", "accelerate", "matplotlib", "jsonargparse"]

BEYOND_TORCH = [*HEAVY, "safetensors", "rich", "yaml"]

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked in this test")

sys.meta_path.insert(0, Blocked())
"""


def run(code: str, blocked: Iterable[str] = ()) -> str:
    """The output of `code` in a fresh interpreter in which importing any of `blocked` fails."""
    if blocked:
        code = f"BLOCKED = {list(blocked)}\n{BLOCK}\n{code}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_light() -> None:
    loaded = run(f"import sys, llmtools; print(sorted(set({HEAVY}) & set(sys.modules)))")
    assert loaded == "[]"


def test_every_public_name_is_there_and_listed() -> None:
    code = """
import llmtools
for name in llmtools.__all__:
    assert name in dir(llmtools), name
    getattr(llmtools, name)
"""
    run(code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    code = """
import llmtools
try:
    llmtools.quantise
except AttributeError as error:
    assert "quantise" in str(error)
else:
    raise SystemExit("no error")
"""
    run(code)


@pytest.mark.parametrize("package", ["kernels", "quant", "nn"])
def test_lower_floors_import_with_torch_alone(package: str) -> None:
    run(f"import llmtools.{package}", blocked=BEYOND_TORCH)


def test_a_matrix_is_quantized_with_torch_alone() -> None:
    code = """
import torch
from llmtools import quantizer
weight = torch.randn(8, 64)
rtn = quantizer("rtn", bits=4, group_size=32)
packed = rtn.quantize(weight)
assert (rtn.dequantize(packed) - weight).norm() < 0.2 * weight.norm()
"""
    run(code, blocked=BEYOND_TORCH)


def test_recipes_and_command_line_import_without_training_libraries() -> None:
    """Quantizing and evaluating work where trl, datasets and matplotlib are not installed."""
    run("import llmtools.recipes, llmtools.cli.app", blocked=["trl", "datasets", "matplotlib"])


@pytest.mark.parametrize(("former", "current"), _moved.MOVED.items())
def test_former_module_paths_are_aliases(former: str, current: str) -> None:
    alias, module = importlib.import_module(former), importlib.import_module(current)
    public = [name for name in vars(module) if not name.startswith("_")]
    assert public and all(getattr(alias, name) is getattr(module, name) for name in public)
