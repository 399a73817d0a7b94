"""Fused experts as linears: the same numbers as transformers' own forward, and the way back to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import llmtools
import llmtools.model.transformers_integration
from benchmarks.tiny import tiny_model
from llmtools.errors import InputError
from llmtools.kernels.grouped import multiplies
from llmtools.nn.experts import (
    IMPLEMENTATION,
    experts_forward,
    fuse_dense,
    fused_experts,
    route_all,
    unfuse_all,
    unfused_experts,
    unfused_within,
)
from llmtools.nn.linear import QuantizedLinear
from llmtools.nn.swap import quantized_linears

KINDS = {
    "mixtral": "gate and up in one matrix",
    "gpt_oss": "transposed, interleaved, with biases, a gate of its own",
    "nemotron_h": "without a gate",
    "deepseek_v4": "a gate of its own",
}


def drawn(family: str) -> Any:
    """A tiny model with weights wide enough that experts matter."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in fused_experts(model).values():
            for parameter in module.parameters(recurse=False):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def routed(module: Any, tokens: int = 7, k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, and random experts and weights for them."""
    generator = torch.Generator().manual_seed(2)
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    x = torch.randn(tokens, width, generator=generator)
    ids = torch.stack([torch.randperm(module.num_experts, generator=generator)[:k] for _ in range(tokens)])
    return x, ids, torch.rand(tokens, k, generator=generator)


def routed_among(module: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of experts that are linears."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, module.get_submodule("0.w_up").in_features, generator=generator)
    ids = torch.stack([torch.randperm(module.num_experts, generator=generator)[:2] for _ in range(tokens)])
    return x, ids, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("family", KINDS)
def test_unfused_experts_compute_what_the_family_does(family: str) -> None:
    model = drawn(family)
    path, module = next(iter(fused_experts(model).items()))
    x, ids, weights = routed(module)
    expected = type(module).forward.__wrapped__(module, x, ids, weights)
    unfuse_all(model)
    assert module.config._experts_implementation == IMPLEMENTATION
    assert model.get_submodule(path) is module
    torch.testing.assert_close(module(x, ids, weights), expected, rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("family", KINDS)
def test_fusing_again_gives_the_same_bits(family: str) -> None:
    model = drawn(family)
    before = copy.deepcopy(model.state_dict())
    was = model.config._experts_implementation
    with unfused_within(model) as parts:
        assert not fused_experts(model)
        for name, (fused, part) in parts.items():
            assert torch.equal(model.get_parameter(name), part.of(before[fused]))
        if family == "mixtral":  # nothing was copied
            weights = [each.get_submodule("0.w_up").weight for each in unfused_experts(model).values()]
            assert all(each.untyped_storage().nbytes() > each.nbytes for each in weights)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], values) for name, values in before.items())
    assert model.config._experts_implementation == was


def test_gradients_of_tokens_and_weights_are_those_of_the_family() -> None:
    model = drawn("gpt_oss")
    module: Any = next(iter(fused_experts(model).values()))
    x, ids, weights = routed(module)

    def gradients() -> list[torch.Tensor]:
        given = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        forward = module if module._parameters.get("down_proj") is None else type(module).forward.__wrapped__
        out = forward(*([module] if forward is not module else []), given[0], ids, given[1])
        return list(torch.autograd.grad(out.square().sum(), given))

    expected = gradients()
    unfuse_all(model)
    for found, each in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)


def test_a_choice_of_no_expert_adds_nothing() -> None:
    model = drawn("mixtral")
    module: Any = next(iter(fused_experts(model).values()))
    x, ids, weights = routed(module)
    unfuse_all(model)
    first = experts_forward(module, x, ids, weights * torch.tensor([1.0, 0.0]))
    ids[:, 1] = module.num_experts
    torch.testing.assert_close(experts_forward(module, x, ids, weights), first)
    ids[:, 0] = module.num_experts
    assert not experts_forward(module, x, ids, weights).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decoded_token_has_one_call_a_projection_with_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = drawn("mixtral").to(dtype)
    llmtools.quantize(model, "rtn", bits=4, group_size=16)
    module: Any = next(iter(unfused_experts(model).values()))
    x, ids, weights = routed_among(module, tokens=2)
    x = x.to(dtype)
    calls: list[int] = []
    forward = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    with torch.no_grad():
        at_once = experts_forward(module, x, ids, weights)
        once = len(calls)
        for linear in quantized_linears(module).values():
            linear.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(experts_forward(module, x, ids, weights), at_once, rtol=0, atol=0)
    assert len(calls) - once == 3 * len(ids.unique())  # hooks see each linear
    assert once == (0 if multiplies(x.device, 4) else 3 * len(ids.unique()))
    given = x.clone().requires_grad_()
    torch.testing.assert_close(experts_forward(module, given, ids, weights).detach(), at_once)
    assert len(calls) == once + 6 * len(ids.unique())


def test_an_expert_without_tokens_is_not_touched() -> None:
    model = drawn("mixtral")
    module: Any = next(iter(fused_experts(model).values()))
    x, ids, weights = routed(module)
    unfuse_all(model)
    for name, expert in module.named_children():
        if name == "3":
            expert.w_up.forward = pytest.fail
    experts_forward(module, x, ids % 3, weights)


def test_all_tokens_may_visit_all_experts_and_outputs_stay() -> None:
    model = drawn("mixtral")
    module: Any = next(iter(fused_experts(model).values()))
    x, ids, weights = routed(module)
    unfuse_all(model)
    expected = module(x, ids, weights)
    seen: list[int] = []
    for expert in range(module.num_experts):
        module.get_submodule(f"{expert}.w_down").register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with route_all():
        torch.testing.assert_close(module(x, ids, weights), expected)
    assert seen == [len(x)] * module.num_experts


def test_expert_parallelism_is_refused() -> None:
    model = drawn("mixtral")
    for module in fused_experts(model).values():
        module._is_expert_parallel = True  # type: ignore[assignment]
    with pytest.raises(InputError, match="expert parallelism"):
        unfuse_all(model)


def test_a_module_with_other_parameters_stays_fused() -> None:
    model = drawn("mixtral")
    for module in fused_experts(model).values():
        module.register_parameter("scale", torch.nn.Parameter(torch.ones(4)))
    assert not fused_experts(model)
    fuse_dense(model)
    assert model.config._experts_implementation != IMPLEMENTATION


def test_experts_that_are_given_all_tokens_are_known_by_what_they_compute() -> None:
    model = tiny_model("llama4_text")
    path, module = next(iter(fused_experts(model).items()))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(module.num_experts * 5, 64, generator=torch.Generator().manual_seed(0))  # type: ignore[operator]
    x[3:12] = 0
    expected = module(x)
    with unfused_within(model):
        assert model.get_submodule(path) is not module
        torch.testing.assert_close(model.get_submodule(path)(x), expected, rtol=1e-5, atol=1e-6)
    assert model.get_submodule(path) is module
    assert all(torch.equal(model.state_dict()[name], values) for name, values in before.items())
    module.act_fn = torch.nn.Identity()
    assert fused_experts(model)
    forward = type(module).forward

    class Other(type(module)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * forward(self, hidden_states)

    module.__class__ = Other
    assert path not in fused_experts(model)


def test_experts_that_give_tokens_back_as_they_are_stay_what_they_are() -> None:
    model = tiny_model("longcat_flash")
    path, module = next((path, each) for path, each in fused_experts(model).items())
    former: Any = module
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in former.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    before = copy.deepcopy(model.state_dict())
    x, weights = torch.randn(9, 64, generator=generator), torch.rand(9, 2, generator=generator)
    ids = torch.stack([torch.randperm(former.total_experts, generator=generator)[:2] for _ in range(9)])
    assert former.total_experts > former.num_routed_experts and (ids >= former.num_routed_experts).any()
    expected = former(x, ids, weights)
    with unfused_within(model):
        assert model.get_submodule(path) is not former
        torch.testing.assert_close(model.get_submodule(path)(x, ids, weights), expected, rtol=1e-5, atol=1e-6)
    assert model.get_submodule(path) is former
    for name, values in model.state_dict().items():
        used = slice(0, former.num_routed_experts if name.endswith("experts.gate_up_proj") else None)
        assert torch.equal(values[used], before[name][used]), name
    former.act_fn = torch.nn.Identity()
    assert path in fused_experts(model)
    former.identity_expert = torch.nn.ReLU()
    assert path not in fused_experts(model)
