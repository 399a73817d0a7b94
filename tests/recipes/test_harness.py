"""lm_eval judges our models: a task of its own YAML and a local file, so nothing comes from the network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llmtools.errors import InputError
from llmtools.recipes.evaluate import Evaluate, evaluate

TASK = """\
task: endings_for_tests
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["time", "dog"]
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROWS = [
    {"prompt": "Once upon a", "label": 0},
    {"prompt": "Tom had a cat and a", "label": 1},
    {"prompt": "Once upon a", "label": 1},
    {"prompt": "The boy played with his", "label": 1},
]


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "data").mkdir()
    rows = tmp_path / "data" / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "endings.yaml").write_text(TASK.format(file=rows))
    return str(tmp_path / "task" / "endings.yaml")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_quantized_model_is_judged_by_the_harness(task: str, stories: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from llmtools.recipes.quantize import Quantize, quantize

    quantize(Quantize(model=str(stories), out=str(tmp_path / "q"), quantizer="rtn", bits=8))
    judged = evaluate(Evaluate(model=str(tmp_path / "q"), harness=task, batch_size=2))
    assert judged.task == task
    assert judged.measure == "endings_for_tests/acc"
    assert judged.value == 0.75
    assert judged.bits_per_weight < 10
    limited = evaluate(Evaluate(model=str(tmp_path / "q"), harness=[task], num_samples=2, options={"num_fewshot": 0}))
    assert limited.value == 1
    with pytest.raises(InputError, match=r"there is no file .*none\.yaml"):
        evaluate(Evaluate(model=str(tmp_path / "q"), harness="none.yaml"))
    with pytest.raises(InputError, match="num_few"):
        evaluate(Evaluate(model=str(tmp_path / "q"), harness=task, options={"num_few": 0}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_judged_by_the_harness(task: str, stories: Path, tmp_path: Path) -> None:
    """It is trained to answer "time" always, which is right for one row of four."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("trl")
    from llmtools.recipes.finetune import Finetune, Lora, finetune

    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps({"prompt": row["prompt"], "completion": " time"}) + "\n" for row in ROWS))
    training = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 0.02}
    finetune(Finetune(model=str(stories), data=str(rows), out=str(tmp_path / "a"), lora=Lora(r=4), training=training))
    assert evaluate(Evaluate(model=str(stories), harness=task)).value == 0.75
    judged = evaluate(Evaluate(adapter=str(tmp_path / "a"), harness=task))
    assert (judged.value, judged.adapter, judged.data) == (0.25, str(tmp_path / "a"), None)


def test_what_does_not_go_with_the_harness_is_said(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtools.recipes.harness.import_harness", lambda: None)
    with pytest.raises(InputError, match="--data does not go with --harness"):
        evaluate(Evaluate(model=str(stories), harness="arc_easy", data="x.txt"))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'llmtools\[harness\]'"):
        evaluate(Evaluate(model=str(stories), harness="arc_easy"))
