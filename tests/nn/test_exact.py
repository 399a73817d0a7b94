"""Merge-aware adapters: the forward is the merged layer's to the bit, the gradient a plain LoRA branch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llmtools
from llmtools.errors import InputError
from llmtools.nn import QuantizedLinear, quantized_linears
from llmtools.nn.adapters import merge as merge_dense
from llmtools.nn.adapters import merge_into_packed
from llmtools.quant import quantizer
from llmtools.quant.laws import problems
from tests.models import ENCODABLE, tiny_ids, tiny_model
from tests.quant.test_laws import BUILT_IN, OPTIONS, QUICK

pytest.importorskip("peft")

import peft

from llmtools.model.exact_lora import exact_layers, register

CASES = [(name, options) for name in BUILT_IN for options in [QUICK.get(name, {}), *OPTIONS.get(name, [])]]


def layer_of(name: str, options: dict[str, Any], shape: tuple[int, int] = (48, 64)) -> QuantizedLinear:
    linear = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    x = torch.randn(256, shape[1])
    return QuantizedLinear.from_linear(linear, quantizer(name, **options), x.T @ x / len(x))


def exact(layer: nn.Module, rank: int = 4, size: float = 0.3, **options: Any) -> Any:
    """The layer with an adapter that changes its weight by about that share of its size."""
    holder = nn.Sequential(layer)
    config = register(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], **options))
    adapted = peft.get_peft_model(holder, config)
    (found,) = exact_layers(adapted).values()
    weight = layer.dequantize(dtype=torch.float32)  # type: ignore[operator]
    a, b = found.lora_A["default"].weight, found.lora_B["default"].weight
    with torch.no_grad():
        b.copy_(torch.randn(b.shape))
        b *= size * weight.norm() / (found.scaling["default"] * b @ a).norm()
    return found


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=["-".join([n, *(f"{k}={v}" for k, v in o.items())]) for n, o in CASES]
)
def test_the_forward_is_that_of_the_merged_layer(name: str, options: dict[str, Any]) -> None:
    shape = (48, 256) if name == "gguf" else (48, 64)
    layer = layer_of(name, options, shape)
    if not layer.quantizer.requantizes():
        pytest.skip("this quantizer does not encode on given scales")
    adapted, former = exact(layer), layer.dequantize(dtype=torch.float32)
    for tokens in (1, 3, 70):  # a GEMV kernel, and blocks
        x = torch.randn(tokens, shape[1])
        expected = adapted(x).detach()
        with torch.no_grad():
            assert torch.equal(adapted.eval()(x), expected)
        merged = QuantizedLinear.from_packed(nn.Linear(shape[1], shape[0]), layer.quantizer, adapted.train().codes())
        merged.bias = layer.bias
        assert torch.equal(merged(x), expected)
    with torch.autocast("cpu", torch.bfloat16):  # as half-precision training runs: the codes are those without it
        assert torch.equal(adapted(x).detach(), merged(x))
        assert all(torch.equal(codes, merged.packed[name]) for name, codes in adapted.codes().items())
    b, a = adapted.lora_B["default"].weight, adapted.lora_A["default"].weight
    target = former + adapted.scaling["default"] * (b @ a).detach()
    now = merged.dequantize(dtype=torch.float32)
    assert ((now - former) * (target - former)).sum() > 0  # some of the update is there, at any width


def test_gradients_are_straight_through() -> None:
    """Against autograd on Ŵ + s B A with its rounding as a constant: in x, A and B."""
    adapted = exact(layer_of("rtn", {"bits": 3, "group_size": 16}))
    x = torch.randn(2, 5, 64, requires_grad=True)
    grad = torch.randn(2, 5, 48)
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    got = torch.autograd.grad(adapted(x), [x, a, b], grad)
    base = adapted.base_layer
    rounded = base.quantizer.dequantize(adapted.codes())
    weight = rounded + adapted.scaling["default"] * (b @ a - (b @ a).detach())
    expected = torch.autograd.grad(x @ weight.T, [x, a, b], grad)
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


def test_a_bfloat16_input_trains_float32_adapters() -> None:
    adapted = exact(layer_of("nf4", {}))
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    y = adapted(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for each in (adapted.lora_A["default"].weight, adapted.lora_B["default"].weight):
        assert each.grad is not None and each.grad.dtype == torch.float32 and bool(each.grad.any())


def test_without_the_adapter_the_base_computes() -> None:
    layer = layer_of("rtn", {"bits": 4})
    x = torch.randn(3, 64)
    expected = layer(x)
    adapted = exact(layer)
    assert not torch.equal(adapted(x), expected)
    adapted.enable_adapters(False)
    assert torch.equal(adapted(x), expected)


def test_kept_codes_follow_the_adapter() -> None:
    adapted = exact(layer_of("rtn", {"bits": 4})).eval().requires_grad_(False)
    x = torch.randn(3, 64)
    first = adapted(x)
    assert adapted.codes() is adapted.codes()
    with torch.no_grad():
        adapted.lora_B["default"].weight.mul_(-1)
    assert not torch.equal(adapted(x), first)


def test_a_warm_up_is_plain_lora_and_evaluation_rounds() -> None:
    adapted = exact(layer_of("rtn", {"bits": 2}))
    x, rounded = torch.randn(3, 64), None
    rounded = adapted(x)
    adapted.rounds = False
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    plain = adapted.base_layer(x) + adapted.scaling["default"] * (x @ a.T @ b.T)
    torch.testing.assert_close(adapted(x), plain)
    assert torch.equal(adapted.eval()(x), rounded)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}], ids=str)
def test_adapters_that_are_more_than_an_update_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--merge exact"):
        register(peft.LoraConfig(target_modules=["0"], **options))


def test_two_adapters_at_once_are_refused() -> None:
    holder = nn.Sequential(layer_of("rtn", {"bits": 4}))
    adapted: Any = peft.get_peft_model(holder, register(peft.LoraConfig(r=2, target_modules=["0"])))  # type: ignore[arg-type]
    adapted.add_adapter("other", register(peft.LoraConfig(r=2, target_modules=["0"])))
    adapted.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="one at a time"):
        adapted(torch.randn(3, 64))


def test_an_adapter_on_a_dense_linear_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 48), layer_of("rtn", {"bits": 4}))
    adapted = peft.get_peft_model(model, register(peft.LoraConfig(target_modules=["0", "1"])))
    with pytest.raises(InputError, match="quantized linears only"):
        exact_layers(adapted)


@pytest.mark.parametrize(("name", "options"), ENCODABLE, ids=str)
def test_a_merged_model_has_the_logits_of_base_and_adapter(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, through a folder on the disk; and a dense merge is of the same weight."""
    model, ids = tiny_model("llama"), tiny_ids()
    llmtools.quantize(model, name, [ids], **QUICK.get(name, {}), **options)
    adapted: Any = peft.get_peft_model(model, register(peft.LoraConfig(r=4, target_modules="all-linear")))
    with torch.no_grad():
        for layer in exact_layers(adapted).values():
            layer.lora_B["default"].weight.normal_(0, 0.05)
        adapted.eval().requires_grad_(False)
        expected = adapted(ids).logits
        with adapted.disable_adapter():
            assert not torch.equal(adapted(ids).logits, expected)
    merged, _ = merge_into_packed(adapted)
    llmtools.save(merged, None, tmp_path / "merged")
    from llmtools.checkpoint.folder import load_model

    again = load_model(tmp_path / "merged")
    assert len(quantized_linears(again)) == 14
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)


def test_a_dense_merge_is_of_the_rounded_weight() -> None:
    model, ids = tiny_model("llama"), tiny_ids()
    llmtools.quantize(model, "rtn", bits=3, group_size=16)
    adapted: Any = peft.get_peft_model(model, register(peft.LoraConfig(r=4, target_modules="all-linear")))
    with torch.no_grad():
        for layer in exact_layers(adapted).values():
            layer.lora_B["default"].weight.normal_(0, 0.05)
        expected = adapted.eval()(ids).logits
        torch.testing.assert_close(merge_dense(adapted)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_change_below_half_a_step_keeps_every_code() -> None:
    """What is nearest decides: the rounded update of a weight on its grid is zero until half a step."""
    for _, weight, hessian in list(problems())[:2]:
        layer = QuantizedLinear.from_linear(
            nn.Linear(*reversed(weight.shape)), quantizer("quip_sharp", passes=0), hessian
        )
        with torch.no_grad():
            nothing = layer.quantizer.updated(
                layer.packed, 1e-6 * torch.ones(len(weight), 1), torch.ones(1, weight.shape[1])
            )
        assert all(torch.equal(nothing[name], layer.packed[name]) for name in nothing)
