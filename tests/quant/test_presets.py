"""The named quantizers: what each stores, what it costs and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtools.errors import InputError
from llmtools.quant import Packed, proxy_loss, quantizer
from llmtools.quant.laws import problems


def bits_per_weight(packed: Packed, out: int, n: int) -> float:
    return sum(8 * tensor.nbytes for tensor in packed.values()) / (out * n)


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("rtn", {"bits": 4, "group_size": 128}, 4 + (16 + 4) / 128),
        ("rtn", {"bits": 4, "group_size": 128, "symmetric": True}, 4 + 16 / 128),
        ("rtn", {"bits": 3, "group_size": 64}, 3 + (16 + 3) / 64),
        ("rtn", {"bits": 2, "group_size": 32}, 2 + (16 + 2) / 32),
        ("nf4", {}, 4.5),
        ("optq", {"bits": 2, "group_size": 64}, 2 + (16 + 2) / 64),
    ],
    ids=lambda value: str(value),
)
def test_size_is_as_promised(name: str, options: dict[str, Any], bits: float) -> None:
    made = quantizer(name, **options)
    packed = made.quantize(torch.randn(8, 1024), torch.eye(1024))
    assert bits_per_weight(packed, 8, 1024) == pytest.approx(bits, rel=0.002)


@pytest.mark.parametrize("name", ["rtn", "optq"])
@pytest.mark.parametrize("bits", [0, 1, 5, 16, "4", True], ids=repr)
def test_other_widths_are_refused(name: str, bits: Any) -> None:
    with pytest.raises(InputError, match=f"{name}: bits={bits!r}; choose 2, 3, 4 or 8"):
        quantizer(name, bits=bits)


@pytest.mark.parametrize("name", ["rtn", "nf4", "optq"])
@pytest.mark.parametrize("group_size", [0, -2])
def test_impossible_group_sizes_are_refused(name: str, group_size: int) -> None:
    with pytest.raises(InputError, match=f"{name}: group_size={group_size}; give a positive number of columns, or -1"):
        quantizer(name, group_size=group_size)


@pytest.mark.parametrize("name", ["rtn", "optq"])
def test_a_group_larger_than_the_row_is_the_row(name: str) -> None:
    _, (_, weight, hessian), *_ = problems()
    whole, large = (quantizer(name, bits=3, group_size=size) for size in (-1, 1024))
    values = [made.dequantize(made.quantize(weight, hessian)) for made in (whole, large)]
    assert torch.equal(*values)


@pytest.mark.parametrize("name", ["rtn", "optq"])
def test_clip_search_is_worth_most_at_two_bits(name: str) -> None:
    gains = {}
    for bits in (2, 4):
        losses = []
        for clip in (False, True):
            made = quantizer(name, bits=bits, clip=clip)
            losses.append(sum(proxy_loss(w, made.dequantize(made.quantize(w, h)), h) for _, w, h in some_problems()))
        gains[bits] = losses[1] / losses[0]
    assert gains[2] < 0.8 and gains[2] < gains[4]


def some_problems() -> list[Any]:
    return [problem for problem in problems() if "with" not in problem[0]]
