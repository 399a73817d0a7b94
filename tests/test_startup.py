"""What a command imports, and the collector's rest while it does."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmtools import startup

LIBRARIES = {"torch", "transformers", "peft", "trl", "datasets", "pandas", "matplotlib", "bitsandbytes", "lm_eval"}

COMMAND = """
import gc, json, sys
from llmtools.cli.app import main
code = main()
print(json.dumps([code, sorted(name for name in sys.modules), gc.isenabled(), gc.get_freeze_count()]))
"""


def libraries_of(*args: object) -> tuple[set[str], bool]:
    """(the libraries that a command imports, whether the collector put objects aside), in a fresh interpreter."""
    command = [sys.executable, "-c", COMMAND, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    code, modules, enabled, frozen = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    assert enabled
    return LIBRARIES & set(modules), frozen > 0


@pytest.mark.parametrize("args", [["--help"], ["quantize", "--help"], ["finetune", "--help_all"]])
def test_help_imports_no_library_that_is_slow(args: list[str]) -> None:
    assert libraries_of(*args)[0] <= ({"torch"} if "--help_all" in args else set())


def test_listing_quantizers_imports_torch_alone() -> None:
    assert libraries_of("list")[0] == {"torch"}


def test_quantizing_and_generating_import_torch_and_transformers_alone(stories: Path, tmp_path: Path) -> None:
    out = tmp_path / "quantized"
    both = {"torch", "transformers"}
    assert libraries_of("quantize", "--model", stories, "--quantizer", "rtn", "--out", out) == (both, True)
    assert libraries_of("generate", "--model", out, "--prompt", "Once", "--max_new_tokens", 1) == (both, True)


def test_the_collector_rests_until_the_libraries_are_loaded() -> None:
    before = gc.get_freeze_count()
    try:
        with startup.collector_resting():
            assert not gc.isenabled()
            startup.libraries_loaded()
            assert gc.isenabled() and gc.get_freeze_count() > before
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_the_collector_works_again_after_an_error() -> None:
    with pytest.raises(ValueError, match="of a command"), startup.collector_resting():
        raise ValueError("of a command")
    assert gc.isenabled()


def test_a_programs_own_collector_is_left_alone() -> None:
    before = gc.get_freeze_count()
    startup.libraries_loaded()
    assert gc.isenabled() and gc.get_freeze_count() == before
    gc.disable()
    try:
        with startup.collector_resting():
            startup.libraries_loaded()
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert gc.get_freeze_count() == before
