"""Validation: its loss is the mean over learned tokens, that of the adapter that is written, and it can end the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from llmtools.cli.app import main
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


def validated(out: Path) -> list[int]:
    """The steps after which a run validated."""
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if "eval_loss" in record]


@pytest.mark.parametrize(
    ("training", "more", "steps"),
    [
        ({"max_steps": 4}, {}, [4]),
        ({"max_steps": 12}, {}, [10, 12]),
        ({"max_steps": 12, "load_best_model_at_end": True}, {}, [10, 12]),
        ({"max_steps": 4, "eval_steps": 2}, {}, [2, 4]),
        ({"max_steps": 4, "eval_steps": 2}, {"early_stopping": 5}, [2, 4]),
        ({"max_steps": 4, "save_steps": 2}, {"early_stopping": 5}, [2, 4]),
        ({"max_steps": 4, "eval_strategy": "epoch"}, {"early_stopping": 5}, [4]),
        ({"max_steps": 3}, {"early_stopping": 5}, [1, 2, 3]),
    ],
    ids=str,
)
def test_validations_are_some_steps_apart_and_saving_goes_with_them_where_the_best_is_kept(
    stories: Path, data: tuple[str, str], tmp_path: Path, training: dict[str, Any], more: dict[str, Any],
    steps: list[int],
) -> None:  # fmt: skip
    result = run(stories, data, tmp_path / "a", {"learning_rate": 1e-3, **training}, **more)
    assert validated(tmp_path / "a") == steps
    if more or "load_best_model_at_end" in training:
        kept = {int(path.name.rpartition("-")[2]) for path in (tmp_path / "a" / "checkpoints").iterdir()}
        assert kept <= set(steps) and result.validation_loss is not None


def test_arguments_of_sft_config_may_stand_without_their_prefix(
    stories: Path, data: tuple[str, str], tmp_path: Path
) -> None:
    words = ["--model_name_or_path", str(stories), "--data", data[0], "--output_dir", str(tmp_path / "a")]
    assert main(["finetune", *words, "--max_steps", "1", "--learning_rate=2e-4", "--num_train_epochs", "3"]) == 0
    told = json.loads((tmp_path / "a" / "llmtools.json").read_text())["recipe"]["training"]
    assert told == {"max_steps": 1, "learning_rate": 2e-4, "num_train_epochs": 3}
    assert main(["finetune", *words, "--max_stepz", "1"]) == 2


def test_validation_shows_how_far_it_is(
    stories: Path, data: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("llmtools.progress.QUIET_SECONDS", 0.0)
    with caplog.at_level("INFO", logger="llmtools"):
        run(stories, data, tmp_path / "a", {"max_steps": 2, "eval_steps": 1, "eval_on_start": True})
    shown = [record.message.split(",")[0].split(" in ")[0] for record in caplog.records]
    batches = [f"validation: {number} of 3 batches" for number in (1, 2, 3)]  # 5 rows, two at a time as in training
    assert [line for line in shown if line.startswith("validation: ")] == 3 * batches


def test_a_batch_of_validation_is_as_large_as_one_of_training(
    stories: Path, data: tuple[str, str], tmp_path: Path
) -> None:
    for asked, wanted in (({}, 2), ({"per_device_eval_batch_size": 5}, 5)):
        run(stories, data, tmp_path / f"a{wanted}", {"max_steps": 1, **asked})
        written = json.loads((tmp_path / f"a{wanted}" / "llmtools.json").read_text())
        assert written["training"]["per_device_eval_batch_size"] == wanted


def test_the_losses_are_drawn_and_shown_in_the_card(
    stories: Path, data: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("matplotlib")
    from llmtools.checkpoint.upload import files_of
    from llmtools.train import losses as pictures

    out = tmp_path / "a"
    run(stories, data, out, {"max_steps": 2, "eval_steps": 1})
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "(loss.png)" in (out / "README.md").read_text()
    assert "loss.png" in files_of(out)[0]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    drawn = pictures.losses(out / "metrics.jsonl")
    assert drawn["training"] == [(record["step"], record["loss"]) for record in records if "loss" in record]
    assert [step for step, _ in drawn["validation"]] == [1, 2]

    def broken(*args: Any) -> None:
        raise RuntimeError("no fonts\nat all")

    for patch, says in (
        (("find_spec", lambda name: None), "pip install 'llmtools[plot]'"),
        (("_draw", broken), "loss.png could not be plotted: no fonts"),
    ):
        with monkeypatch.context() as patched, caplog.at_level("INFO", logger="llmtools"):
            patched.setattr(pictures, *patch)
            run(stories, data, out, {"max_steps": 1}, overwrite=True)
        assert sum(says in record.getMessage() for record in caplog.records) == 1
        assert not (out / "loss.png").exists() and "loss.png" not in (out / "README.md").read_text()


@pytest.mark.parametrize("name, says", [("wandb", "pip install wandb"), ("tensorbord", "not supported")])
def test_what_cannot_be_reported_to_is_said_before_anything_is_loaded(
    name: str, says: str, stories: Path, data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    monkeypatch.setattr("llmtools.checkpoint.loading.open_model", lambda *args, **kwargs: pytest.fail("loaded"))
    for given in (name, ["tensorboard", name]):
        with pytest.raises(InputError, match=says):
            run(stories, data, tmp_path / "a", {"report_to": given})
    assert list(tmp_path.iterdir()) == []
