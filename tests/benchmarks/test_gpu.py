"""The GPU benchmark's own code, on toy shapes on the CPU; what only a GPU can do is left out there."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile by itself
@pytest.mark.parametrize("section", ["ops", "crossing", "layers", "graphs", "steps", "memory"])
def test_each_section_runs_on_toy_shapes(section, capsys):
    assert gpu.main([section, "--device", "cpu", "--tiny"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{section} ")]
    assert lines and not any("failed" in line for line in lines)


def test_results_are_appended_as_lines_of_json(tmp_path):
    bench = gpu.Bench("cpu", tiny=True, output=tmp_path / "results" / "gpu.jsonl")
    for seconds in (1.23456789, 2.0):
        bench.record("ops", seconds=seconds)
    records = [json.loads(line) for line in bench.output.read_text().splitlines()]
    assert [record["seconds"] for record in records] == [1.235, 2.0]
    assert all(record["device"] == "cpu" and record["torch"] for record in records)


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["speed", "--device", "cpu", "--tiny"])
    assert "no section speed" in capsys.readouterr().err
