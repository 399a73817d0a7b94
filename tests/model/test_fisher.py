"""Two-sided rounding: the moments are the Fisher information, and the network is nearer to the original."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmtools
from llmtools.errors import InputError
from llmtools.model.blocks import Block
from llmtools.model.fisher import (
    GradientSum,
    backward_of_samples,
    block_gradients,
    gradient_sums,
)
from llmtools.model.options import BlockTuning
from llmtools.model.quantize import quantize
from llmtools.model.walk import Calls, walk
from llmtools.nn import quantized_linears
from llmtools.quant import HessianSum
from tests.model.test_processes import in_threads
from tests.models import FAMILIES, tiny_ids, tiny_mixture, tiny_model

BATCHES = [tiny_ids(2, 48, seed=seed) for seed in range(3)]


def sums_of(model: nn.Module, paths: list[str]) -> dict[str, GradientSum]:
    """By block: what a walk finds in a network that nothing changes."""
    kept = block_gradients(model, enumerate(BATCHES), [f"model.layers.{k}" for k in range(2)])
    found: dict[str, GradientSum] = {}

    def visit(block: Block, calls: Calls) -> None:
        here = [path for path in paths if path.startswith(block.path)]
        found.update(gradient_sums(model, block, calls, kept[block.path], here))

    walk(model, BATCHES, visit)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_moments_by_block_are_those_of_one_backward_pass(family: str) -> None:
    model: Any = tiny_model(family)
    names = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    paths = [f"model.layers.{k}.{name}" for k in range(2) for name in names]
    found = sums_of(model, paths)
    outputs: dict[str, list[Tensor]] = {path: [] for path in paths}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            outputs[path].append(output)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    for seed, ids in enumerate(BATCHES):
        logits = model(ids).logits.flatten(0, -2)
        sampled = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(seed))
        (-logits.log_softmax(-1).gather(1, sampled).sum()).backward()
    for handle in handles:
        handle.remove()
    for path in paths:
        g = torch.cat([each.grad.flatten(0, 1) for each in outputs[path] if each.grad is not None])
        moment = HessianSum.value(found[path])
        torch.testing.assert_close(moment, g.T @ g / len(g), rtol=1e-3, atol=1e-5 * float(moment.max()))


def test_the_second_moments_estimate_the_divergence() -> None:
    """½ tr(G E H Eᵀ), over many samples, beside the divergence that a small change of one weight makes."""
    model: Any = tiny_model("llama")
    ids, path = torch.cat(BATCHES), "model.layers.1.mlp.down_proj"
    linear = model.get_submodule(path)
    seen: list[Tensor] = []
    gradients: list[Tensor] = []
    hooks = [linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, 1)))]
    hooks += [linear.register_full_backward_hook(lambda module, ins, outs: gradients.append(outs[0].flatten(0, 1)))]
    backward_of_samples(model, ((seed, ids) for seed in range(20)))
    for hook in hooks:
        hook.remove()
    x, g = torch.cat(seen), torch.cat(gradients)
    moment, hessian = g.T @ g / len(g), x.T @ x / len(x)
    with torch.no_grad():
        original = model(ids).logits.log_softmax(-1)
        error = 0.05 * linear.weight.std() * torch.randn_like(linear.weight)
        linear.weight += error
        changed = model(ids).logits.log_softmax(-1)
    true = float((original.exp() * (original - changed)).sum(-1).mean())
    assert 0.7 < 0.5 * float(((moment @ error @ hessian) * error).sum()) / true < 1.4


def test_a_moment_is_shrunk_by_what_its_tokens_leave_open() -> None:
    """By Ledoit and Wolf's share, spelt out; the more tokens, the less; and it is nearer to the truth for it."""
    g = torch.Generator().manual_seed(0)
    truth, shares = torch.diag(torch.linspace(0.5, 3, 20)), []
    for tokens in (60, 240):
        rows = torch.randn(tokens, 20, generator=g) @ truth.sqrt()
        total = GradientSum(20)
        for part in rows.view(2, -1, 20):
            total.add(part)
        mean, found = rows.T @ rows / tokens, total.value()
        average = mean.diagonal().mean() * torch.eye(20)
        noise = sum(float((row[:, None] * row - mean).square().sum()) for row in rows) / tokens**2
        shares.append(noise / float((mean - average).square().sum()))
        torch.testing.assert_close(found, (1 - shares[-1]) * mean + shares[-1] * average)
        assert (found - truth).norm() < (mean - truth).norm()
    assert 0 < shares[1] < shares[0] < 1


def test_one_token_with_all_of_the_gradient_says_nothing() -> None:
    rows = torch.randn(50, 8) * 1e-3
    rows[7] = torch.randn(8)
    total = GradientSum(8)
    total.add(rows)
    found = total.value()
    assert (found - found.diagonal().diag()).abs().max() < 0.1 * found.diagonal().mean()


