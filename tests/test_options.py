"""Options are checked by the declaration of their class, as JSON and YAML have values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from llmtools import InputError, quantizer
from llmtools.options import FORMER_NAMES, built, current_name, fits, type_name, with_current_names


@dataclass(frozen=True)
class Thing:
    size: int = 1
    share: float | None = None
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.size < 0:
            raise InputError(f"thing: size={self.size}; no less than 0")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, True), (True, int, False), ("3", int, False), (3.0, int, False), (2**80, int, True),
        (3, float, True), (float("nan"), float, False), (10**400, float, False), (False, float, False),
        (None, int | None, True), (None, int, False), ("x", str, True), (b"x", str, False),
        ([1, 2], list[int], True), ([1, "2"], list[int], False), ((1,), tuple[int, ...], True),
        ({"a": 1}, dict[str, int], True), ({"a": "1"}, dict[str, int], False), ([("a", 1)], dict[str, int], False),
        ("a", Literal["a", "b"], True), ("c", Literal["a", "b"], False), (1, bool, False), ("12", list[str], False),
        (5, object, True),
    ],
    ids=repr,
)  # fmt: skip
def test_values_fit_their_types_as_json_has_them(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected


def test_a_wrong_name_or_value_is_one_line_that_says_what_is_expected() -> None:
    assert built("thing", Thing, {"size": 2, "names": ["x"]}).size == 2
    for options, message in (
        ({"siez": 1}, "no option 'siez'; did you mean 'size'"),
        ({"size": "2"}, "thing: size='2'; int is expected"),
        ({"size": -1}, "no less than 0"),
        ({"share": "much"}, "share='much'; float or null is expected"),
        ({"kind": "c"}, "kind='c'; 'a' or 'b' is expected"),
    ):
        with pytest.raises(InputError, match=message):
            built("thing", Thing, options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rtn", {"symmetric": "x"}),
        ("rtn", {"clip": 1}),
        ("rtn", {"group_size": "32"}),
        ("optq", {"act_order": "no"}),
        ("optq", {"damping": "0.1"}),
        ("quip_sharp", {"residual_scale": [1.0]}),
        ("quip_sharp", {"seed": 1.5}),
        ("nf4", {"double_quantization": None}),
        ("codebook", {"table": 5}),
        ("affine", {"scale_type": ["float16"]}),
        ("quip_sharp_rows", {"total": "all"}),
    ],
    ids=str,
)
def test_no_quantizer_takes_a_value_of_another_type(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=name):
        quantizer(name, **options)


def test_types_are_called_as_a_reader_of_json_knows_them() -> None:
    assert type_name(int | None) == "int or null"
    assert type_name(list[str]) == "list"


def test_former_names_of_options_are_read_and_both_names_at_once_refused() -> None:
    assert current_name("evaluate", "context") == "max_length"
    assert current_name("evaluate", "options.context") == "options.context"  # an option of the task
    assert current_name("no such command", "limit") == "limit"
    tasks = {"limit": {"limit": 3, "evaluate": {"context": 8, "options": {"limit": 1}}}}  # a task of that name, too
    assert with_current_names("sweep", {"quantize": {"samples": 2}, "tasks": tasks}) == {
        "quantize": {"num_samples": 2},
        "tasks": {"limit": {"num_samples": 3, "evaluate": {"max_length": 8, "options": {"limit": 1}}}},
    }
    for command, names in FORMER_NAMES.items():
        for former, current in names.items():
            *outer, last = former.replace("*", "x").split(".")
            both: dict[str, Any] = {last: 1, current: 2}
            for group in reversed(outer):
                both = {group: both}
            with pytest.raises(InputError, match=f"{last} is the former name of .*{current}"):
                with_current_names(command, both)
