"""The demo runs from end to end and writes its report, on two steps and a few pages of text."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("matplotlib")


def test_the_demo_reports_every_model(monkeypatch: pytest.MonkeyPatch, repository: Path, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(repository / "demo")
    demo = importlib.import_module("demo")
    for name in ("HOME_HELD_OUT", "NEW_TRAIN", "NEW_HELD_OUT"):
        page = tmp_path / f"{name}.txt"
        page.write_text(getattr(demo, name).read_text()[:6000])
        monkeypatch.setattr(demo, name, page)
    out = tmp_path / "report"
    demo.main(demo.Demo(out=str(out), steps=2, samples=4, batch=2, tokens=64))

    report = json.loads((out / "report.json").read_text())
    assert [(row["quantizer"], row["bits"]) for row in report["quantized"]] == [
        ("none", 16), ("rtn", 4), ("optq", 4), ("rtn", 3), ("optq", 3), ("rtn", 2), ("optq", 2),
    ]  # fmt: skip
    sizes = [row["weight_bytes"] for row in report["quantized"]]
    assert sizes == sorted(sizes, reverse=True)
    assert [row["bits"] for row in report["finetuned"]] == [16, 4, 3, 2]
    assert all(row["after"] < row["before"] for row in report["finetuned"])
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert "quality.png" in (out / "report.md").read_text()
    assert "/" + "tmp" not in (out / "report.md").read_text()


def test_the_demo_reads_its_flags_as_plain_data(repository: Path, tmp_path: Path) -> None:
    """As the command line does: no objects of classes that a YAML or a flag names, and mistakes are one line."""
    ran = tmp_path / "ran"
    harmful = f"model: !!python/object/apply:os.mkdir [{ran}]\n"
    (tmp_path / "a.yaml").write_text(harmful)
    for words, says in (
        (["--config", str(tmp_path / "a.yaml")], "a.yaml"),
        (["--steps", "many"], "--steps many: int is expected"),
        (["--stepz", "3"], "did you mean 'steps'"),
    ):
        command = [sys.executable, str(repository / "demo" / "demo.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith("demo: "), done.stderr
        assert len(done.stderr.splitlines()) == 1 and says in done.stderr
    assert not ran.exists()
