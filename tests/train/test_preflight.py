"""The memory of a step is estimated on the model that is there, before the first step."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

import llmtools
from llmtools.errors import InputError
from llmtools.recipes.finetune import Finetune, finetune
from llmtools.train import preflight
from tests.models import tiny_ids, tiny_model, training_rows

TRAINING = {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": 48}


def adapted(**options: Any) -> Any:
    model = tiny_model()
    llmtools.quantize(model, "rtn")
    prepared = llmtools.prepare_for_training(model, gradient_checkpointing=False)
    return peft.get_peft_model(prepared, peft.LoraConfig(r=2, target_modules="all-linear", **options)).train()


def test_the_estimate_grows_with_the_tokens_and_leaves_the_model_as_it_is() -> None:
    model = adapted(exclude_modules=["lm_head"])
    with torch.no_grad():
        before = model(input_ids=tiny_ids()).logits
    arguments = SimpleNamespace(optim="sgd", bf16=False)
    found = [preflight.step_bytes(model, batch, 32, arguments) for batch in (1, 2, 4)]
    assert all(each is not None for each in found)
    assert found[2] - found[1] == pytest.approx(2 * (found[1] - found[0]), rel=0.05)
    adam = preflight.step_bytes(model, 1, 32, SimpleNamespace(optim="adamw_torch", bf16=False))
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert adam - found[0] == 8 * trained
    assert not any(each.is_meta for each in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=tiny_ids()).logits, before)


def test_what_cannot_fit_is_refused_with_the_ways_out(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda: 1000)
    data = training_rows(tmp_path / "train.jsonl")
    asked = Finetune(model=str(stories), data=data, out=str(tmp_path / "a"), training=TRAINING)
    with pytest.raises(InputError, match=r"gradient_checkpointing true.*batch_size 1.*max_length.*--force"):
        finetune(asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl"]
    with caplog.at_level(logging.WARNING, "llmtools"):
        assert finetune(Finetune(**{**vars(asked), "force": True})).steps == 1
    assert "--force: it is tried" in caplog.text


def test_nothing_is_said_where_it_fits_or_is_not_known(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_bound", lambda *_: 10**15)  # so that the step is estimated
    data = training_rows(tmp_path / "train.jsonl")
    for index, free in enumerate((None, 10**12)):
        monkeypatch.setattr(preflight, "free_memory", lambda free=free: free)
        out = tmp_path / f"a{index}"
        assert finetune(Finetune(model=str(stories), data=data, out=str(out), training=TRAINING)).steps == 1
