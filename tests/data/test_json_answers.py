"""The task `json`: objects are compared as JSON values, and nothing that a model writes stops the score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtools.data.tasks import make_task
from llmtools.errors import InputError

RECORDS: list[dict[str, Any]] = [{"item": "lamps", "count": 2}, {"item": "sofa", "count": 1, "gift": True, "to": None}]


def task_on(tmp_path: Path, answers: list[str]) -> Any:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "?", "completion": answer}) + "\n" for answer in answers))
    return make_task("json", data=str(file), validation_data=str(file))


def score(tmp_path: Path, outputs: list[str]) -> dict[str, float]:
    task = task_on(tmp_path, [json.dumps(record) for record in RECORDS])
    return dict(task.score(outputs, task.test()))


def test_a_perfect_answer_scores_1_however_it_is_written(tmp_path: Path) -> None:
    for options in ({}, {"indent": 2}, {"sort_keys": True}, {"separators": (",", ":")}):
        outputs = [f"\n{json.dumps(record, **options)} " for record in RECORDS]
        assert score(tmp_path, outputs) == {"exact_match": 1.0, "fields": 1.0, "valid": 1.0}
    assert score(tmp_path, ['{"item": "lamps", "count": 2.0}', json.dumps(RECORDS[1])])["exact_match"] == 1.0


def test_fields_are_counted_one_by_one(tmp_path: Path) -> None:
    one_wrong = ['{"item": "lamps", "count": 3}', '{"item": "sofa", "count": 1, "gift": true}']
    assert score(tmp_path, one_wrong) == {"exact_match": 0.0, "fields": pytest.approx(4 / 6), "valid": 1.0}
    further = ['{"item": "lamps", "count": 2, "more": 0}', "no"]
    assert score(tmp_path, further) == {"exact_match": 0.0, "fields": pytest.approx(2 / 6), "valid": 0.5}


def test_values_of_other_types_are_wrong(tmp_path: Path) -> None:
    """In Python, True equals 1."""
    outputs = ['{"item": ["lamps"], "count": "2"}', '{"item": {}, "count": true, "gift": 1, "to": false}']
    assert score(tmp_path, outputs) == {"exact_match": 0.0, "fields": 0.0, "valid": 1.0}


@pytest.mark.parametrize(
    "output",
    ["", "[]", "2", "{", '{"a": NaN}', "[" * 100_000, '{"a":' * 100_000, '{"a": 1e99999999999999999999}',
     'Here: {"item": "lamps", "count": 2}', '{"item": "lamps", "count": 2} {}'],
)  # fmt: skip
def test_whatever_is_no_json_object_scores_0(tmp_path: Path, output: str) -> None:
    assert score(tmp_path, [output, output]) == {"exact_match": 0.0, "fields": 0.0, "valid": 0.0}


@pytest.mark.parametrize("answer", ["lamps", "[1]", "{}"])
def test_data_whose_answers_are_no_objects_are_refused(tmp_path: Path, answer: str) -> None:
    task = task_on(tmp_path, ['{"a": 1}', answer])
    for rows in (task.train, task.test):
        with pytest.raises(InputError, match=r"row 2: the answer .* is not a JSON object"):
            rows()
