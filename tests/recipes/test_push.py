"""`llmtools push` uploads a folder, or shows the card that would go with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llmtools
from llmtools.cli import main
from tests.hub import Hub
from tests.models import tiny_model


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    model = tiny_model()
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    return llmtools.save(model, None, tmp_path / "tiny")


def test_a_folder_is_pushed_with_its_results(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"task": "perplexity", "measure": "perplexity", "value": 7.5, "details": {}}
    result |= {"model": str(quantized), "data": "/home/somebody/held_out.txt"}
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(result))
    hub = Hub(monkeypatch)
    words = ["push", str(quantized), "--repo", "me/tiny", "--results", str(scores)]
    assert main([*words, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "perplexity 7.5000 on perplexity (data held_out.txt)" in shown
    assert "| perplexity | perplexity | 7.5000 | data held_out.txt |" in shown
    assert "/home/somebody" not in shown
    assert hub.commits == []
    assert main([*words, "--private"]) == 0
    assert capsys.readouterr().out == "me/tiny: https://huggingface.co/me/tiny\n"
    assert hub.repos["me/tiny"]["private"] is True
    assert hub.files["README.md"].decode() == shown.removesuffix("\n")


def test_mistakes_are_one_line(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"task": "t", "measure": "m", "value": 1, "model": "elsewhere"}')
    (tmp_path / "no.json").write_text('{"a": 1}')
    (tmp_path / "bad.json").write_text("no")
    (tmp_path / "empty").mkdir()
    for args, says in (
        ((quantized,), "missing: --repo"),
        ((quantized, "--repo", "a/b/c"), "owner/name"),
        ((quantized, "--repo", "me/a--b"), "owner/name"),
        ((quantized, "--repo", "me/a--b", "--dry_run"), "owner/name"),
        ((tmp_path / "none", "--repo", "a/b"), "there is no folder"),
        ((tmp_path / "empty", "--repo", "a/b"), "neither a model"),
        ((quantized, "--repo", "a/b", "--results", tmp_path / "other.json"), "measured on elsewhere"),
        ((quantized, "--repo", "a/b", "--results", tmp_path / "no.json"), "it has a"),
        ((quantized, "--repo", "a/b", "--results", tmp_path / "bad.json"), "is not what"),
        ((quantized, "--repo", "a/b"), "offline"),  # the tests' environment says so to the hub's client
    ):
        assert main(["push", *map(str, args)]) == 2
        line = capsys.readouterr().err.strip()
        assert says in line, line
        assert "\n" not in line


def test_a_hub_that_cannot_be_reached_is_one_line(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # the port that discards
    assert main(["push", str(quantized), "--repo", "a/b"]) == 2
    line = capsys.readouterr().err.strip()
    assert "http://127.0.0.1:9 cannot be reached" in line and "\n" not in line
