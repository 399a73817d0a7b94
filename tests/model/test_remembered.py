"""Runs of a block that repeat earlier ones: computed once, to the same bits, within a limit of memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llmtools as lt
from llmtools.model import remembered
from llmtools.model.remembered import Remembered
from tests.models import tiny_model


class Counting(nn.Linear):
    """A linear that counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def quantized(monkeypatch: pytest.MonkeyPatch, limit: int) -> tuple[dict[str, Tensor], int]:
    """(the state of a model after calibrated quantization, how often its quantized layers computed a product)."""
    calls: Counter[str] = Counter()
    product = lt.QuantizedLinear.product

    def counted(layer: lt.QuantizedLinear, *args: Any) -> Tensor:
        calls["product"] += 1
        return product(layer, *args)

    torch.manual_seed(0)
    model = tiny_model("llama").bfloat16()
    text = [torch.randint(0, 60, (1, 24)) for _ in range(3)]
    with monkeypatch.context() as patched:
        patched.setattr(lt.QuantizedLinear, "product", counted)
        patched.setattr(Remembered.__init__, "__defaults__", (limit,))
        lt.quantize(model, "optq", text, bits=3, group_size=16)
    for module in model.modules():
        assert "forward" not in vars(module)
    return model.state_dict(), calls["product"]


def test_quantizing_is_the_same_with_less_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    most, once = quantized(monkeypatch, remembered.REMEMBERED_BYTES)
    none, often = quantized(monkeypatch, 0)
    some, fewer = quantized(monkeypatch, 7000)  # of outputs in float32, where bfloat16 is slow
    assert most.keys() == none.keys() == some.keys()
    assert all(torch.equal(most[name], none[name]) and torch.equal(some[name], none[name]) for name in most)
    assert once < fewer < often


def test_an_error_leaves_the_layers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_model("llama"), [torch.randint(0, 60, (1, 24))]
    steps: list[str] = []

    def stop(done: int, total: int, path: str) -> None:
        steps.append(path)
        if "gate_proj" in path:
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        lt.quantize(model, "optq", text, bits=3, group_size=16, on_step=stop)
    assert any("o_proj" in path for path in steps)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_is_computed_once_for_a_batch_and_call() -> None:
    layer, kept = Counting(4, 4), Remembered()
    kept.add([layer])
    x = torch.randn(2, 4)
    with torch.no_grad():
        layer(x)
        assert layer.calls == 1  # outside of a run nothing is kept
        for _ in range(3):
            for index in range(2):
                with kept.run(index):
                    first, second = layer(x * (index + 1)), layer(x + 1)
                    assert torch.equal(first, F.linear(x * (index + 1), layer.weight, layer.bias))
                    assert torch.equal(second, F.linear(x + 1, layer.weight, layer.bias))
    assert layer.calls == 1 + 4
    kept.close()
    layer(x)
    assert layer.calls == 6 and kept.bytes == 0


def test_what_the_model_writes_into_is_computed_again() -> None:
    layer, kept = Counting(4, 4), Remembered()
    kept.add([layer])
    x = torch.randn(2, 4)
    with torch.no_grad():
        plain = F.linear(x, layer.weight, layer.bias)
        for _ in range(3):
            with kept.run(0):
                y = layer(x)
                assert torch.equal(y, plain)
                y[:1].add_(1)  # through a view
    assert layer.calls == 3
    assert kept.bytes == y.numel() * y.element_size()


def test_attention_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, kept = torch.randn(1, 2, 5, 8), Remembered()
    with torch.no_grad():
        with kept.run(0):
            first = F.scaled_dot_product_attention(q, q, q)
        with kept.run(0):
            assert F.scaled_dot_product_attention(q, q, q) is first
        with kept.run(1):
            assert F.scaled_dot_product_attention(q, q, q) is not first
        assert F.scaled_dot_product_attention(q, q, q) is not first
