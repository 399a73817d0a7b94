"""A half-precision model that is computed in float32 is the same model in float32, and keeps its own weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtools.checkpoint.loading import compute_fast
from llmtools.model.fisher import block_gradients
from llmtools.model.quantize import quantize
from llmtools.nn import quantized_linears, wide
from llmtools.nn.wide import run_wide, widen
from tests.models import tiny_ids, tiny_mixture, tiny_model

IDS = tiny_ids(2, 24)


@pytest.fixture
def slow_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without products of half precision."""
    monkeypatch.setattr(wide.build, "has_bfloat16", lambda: False)


@pytest.fixture
def fast_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide.build, "has_bfloat16", lambda: True)


def bfloat16(family: str = "llama") -> Any:
    return tiny_model(family).to(torch.bfloat16)


def packed_bytes(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": each
        for path, layer in quantized_linears(model).items()
        for name, each in layer.packed.items()
    }


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixture"])
def test_a_run_is_that_of_the_model_in_float32(family: str, slow_halves: None) -> None:
    model: Any = tiny_mixture("mixtral").to(torch.bfloat16) if family == "mixture" else bfloat16(family)
    before = {name: (each.data_ptr(), each.dtype) for name, each in model.named_parameters()}
    with torch.no_grad():
        found = run_wide(model, (), {"input_ids": IDS}).logits
        assert torch.equal(found, copy.deepcopy(model).float()(input_ids=IDS).logits)
        assert not torch.equal(found, model(input_ids=IDS).logits.float())
    assert {name: (each.data_ptr(), each.dtype) for name, each in model.named_parameters()} == before


def test_a_widened_model_keeps_its_packed_tensors(slow_halves: None) -> None:
    model = bfloat16()
    quantize(model, "quip_sharp", [IDS], bits=2)
    former = packed_bytes(model)
    others = [each for name, each in (*model.named_parameters(), *model.named_buffers()) if name not in former]
    assert {each.dtype for each in others} == {torch.bfloat16}
    widen(model)
    assert {layer.dtype for layer in quantized_linears(model).values()} == {torch.float32}
    assert all(each is packed_bytes(model)[name] for name, each in former.items())
    assert {each.dtype for name, each in model.named_parameters() if name not in former} == {torch.float32}
    assert model(input_ids=IDS).logits.dtype == torch.float32


def test_where_half_precision_is_fast_nothing_changes(fast_halves: None) -> None:
    model = bfloat16()
    expected = model(input_ids=IDS).logits
    widen(model)
    assert model.dtype == torch.bfloat16
    assert torch.equal(run_wide(model, (), {"input_ids": IDS}).logits, expected)


def test_quantizing_is_that_of_the_model_in_float32(slow_halves: None) -> None:
    """But for what the model computes around its blocks: rotary embeddings in its own type."""
    narrow, full = bfloat16(), bfloat16().float()
    full.model.rotary_emb.register_forward_hook(lambda module, inputs, out: tuple(x.bfloat16().float() for x in out))
    for model in (narrow, full):
        quantize(model, "optq", [IDS], bits=3, group_size=16)
    found, expected = packed_bytes(narrow), packed_bytes(full)
    assert found.keys() == expected.keys() and all(torch.equal(each, expected[name]) for name, each in found.items())
    assert {each.dtype for name, each in narrow.named_parameters() if name not in found} == {torch.bfloat16}


def test_gradients_are_those_of_the_model_in_float32(slow_halves: None) -> None:
    blocks = ["model.layers.0", "model.layers.1"]
    found, expected = (block_gradients(each, [(0, IDS)], blocks) for each in (bfloat16(), bfloat16().float()))
    for path in blocks:
        assert torch.equal(found[path][0], expected[path][0]) and found[path][0].any()


def test_without_memory_or_with_weights_in_files_a_model_stays_as_it_is(
    slow_halves: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = bfloat16()
    compute_fast(model, "disk")
    assert model.dtype == torch.bfloat16 and not caplog.records
    size = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(wide, "free_memory", lambda: size - 1)
    compute_fast(model)
    assert model.dtype == torch.bfloat16 and "many times slower" in caplog.text
    monkeypatch.setattr(wide, "free_memory", lambda: size)
    compute_fast(model)
    assert model.dtype == torch.float32
