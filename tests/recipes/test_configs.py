"""The packaged recipes: each builds by itself and says how it is run, and one of each task runs, scaled down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmtools.cli.main import VERBS, _parse, _parser, main
from llmtools.recipes.configs import packaged, with_packaged
from tests.models import tiny_model

ASSETS = Path(__file__).parent.parent / "assets"
TASKS = ("samsum", "mnli", "alpaca", "code_alpaca")
METHODS = ("quip_sharp_2bit", "optq_3bit", "optq_4bit", "qlora", "int8", "lora")
DATA = {name: ASSETS / name for name in TASKS}


def built(name: str, *args: str) -> Any:
    """The recipe that a packaged YAML makes, with these arguments after it."""
    verb = packaged()[name].verb
    options = VERBS[verb].recipe()
    return _parse(_parser(verb, VERBS[verb], options), verb, options, with_packaged(["--config", name, *args]))


def test_there_is_one_for_each_published_row() -> None:
    rows = {f"{task}_{method}" for task in TASKS for method in METHODS}
    models = {f"quantize_{method}" for method in METHODS[:3]}
    assert {name for name in packaged() if not name.startswith("sweep_")} == rows | models


@pytest.mark.parametrize("name", packaged())
def test_it_builds_and_says_how_it_is_run(name: str) -> None:
    from llmtools.recipes.quantize import resolve_quantizer
    from llmtools.train.arguments import check_training

    recipe = built(name)
    comment = packaged()[name].file.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in comment)
    commands = [line.removeprefix("#").strip() for line in comment if "llmtools" in line]
    assert len(commands) >= 2
    for command in commands:  # the flags of the commands exist, and their recipes
        verb, *words = command.split()[1:]
        if "--config" in words:
            assert packaged()[words[words.index("--config") + 1]].verb == verb, command
        known = {f"--{key}" for key in ("config", *VERBS[verb].recipe().__dataclass_fields__)}
        assert {word.split(".")[0] for word in words if word.startswith("--")} <= known, command
    if name.startswith("sweep_"):
        from llmtools.sweep.runner import _Run

        assert all(command.startswith(f"llmtools sweep {name}") for command in commands)
        assert len(_Run(recipe).cells()) >= 4
        return
    if name.startswith("quantize_"):
        assert "--config quantize_" in commands[0]
        assert resolve_quantizer(recipe).bits == int(name[-4])
        return
    pytest.importorskip("trl")
    assert any(f"finetune --config {recipe.task}_" in command for command in commands)
    check_training(recipe.training)
    assert recipe.task == recipe.data == name.removesuffix("_" + next(m for m in METHODS if name.endswith("_" + m)))
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (8, 32, 0.1)
    training = recipe.training
    assert (training["learning_rate"], training["lr_scheduler_type"], training["warmup_steps"]) == (
        1e-3,
        "cosine",
        0.06,
    )
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    assert batch == (256 if recipe.task == "mnli" else 128)
    if recipe.task == "samsum":
        assert training["max_steps"] == 350
    if recipe.task == "mnli":
        assert training["num_train_epochs"] == 1
    assert recipe.load == {"qlora": "nf4", "int8": "int8"}.get(name.rpartition("_")[2])


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_a_task_differ_in_the_model_alone(task: str) -> None:
    rows = [vars(built(f"{task}_{method}")) for method in METHODS]
    for row in rows:
        assert {key: row[key] for key in row if key not in ("model", "load", "out")} == {
            key: rows[0][key] for key in row if key not in ("model", "load", "out")
        }
    assert len({row["out"] for row in rows}) == len(METHODS)


SMALL = {
    "samsum": ("samsum_optq_4bit", ["--options.source_tokens", "300", "--options.max_new_tokens", "40"]),
    "mnli": ("mnli_optq_3bit", ["--options.source_tokens", "300", "--validation", "0.2"]),
    "alpaca": ("alpaca_lora", ["--validation", "0.25"]),
    "code_alpaca": ("code_alpaca_quip_sharp_2bit", ["--validation", "0.25"]),
}


@pytest.fixture(scope="module")
def bases(stories: Path, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and what the packaged recipes make of one layer of it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bases")
    tiny_model(max_position_embeddings=512).save_pretrained(folder / "lora")
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder / "lora")
    small = ["--model", str(folder / "lora"), "--calibration", str(tinystories / "held_out.txt"), "--samples", "2"]
    small += ["--tokens", "64", "--group_size=32", "--skip", '["*.1.*", "lm_head"]']
    for method in METHODS[:3]:
        flags = [flag for flag in small if "group_size" not in flag or method.startswith("optq")]
        assert main(["quantize", "--config", f"quantize_{method}", *flags, "--out", str(folder / method)]) == 0
    return {method: folder / method for method in (*METHODS[:3], "lora")}


@pytest.mark.parametrize("task", TASKS)
def test_one_of_each_task_runs_scaled_down(
    task: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("rouge_score")
    name, flags = SMALL[task]
    model = bases[name.removeprefix(f"{task}_")]
    small = "--training.max_steps 2 --training.per_device_train_batch_size 2 --training.gradient_accumulation_steps 1"
    small += " --training.eval_steps 1 --training.save_steps 1"
    words = ["--config", name, "--model", str(model), "--data", str(DATA[task]), "--out", str(tmp_path / "a"), *flags]
    assert main(["finetune", *words, *small.split(), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["steps"] == 2
    assert trained["validation_loss"] > 0

    data = DATA[task] if task in ("samsum", "mnli") else DATA[task] / f"{task}.json"
    words = ["--adapter", str(tmp_path / "a"), "--task", task, "--data", str(data), "--limit", "2", "--batch_size", "2"]
    options = [word for word in flags if word not in ("--validation", "0.2", "0.25")] or [
        "--options.max_new_tokens",
        "8",
    ]
    assert main(["evaluate", *words, *options, "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert judged["measure"] == ("accuracy" if task == "mnli" else "rouge1")
    assert 0 <= judged["value"] <= 1
    assert judged["details"]["examples"] == 2


def test_the_best_checkpoint_is_kept_by_the_validation_split(bases: dict[str, Path], tmp_path: Path) -> None:
    """At a learning rate that makes the model worse with each step the adapter that comes out is not the last one."""
    pytest.importorskip("trl")
    from llmtools.recipes.finetune import Finetune, Lora, finetune

    training = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "learning_rate": 0.3, "load_best_model_at_end": True}
    small = {"per_device_train_batch_size": 2, "lr_scheduler_type": "constant", "save_total_limit": 3}
    options = {"source_tokens": 300, "max_new_tokens": 40}
    finetune(
        Finetune(
            model=str(bases["lora"]),
            data=str(DATA["samsum"]),
            out=str(tmp_path / "a"),
            task="samsum",
            options=options,
            lora=Lora(r=2),
            training={**training, **small},
        )
    )
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    assert sorted(losses) == [1, 2, 3]
    assert min(losses, key=losses.__getitem__) != 3
    last = next((tmp_path / "a" / "checkpoints").glob("*-3"))
    kept, of_last = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "a", last))
    assert any(not torch.equal(kept[key], of_last[key]) for key in kept)


def test_a_name_is_listed_and_a_file_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list"]) == 0
    assert "samsum_optq_3bit" in capsys.readouterr().out
    assert main(["list", "samsum_optq_3bit"]) == 0
    assert "max_steps: 350" in capsys.readouterr().out
    whole = [f"--config={packaged()['mnli_lora'].file}", "--out=mnli-lora"]
    assert with_packaged(["--config=mnli_lora"]) == with_packaged(["--config", "mnli_lora"]) == whole
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnli_lora").write_text("model: x\n")
    assert with_packaged(["--config", "mnli_lora"]) == ["--config", "mnli_lora"]
    assert main(["finetune", "--config", "mnli_loar"]) == 2


def test_a_recipe_on_the_demos_files_wants_a_checkout(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtools.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "sweep_demo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sweep_demo works on demo/assets of a checkout" in line and f"cd {repository}" in line
    assert main(["list", "sweep_demo"]) == 0
    assert with_packaged(["--config", "samsum_lora"]) == packaged()["samsum_lora"].arguments()
    assert list(tmp_path.iterdir()) == []
