"""Weights of any magnitude: float16 scales where they suit, float32 where they do not, and nothing lost in silence."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmtools
from llmtools import QuantizedLinear
from llmtools.errors import InputError
from llmtools.nn.swap import quantized_linears
from llmtools.quant import from_spec, quantizer
from tests.models import tiny_ids, tiny_model

QUANTIZERS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 3},
    "rtn-symmetric": {"bits": 4, "symmetric": True},
    "rtn-8": {"bits": 8, "clip": False},
    "nf4": {},
    "nf4-nested": {"double_quantization": True},
    "optq": {"act_order": True},
    "hqq": {},
    "awq": {},
    "quip": {"passes": 0},
    "quip-groups": {"passes": 0, "group_size": 16},
    "quip_sharp": {"passes": 0},
    "qtip": {"state_bits": 8},
    "signround": {"iterations": 5},
    "affine": {},
}
SWITCHED = [name for name in QUANTIZERS if not name.startswith("nf4")]
MAGNITUDES = (2.0**-60, 2.0**-30, 2.0**-27, 2.0**-24, 2.0**-20, 2.0**-17, 2.0**-14, 2.0**17, 2.0**20, 2.0**40)


def made(name: str, **options: Any) -> Any:
    return quantizer(name.partition("-")[0], **QUANTIZERS[name] | options)


def drawn() -> tuple[Tensor, Tensor]:
    """A weight with uneven rows, and the second moment of uneven inputs."""
    weight = torch.randn(24, 64) * (0.5 + torch.rand(24, 1))
    x = torch.randn(256, 64) * (0.1 + torch.rand(64))
    return weight, x.T @ x / 256


def layer_of(weight: Tensor, chosen: Any, hessian: Tensor) -> QuantizedLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return QuantizedLinear.from_linear(linear, chosen, hessian)


def error(weight: Tensor, layer: QuantizedLinear) -> float:
    return float((layer.dequantize(dtype=torch.float32).double() - weight.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_error_of_a_layer_is_that_of_ordinary_magnitudes(name: str) -> None:
    """HQQ's proximal step is not the same in other units; all else is, but for the rounding of small scales."""
    weight, hessian = drawn()
    ordinary = error(weight, layer_of(weight, made(name), hessian))
    for magnitude in MAGNITUDES:
        scaled = weight * magnitude
        relative = error(scaled, layer_of(scaled, made(name), hessian))
        assert relative <= ordinary * (1.25 if name == "hqq" else 1.02) + 1e-3, magnitude


@pytest.mark.parametrize("name", SWITCHED)
def test_only_layers_that_need_it_get_float32_scales(name: str, caplog: pytest.LogCaptureFixture) -> None:
    weight, hessian = drawn()
    for magnitude, changed in ((1.0, False), (0.02, False), (2.0**-30, True), (2.0**21, True)):
        caplog.clear()
        layer = layer_of(weight * magnitude, made(name), hessian)
        assert layer.quantizer == (made(name, scale_type="float32") if changed else made(name))
        lines = [record for record in caplog.records if "float32 scales" in record.getMessage()]
        assert len(lines) == changed and all(record.levelno == logging.WARNING for record in lines)


def test_rows_that_are_nearly_zero_change_nothing() -> None:
    weight, hessian = drawn()
    weight[3] *= 1e-9
    weight[5] = 0
    assert layer_of(weight, made("rtn"), hessian).quantizer == made("rtn")
    assert layer_of(torch.zeros_like(weight), made("rtn"), hessian).quantizer == made("rtn")


@pytest.mark.parametrize("name", SWITCHED)
def test_a_quantizer_by_itself_says_what_it_cannot_hold(name: str, caplog: pytest.LogCaptureFixture) -> None:
    weight, hessian = drawn()
    made(name).quantize(weight, hessian)
    assert not caplog.records
    made(name).quantize(weight * 2.0**-30, hessian)
    assert sum("choose scale_type=float32" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("name", SWITCHED)
def test_the_type_of_scales_is_in_a_configuration_only_where_it_is_chosen(name: str) -> None:
    """`affine`, which had the option from the start, always says it."""
    assert ("scale_type" in made(name).spec()) == (name == "affine")
    wide = made(name, scale_type="float32")
    assert wide.spec()["scale_type"] == "float32" and from_spec(json.loads(json.dumps(wide.spec()))) == wide
    with pytest.raises(InputError, match=r"scale_type: 'float33'; did you mean 'float32'"):
        made(name, scale_type="float33")


@pytest.mark.parametrize("name", ["rtn", "optq", "signround"])
def test_a_checkpoint_remembers_which_layers_have_wide_scales(name: str, tmp_path: Path) -> None:
    """The same function in other units: the inputs of down_proj times 1e8, its weights by 1e8."""
    model = tiny_model()
    small = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    with torch.no_grad():
        for path in small:
            model.get_submodule(path).weight.mul_(1e-8)
            model.get_submodule(path.replace("down", "up")).weight.mul_(1e8)
    few = {"iterations": 2} if name == "signround" else {}
    report = llmtools.quantize(model, name, [tiny_ids()], group_size=32, **few)
    ups = [path.replace("down", "up") for path in small]
    assert {row.path for row in report.rows if "scale_type" in row.quantizer} == {*small, *ups}
    assert max(row.relative_error for row in report.rows) < 0.2
    expected = model(tiny_ids()).logits
    folder = llmtools.save(model, None, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert [spec.get("scale_type") for spec in config["quantizers"]] == [None, "float32"]
    opened = AutoModelForCausalLM.from_pretrained(folder)
    layers = quantized_linears(opened)
    assert all(layers[path].packed["scales"].dtype == torch.float32 for path in small + ups)
    assert torch.equal(opened(tiny_ids()).logits, expected)
