"""The layer as other libraries meet it: what they may read, write, modify, count and save."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import llmtools
from llmtools import InputError, QuantizedLinear
from llmtools.nn.swap import quantized_linears
from llmtools.quant import ALL, Packed, Quantizer, TensorSpec, quantizer, quantizers
from tests.models import tiny_ids, tiny_model

QUICK: dict[str, dict[str, Any]] = {"quip": {"passes": 0}, "quip_sharp": {"passes": 0}, "signround": {"iterations": 2}}
BUILT_IN = [name for name in quantizers.names() if quantizers.known(name).__module__.startswith("llmtools.")]
WIDTH, HEIGHT = {"gguf": 64, "qtip_hybrid": 48}, {"qtip_hybrid": 32}
"""Columns of those that do not take any number."""


@dataclass(frozen=True)
class Strange(Quantizer):
    """A plug-in whose tensors have the names by which PEFT and others recognise the layers of other quantizers."""

    name: ClassVar[str] = "strange"

    names: ClassVar[tuple[str, ...]] = (
        "qweight", "W_q", "codebooks", "quant_state", "SCB", "state", "qzeros", "scales", "weight_packed", "base_layer",
    )  # fmt: skip

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        codes = {name: TensorSpec((out_features, 1), torch.int32) for name in self.names}
        return {"values": TensorSpec((out_features, in_features), torch.float32)} | codes

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        codes = {name: torch.full((weight.shape[0], 1), 7, dtype=torch.int32) for name in self.names}
        return {"values": weight.detach().float()} | codes

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        return packed["values"][rows].to(dtype)


def made(name: str) -> Quantizer:
    return Strange() if name == "strange" else quantizer(name, **QUICK.get(name, {}))


def layer_of(name: str = "rtn", out: int | None = None, n: int = 40, **options: Any) -> QuantizedLinear:
    dense = nn.Linear(n, out or HEIGHT.get(name, 24), **options)
    return QuantizedLinear.from_linear(dense, made(name), torch.eye(n))


# ---- adapters that do nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BUILT_IN, "strange"])
def test_an_adapter_that_is_zero_changes_no_bit_and_shows_the_weight(name: str) -> None:
    """T5, DeepSeek V3.2 and Mamba read the type and the values of an adapted layer's `weight`."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layer_of(name, n, n, bias=True), layer_of(name, n=n)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x.to(self.first.weight.dtype))
            return self.second(hidden) + hidden @ self.second.weight.T.to(hidden.dtype)

    n = WIDTH.get(name, 40)
    model, x = Reads(), torch.randn(3, n)
    before = model(x)
    adapted = get_peft_model(model, LoraConfig(target_modules=["first", "second"]))
    assert torch.equal(adapted(x), before)
    for path in ("first", "second"):
        wrapped = adapted.base_model.model.get_submodule(path)
        assert wrapped.weight.shape == wrapped.base_layer.dequantize().shape
        assert wrapped.weight.dtype == wrapped.base_layer.dtype == torch.float32


@pytest.mark.parametrize("name", ["rtn", "nf4", "quip_sharp", "strange"])
def test_packed_tensors_are_parameters_and_no_attributes(name: str) -> None:
    layer = layer_of(name)
    packed = layer.packed
    assert set(packed) == {key for key, _ in layer.named_parameters()} - {"bias"} == set(layer.state_dict()) - {"bias"}
    for key, tensor in packed.items():
        assert not hasattr(layer, key)
        with pytest.raises(AttributeError, match=rf"layer\.packed\['{key}'\]"):
            getattr(layer, key)
        assert layer.get_parameter(key) is tensor  # by name, as loaders ask
    x = torch.randn(2, 40)
    assert torch.equal(torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)), layer(x))


@pytest.mark.parametrize("name", ["rtn", "quip_sharp", "strange"])
def test_a_layer_is_copied_pickled_and_loaded_whole(name: str) -> None:
    layer, x = layer_of(name), torch.randn(2, 40)
    other = QuantizedLinear(40, 24, made(name), bias=True)
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), layer(x))


