"""An adapter is judged, and heard, as it was trained: its base quantized alike, its task's options the same."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

from llmtools.checkpoint import loading
from llmtools.errors import InputError
from llmtools.recipes.evaluate import Evaluate, evaluate
from llmtools.recipes.generate import Generate, generate
from llmtools.recipes.quantize import Quantize, quantize

ASSETS = Path(__file__).parent.parent / "assets"


def adapter(base: Path, folder: Path, **recipe: Any) -> str:
    """An adapter that changes nothing, with the run.json of a training by this recipe."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"command": "finetune", "recipe": recipe}))
    return str(folder)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """How each model was loaded."""
    seen: list[str | None] = []
    real = loading.open_model

    def open_model(name: str, *, load: str | None = None, **options: Any) -> Any:
        seen.append(load)
        return real(name, **options)

    monkeypatch.setattr(loading, "open_model", open_model)
    return seen


def test_the_base_of_an_adapter_is_quantized_as_in_its_training(
    stories: Path, tmp_path: Path, loads: list[str | None], caplog: pytest.LogCaptureFixture
) -> None:
    """With --model, too, and to write as well as to be judged; what the user says wins."""
    caplog.set_level("INFO", logger="llmtools")
    qlora = adapter(stories, tmp_path / "a", load="nf4")
    (tmp_path / "x.txt").write_text("Once upon a time there was a little dog. " * 20)
    judged: dict[str, Any] = {"adapter": qlora, "data": str(tmp_path / "x.txt"), "max_length": 32, "num_samples": 1}
    evaluate(Evaluate(**judged))
    evaluate(Evaluate(model=str(stories), **judged))
    generate(Generate(adapter=qlora, prompt="Once", max_new_tokens=1))
    generate(Generate(model=str(stories), adapter=qlora, prompt="Once", max_new_tokens=1))
    assert loads == ["nf4"] * 4
    assert caplog.text.count("the adapter was trained with --load nf4") == 4
    generate(Generate(adapter=qlora, prompt="Once", max_new_tokens=1, load="int8"))
    generate(Generate(model=str(stories), prompt="Once", max_new_tokens=1))
    assert loads[4:] == ["int8", None]


def test_a_model_that_is_quantized_already_stays_as_it_is(
    stories: Path, tmp_path: Path, loads: list[str | None]
) -> None:
    quantize(Quantize(model=str(stories), out=str(tmp_path / "q"), quantizer="rtn", bits=8))
    qlora = adapter(stories, tmp_path / "a", load="nf4")
    loads.clear()
    generate(Generate(model=str(tmp_path / "q"), adapter=qlora, prompt="Once", max_new_tokens=1))
    assert loads == [None]


def test_an_adapter_is_judged_in_the_words_of_its_training(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For the same task alone; what the user says wins, and where data lie is not taken over."""
    tasks = importlib.import_module("llmtools.data.tasks")
    caplog.set_level("INFO", logger="llmtools")
    made: list[dict[str, Any]] = []
    real = tasks.make_task

    def make_task(name: str, **options: Any) -> Any:
        made.append(options)
        return real(name, **options)

    monkeypatch.setattr(tasks, "make_task", make_task)
    options = {"digits": True, "source_tokens": 100, "validation_data": "elsewhere.json"}
    digits = adapter(stories, tmp_path / "a", task="mnli", options=options)
    data = str(ASSETS / "mnli")
    result = evaluate(Evaluate(adapter=digits, task="mnli", data=data, num_samples=2, options={"source_tokens": 120}))
    assert made.pop() == {"data": data, "digits": True, "source_tokens": 120}
    assert "as the adapter was trained: digits True\n" in caplog.text
    assert result.data == data
    evaluate(Evaluate(model=str(stories), task="mnli", data=data, num_samples=2, options={"source_tokens": 120}))
    assert made.pop() == {"data": data, "source_tokens": 120}
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Once upon a", "completion": " time"}\n')
    evaluate(Evaluate(adapter=digits, task="text", data=str(rows)))
    assert made.pop() == {"data": str(rows), "validation_data": str(rows)}
    trained = str(Path(shutil.copy(rows, tmp_path / "trained.jsonl")))
    result = evaluate(Evaluate(model=str(stories), task="text", data=trained, options={"validation_data": str(rows)}))
    assert result.data == str(rows)  # what is measured on


def test_options_that_would_be_ignored_are_refused_or_told(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llmtools.recipes.harness.import_harness", lambda: None)
    with pytest.raises(InputError, match="--task samsum does not go with --harness arc_easy"):
        evaluate(Evaluate(model=str(stories), harness="arc_easy", task="samsum"))
    (tmp_path / "x.txt").write_text("Once upon a time there was a little dog. " * 20)
    judged = Evaluate(model=str(stories), data=str(tmp_path / "x.txt"), max_length=32, num_samples=2, batch_size=2)
    assert evaluate(judged).data == str(tmp_path / "x.txt")
    assert "batch_size=2 has no effect" in caplog.text
