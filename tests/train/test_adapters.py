"""Adapters on mixtures of experts: packed one by one, or fused in one parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import llmtools
from llmtools.errors import InputError
from llmtools.recipes.finetune import Finetune, Lora, finetune
from tests.models import tiny_ids, tiny_mixture

TRAINING: dict[str, Any] = {"max_steps": 2, "max_length": 32, "per_device_train_batch_size": 2, "learning_rate": 1e-2}


@pytest.fixture
def saved(stories: Path, tmp_path: Path) -> Any:
    """Saves a tiny mixture of a family with a tokenizer, and returns its folder."""
    from transformers import AutoTokenizer

    def save(family: str, quantized: bool = True) -> str:
        model = tiny_mixture(family)
        if quantized:
            llmtools.quantize(model, "rtn", bits=4, group_size=32)
        model.save_pretrained(tmp_path / family)
        AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return save


@pytest.fixture
def data(tinystories: Path, tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text((tinystories / "train.txt").read_text()[:4000])
    return str(path)


@pytest.mark.parametrize(
    ("family", "adapted", "passed_over"),
    [
        ("qwen2_moe", {"q_proj", "gate_proj", "up_proj", "down_proj"}, None),
        ("mixtral", {"q_proj", "w_gate", "w_up", "w_down"}, None),
        ("deepseek_v3", {"q_a_proj", "w_gate", "w_up", "w_down"}, "shared_experts.gate_proj"),
    ],
)
def test_the_defaults_train_a_mixture_and_the_adapter_comes_back(
    family: str, adapted: set[str], passed_over: str | None, saved: Any, data: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    model, out = saved(family), tmp_path / "adapter"
    finetune(Finetune(model=model, data=data, out=str(out), training=TRAINING))
    warned = [record.message for record in caplog.records if "get no adapter" in record.message]
    assert [passed_over in line for line in warned] == ([True] if passed_over else []), warned
    opened = llmtools.load(out)[0]
    carriers = {path.split(".lora_A")[0] for path, _ in opened.named_modules() if path.endswith(".lora_A")}
    assert adapted <= {path.replace(".base_layer", "").rpartition(".")[2] for path in carriers}
    with torch.no_grad():
        after = opened(input_ids=tiny_ids()).logits
        before = llmtools.load(model)[0](input_ids=tiny_ids()).logits
        merged = llmtools.merge(opened)(input_ids=tiny_ids()).logits
    assert not torch.allclose(after, before)
    torch.testing.assert_close(merged, after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "quantized", "dropout"), [("mixtral", False, 0.0), ("mixtral", True, 0.05), ("llama", False, 0.05)]
)
def test_dropout_is_left_out_where_experts_are_fused(
    family: str, quantized: bool, dropout: float, saved: Any, stories: Path, data: str, tmp_path: Path
) -> None:
    model = str(stories) if family == "llama" else saved(family, quantized)
    finetune(Finetune(model=model, data=data, out=str(tmp_path / "a"), training={**TRAINING, "max_steps": 1}))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_dropout"] == dropout


def test_dropout_that_is_asked_for_is_refused_with_the_way_out(saved: Any, data: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dropout.*--lora\.dropout 0"):
        finetune(
            Finetune(
                model=saved("mixtral", quantized=False),
                data=data,
                out=str(tmp_path / "a"),
                lora=Lora(dropout=0.1),
                training=TRAINING,
            )
        )
