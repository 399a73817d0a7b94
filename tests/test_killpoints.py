"""A kill at any moment leaves nothing half-written, and the same command ends with the bytes of an unbroken run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_kill_at_any_moment_is_mended_by_the_same_command(repository: Path) -> None:
    """A few moments of three commands; `python -m tests.killpoints` goes through all of them."""
    pytest.importorskip("trl")
    if not hasattr(os, "fork"):
        pytest.skip("runs are forked")
    scenarios = ["quantize-overwrite-plain", "finetune", "export-overwrite"]
    command = [sys.executable, "-m", "tests.killpoints", "--points", "3", *scenarios]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = re.findall(r"^(\S+): 3 points: .*; wrong: 0$", done.stdout, flags=re.MULTILINE)
    assert found == scenarios
