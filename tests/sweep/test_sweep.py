"""A sweep: its runs, what is made again and what is not, what fails, and a report that is right and loads nothing."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from llmtools import document
from llmtools.checkpoint.inputs import contents
from llmtools.checkpoint.run_info import command, given
from llmtools.cli.app import VERBS, _parse, _parser, main
from llmtools.errors import InputError
from llmtools.kernels.build import has_bfloat16
from llmtools.model.options import BlockTuning
from llmtools.recipes.evaluate import Evaluate
from llmtools.recipes.finetune import Finetune, Lora
from llmtools.recipes.quantize import Quantize
from llmtools.sweep import plots, report
from llmtools.sweep import runner as module
from llmtools.sweep.memory import meter
from llmtools.sweep.runner import Sweep, sweep
from tests.models import training_rows

ASSETS = Path(__file__).parent.parent / "assets"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tinystories: Path) -> Path:
    """A few rows to train on, and a little text."""
    folder = tmp_path_factory.mktemp("data")
    training_rows(folder / "train.jsonl")
    (folder / "text.txt").write_text((tinystories / "held_out.txt").read_text()[:3000])
    return folder


@pytest.fixture(scope="module")
def recipe(stories: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """One quantizer and the model itself."""
    evaluate = {"task": "perplexity", "data": str(data / "text.txt"), "max_length": 64, "num_samples": 4}
    return Sweep(
        model=str(stories),
        out=str(tmp_path_factory.mktemp("sweep") / "s"),
        tasks={"cats": {"finetune": {"task": "text", "data": str(data / "train.jsonl")}, "evaluate": evaluate}},
        baselines=["lora"],
        quantizers=[{"name": "rtn", "bits": 4, "group_size": 32}],
        ranks=[2],
        seeds=[0],
        training={"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 48, "learning_rate": 1e-3},
    )


@pytest.fixture(scope="module")
def swept(recipe: Sweep) -> module.SweepResult:
    return sweep(recipe)


RUNS = ("lora-not-quantized.cats.r2.s0", "rtn-4-bit-group-size-32.cats.r2.s0")


def result_of(recipe: Sweep, name: str) -> dict[str, Any]:
    return dict(json.loads((Path(recipe.out) / "runs" / f"{name}.json").read_text()))


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.json") if path.name != "report.json"}


def test_a_run_says_what_it_cost_and_how_good_it_is(recipe: Sweep, swept: module.SweepResult) -> None:
    assert (swept.runs, swept.computed, swept.reused, swept.failed, swept.exit_code) == (2, 2, 0, {}, 0)
    dense, packed = (result_of(recipe, name) for name in RUNS)
    assert dense["bits_per_weight"] == 16
    assert 4.5 < packed["bits_per_weight"] < 5
    wide = 1 if has_bfloat16() else 2  # in memory, where the model is computed in float32
    others = dense["model_bytes"] - wide * dense["weight_bytes"]  # embeddings, norms, tables of positions
    assert others == packed["model_bytes"] - packed["weight_bytes"]
    assert 2 * 260_032 <= dense["model_bytes"] / wide < 2 * 260_032 + 1000
    for found in (dense, packed):
        assert found["before"]["measure"] == found["after"]["measure"] == "perplexity"
        assert found["before"]["value"] != found["after"]["value"]
        assert found["peak_bytes"] > found["model_bytes"] + 12 * found["trained"]["trainable"]
        assert found["trained"]["steps"] == 2
        assert found["seconds"] > found["trained"]["seconds"] > 0
        assert {"torch", "peft", "trl", "llmtools"} <= set(found["versions"])
        assert found["device"] == "cpu" or torch.cuda.is_available()
    assert dense["peak_bytes"] != packed["peak_bytes"]
    assert [words.split()[1] for words in packed["commands"]] == ["quantize", "evaluate", "finetune", "evaluate"]
    assert (Path(recipe.out) / "adapters" / RUNS[1] / "adapter_config.json").exists()


def test_a_second_run_makes_nothing_and_a_lost_run_again(
    recipe: Sweep, swept: module.SweepResult, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="llmtools")
    before = times(Path(recipe.out))
    again = sweep(recipe)
    assert (again.computed, again.reused, again.table) == (0, 2, swept.table)
    assert times(Path(recipe.out)) == before
    assert caplog.text.count("(finished before)") == 2
    former = result_of(recipe, RUNS[0])
    (Path(recipe.out) / "runs" / f"{RUNS[0]}.json").unlink()
    only = sweep(replace(recipe, report_only=True))
    assert (only.computed, only.reused, only.missing) == (0, 1, [RUNS[0]])
    assert f"* {RUNS[0]}: not run yet" in Path(f"{only.report}.md").read_text()
    one = sweep(recipe)
    assert (one.computed, one.reused) == (1, 1)
    assert result_of(recipe, RUNS[0])["after"]["value"] == former["after"]["value"]


def test_the_yaml_that_is_written_is_the_sweep(recipe: Sweep, swept: module.SweepResult) -> None:
    verb = VERBS["sweep"]
    file = str(Path(recipe.out) / "sweep.yaml")
    assert _parse(_parser("sweep", verb, Sweep), "sweep", Sweep, ["--config", file]) == recipe
    assert main(["sweep", file, "--report_only"]) == 0


def test_changed_settings_are_noticed_and_concern_their_runs_alone(
    recipe: Sweep, swept: module.SweepResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    caplog.set_level("INFO", logger="llmtools")
    shutil.copytree(recipe.out, tmp_path / "s")
    here = replace(recipe, out=str(tmp_path / "s"))
    before = times(tmp_path / "s")
    changed = replace(here, training={**recipe.training, "max_steps": 1}, baselines=[])
    assert (sweep(changed).computed, "finetune.training.max_steps 2, now 1" in caplog.text) == (1, True)
    touched = {path for path, at in times(tmp_path / "s").items() if before[path] != at}
    assert not [path for path in touched if "/before/" in path or "/models/" in path]
    assert result_of(changed, RUNS[1])["trained"]["steps"] == 1
    stale = sweep(replace(here, report_only=True))  # with the former settings
    assert stale.missing == [RUNS[1]]


@pytest.fixture
def moved(recipe: Sweep, swept: module.SweepResult, stories: Path, data: Path, tmp_path: Path) -> Sweep:
    """The finished sweep, its model and its data, each moved to another folder."""
    import shutil

    places = {recipe.out: tmp_path / "s", str(stories): tmp_path / "model", str(data): tmp_path / "data"}
    for source, target in places.items():
        shutil.copytree(source, target)
    tasks = json.loads(json.dumps(recipe.tasks).replace(str(data), str(tmp_path / "data")))
    return replace(recipe, out=str(tmp_path / "s"), model=str(tmp_path / "model"), tasks=tasks, report_only=True)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("data/train.jsonl", "finetune reads.data changed"),
        ("data/text.txt", "evaluate reads.data changed"),
        ("model/model.safetensors", "model reads.model's weights changed"),
        ("model/config.json", "model reads.model's configuration changed"),
        ("model/tokenizer.json", "model reads.tokenizer changed"),
    ],
)
def test_a_run_is_kept_only_with_what_it_was_made_from(
    file: str, said: str, moved: Sweep, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="llmtools")
    assert sweep(moved).missing == []
    bytes_ = (tmp_path / file).read_bytes()
    os.utime(tmp_path / file, (1, 1))
    assert sweep(moved).missing == []
    (tmp_path / file).write_bytes(bytes_[:-1] + bytes([bytes_[-1] ^ 1]))  # as long, and as old
    os.utime(tmp_path / file, (1, 1))
    assert sweep(moved).missing == list(RUNS)
    assert said in caplog.text
    (tmp_path / file).write_bytes(bytes_)
    assert sweep(moved).missing == []


def test_a_run_is_kept_only_with_the_adapter_that_it_made(moved: Sweep, tmp_path: Path) -> None:
    dense, packed = (tmp_path / "s" / "adapters" / name / "adapter_model.safetensors" for name in RUNS)
    dense.unlink()
    assert sweep(moved).missing == [RUNS[0]]
    packed.write_bytes(packed.read_bytes()[:-1] + b"!")
    assert sweep(moved).missing == list(RUNS)


def test_results_of_earlier_versions_are_read(moved: Sweep, swept: module.SweepResult, tmp_path: Path) -> None:
    """They lie in OUT/cells, and call the variant "form"."""
    before = sweep(moved)
    folder = (tmp_path / "s" / "runs").rename(tmp_path / "s" / "cells")
    for file in folder.glob("*.json"):
        result = json.loads(file.read_text())
        file.write_text(json.dumps({"form": result.pop("variant"), **result}))
    again = sweep(moved)
    assert (again.reused, again.missing, again.table) == (2, [], before.table)
    assert not (tmp_path / "s" / "runs").exists()


def test_code_and_calibration_text_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_quantizer.py").write_text("X = 1\n")
    (tmp_path / "text.txt").write_text("one")
    made = Quantize(model="m", out="o", quantizer="own_quantizer:X", calibration=str(tmp_path / "text.txt"))
    before = contents(made)
    assert before.keys() == {"own_quantizer:X", "calibration"}
    (tmp_path / "own_quantizer.py").write_text("X = 2\n")
    (tmp_path / "text.txt").write_text("two")
    assert not before.items() & contents(made).items()
    asked = Evaluate(
        model="m", task="text", data=str(tmp_path), options={"prompt": "x" * 5000, "n": 3, "data": "hub/d"}
    )
    assert contents(asked).keys() == {"data"}


def test_a_sweep_replaces_nothing_that_is_not_its_own(recipe: Sweep, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "llmtools.json").write_text('{"versions": {}, "files": []}')
    with pytest.raises(InputError, match="is a model or an adapter"):
        sweep(replace(recipe, out=str(tmp_path / "q")))
    (tmp_path / "thesis.md").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.md is no report of a sweep"):
        sweep(replace(recipe, out=str(tmp_path / "s"), report=str(tmp_path / "thesis"), report_only=True))
    (tmp_path / "sweep.yaml").write_text("model: mine  # with a comment\n")
    module._prepare(recipe, tmp_path)
    assert (tmp_path / "sweep.yaml").read_text() == "model: mine  # with a comment\n"
    assert (tmp_path / "thesis.md").read_text() == "years of work"


def test_two_sweeps_do_not_write_to_one_folder(recipe: Sweep, tmp_path: Path) -> None:
    import threading

    from llmtools.files import claim

    said: list[str] = []

    def second() -> None:
        try:
            sweep(replace(recipe, out=str(tmp_path / "s")))
        except InputError as error:
            said.append(str(error))

    with claim(tmp_path / "s", adding=True):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(said) == 1 and f"another run (pid {os.getpid()}) writes to {tmp_path / 's'}" in said[0]


def test_a_run_that_fails_says_why_and_stops_no_other(recipe: Sweep, data: Path, tmp_path: Path) -> None:
    late = tmp_path / "late.jsonl"
    task = recipe.tasks["cats"]
    late.write_text("{")
    tasks = {"late": {**task, "finetune": {"task": "text", "data": str(late)}}, **recipe.tasks}
    quantizers = [{"name": "rtn", "bits": 3, "group_size": 32}]
    here = replace(recipe, out=str(tmp_path / "s"), tasks=tasks, quantizers=quantizers, baselines=["lora"])
    result = sweep(here)
    assert (result.runs, result.computed, result.reused, result.exit_code) == (4, 2, 0, 1)
    assert set(result.failed) == {"lora-not-quantized.late.r2.s0", "rtn-3-bit-group-size-32.late.r2.s0"}
    assert "late.jsonl:1" in result.failed["lora-not-quantized.late.r2.s0"]
    assert "Traceback" in result_of(here, "lora-not-quantized.late.r2.s0")["traceback"]
    text = Path(f"{result.report}.md").read_text()
    assert "lora-not-quantized.late.r2.s0: " in text
    late.write_text((data / "train.jsonl").read_text())
    result = sweep(replace(here, quantizers=[]))
    assert (result.computed, result.reused, result.failed) == (1, 1, {})


def test_what_cannot_be_run_is_said_before_anything_is(
    recipe: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = recipe.tasks["cats"]
    for changes, said in (
        ({"baselines": ["qlora"]}, "no baseline 'qlora'"),
        ({"quantizers": [{"bits": 3}]}, "{name: …"),
        ({"quantizers": [{"name": "optk"}]}, "optq"),
        ({"quantizers": [{"name": "rtn", "bitz": 3}]}, "bitz"),
        ({"quantizers": [], "baselines": []}, "at least one"),
        ({"ranks": [0]}, "ranks"),
        ({"seeds": []}, "seeds"),
        ({"quantizers": [{"name": "rtn", "bits": []}]}, "bits: []"),
        ({"quantizers": [{"name": "rtn", "quantize": {"sead": 1}}]}, "did you mean 'seed'"),
        ({"quantizers": [{"name": "rtn", "quantize": 3}]}, "quantizers.rtn.quantize: a mapping"),
        ({"data": {"dogs": "x"}}, "--data.dogs"),
        ({"data": {"cats": "x"}}, "--data.cats: under finetune and evaluate this task names data of its own"),
        ({"data": {"mnli": __file__}, "tasks": {"mnli": {"data": "x"}}}, "would be trained on and evaluated on"),
        ({"tasks": {"a/b": task}}, "'a/b'"),
        ({"tasks": {"cats": {**task, "evaluate": {"num_sampels": 3}}}}, "did you mean 'num_samples'"),
        ({"tasks": {"cats": {**task, "finetune": {"seed": 3}}}}, "the sweep sets it"),
        ({"tasks": {"cats": task, "late": {**task, "finetune": 3}}}, "tasks.late.finetune: a mapping"),
        ({"tasks": {"cats": task, "late": 3}}, "tasks.late: a mapping"),
        ({"tasks": {"cats": task, "late": {**task, "evaluate": ["x"]}}}, "tasks.late.evaluate: a mapping"),
        ({"tasks": {"cats": task, "late": {**task, "finetune": {"training": 3}}}}, "finetune.training: a mapping"),
        ({"tasks": {"cats": task, "late": {**task, "options": "x"}}}, "tasks.late.options: a mapping"),
        (
            {"tasks": {"cats": task, "late": {**task, "evaluate": {"limit": "x"}}}},
            "num_samples='x'; int or null is expected",
        ),
        (
            {"tasks": {"cats": task, "late": {"task": "catz", "data": "x"}}},
            "not-quantized.late.r2.s0: task 'catz' is not known",
        ),
        (
            {"tasks": {"cats": task, "late": {"task": "text", "data": "gone.jsonl"}}},
            "late.r2.s0: there is no file gone",
        ),
        (
            {"tasks": {"cats": task, "late": {**task, "evaluate": {"task": "perplexity", "data": "./gone.txt"}}}},
            "late.r2.s0: there is no file gone.txt",
        ),
        ({"tasks": {"late": {"task": "mnli", "data": "/no/such"}}}, "late.r2.s0: there is no file or folder /no/such"),
        (
            {"quantizers": [{"name": "rtn"}, {"name": "optq", "bits": 3}]},
            "optq-3-bit.cats.r2.s0: optq needs calibration text",
        ),
        ({"quantizers": [{"name": "rtn", "bits": [4, "x"]}]}, "bits"),
        ({"quantize": {"recover": {"stepz": 3}}}, "quantize: recover: no option 'stepz'; did you mean 'steps'"),
        ({"quantize": {"recover": {"steps": "x"}}}, "quantize: recover: steps='x'; int or null is expected"),
        ({"quantize": {"recover": 3}}, "recover=3; Recovery is expected"),
        ({"quantize": {"error_propagation": 0.5}}, "--error_propagation needs calibration text"),
        ({"tasks": {"cats": task, "late": {"task": "text"}}}, "tasks.late: 'data' is missing"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            sweep(replace(recipe, out=str(tmp_path / "s"), **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


def test_a_baseline_that_is_not_installed_is_left_out_with_a_line(
    recipe: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    here = replace(recipe, out=str(tmp_path / "s"), baselines=["lora", "nf4", "int8"], report_only=True)
    result = sweep(here)
    assert result.runs == 2  # LoRA and RTN
    assert "* NF4, bitsandbytes: left out" in Path(f"{result.report}.md").read_text()


@pytest.mark.slow
def test_a_baseline_of_bitsandbytes_is_a_run_like_any_other(recipe: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    here = replace(recipe, out=str(tmp_path / "s"), baselines=["nf4"], quantizers=[])
    assert sweep(here).computed == 1
    found = result_of(here, "nf4-bitsandbytes.cats.r2.s0")
    assert 4 < found["bits_per_weight"] < 5
    others = 64 * 512 * 2  # the embedding, which is the output head, too; and the norms
    assert found["weight_bytes"] + others < found["model_bytes"] < found["weight_bytes"] + others + 3000
    assert "--load nf4" in found["commands"][0]


def test_lists_make_variants_and_data_are_replaced(recipe: Sweep) -> None:
    many = replace(
        recipe,
        quantizers=[{"name": "rtn", "bits": [4, 3, 2], "group_size": [32, 64]}, {"name": "nf4"}],
        ranks=[1, 2],
        seeds=[0, 1],
        tasks={"mnli": {"data": "none", "options": {"digits": True}, "finetune": {"options": {"digits": False}}}},
        data={"mnli": str(ASSETS / "mnli")},
    )
    runner = module._Runner(many)
    runs = runner.runs()
    assert len(runs) == len({one.name for one in runs}) == (1 + 6 + 1) * 2 * 2
    assert runner.finetune(runs[0]).data == runner.evaluate(runs[0]).data == str(ASSETS / "mnli")
    assert {runner.finetune(one).lora.r for one in runs} == {1, 2}
    assert runs[0].seed == 0 and runs[-1].seed == 1  # seed by seed


def test_a_quantizer_has_options_of_quantize_of_its_own(recipe: Sweep, data: Path) -> None:
    own = {"rounding": "two_sided", "recover": {"steps": 3}}
    many = replace(
        recipe, baselines=[],
        quantize={"calibration": str(data / "text.txt"), "num_samples": 4, "rounding": "one_sided"},
        quantizers=[{"name": "optq", "bits": 3}, {"name": "optq", "bits": 3, "quantize": own}],
    )  # fmt: skip
    runner = module._Runner(many)
    plain, other = (run.variant for run in runner.runs())
    assert (plain.label, other.label) == ("optq 3-bit", "optq 3-bit, rounding two_sided, recover steps 3")
    one, two = runner.quantize(plain), runner.quantize(other)
    assert one is not None and two is not None
    assert (one.rounding, one.recover.steps) == ("one_sided", None)
    assert (two.rounding, two.recover.steps, two.num_samples, two.options) == ("two_sided", 3, 4, {})


def test_options_of_quantize_reach_it_with_the_text_that_they_read(recipe: Sweep, data: Path) -> None:
    text = str(data / "text.txt")
    for options, reads in (
        ({}, False),
        ({"error_propagation": 0.5}, True),
        ({"recover": {"steps": 3, "top_k": 8}}, True),
        ({"fit": "1GB", "fit_step": {"batch_size": 2, "lora": {"r": 4}}}, False),
        ({"finetune_blocks": {"epochs": 1}}, True),
    ):
        runner = module._Runner(replace(recipe, quantize={"calibration": text, **options}, baselines=[]))
        made = runner.quantize(runner.runs()[0].variant)
        assert made is not None and made.calibration == (text if reads else None), options
        words = shlex.split(command("quantize", made))
        assert _parse(_parser("quantize", VERBS["quantize"], Quantize), "quantize", Quantize, words[2:]) == made
    assert made.finetune_blocks == BlockTuning(epochs=1)


def test_a_sign_tells_names_apart() -> None:
    values = ({"damping": 0.01}, {"damping": -0.01}, {"group_size": 1}, {"group_size": -1})
    slugs = [module.Variant(module._label({"name": "optq", "bits": 3, **more})).slug for more in values]
    assert slugs[:2] == ["optq-3-bit-damping-0-01", "optq-3-bit-damping-minus-0-01"]
    assert len(set(slugs)) == 4


def test_a_model_is_evaluated_before_training_with_the_prompt_template_of_training(recipe: Sweep) -> None:
    """What was left to the options of finetune goes for evaluate, too, as it does where it has the adapter."""
    tasks = {"mnli": {"data": "x", "finetune": {"options": {"digits": True, "validation_data": "y"}}}}
    runner = module._Runner(replace(recipe, tasks=tasks))
    assert runner.evaluate(runner.runs()[0]).options == {"digits": True}
    tasks["mnli"]["evaluate"] = {"options": {"digits": False}}
    runner = module._Runner(replace(recipe, tasks=tasks))
    assert runner.evaluate(runner.runs()[0]).options == {"digits": False}
    assert runner.answer_tokens("mnli") == 4
    if find_spec("lm_eval") is None:
        return
    tasks["mnli"] = {"finetune": {"data": "x"}, "evaluate": {"harness": "arc_easy"}}
    runner = module._Runner(replace(recipe, tasks=tasks))
    assert runner.evaluate(runner.runs()[0]).task == Evaluate.task
    assert runner.answer_tokens("mnli") is runner.majority_baseline("mnli") is None


def test_a_command_says_the_recipe() -> None:
    made: list[tuple[str, Any]] = [
        ("quantize", Quantize(model="m", out="a b", quantizer="rtn", bits=3, options={"clip": False}, skip=["x", "y"])),
        (
            "finetune",
            Finetune(
                model="m",
                data="d",
                out="o",
                lora=Lora(r=2, options={"use_dora": True}),
                training={"max_steps": 2, "learning_rate": 1e-3, "lr_scheduler_kwargs": {"num_cycles": 2}},
            ),
        ),
        ("evaluate", Evaluate(model="m", task="samsum", options={"source_tokens": 90}, num_samples=3)),
    ]
    for verb, wanted in made:
        options = type(wanted)
        words = shlex.split(command(verb, wanted))
        assert words[:2] == ["llmtools", verb]
        assert _parse(_parser(verb, VERBS[verb], options), verb, options, words[2:]) == wanted
    assert given(Evaluate(model="m")) == {"model": "m"}


# ---------------------------------------------------------------------------------------------------------- the report


def test_the_html_holds_everything_and_loads_nothing(swept: module.SweepResult) -> None:
    pytest.importorskip("matplotlib")
    text = Path(f"{swept.report}.html").read_text()
    assert text.count("data:image/svg+xml;base64,") == 3
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b|@import|url\(", text)
    sources = re.findall(r"(?:src|href|srcset|poster|data)\s*=\s*[\"']([^\"']*)", text)
    assert sources and all(source.startswith("data:") for source in sources)
    rows = json.loads(Path(f"{swept.report}.json").read_text())["rows"]
    assert [row["seeds"] for row in rows] == [[0], [0]]
    for row in rows:
        assert html.escape(document.figure(row["before"])) in text


def made_up(variant: str, seed: int, value: float, rank: int = 8, task: str = "mnli", **more: Any) -> dict[str, Any]:
    """A run with round figures."""
    measure = "perplexity" if task == "text" else "accuracy"
    counts = {"context": 64} if task == "text" else {"examples": 100, "shortened_prompts": 79}
    return {
        "variant": variant,
        "task": task,
        "rank": rank,
        "seed": seed,
        "before": {"measure": measure, "value": 0.25},
        "after": {"measure": measure, "value": value, "details": {measure: value, "other": 2 * value} | counts},
        "bits_per_weight": 4.5,
        "weight_bytes": 1000,
        "model_bytes": 2500,
        "peak_bytes": 4000 + 1000 * seed,
        "trained": {"seconds": 10.0 + seed, "examples": 984, "left_out": 16 if task == "mnli" else 0},
        "versions": {"torch": "2"},
        "platform": "here",
        "commands": ["llmtools finetune"],
        **more,
    }


@pytest.fixture
def reported(recipe: Sweep, tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """The Markdown and the JSON of a report on made-up runs."""

    def write(runs: list[dict[str, Any]], **more: Any) -> tuple[str, dict[str, Any]]:
        found = {f"{number}": made for number, made in enumerate(runs)}
        majority_baselines = {"mnli": {"scores": {"accuracy": 0.4}, "answer": "no"}}
        lengths = {"mnli": 4, "text": None}
        arguments = {
            "left_out": [],
            "parameters": 260_032,
            "majority_baselines": majority_baselines,
            "answer_tokens": lengths,
        } | more
        report.report(recipe, tmp_path / "r", list(found), found, **arguments)
        return (tmp_path / "r.md").read_text(), json.loads((tmp_path / "r.json").read_text())

    return write


def test_seeds_become_a_mean_and_a_spread(reported: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, found = reported([made_up("a", seed, value) for seed, value in enumerate((0.1, 0.2, 0.6))])
    (row,) = found["rows"]
    assert row["after"]["mean"] == pytest.approx(0.3)
    assert row["after"]["spread"] == pytest.approx(0.07**0.5)  # ((0.2² + 0.1² + 0.3²) / 2)
    assert row["measures"]["other"]["mean"] == pytest.approx(0.6)
    assert (row["peak_bytes"], row["seconds"], row["after"]["runs"]) == (5000, 11, 3)
    assert "| a | 4.50 | 1.0 KB | 2.5 KB | 0.250 | 0.300 ± 0.265 |" in text
    assert "| majority-class baseline |  |  |  |  | 0.400 |" in text
    assert "| a | 5.0 KB | 11 |" in text


def test_unfinished_seeds_are_told_apart(reported: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, _ = reported([made_up("a", 0, 0.5), made_up("a", 1, 0.7), made_up("b", 0, 0.3)])
    assert "over 1 or 2 seeds of training, and a figure without it is of one" in text
    assert "| 0.250 | 0.600 ± 0.141 |" in text and "| 0.250 | 0.300 |" in text


def test_a_score_at_chance_level_is_called_that(reported: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    """One standard error at 0.4 over 100 examples is 0.049."""
    text, _ = reported([made_up("a", 0, 0.49), made_up("b", 0, 0.3)])
    assert "(accuracy 0.400) by more than two standard errors (0.049 each, with 100 examples)" in text
    assert "mnli: no variant is better" in text and "at chance level" in text
    text, _ = reported([made_up("a", 0, 0.51), made_up("b", 0, 0.3)])
    assert re.search(r"mnli: better than the majority-class baseline \(accuracy 0\.400\).*: a\. Not better: b\.", text)


def test_the_report_says_what_it_rests_on(reported: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, _ = reported([made_up("a", 0, 20.0, task="text")], majority_baselines={})
    assert "260,032 parameters" in text and "text in windows of 64 tokens" in text
    assert "one run with one seed" in text and "majority-class" not in text
    large, _ = reported([made_up("a", 0, 20.0, task="text")], majority_baselines={}, parameters=7_000_000_000)
    assert "cannot be expected" in text and "cannot be expected" not in large
    empty, found = reported([])
    assert found["rows"] == [] and "Quality" in empty and "The evaluation took" not in empty
    assert "\n    model: " in empty  # the sweep itself


def test_the_report_says_what_was_cut(reported: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, _ = reported([made_up("a", 0, 0.5), made_up("a", 0, 20.0, task="text")])
    evaluated = "100 examples of mnli (79 with a truncated prompt, answers of at most 4 tokens), text in windows of 64"
    assert f"The evaluation took {evaluated} tokens. A reference answer longer" in text
    assert "Left out of the training for their length were 16 of 1000 examples of mnli. " in text
    text, _ = reported([made_up("a", 0, 20.0, task="text")], majority_baselines={})
    assert "reference answer longer" not in text and "Left out of the training" not in text


def test_ranks_have_a_column_and_a_plot_of_their_own(
    reported: Callable[..., tuple[str, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    runs = [made_up("a", seed, 0.4 + 0.1 * seed, rank) for rank in (4, 8) for seed in (0, 1)]
    text, found = reported(runs)
    assert "| weights | rank |" in text and len(found["rows"]) == 2
    page = (tmp_path / "r.html").read_text()
    assert page.count("<img") == 4 and "rank of the adapters" in page
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    reported(runs)
    assert "llmtools[plot]" in (tmp_path / "r.html").read_text()


def test_the_majority_class_baseline_is_the_most_common_reference_answer(recipe: Sweep, tmp_path: Path) -> None:
    tasks = {"mnli": {"data": str(ASSETS / "mnli"), "options": {"digits": True}}}
    found = module._Runner(replace(recipe, tasks=tasks, out=str(tmp_path / "s"))).majority_baseline("mnli")
    assert found is not None
    labels = [json.loads(line)["label"] for line in (ASSETS / "mnli" / "dev_matched.jsonl").read_text().splitlines()]
    known = [label for label in labels if label != "-"]
    most = max(known.count(label) for label in set(known))
    assert found["scores"]["accuracy"] == pytest.approx(most / len(known))
    assert found["answer"] in ("0", "1", "2")
    assert module._Runner(recipe).majority_baseline("cats") is None  # perplexity has no answers


def test_the_meter_counts_what_stays_and_what_a_step_allocates() -> None:
    """A step that allocates 4 MB and 2 MB at once, beside a frozen weight of 40 KB and a trained one of 400 bytes."""
    from types import SimpleNamespace

    model = torch.nn.Sequential(torch.nn.Linear(100, 100, bias=False), torch.nn.Linear(100, 1, bias=False))
    model[0].requires_grad_(False)
    optimizer = SimpleNamespace(state={0: {"exp_avg": torch.zeros(100), "step": 1}})
    memory, state = meter(), SimpleNamespace(global_step=0, max_steps=3)
    memory.on_train_begin(None, state, None, model=model)
    memory.on_step_begin(None, state, None, model=model, optimizer=optimizer)
    memory.on_step_end(None, state, None)
    assert memory.peak_bytes == 0  # it is the second step that counts
    state.global_step = 1
    memory.on_step_begin(None, state, None, model=model, optimizer=optimizer)
    one = torch.empty(1_000_000)
    two = torch.empty(500_000)
    del one, two
    memory.on_step_end(None, state, None)
    assert memory.model_bytes == 40_000
    if not torch.cuda.is_available():
        assert 6_040_800 <= memory.peak_bytes < 6_050_000
    assert memory.close() is None


OWN_TASK = """
from dataclasses import dataclass
from typing import ClassVar