# ---- the weight ------------------------------------------------------------------------------------------------------

ONE = torch.tensor([0])
WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda w: w.add_(1),
    "data.add_": lambda w: w.data.add_(1),
    "data = ": lambda w: setattr(w, "data", torch.zeros(24, 40)),
    "[0] = ": lambda w: w.__setitem__(0, 1.0),
    "[0].zero_": lambda w: w[0].zero_(),
    "[0].data.zero_": lambda w: w[0].data.zero_(),
    "[0] data = ": lambda w: setattr(w[0], "data", torch.zeros(40)),
    "[1:3][0] = ": lambda w: w[1:3].__setitem__(0, 1.0),
    "T[0].add_": lambda w: w.T[0].add_(1),
    "reshape.scatter_add_": lambda w: w.data.reshape(-1).scatter_add_(0, ONE, torch.ones(1)),
    "view.index_put_": lambda w: w.view(-1).index_put_((ONE,), torch.ones(1)),
    "narrow.fill_": lambda w: w.narrow(0, 0, 2).fill_(1),
    "unbind.mul_": lambda w: w.unbind()[3].mul_(2),
    "chunk.copy_": lambda w: w.chunk(2)[1].copy_(torch.zeros(12, 40)),
    "diagonal.zero_": lambda w: w.diagonal().zero_(),
    "unfold.zero_": lambda w: w.unfold(1, 8, 8).zero_(),
    "detach.sub_": lambda w: w.detach().sub_(1),
    "out=": lambda w: torch.add(w, 1, out=w),
    "out= of a view": lambda w: torch.neg(torch.ones(40), out=w[0]),
    "_foreach_add_": lambda w: torch._foreach_add_([torch.zeros(1), w.data[0]], 1.0),
    "nn.init": lambda w: nn.init.normal_(w),
    "[0] += ": lambda w: w[0].__iadd__(1),
    "numpy": lambda w: w.numpy().__setitem__(0, 1.0),
    "numpy of a view": lambda w: w[0].numpy().__setitem__(0, 1.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_no_write_into_the_weight_or_a_view_of_it_is_lost_in_silence(write: str) -> None:
    layer = layer_of()
    before = layer.dequantize()
    with torch.no_grad(), pytest.raises((InputError, ValueError), match=r"llmtools\.merge|read-only"):
        WRITES[write](layer.weight)
    assert torch.equal(layer.dequantize(), before)


READS: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda w: w.sum(),
    "row": lambda w: w[3] * 2,
    "rows": lambda w: torch.stack([row.abs().max() for row in w]),
    "item": lambda w: w[0, 0].item(),
    "tolist": lambda w: w[0].tolist(),
    "numpy": lambda w: np.asarray(w[1:3]).copy(),
    "product": lambda w: torch.ones(2, 40) @ w.T,
    "float64": lambda w: w.double(),
    "bfloat16": lambda w: w.to(torch.bfloat16),
    "deepcopy": copy.deepcopy,
    "deepcopy of a row": lambda w: copy.deepcopy(w[0]),
    "data of data": lambda w: w.data.data[0].data + 1,
    "split": lambda w: torch.cat(torch.split(w, [5, 19])),
    "out=": lambda w: torch.mm(torch.ones(2, 40), w.T, out=torch.empty(2, 24)),
    "index": lambda w: w[torch.tensor([0, 2])],
    "torch.save": lambda w: torch.load(_saved({"w": w, "row": w[0]}))["row"],
}


def _saved(value: Any) -> io.BytesIO:
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return file


@pytest.mark.parametrize("read", READS)
def test_the_weight_reads_as_a_dense_one(read: str) -> None:
    layer = layer_of()
    got, expected = READS[read](layer.weight), READS[read](layer.dequantize())
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(expected))


