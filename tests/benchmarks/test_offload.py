"""The offloading benchmark's own code, on a shape that takes no time."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft")

from benchmarks import offload
from benchmarks.quality import rows_of
from llmtools.kernels import build


def test_the_model_has_the_bytes_that_are_planned_and_both_ways_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "has_bfloat16", lambda: True)  # else what is dense is planned in float32
    total = offload.make("tiny", 2, tmp_path / "m")
    memory, _, _ = offload.planned("tiny", "rtn", {"bits": 2, "group_size": 128}, "all-linear", "adamw_torch", "cpu")
    buffers = 4 * 64 // 4 // 2 * 2  # frequencies of the rotary embedding, and their originals, are in no file
    assert total == memory.packed + memory.linears + memory.embeddings + memory.others - buffers
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 3
    found = [offload.measure(tmp_path / "m", way, 2, 16) for way in offload.WAYS]
    assert found[0]["losses"] == found[1]["losses"] and len(found[0]["losses"]) == 2


def test_a_mixture_takes_a_step_in_files(tmp_path: Path) -> None:
    offload.make("tiny-moe", 2, tmp_path / "m")
    modules = offload.setting("tiny-moe", 2)[2]
    found = [offload.measure(tmp_path / "m", way, 1, 16, modules) for way in offload.WAYS]
    assert found[0]["losses"] == found[1]["losses"]


def test_rows_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "model": "tiny", "bits": 2, "weights": "disk", "cache": "warm", "tokens": 16, "weight_bytes": 3 * 10**9,
        "planned_anon_bytes": 2 * 10**9, "imports_anon_bytes": 10**9, "peak_anon_bytes": 4 * 10**9,
        "peak_file_bytes": 5 * 10**9, "load_seconds": 1.0, "step_seconds": [2.0], "step_cpu_seconds": [3.0],
        "losses": [4.0],
    }  # fmt: skip
    offload.append(row, tmp_path / "rows.jsonl")
    assert rows_of(tmp_path / "rows.jsonl")[0].items() >= row.items()
    assert "RssAnon 4.00 GB (3.00 above imports, 2.00 planned), RssFile 5.00 GB" in offload.shown(row)
    assert offload.main(["--table", "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert "| tiny, 2 bits | disk" in capsys.readouterr().out