def test_no_parameter_is_changed_or_gets_a_gradient() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    before = {name: (each.clone(), each.requires_grad) for name, each in model.named_parameters()}
    sums_of(model, ["model.layers.0.mlp.up_proj"])
    for name, each in model.named_parameters():
        assert torch.equal(each, before[name][0]) and each.requires_grad == before[name][1] and each.grad is None


def divergence(original: nn.Module, model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        one, other = (each(ids).logits.float().log_softmax(-1) for each in (original, model))
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize(("name", "options"), [("quip_sharp", {"bits": 2}), ("qtip", {"bits": 3, "state_bits": 8})])
@pytest.mark.parametrize("propagated", [0.0, 0.5])
def test_the_network_is_nearer_to_the_original(
    name: str, options: dict[str, Any], propagated: float, stories: Path, tinystories: Path
) -> None:
    """By the divergence of a trained model on text that is in no calibration."""
    original, tokenizer = llmtools.load(stories)
    text = llmtools.calibration(tinystories / "train.txt", tokenizer, samples=8, tokens=256)
    held_out = (tinystories / "held_out.txt").read_text()[:8000]
    ids = tokenizer(held_out, return_tensors="pt", verbose=False).input_ids[:, :2048].view(-1, 256)
    found = {}
    for rounding in ("one_sided", "two_sided"):
        model, _ = llmtools.load(stories)
        quantize(model, name, text, rounding=rounding, error_propagation=propagated, **options)
        found[rounding] = divergence(original, model, ids)
    assert found["two_sided"] < 0.95 * found["one_sided"], found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_rounded(family: str) -> None:
    plain, model = tiny_model(family), tiny_model(family)
    for each, rounding in ((plain, "one_sided"), (model, "two_sided")):
        quantize(each, "optq", BATCHES, bits=3, group_size=16, rounding=rounding)
    one, two = quantized_linears(plain), quantized_linears(model)
    assert one.keys() == two.keys()
    changed = [path for path in one if not torch.equal(one[path].packed["qweight"], two[path].packed["qweight"])]
    assert len(changed) > 0.7 * len(one), changed


def test_a_mixture_of_experts_and_other_quantizers_beside_it() -> None:
    """Experts see gradients of their own tokens; linears of a quantizer without a sweep are rounded as ever."""
    model = tiny_mixture("mixtral")
    report = quantize(
        model, "optq", BATCHES, bits=3, group_size=16, rounding="two_sided",
        overrides={"o_proj": {"name": "rtn", "bits": 3, "group_size": 16}},
    )  # fmt: skip
    assert {row.quantizer["name"] for row in report.rows} == {"optq", "rtn"}
    assert torch.isfinite(model(BATCHES[0]).logits).all()


def test_with_block_tuning_and_adapters() -> None:
    model = tiny_model("llama")
    report = quantize(
        model,
        "optq",
        BATCHES,
        bits=3,
        group_size=16,
        rounding="two_sided",
        tuning=BlockTuning(epochs=1),
        adapter_rank=2,
    )
    assert report.reconstruction and report.lora_init and torch.isfinite(model(BATCHES[0]).logits).all()


def test_processes_find_the_moments_of_one() -> None:
    alone = tiny_model("llama")
    models = [copy.deepcopy(alone) for _ in range(2)]
    quantize(alone, "optq", BATCHES, bits=3, group_size=16, rounding="two_sided")

    def work(processes: Any) -> dict[str, Tensor]:
        model = models[processes.rank]
        quantize(model, "optq", BATCHES, bits=3, group_size=16, rounding="two_sided", processes=processes)
        return {path: layer.dequantize() for path, layer in quantized_linears(model).items()}

    first, second = in_threads(2, work)
    assert all(torch.equal(first[path], second[path]) for path in first)
    for path in [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]:  # later inputs differ by what differs here
        same = torch.isclose(first[path], quantized_linears(alone)[path].dequantize(), rtol=1e-2, atol=1e-4)
        assert same.float().mean() > 0.95, path


def test_sums_of_processes_are_the_sum_of_all() -> None:
    rows = torch.randn(90, 8)
    whole = GradientSum(8)
    whole.add(rows)

    def work(processes: Any) -> Tensor:
        part = GradientSum(8)
        part.add(rows[:60] if processes.is_first else rows[60:])
        part.reduce(processes.add_up)
        return part.value()

    for found in in_threads(2, work):
        torch.testing.assert_close(found, whole.value())


def test_what_it_needs_and_what_it_does_not_go_with() -> None:
    with pytest.raises(InputError, match="two-sided rounding needs calibration text"):
        quantize(tiny_model("llama"), "rtn", rounding="two_sided")
    with pytest.raises(InputError, match="rtn has no two-sided rounding; use optq"):
        quantize(tiny_model("llama"), "rtn", BATCHES, rounding="two_sided")
    with pytest.raises(InputError, match="signround has no two-sided rounding; use optq"):
        quantize(tiny_model("llama"), "signround", BATCHES, rounding="two_sided")
    with pytest.raises(InputError, match="rounding='twosided'; did you mean"):
        quantize(tiny_model("llama"), "optq", BATCHES, rounding="twosided")