from llmtools.data.tasks import Task


@dataclass(frozen=True)
class Surprise(Task):
    data: str

    has_answers: ClassVar[bool] = False
    reads_file: ClassVar[bool] = True

    def evaluate(self, model, tokenizer, *, limit=None, batch_size=1, on_step=None):
        return {"perplexity": 7.0}


@dataclass(frozen=True)
class Silent(Surprise):
    has_answers: ClassVar[bool] = True
"""


def test_a_plug_in_s_task_says_what_it_can_do(
    recipe: Sweep, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One without answers has no majority-class baseline; one that only forgot to say so gets a line."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "surprise_task.py").write_text(OWN_TASK)
    finetune = recipe.tasks["cats"]["finetune"]

    def of(name: str, text: str = "text.txt") -> Sweep:
        evaluate = {"task": f"surprise_task:{name}", "data": str(data / text)}
        return replace(recipe, out=str(tmp_path / "s"), tasks={"own": {"finetune": finetune, "evaluate": evaluate}})

    runner = module._Runner(of("Surprise"))
    assert runner.runs() and runner.answer_tokens("own") is None and runner.majority_baseline("own") is None
    assert not (tmp_path / "s").exists() and not caplog.records
    with pytest.raises(InputError, match=r"own\.r2\.s0: there is no file .*gone\.txt"):
        module._Runner(of("Surprise", "gone.txt")).runs()
    assert module._Runner(of("Silent")).majority_baseline("own") is None
    assert "own: no majority-class baseline: task 'surprise_task:Silent' has no test rows" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["1e-4", "1E5", ".5", "-.inf", "yes", "No", "on", "null", "~", "", "0x10", "0o17", "0b1", "12:30:00", "1_000", " a",
     "a ", "a: b", "# a", "- a", "a\nb\n\n c\n", "'", '"', "{a}", "[a", "&a", "*a", "!a", "%a", "2020-01-01",
     "\u00e9\u2028",
     "\t", "=", "<<", "---", "true", "1e", "x" * 300],
)  # fmt: skip
def test_what_is_written_as_yaml_is_read_as_the_same(text: str) -> None:
    """As a value, a key and in a list; by our reader, and as the same string by one of YAML 1.1."""
    import yaml

    from llmtools.recipes.plain_yaml import as_yaml, parse_yaml

    value = {"options": {"a": text, "b": [text, text], f"k{text}": 1e-5, "n": [1, True, None, 0.1, "c"]}, text: text}
    written = as_yaml(value)
    assert parse_yaml(written, "here") == value
    assert yaml.safe_load(as_yaml({"a": text})) == {"a": text}
    assert '"1e-4"' in as_yaml({"a": "1e-4"}) and '"0o17"' in as_yaml(["0o17"])  # which others take for numbers


def test_a_model_that_is_quantized_already_is_trained_as_it_is(
    recipe: Sweep, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its only variant is itself, such as a GGUF file, and nothing is copied; what cannot be made is said before."""
    monkeypatch.setattr("llmtools.checkpoint.loading.is_quantized", lambda name: name == str(stories))
    here = replace(recipe, out=str(tmp_path / "s"), baselines=["lora", "nf4"], quantizers=[])
    result = sweep(here)
    assert (result.runs, result.failed) == (1, {})
    made = result_of(here, "lora-as-quantized.cats.r2.s0")
    assert all(f"--model {stories} " in line for line in made["commands"])
    assert not (tmp_path / "s" / "models" / "original").exists()
    text = Path(f"{result.report}.md").read_text()
    assert (
        "* NF4, bitsandbytes: left out, the model is quantized already" in text and "embeddings and norms" not in text
    )
    for changes in ({"quantizers": recipe.quantizers}, {"baselines": ["nf4"]}):
        with pytest.raises(InputError, match="is quantized already"):
            sweep(replace(here, out=str(tmp_path / "t"), **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "t").exists()