@pytest.mark.parametrize("own", [Tensor.clone, Tensor.double, lambda w: w[0].clone(), lambda w: w + 0, copy.deepcopy])
def test_what_is_no_view_of_the_weight_may_be_written(own: Callable[[Tensor], Tensor]) -> None:
    value = own(layer_of().weight)
    assert type(value) is Tensor
    value.zero_()
    assert not value.any()


def test_a_layer_takes_back_its_own_weight_and_no_other() -> None:
    layer, other = layer_of(), layer_of()
    before = layer.dequantize()
    layer.weight = layer.weight  # type: ignore[method-assign]
    layer.weight = layer.weight.data  # type: ignore[method-assign]
    for value in (other.weight, layer.weight.T, before, nn.Parameter(before), None):
        with pytest.raises(InputError, match=r"llmtools\.merge"):
            layer.weight = value  # type: ignore[assignment,method-assign]
    assert torch.equal(layer.dequantize(), before)


# ---- the output ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [(), (3,), (2, 3), (2, 40), (0,)], ids=str)
@pytest.mark.parametrize("name", [*BUILT_IN, "strange"])
def test_the_output_may_be_modified_in_place(name: str, before: tuple[int, ...]) -> None:
    shape = (*before, WIDTH.get(name, 40))
    layer = layer_of(name, n=shape[-1])
    x, shift = torch.randn(shape, requires_grad=True), torch.randn(layer.out_features, requires_grad=True)
    with torch.no_grad():
        quiet = layer(x)
    for y in (layer(x), layer(x.detach()), quiet):
        expected = 2 * (y.detach() + shift)
        y += shift
        y *= 2
        assert torch.equal(y, expected)
    y = layer(x)
    y[..., 0] = 0
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize()[1:].sum(0).expand(shape), rtol=1e-4, atol=1e-4)


# ---- counting, saving, sharding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtn", "nf4", "quip_sharp"])
def test_parameters_are_counted_as_those_of_the_dense_model(name: str) -> None:
    model = tiny_model(intermediate_size=100)
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert llmtools.count_parameters(model) == (dense, dense)
    llmtools.quantize(model, made(name), [tiny_ids()])
    model.requires_grad_(False)
    assert llmtools.count_parameters(model) == (0, dense)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=4))
    adapters = 2 * 4 * (64 + 64)
    assert llmtools.count_parameters(adapted) == (adapters, dense + adapters)


@pytest.mark.filterwarnings("ignore")  # torch speaks about its own storages
def test_accelerate_saves_and_loads_the_state_of_rows_of_any_width(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = tiny_model(intermediate_size=100)
    llmtools.quantize(model, "rtn", bits=3, group_size=32)
    layers = quantized_linears(model).values()
    assert sum("columns" in layer.packed for layer in layers) > 1
    accelerator = Accelerator(cpu=True)
    adapted = accelerator.prepare(get_peft_model(model, LoraConfig(target_modules="all-linear", r=4)))
    before = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    accelerator.save_state(str(tmp_path / "state"))
    for parameter in adapted.parameters():
        parameter.data.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    after = adapted.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_unloading_gives_the_base_back() -> None:
    model = tiny_model()
    llmtools.quantize(model, "rtn")
    with torch.no_grad():
        before = model(tiny_ids()).logits
        adapted: PeftModel = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        assert not torch.equal(adapted(tiny_ids()).logits, before)
        assert torch.equal(adapted.unload()(tiny_ids()).logits, before)


@pytest.mark.parametrize(("version", "refused"), [("1", True), (None, True), ("2", False)])
def test_fsdp1_is_refused_in_one_line(version: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version is not None:
        monkeypatch.setenv("FSDP_VERSION", version)
    model = nn.Linear(4, 4)
    if refused:
        with pytest.raises(InputError, match="use FSDP2"):
            llmtools.prepare_for_training(model, gradient_checkpointing=False)
    else:
        llmtools.prepare_for_training(model, gradient_checkpointing=False)
