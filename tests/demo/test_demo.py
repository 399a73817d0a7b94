"""The demo runs from end to end and writes its report, on two steps and a few pages of text."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("matplotlib")

SHORT = {"calibration_windows": 2, "windows": 2, "examples": 2, "tokens": 12, "context": 64}
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 256, "learning_rate": 5e-3}


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, repository: Path) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "demo")
    found = importlib.import_module("demo")
    for name in ("stories_subject", "chat_subject"):
        subject = replace(getattr(found, name)(), training=TRAINING, **SHORT)
        monkeypatch.setattr(found, name, lambda subject=subject: subject)
    return found


def report_of(demo: ModuleType, model: str, out: Path) -> dict[str, Any]:
    """The report of a run, whose files are checked."""
    demo.main(demo.Demo(model=model, out=str(out), steps=2))
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert [(row["quantizer"], row["bits"]) for row in report["models"]] == [
        ("none", 16), ("rtn", 2), ("qtip", 2),
    ]  # fmt: skip
    original, *quantized = report["models"]
    assert original["bits_per_weight"] == 16
    assert all(row["weight_bytes"] < original["weight_bytes"] / 6 for row in quantized)
    assert all(row["weight_bytes"] < row["file_bytes"] < original["file_bytes"] for row in quantized)
    assert [row["bits"] for row in report["finetuned"]] == [16, 2]
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert "quality.png" in (out / "report.md").read_text()
    html = (out / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', html) == [] and "data:image/png;base64," in html
    return report


def test_a_model_without_a_chat_template_learns_a_kind_of_text(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(demo, "embedded", tmp_path / "report")
    assert report["model"] == "stories260K"
    assert [row["measure"] for row in report["finetuned"]] == ["perplexity", "perplexity"]
    assert all(row["after"]["perplexity"] < row["before"]["perplexity"] for row in report["finetuned"])
    assert list(report["models"][0]["answers"]) == ["Once upon a time"]

    printed = capsys.readouterr().out
    first = re.findall(r"^\$ llmtools (\w+)", printed, re.MULTILINE)
    assert first[:3] == ["export", "generate", "evaluate"] and first.count("finetune") == 2
    for command in report["next_commands"]:
        assert command in printed
    _, *words = report["next_commands"][0].split()
    assert words[0] == "generate" and Path(words[2]).is_dir() and Path(words[4]).is_dir()


def test_a_chat_model_learns_to_write_records(demo: ModuleType, stories: Path, tmp_path: Path) -> None:
    """The embedded model, with a chat template."""
    chat = tmp_path / "chat"
    shutil.copytree(stories, chat)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    (chat / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    report = report_of(demo, str(chat), tmp_path / "report")
    assert report["model"] == str(chat)
    for row in report["finetuned"]:
        assert row["measure"] == "exact_match" and set(row["before"]) == {"exact_match", "fields", "valid", "examples"}
    assert len(report["samples"]) == 6
    assert all(json.loads(sample["expected"])["city"] in sample["prompt"] for sample in report["samples"])


def test_the_demo_reads_its_flags_as_plain_data(repository: Path, tmp_path: Path) -> None:
    """As the command line does: no objects of classes that a YAML or a flag names, and mistakes are one line."""
    ran = tmp_path / "ran"
    harmful = f"model: !!python/object/apply:os.mkdir [{ran}]\n"
    (tmp_path / "a.yaml").write_text(harmful)
    for words, says in (
        (["--config", str(tmp_path / "a.yaml")], "a.yaml"),
        (["--steps", "many"], "--steps many: int or null is expected"),
        (["--stepz", "3"], "did you mean 'steps'"),
    ):
        command = [sys.executable, str(repository / "demo" / "demo.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith("demo: "), done.stderr
        assert len(done.stderr.splitlines()) == 1 and says in done.stderr
    assert not ran.exists()
