"""The grids of other programs are quantizers like ours: they keep the laws, whatever their options."""

from __future__ import annotations

from typing import Any

import pytest

from llmtools import InputError
from llmtools.quant import quantizer
from llmtools.quant.laws import check

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("affine", {"bits": 3, "permuted": True, "scale_type": "bfloat16"}),
    ("affine", {"bits": 4, "group_size": 16, "float_zeros": True}),
    ("affine", {"bits": 8, "scale_type": "float32"}),
    ("affine", {"bits": 5, "group_size": -1, "symmetric": True}),
    ("affine", {"bits": 1}),
    ("codebook", {"table": "nf4", "group_size": 24, "double_quantization": True}),
    ("codebook", {"table": list(range(-8, 8))}),
    ("affine_columns", {"bits": 3, "group_size": 3}),
    ("exl3", {"bits": 3, "code": "mcg", "state_bits": 8}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_every_law_holds(name: str, options: dict[str, Any]) -> None:
    broken = [outcome for outcome in check(quantizer(name, **options)) if outcome.error]
    assert not broken


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("affine", {"bits": 9}, "bits=9"),
        ("affine", {"scale_type": "float64"}, "did you mean 'float"),
        ("affine", {"symmetric": True, "float_zeros": True}, "no zero points"),
        ("codebook", {"table": "nf5"}, "did you mean 'nf4'"),
        ("codebook", {"table": [1.0, 0.0]}, "16 numbers in rising order"),
        ("affine_columns", {"group_size": -1}, "group_size=-1"),
        ("exl3", {"bits": 9}, "bits=9"),
        ("exl3", {"code": "mul2"}, "code='mul2'"),
        ("quip_sharp_rows", {"first": 8, "total": 8}, "no row 8 of 8"),
    ],
    ids=str,
)
def test_options_that_make_no_grid_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantizer(name, **options)
