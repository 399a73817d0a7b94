"""Error propagation: weights that make up for the errors of the layers before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtools.errors import InputError
from llmtools.model.options import BlockTuning
from llmtools.model.propagation import DAMPING, ErrorSum, corrected
from llmtools.model.quantize import quantize
from llmtools.nn import QuantizedLinear, quantized_linears
from llmtools.nn.adapters import dequantize
from llmtools.quant import quantizer
from tests.models import FAMILIES, tiny_ids, tiny_mixture, tiny_model

BATCHES = [tiny_ids(2, 64, seed=seed) for seed in range(2)]


def last_hidden(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(ids, output_hidden_states=True).hidden_states[-1] for ids in BATCHES])


def packed_of(model: nn.Module) -> dict[str, Tensor]:
    return {f"{path}.{name}": t for path, layer in quantized_linears(model).items() for name, t in layer.packed.items()}


def inputs_of(model: nn.Module, path: str) -> Tensor:
    """What the linear at `path` reads in ``model(ids)``: [t, in] float32."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for ids in BATCHES:
            model(ids)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]).float() for x in seen])


def test_the_corrected_weight_is_the_ridge_regression_of_the_original_outputs() -> None:
    torch.manual_seed(0)
    x, seen = torch.randn(500, 12), torch.randn(500, 12)
    seen += 2 * x
    linear = nn.Linear(12, 5, bias=True)
    total = ErrorSum(12)
    for part, other in zip(x.split(100), seen.split(100), strict=True):
        total.add(part, other)
    hessian = seen.T @ seen / 500
    correction = total.correction(hessian, 1.0)
    assert correction is not None
    made = corrected(linear, correction)
    ridge = DAMPING * float(hessian.diagonal().mean()) * 500
    # |W x − V x̂|² + λ|V − W|²: rows of [x̂; √λ 1] against [W x; √λ W]
    inputs = torch.cat([seen, ridge**0.5 * torch.eye(12)]).double()
    outputs = torch.cat([x @ linear.weight.T, ridge**0.5 * linear.weight.T]).double()
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    torch.testing.assert_close(made.weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert made.bias is linear.bias
    half = total.correction(hessian, 0.5)
    assert half is not None
    torch.testing.assert_close(half, correction / 2)


def test_inputs_that_are_the_original_ones_correct_nothing() -> None:
    total, x = ErrorSum(8), torch.randn(40, 8)
    total.add(x, x)
    correction = total.correction(x.T @ x / 40, 1.0)
    assert correction is not None and not correction.any()


def test_inputs_of_other_tokens_are_not_compared() -> None:
    total, x = ErrorSum(8), torch.randn(40, 8)
    total.add(x, x + 1)
    total.add(x, x[:30])
    assert total.correction(x.T @ x / 40, 1.0) is None


@pytest.mark.parametrize("sequential", [True, False])
def test_every_weight_is_corrected_by_the_inputs_of_whole_networks(sequential: bool) -> None:
    """Replays the work with whole networks and one hook, which is slow and plainly right."""
    original, replayed, model = (tiny_model("llama") for _ in range(3))
    quantize(model, "rtn", BATCHES, bits=3, group_size=16, error_propagation=0.7, sequential=sequential)
    groups = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
              ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip
    made = quantizer("rtn", bits=3, group_size=16)
    for block in range(len(replayed.model.layers)):
        paths = [[f"model.layers.{block}.{name}" for name in group] for group in groups]
        for stage in [[group] for group in paths] if sequential else [paths]:
            pairs = [(inputs_of(original, group[0]), inputs_of(replayed, group[0])) for group in stage]
            for group, (x, seen) in zip(stage, pairs, strict=True):
                hessian = seen.T @ seen / len(seen)
                damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
                change = torch.linalg.solve(damped, seen.T @ (x - seen) / len(seen)).T
                for path in group:
                    linear: Any = replayed.get_submodule(path)
                    weight = linear.weight.detach()
                    expected = weight + 0.7 * weight @ change
                    layer: Any = model.get_submodule(path)
                    apart = layer.dequantize(dtype=torch.float32) - made.dequantize(made.quantize(expected))
                    assert apart.norm() < 0.02 * expected.norm(), path  # a code here and there is rounded otherwise
                    replayed.set_submodule(path, QuantizedLinear.from_packed(linear, layer.quantizer, layer.packed))
    assert torch.equal(last_hidden(replayed), last_hidden(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_is_nearer_to_the_original(family: str) -> None:
    original, plain, model = (tiny_model(family) for _ in range(3))
    quantize(plain, "rtn", BATCHES, bits=3, group_size=16)
    quantize(model, "rtn", BATCHES, bits=3, group_size=16, error_propagation=1.0)
    wanted = last_hidden(original)
    assert (last_hidden(model) - wanted).norm() < (last_hidden(plain) - wanted).norm()


def test_a_mixture_of_experts_is_quantized_too() -> None:
    model = tiny_mixture("mixtral")
    report = quantize(model, "rtn", BATCHES, bits=3, group_size=16, error_propagation=0.5)
    assert report.rows and torch.isfinite(last_hidden(model)).all()


def test_no_strength_changes_no_bit() -> None:
    plain, model = tiny_model("llama"), tiny_model("llama")
    quantize(plain, "optq", BATCHES, bits=3, group_size=16)
    quantize(model, "optq", BATCHES, bits=3, group_size=16, error_propagation=0.0)
    assert all(torch.equal(tensor, packed_of(model)[name]) for name, tensor in packed_of(plain).items())


def test_learned_rounding_starts_from_the_corrected_weights() -> None:
    model = tiny_model("llama")
    report = quantize(model, "signround", BATCHES, bits=3, group_size=16, iterations=4, error_propagation=0.5)
    assert report.reconstruction and torch.isfinite(last_hidden(dequantize(model))).all()


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(InputError, match=r"from 0 \(none\) to 1"):
        quantize(tiny_model("llama"), "rtn", BATCHES, error_propagation=strength)


def test_what_it_needs_and_what_it_does_not_go_with() -> None:
    with pytest.raises(InputError, match="needs calibration text"):
        quantize(tiny_model("llama"), "rtn", error_propagation=0.5)
    with pytest.raises(InputError, match="choose one of the two"):
        quantize(tiny_model("llama"), "optq", BATCHES, error_propagation=0.5, tuning=BlockTuning(epochs=1))
