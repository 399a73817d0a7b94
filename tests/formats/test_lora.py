"""Adapters for servers are plain LoRA, and mean the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import llmtools
from llmtools import InputError
from llmtools.formats.lora import export_adapter
from tests.models import tiny_ids, tiny_model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits


def trained(folder: Path, model: Any = None, **options: Any) -> Tensor:
    """An adapter after a few steps, in `folder`; returns what the model with it says."""
    model = model or tiny_model()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=4, lora_alpha=8, **options))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        adapted(input_ids=tiny_ids(), labels=tiny_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)
    return logits(adapted.eval())


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 2}}], ids=str)
def test_a_plain_adapter_stays_as_it_is(options: dict[str, Any], tmp_path: Path) -> None:
    expected = trained(tmp_path / "adapter", **options)
    export_adapter(tmp_path / "adapter", tmp_path / "plain", base_name="someone/model")
    assert config_of(tmp_path / "plain")["base_model_name_or_path"] == "someone/model"
    assert config_of(tmp_path / "plain")["init_lora_weights"] is True
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "plain")), expected)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 2}}], ids=str)
def test_an_initialisation_from_the_base_is_subtracted(start: Any, options: dict[str, Any], tmp_path: Path) -> None:
    expected = trained(tmp_path / "adapter", init_lora_weights=start, **options)
    with pytest.raises(InputError, match="pass --model"):
        export_adapter(tmp_path / "adapter", tmp_path / "plain")
    export_adapter(tmp_path / "adapter", tmp_path / "plain", base=tiny_model())
    told = config_of(tmp_path / "plain")
    assert told["r"] == 8 and told["init_lora_weights"] is True
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "plain")), expected)


def test_adapters_of_quantized_models_are_plain_already(tmp_path: Path) -> None:
    def base() -> Any:
        model = tiny_model()
        llmtools.quantize(model, "rtn", bits=4, group_size=32)
        return model

    expected = trained(tmp_path / "adapter", base())
    export_adapter(tmp_path / "adapter", tmp_path / "plain")
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "plain")), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
    ids=["dora", "bias", "whole modules"],
)
def test_what_servers_do_not_read_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    trained(tmp_path / "adapter", **options)
    with pytest.raises(InputError, match=rf"{message}.*--format dense"):
        export_adapter(tmp_path / "adapter", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
