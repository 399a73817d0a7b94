"""A sweep: its cells, what is made again and what is not, what fails, and a report that is right and loads nothing."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from llmtools import document
from llmtools.checkpoint.inputs import contents
from llmtools.checkpoint.run_info import command, given
from llmtools.cli.main import VERBS, _parse, _parser, main
from llmtools.errors import InputError
from llmtools.recipes.evaluate import Evaluate
from llmtools.recipes.finetune import Finetune, Lora
from llmtools.recipes.quantize import Quantize
from llmtools.sweep import plots as pictures
from llmtools.sweep import report as tradeoff
from llmtools.sweep import runner as module
from llmtools.sweep.memory import meter
from llmtools.sweep.runner import Sweep, sweep

ASSETS = Path(__file__).parent.parent / "assets"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tinystories: Path) -> Path:
    """A few rows to train on, and a little text."""
    folder = tmp_path_factory.mktemp("data")
    rows = ({"prompt": f"Tom had {n} cats.", "completion": f" He gave {n} balls to them."} for n in range(8))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text((tinystories / "held_out.txt").read_text()[:3000])
    return folder


@pytest.fixture(scope="module")
def recipe(stories: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """One quantizer and the model itself."""
    judged = {"task": "perplexity", "data": str(data / "text.txt"), "max_length": 64, "num_samples": 4}
    return Sweep(
        model=str(stories),
        out=str(tmp_path_factory.mktemp("sweep") / "s"),
        tasks={"cats": {"finetune": {"task": "text", "data": str(data / "train.jsonl")}, "evaluate": judged}},
        baselines=["lora"],
        quantizers=[{"name": "rtn", "bits": 4, "group_size": 32}],
        ranks=[2],
        seeds=[0],
        training={"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 48, "learning_rate": 1e-3},
    )


@pytest.fixture(scope="module")
def swept(recipe: Sweep) -> module.Swept:
    return sweep(recipe)


CELLS = ("lora-not-quantized.cats.r2.s0", "rtn-4-bit-group-size-32.cats.r2.s0")


def cell(recipe: Sweep, name: str) -> dict[str, Any]:
    return dict(json.loads((Path(recipe.out) / "cells" / f"{name}.json").read_text()))


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.json") if path.name != "report.json"}


def test_a_cell_says_what_it_cost_and_how_good_it_is(recipe: Sweep, swept: module.Swept) -> None:
    assert (swept.cells, swept.made, swept.kept, swept.failed, swept.exit_code) == (2, 2, 0, {}, 0)
    dense, packed = (cell(recipe, name) for name in CELLS)
    assert dense["bits_per_weight"] == 16
    assert 4.5 < packed["bits_per_weight"] < 5
    others = dense["model_bytes"] - dense["weight_bytes"]  # embeddings, norms, tables of positions
    assert others == packed["model_bytes"] - packed["weight_bytes"]
    assert 2 * 260_032 <= dense["model_bytes"] < 2 * 260_032 + 1000
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
    assert (Path(recipe.out) / "adapters" / CELLS[1] / "adapter_config.json").exists()


def test_a_second_run_makes_nothing_and_a_lost_cell_again(
    recipe: Sweep, swept: module.Swept, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="llmtools")
    before = times(Path(recipe.out))
    again = sweep(recipe)
    assert (again.made, again.kept, again.table) == (0, 2, swept.table)
    assert times(Path(recipe.out)) == before
    assert caplog.text.count("(finished before)") == 2
    former = cell(recipe, CELLS[0])
    (Path(recipe.out) / "cells" / f"{CELLS[0]}.json").unlink()
    only = sweep(replace(recipe, report_only=True))
    assert (only.made, only.kept, only.missing) == (0, 1, [CELLS[0]])
    assert f"* {CELLS[0]}: not made yet" in Path(f"{only.report}.md").read_text()
    one = sweep(recipe)
    assert (one.made, one.kept) == (1, 1)
    assert cell(recipe, CELLS[0])["after"]["value"] == former["after"]["value"]


def test_the_yaml_that_is_written_is_the_sweep(recipe: Sweep, swept: module.Swept) -> None:
    verb = VERBS["sweep"]
    file = str(Path(recipe.out) / "sweep.yaml")
    assert _parse(_parser("sweep", verb, Sweep), "sweep", Sweep, ["--config", file]) == recipe
    assert main(["sweep", file, "--report_only"]) == 0


def test_changed_settings_are_noticed_and_concern_their_cells_alone(
    recipe: Sweep, swept: module.Swept, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    caplog.set_level("INFO", logger="llmtools")
    shutil.copytree(recipe.out, tmp_path / "s")
    for file in (tmp_path / "s").rglob("*.json"):  # the settings hold the folder's name
        file.write_text(file.read_text().replace(recipe.out, str(tmp_path / "s")))
    here = replace(recipe, out=str(tmp_path / "s"))
    before = times(tmp_path / "s")
    changed = replace(here, training={**recipe.training, "max_steps": 1}, baselines=[])
    assert (sweep(changed).made, "finetune.training.max_steps 2, now 1" in caplog.text) == (1, True)
    touched = {path for path, at in times(tmp_path / "s").items() if before[path] != at}
    assert not [path for path in touched if "/before/" in path or "/models/" in path]
    assert cell(changed, CELLS[1])["trained"]["steps"] == 1
    stale = sweep(replace(here, report_only=True))  # with the former settings
    assert stale.missing == [CELLS[1]]


@pytest.fixture
def moved(recipe: Sweep, swept: module.Swept, stories: Path, data: Path, tmp_path: Path) -> Sweep:
    """The finished sweep with its model and its data in a folder of its own."""
    import shutil

    places = {recipe.out: tmp_path / "s", str(stories): tmp_path / "model", str(data): tmp_path / "data"}
    for source, target in places.items():
        shutil.copytree(source, target)
    for file in (*(tmp_path / "s").rglob("*.json"), tmp_path / "s" / "sweep.yaml"):
        text = file.read_text()
        for source, target in places.items():
            text = text.replace(str(source), str(target))
        file.write_text(text)
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
def test_a_cell_is_kept_only_with_what_it_was_made_from(
    file: str, said: str, moved: Sweep, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="llmtools")
    assert sweep(moved).missing == []
    bytes_ = (tmp_path / file).read_bytes()
    os.utime(tmp_path / file, (1, 1))
    assert sweep(moved).missing == []
    (tmp_path / file).write_bytes(bytes_[:-1] + bytes([bytes_[-1] ^ 1]))  # as long, and as old
    os.utime(tmp_path / file, (1, 1))
    assert sweep(moved).missing == list(CELLS)
    assert said in caplog.text
    (tmp_path / file).write_bytes(bytes_)
    assert sweep(moved).missing == []


def test_a_cell_is_kept_only_with_the_adapter_that_it_made(moved: Sweep, tmp_path: Path) -> None:
    dense, packed = (tmp_path / "s" / "adapters" / name / "adapter_model.safetensors" for name in CELLS)
    dense.unlink()
    assert sweep(moved).missing == [CELLS[0]]
    packed.write_bytes(packed.read_bytes()[:-1] + b"!")
    assert sweep(moved).missing == list(CELLS)


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


def test_a_cell_that_fails_says_why_and_stops_no_other(recipe: Sweep, data: Path, tmp_path: Path) -> None:
    late = tmp_path / "late.jsonl"
    task = recipe.tasks["cats"]
    late.write_text("{")
    tasks = {"late": {**task, "finetune": {"task": "text", "data": str(late)}}, **recipe.tasks}
    quantizers = [{"name": "rtn", "bits": 3, "group_size": 32}]
    here = replace(recipe, out=str(tmp_path / "s"), tasks=tasks, quantizers=quantizers, baselines=["lora"])
    result = sweep(here)
    assert (result.cells, result.made, result.kept, result.exit_code) == (4, 2, 0, 1)
    assert set(result.failed) == {"lora-not-quantized.late.r2.s0", "rtn-3-bit-group-size-32.late.r2.s0"}
    assert "late.jsonl:1" in result.failed["lora-not-quantized.late.r2.s0"]
    assert "Traceback" in cell(here, "lora-not-quantized.late.r2.s0")["traceback"]
    text = Path(f"{result.report}.md").read_text()
    assert "lora-not-quantized.late.r2.s0: " in text
    late.write_text((data / "train.jsonl").read_text())
    result = sweep(replace(here, quantizers=[]))
    assert (result.made, result.kept, result.failed) == (1, 1, {})


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
        ({"data": {"dogs": "x"}}, "--data.dogs"),
        ({"data": {"cats": "x"}}, "--data.cats: under finetune and evaluate this task names data of its own"),
        ({"data": {"mnli": __file__}, "tasks": {"mnli": {"data": "x"}}}, "would be trained on and judged by"),
        ({"tasks": {"a/b": task}}, "'a/b'"),
        ({"tasks": {"cats": {**task, "evaluate": {"num_sample": 3}}}}, "did you mean 'num_samples'"),
        ({"tasks": {"cats": {**task, "finetune": {"seed": 3}}}}, "the sweep decides this"),
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
    assert result.cells == 2  # LoRA and RTN
    assert "* NF4, bitsandbytes: left out" in Path(f"{result.report}.md").read_text()


@pytest.mark.slow
def test_a_baseline_of_bitsandbytes_is_a_cell_like_any_other(recipe: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    here = replace(recipe, out=str(tmp_path / "s"), baselines=["nf4"], quantizers=[])
    assert sweep(here).made == 1
    found = cell(here, "nf4-bitsandbytes.cats.r2.s0")
    assert 4 < found["bits_per_weight"] < 5
    others = 64 * 512 * 2  # the embedding, which is the output head, too; and the norms
    assert found["weight_bytes"] + others < found["model_bytes"] < found["weight_bytes"] + others + 3000
    assert "--load nf4" in found["commands"][0]


def test_lists_are_run_through_and_data_replaced(recipe: Sweep) -> None:
    many = replace(
        recipe,
        quantizers=[{"name": "rtn", "bits": [4, 3, 2], "group_size": [32, 64]}, {"name": "nf4"}],
        ranks=[1, 2],
        seeds=[0, 1],
        tasks={"mnli": {"data": "none", "options": {"digits": True}, "finetune": {"options": {"digits": False}}}},
        data={"mnli": str(ASSETS / "mnli")},
    )
    run = module._Run(many)
    cells = run.cells()
    assert len(cells) == len({one.name for one in cells}) == (1 + 6 + 1) * 2 * 2
    assert run.finetune(cells[0]).data == run.evaluate(cells[0]).data == str(ASSETS / "mnli")
    assert {run.finetune(one).lora.r for one in cells} == {1, 2}
    assert cells[0].seed == 0 and cells[-1].seed == 1  # seed by seed


def test_a_sign_tells_names_apart() -> None:
    values = ({"damping": 0.01}, {"damping": -0.01}, {"group_size": 1}, {"group_size": -1})
    slugs = [module.Form(module._label({"name": "optq", "bits": 3, **more})).slug for more in values]
    assert slugs[:2] == ["optq-3-bit-damping-0-01", "optq-3-bit-damping-minus-0-01"]
    assert len(set(slugs)) == 4


def test_a_model_is_judged_before_training_in_the_words_of_training(recipe: Sweep) -> None:
    """What was left to the options of finetune goes for evaluate, too, as it does where it has the adapter."""
    tasks = {"mnli": {"data": "x", "finetune": {"options": {"digits": True, "validation_data": "y"}}}}
    run = module._Run(replace(recipe, tasks=tasks, report_only=True))
    assert run.evaluate(run.cells()[0]).options == {"digits": True}
    tasks["mnli"]["evaluate"] = {"options": {"digits": False}}
    assert run.evaluate(run.cells()[0]).options == {"digits": False}
    assert run.answer_tokens("mnli") == 4
    tasks["mnli"] = {"finetune": {"data": "x"}, "evaluate": {"harness": "arc_easy"}}
    assert run.evaluate(run.cells()[0]).task == Evaluate.task
    assert run.answer_tokens("mnli") is run.floor("mnli") is None


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


def test_the_html_holds_everything_and_loads_nothing(swept: module.Swept) -> None:
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


def made_up(form: str, seed: int, value: float, rank: int = 8, task: str = "mnli", **more: Any) -> dict[str, Any]:
    """A cell with round figures."""
    measure = "perplexity" if task == "text" else "accuracy"
    counts = {"context": 64} if task == "text" else {"examples": 100, "shortened_prompts": 79}
    return {
        "form": form,
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
def told(recipe: Sweep, tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """The Markdown and the JSON of a report on made-up cells."""

    def tell(cells: list[dict[str, Any]], **more: Any) -> tuple[str, dict[str, Any]]:
        found = {f"{number}": made for number, made in enumerate(cells)}
        floors = {"mnli": {"scores": {"accuracy": 0.4}, "answer": "no"}}
        lengths = {"mnli": 4, "text": None}
        arguments = {"left_out": [], "parameters": 260_032, "floors": floors, "answer_tokens": lengths} | more
        tradeoff.report(recipe, tmp_path / "r", list(found), found, **arguments)
        return (tmp_path / "r.md").read_text(), json.loads((tmp_path / "r.json").read_text())

    return tell


def test_seeds_become_a_mean_and_a_spread(told: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, found = told([made_up("a", seed, value) for seed, value in enumerate((0.1, 0.2, 0.6))])
    (row,) = found["rows"]
    assert row["after"]["mean"] == pytest.approx(0.3)
    assert row["after"]["spread"] == pytest.approx(0.07**0.5)  # ((0.2² + 0.1² + 0.3²) / 2)
    assert row["measures"]["other"]["mean"] == pytest.approx(0.6)
    assert (row["peak_bytes"], row["seconds"], row["after"]["runs"]) == (5000, 11, 3)
    assert "| a | 4.50 | 1.0 KB | 2.5 KB | 0.250 | 0.300 ± 0.265 |" in text
    assert "| always the same answer |  |  |  |  | 0.400 |" in text
    assert "| a | 5.0 KB | 11 |" in text


def test_unfinished_seeds_are_told_apart(told: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, _ = told([made_up("a", 0, 0.5), made_up("a", 1, 0.7), made_up("b", 0, 0.3)])
    assert "over 1 or 2 seeds of training, and a figure without it is of one" in text
    assert "| 0.250 | 0.600 ± 0.141 |" in text and "| 0.250 | 0.300 |" in text


def test_chance_is_called_chance(told: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    """One standard error at 0.4 over 100 examples is 0.049."""
    text, _ = told([made_up("a", 0, 0.49), made_up("b", 0, 0.3)])
    assert "(accuracy 0.400) by more than two standard errors (0.049 each, with 100 examples)" in text
    assert "mnli: no form is better" in text and "those of guessing" in text
    text, _ = told([made_up("a", 0, 0.51), made_up("b", 0, 0.3)])
    assert re.search(r"mnli: better than always giving the same answer \(accuracy 0\.400\).*: a\. Not so: b\.", text)


def test_the_report_says_what_it_rests_on(told: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, _ = told([made_up("a", 0, 20.0, task="text")], floors={})
    assert "260,032 parameters" in text and "text in windows of 64 tokens" in text
    assert "one run with one seed" in text and "always the same" not in text
    large, _ = told([made_up("a", 0, 20.0, task="text")], floors={}, parameters=7_000_000_000)
    assert "cannot be expected" in text and "cannot be expected" not in large
    empty, found = told([])
    assert found["rows"] == [] and "Quality" in empty and "Judged" not in empty
    assert "\n    model: " in empty  # the sweep itself


def test_the_report_says_what_was_cut(told: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, _ = told([made_up("a", 0, 0.5), made_up("a", 0, 20.0, task="text")])
    judged = "100 examples of mnli (79 with a shortened prompt, answers of at most 4 tokens), text in windows of 64"
    assert f"Judged were {judged} tokens. Right answers that are longer" in text
    assert "Left out of the training, being too long, were 16 of 1000 examples of mnli. " in text
    text, _ = told([made_up("a", 0, 20.0, task="text")], floors={})
    assert "Right answers" not in text and "Left out of the training" not in text


def test_ranks_have_a_column_and_a_picture_of_their_own(
    told: Callable[..., tuple[str, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    cells = [made_up("a", seed, 0.4 + 0.1 * seed, rank) for rank in (4, 8) for seed in (0, 1)]
    text, found = told(cells)
    assert "| weights | rank |" in text and len(found["rows"]) == 2
    page = (tmp_path / "r.html").read_text()
    assert page.count("<img") == 4 and "rank of the adapters" in page
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    told(cells)
    assert "llmtools[plot]" in (tmp_path / "r.html").read_text()


def test_the_constant_answer_is_the_commonest_right_one(recipe: Sweep, tmp_path: Path) -> None:
    tasks = {"mnli": {"data": str(ASSETS / "mnli"), "options": {"digits": True}}}
    found = module._Run(replace(recipe, tasks=tasks, out=str(tmp_path / "s"))).floor("mnli")
    assert found is not None
    labels = [json.loads(line)["label"] for line in (ASSETS / "mnli" / "dev_matched.jsonl").read_text().splitlines()]
    known = [label for label in labels if label != "-"]
    most = max(known.count(label) for label in set(known))
    assert found["scores"]["accuracy"] == pytest.approx(most / len(known))
    assert found["answer"] in ("0", "1", "2")
    assert module._Run(recipe).floor("cats") is None  # perplexity has no answers


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
    """One without answers has no constant answer to compare with; one that only forgot to say so gets a line."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "surprise_task.py").write_text(OWN_TASK)
    finetune = recipe.tasks["cats"]["finetune"]

    def of(name: str, text: str = "text.txt") -> Sweep:
        judged = {"task": f"surprise_task:{name}", "data": str(data / text)}
        return replace(recipe, out=str(tmp_path / "s"), tasks={"own": {"finetune": finetune, "evaluate": judged}})

    run = module._Run(of("Surprise"))
    assert run.cells() and run.answer_tokens("own") is None and run.floor("own") is None
    assert not (tmp_path / "s").exists() and not caplog.records
    with pytest.raises(InputError, match=r"own\.r2\.s0: there is no file .*gone\.txt"):
        module._Run(of("Surprise", "gone.txt")).cells()
    assert module._Run(of("Silent")).floor("own") is None
    assert "own: no constant answer to compare with: task 'surprise_task:Silent' has no test rows" in caplog.text


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
