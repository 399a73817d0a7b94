"""The code in the README runs: every block marked ``run``, in order, in one empty folder beside the demo's assets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```(python|bash) run\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_readme_opens_with_the_two_commands() -> None:
    text = README.read_text()
    assert 0 < text.index("make demo") < text.index("make test") < text.index("import llmtools")


def test_readme_code_runs(repository: Path, tmp_path: Path) -> None:
    blocks = BLOCK.findall(README.read_text())
    assert {language for language, _ in blocks} == {"python", "bash"}
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "assets").symlink_to(repository / "demo" / "assets")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, code in blocks:
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PATH": path})
        assert done.returncode == 0, f"{code}\n{done.stderr}"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:|#)([^)]+)\)", README.read_text()))))
def test_readme_links_lead_somewhere(link: str) -> None:
    assert (README.parent / link).exists()
