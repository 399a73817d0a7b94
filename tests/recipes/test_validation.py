"""Validation: its loss is the mean over learned tokens, that of the adapter that is written, and it can end the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from llmtools.cli.main import main
from llmtools.errors import InputError
from llmtools.recipes.finetune import Finetune, Lora, finetune


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files to train on and to validate on, with answers of very unequal length."""
    place = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"Tell me about {n}.", "completion": " the cat" * (1 + 9 * (n % 3 == 0))} for n in range(7)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    return str(place / "train.jsonl"), str(place / "val.jsonl")


def run(stories: Path, data: tuple[str, str], out: Path, training: dict[str, Any], **more: Any) -> Any:
    train, validation = data
    recipe = Finetune(
        model=str(stories), data=train, validation=validation, out=str(out), lora=Lora(r=2, dropout=0.0), **more,
        training={"logging_steps": 1, "per_device_train_batch_size": 2, **training},
    )  # fmt: skip
    return finetune(recipe)


def test_the_loss_is_the_mean_over_learned_tokens_whatever_the_batch(
    stories: Path, data: tuple[str, str], tmp_path: Path
) -> None:
    import llmtools
    from llmtools.data.tokens import tokenized

    model, tokenizer = llmtools.load(stories)
    total = count = 0.0
    for line in Path(data[1]).read_text().splitlines():
        example = tokenized(json.loads(line), tokenizer)
        ids, mask = torch.tensor(example.input_ids), torch.tensor(example.completion_mask, dtype=torch.bool)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[mask[1:]].sum())
        count += float(mask[1:].sum())
    for batch in (1, 2, 5):
        training = {"max_steps": 1, "learning_rate": 0.0, "per_device_eval_batch_size": batch}
        result = run(stories, data, tmp_path / str(batch), training)
        assert result.validation_loss == pytest.approx(total / count, abs=1e-4)


def test_the_loss_that_is_said_is_that_of_the_adapter_that_is_written(
    stories: Path, data: tuple[str, str], tmp_path: Path
) -> None:
    training = {
        "max_steps": 6, "learning_rate": 0.3, "lr_scheduler_type": "constant", "save_steps": 2, "eval_steps": 2,
        "load_best_model_at_end": True,
    }  # fmt: skip
    result = run(stories, data, tmp_path / "a", training)
    lines = map(json.loads, (tmp_path / "a" / "metrics.jsonl").read_text().splitlines())
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) == 3 and result.validation_loss == min(losses)


def test_a_run_that_gets_worse_is_stopped_early(stories: Path, data: tuple[str, str], tmp_path: Path) -> None:
    training = {"max_steps": 20, "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    result = run(stories, data, tmp_path / "a", training, early_stopping=2)
    assert result.steps < 20
    with pytest.raises(InputError, match="early_stopping needs validation"):
        finetune(Finetune(model=str(stories), data=data[0], out=str(tmp_path / "b"), early_stopping=2))


def test_arguments_of_sft_config_may_stand_without_their_prefix(
    stories: Path, data: tuple[str, str], tmp_path: Path
) -> None:
    words = ["--model_name_or_path", str(stories), "--data", data[0], "--output_dir", str(tmp_path / "a")]
    assert main(["finetune", *words, "--max_steps", "1", "--learning_rate=2e-4", "--num_train_epochs", "3"]) == 0
    told = json.loads((tmp_path / "a" / "run.json").read_text())["recipe"]["training"]
    assert told == {"max_steps": 1, "learning_rate": 2e-4, "num_train_epochs": 3}
    assert main(["finetune", *words, "--max_stepz", "1"]) == 2
