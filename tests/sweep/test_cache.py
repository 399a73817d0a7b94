"""Stored results belong to their settings, whatever version wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtools.sweep.cache import ResultCache


def test_settings_with_former_names_of_options_are_the_same(tmp_path: Path) -> None:
    def settings(quantize: dict[str, Any], evaluate: dict[str, Any]) -> dict[str, Any]:
        return {"model": "m", "load": None, "quantize": quantize, "finetune": {"data": "d"}, "evaluate": evaluate}

    former = settings({"samples": 2, "tokens": 32}, {"limit": 4, "context": 64})
    current = settings({"num_samples": 2, "max_length": 32}, {"num_samples": 4, "max_length": 64})
    other = settings({"num_samples": 2, "max_length": 32}, {"num_samples": 5, "max_length": 64})
    file = tmp_path / "result.json"
    ResultCache().get(file, former, lambda: {"value": 1})
    assert (ResultCache(compute=False).get(file, current, dict) or {}).get("value") == 1
    assert ResultCache(compute=False).get(file, other, dict) is None
