"""The waist: names and options to quantizers, their configurations, and what a file may not do."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtools.errors import InputError, within
from llmtools.quant import NF4, OPTQ, RTN, HessianSum, Quantizer, from_spec, quantizer, quantizers
from llmtools.quant.laws import problems


def test_a_quantizer_is_found_by_name_with_its_options() -> None:
    assert quantizer("optq", bits=3, group_size=64) == OPTQ(bits=3, group_size=64)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"quantizer 'otpq' is not known; did you mean 'optq'\? \(there are: "):
        quantizer("otpq")


def test_an_unknown_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"optq: no option 'bit'; did you mean 'bits'\? \(there are: act_order, bits, "
    ):
        quantizer("optq", bit=3)


@pytest.mark.parametrize("name", quantizers.names())
def test_the_configuration_is_json_that_makes_the_same_quantizer(name: str) -> None:
    made = quantizer(name)
    assert from_spec(json.loads(json.dumps(made.spec()))) == made
    assert made.spec()["name"] == name


def test_a_file_cannot_make_us_import_anything() -> None:
    with pytest.raises(InputError, match="quantizer 'antigravity:Quantizer' is not known"):
        from_spec({"name": "antigravity:Quantizer"})


@pytest.mark.parametrize("spec", [{}, {"bits": 3}, {"name": 3}], ids=str)
def test_a_spec_without_a_name_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a quantizer is specified as"):
        from_spec(spec)


def test_the_user_may_name_a_class_of_any_module() -> None:
    assert quantizer("llmtools.quant.presets:RTN", bits=2) == RTN(bits=2)


@pytest.mark.parametrize("name", ["fractions:Fraction", "collections:OrderedDict"])
def test_what_is_no_quantizer_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"is no subclass of llmtools\.Quantizer"):
        quantizer(name)


def test_quantizers_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        quantizer("rtn").bits = 3  # type: ignore[attr-defined]


# ---- bad weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("made", [RTN(), NF4(), OPTQ()], ids=lambda made: made.name)
def test_weights_that_are_not_finite_are_refused_by_name(made: Quantizer, bad: float) -> None:
    weight = torch.randn(4, 8)
    weight[1, 2] = bad
    with within("layers.0.up"), pytest.raises(InputError, match=r"layers\.0\.up: NaN or inf in the weight"):
        made.quantize(weight, torch.eye(8))


def test_a_weight_is_a_matrix() -> None:
    with pytest.raises(InputError, match=r"a weight has shape \[out, in\], this one has \[4\]"):
        RTN().quantize(torch.ones(4))


def test_calibrated_quantizers_say_that_they_want_data() -> None:
    with pytest.raises(InputError, match="optq needs calibration data"):
        OPTQ().quantize(torch.randn(4, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e35])
@pytest.mark.parametrize("name", [name for name in quantizers.names() if quantizers.known(name).needs_hessian])
def test_a_hessian_that_is_not_finite_is_refused_by_name(name: str, bad: float) -> None:
    hessian = torch.eye(8)
    hessian[2, 2] = bad
    with within("layers.0.up"), pytest.raises(InputError, match=r"layers\.0\.up: the second moment"):
        quantizer(name).quantize(torch.randn(4, 8), hessian)


# ---- whatever the weight's type ------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [RTN(bits=3), NF4(), OPTQ(bits=3)], ids=lambda made: made.name)
def test_half_precision_weights_are_quantized_as_their_float32_copies(made: Quantizer) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weight, hessian = draw()
        half = weight.to(dtype)
        got, expected = made.quantize(half, hessian), made.quantize(half.float(), hessian)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("made", [RTN(bits=3), NF4(), OPTQ(bits=3)], ids=lambda made: made.name)
def test_strides_do_not_matter(made: Quantizer) -> None:
    weight, hessian = draw()
    strided = weight.T.contiguous().T
    got, expected = made.quantize(strided, hessian), made.quantize(weight, hessian)
    assert all(torch.equal(got[name], expected[name]) and got[name].is_contiguous() for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made", [RTN(bits=3), NF4(), OPTQ(bits=3)], ids=lambda made: made.name)
def test_values_are_float32_rounded_once(made: Quantizer, dtype: torch.dtype) -> None:
    packed = made.quantize(*draw())
    assert torch.equal(made.dequantize(packed, dtype=dtype), made.dequantize(packed).to(dtype))


def draw() -> tuple[Tensor, Tensor]:
    """The weight [24, 96] and Hessian of a law."""
    _, (_, weight, hessian), *_ = problems()
    return weight, hessian


def test_gradients_do_not_reach_the_packed_tensors() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    assert not any(tensor.requires_grad for tensor in RTN().quantize(weight).values())


def test_a_hessian_sum_is_what_calibrated_quantizers_take() -> None:
    total = HessianSum(8)
    total.add(torch.randn(5, 3, 8))
    assert OPTQ(bits=2).quantize(torch.randn(4, 8), total.value())["qweight"].shape == (4, 1)
