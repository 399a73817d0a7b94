"""The survey of families works: a few that differ, a family that fails, rows and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import families
from benchmarks.families import NONE, OK, STEPS, is_clean, measure, one_line, page, read
from benchmarks.tiny import tiny_model

CONTRASTS = ["gemma3n_text", "mixtral", "falcon", "xlm", "deepseek_v3", "bart"]
"""State that layers share, fused experts, a linear of its own kind, two stacks with norms between, latent attention, an
encoder-decoder's decoder."""


@pytest.mark.parametrize("name", CONTRASTS)
def test_families_that_differ_pass_every_step(name: str) -> None:
    row = measure(name)
    assert row["steps"] == {what: OK for what in STEPS} | {k: v for k, v in row["steps"].items() if v == NONE}, row
    assert is_clean(row)
    assert 0 < row["share"] <= 1


def test_what_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = measure("gpt2")
    assert not is_clean(row)
    assert "Conv1D" in families.reason(row)
    assert one_line(row).startswith("xxx....")

    def broken(name: str) -> Any:
        model = tiny_model(name)
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        return model

    assert "not finite" in families.reason(measure("llama", broken))


def test_a_wrong_decoding_and_a_wrong_walk_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtools.nn import QuantizedLinear

    model = tiny_model("llama")
    decode = QuantizedLinear.dequantize
    monkeypatch.setattr(QuantizedLinear, "dequantize", lambda self, *args, **kw: 1.01 * decode(self, *args, **kw))
    row = measure("llama", lambda name: model)
    assert "differ" in row["steps"]["rtn"]
    layer = model.model.layers[0]
    ran: list[int] = []

    def drifting(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        ran.append(1)
        return output * (1 + 0.01 * len(ran))

    layer.register_forward_hook(drifting)
    with pytest.raises(AssertionError, match="given something else in the walk"):
        families.compare_inputs(model)


def test_rows_are_kept_and_made_into_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, made = tmp_path / "rows.jsonl", tmp_path / "page.md"
    assert families.main(["llama", "gpt2", "--results", str(results), "--page", str(made)]) == 0
    assert "+++++++ 100%" in capsys.readouterr().out
    rows = read(results)
    assert list(rows) == ["gpt2", "llama"]  # in transformers' order
    text = page(list(rows.values()))
    assert "Of 2 model types 1 pass every step" in text
    assert "| llama | LlamaForCausalLM | 100 % | ✓ |" in text
