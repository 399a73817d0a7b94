"""Mixtures of experts, quantized, saved, trained and merged: every expert has its packed weights and its adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import llmtools
from benchmarks.families import OK, measure
from benchmarks.tiny import tiny_model
from llmtools.checkpoint.folder import load_model
from llmtools.errors import InputError
from llmtools.model import mixtures
from llmtools.model.mixtures import PSEUDO_TOKENS, PooledSum, pool
from llmtools.nn import quantized_linears
from llmtools.nn.experts import fused_experts, unfused_experts, unfused_within
from llmtools.quant import HessianSum
from tests.models import tiny_ids

FAMILIES = [
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "olmoe", "deepseek_v2", "deepseek_v3",
    "glm4_moe", "gpt_oss", "granitemoe", "jamba", "ernie4_5_moe", "phimoe", "minimax_m2", "hunyuan_v1_moe",
    "nemotron_h", "gemma4_text", "llama4_text", "zaya",
]  # fmt: skip


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids() if ids is None else ids).logits.float()  # type: ignore[no-any-return]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_quantized_saved_opened_trained_and_merged(family: str) -> None:
    row = measure(family)
    assert set(row["steps"].values()) == {OK}, row
    assert row["share"] >= 0.95, row


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_calibrated_lattices_give_the_logits_of_their_decoded_weights(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    llmtools.quantize(model, "quip_sharp", tiny_ids(), bits=2)
    assert not fused_experts(model)
    with torch.no_grad(), unfused_within(dense):
        for path, layer in quantized_linears(model).items():
            dense.get_submodule(path).weight.copy_(layer.dequantize(dtype=torch.float32))
    assert not unfused_experts(dense)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-4)
    llmtools.save(model, None, tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))


def test_each_expert_and_projection_has_packed_weights_of_its_own(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    names = {
        f"model.layers.{i}.mlp.experts.{e}.w_{p}" for i in (0, 1) for e in range(4) for p in ("gate", "up", "down")
    }
    assert names <= quantized_linears(model).keys()
    llmtools.save(model, None, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert names <= config["quantization_config"]["modules"].keys()


# ------------------------------------------------------------------------------------------------------------- loading


def test_experts_are_quantized_as_they_arrive(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from llmtools.model.transformers_integration import LLMToolsConfig

    for family in ("mixtral", "gpt_oss", "qwen3_moe", "llama4_text"):
        model = tiny_model(family)
        model.save_pretrained(tmp_path / family)
        asked = LLMToolsConfig("rtn", bits=4, group_size=32)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / family, quantization_config=asked)
        llmtools.quantize(model, "rtn", bits=4, group_size=32)
        assert quantized_linears(opened).keys() == quantized_linears(model).keys()
        assert torch.equal(logits(opened), logits(model))


def test_a_layer_that_stays_dense_stays_fused_and_comes_back(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    llmtools.quantize(model, "rtn", bits=4, group_size=32, overrides={"*.layers.0.mlp.experts.*": None})
    assert list(fused_experts(model)) == ["model.layers.0.mlp.experts"]
    assert list(unfused_experts(model)) == ["model.layers.1.mlp.experts"]
    llmtools.save(model, None, tmp_path / "out")
    opened = load_model(tmp_path / "out")
    assert list(fused_experts(opened)) == ["model.layers.0.mlp.experts"]
    assert torch.equal(logits(opened), logits(model))


def test_experts_of_which_some_stay_dense_come_back(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    llmtools.quantize(model, "rtn", bits=4, group_size=32, overrides={"w_down": None, "*.2.w_up": {"bits": 3}})
    llmtools.save(model, None, tmp_path / "out")
    opened = load_model(tmp_path / "out")
    assert torch.equal(logits(opened), logits(model))
    assert quantized_linears(opened)["model.layers.0.mlp.experts.2.w_up"].quantizer.spec()["bits"] == 3
    dense = llmtools.dequantize(opened)
    assert set(fused_experts(dense)) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-3, atol=1e-4)


def test_a_refused_quantization_leaves_the_model_as_it_was() -> None:
    model = tiny_model("mixtral")
    before = list(model.state_dict())
    with pytest.raises(InputError, match="matches no linear"):
        llmtools.quantize(model, "rtn", overrides={"nothing": None})
    assert list(model.state_dict()) == before
    assert fused_experts(model)


# --------------------------------------------------------------------------------------------------------- calibration


def test_an_experts_second_moment_is_continued_with_that_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(tokens, 8, generator=generator) * (1 + scale) for scale, tokens in enumerate((20, 3, 0))]
    sums = [HessianSum(8) for _ in x]
    for each, rows in zip(sums, x, strict=True):
        each.add(rows)
    everything = torch.cat(x)
    shared = everything.T @ everything / len(everything)
    more = PSEUDO_TOKENS * 8
    for each, rows in zip([PooledSum(each, pool(sums)) for each in sums], x, strict=True):
        expected = (rows.T @ rows + more * shared) / (len(rows) + more)
        torch.testing.assert_close(each.value(), expected, rtol=1e-5, atol=1e-6)
        assert each.tokens == len(rows)


def second_moments(model: Any, ids: Tensor, all_tokens: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Of the inputs of each expert's linears in the first layer, from the family's own forward."""
    module: Any = next(iter(fused_experts(model).values()))
    seen: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    logits(model, ids)
    hook.remove()
    moments, tokens = {}, {}
    x, chosen = seen[0]
    for expert in range(module.num_experts):
        rows = x if all_tokens else x[(chosen == expert).any(dim=1)]
        gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        inner = module.act_fn(gate) * up
        tokens[str(expert)] = len(rows)
        moments[f"{expert}.w_up"], moments[f"{expert}.w_down"] = (
            each.detach().T @ each.detach() / max(1, len(each)) for each in (rows, inner)
        )
    return moments, tokens


@pytest.mark.parametrize("all_tokens", [False, True])
def test_the_walk_measures_each_expert_on_its_tokens(all_tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("qwen3_moe"), tiny_ids(2, 12)
    expected, tokens = second_moments(model, ids, all_tokens)
    monkeypatch.setattr(mixtures, "PSEUDO_TOKENS", 0.0)
    given: dict[str, Tensor] = {}
    make = llmtools.nn.QuantizedLinear.from_linear

    def noted(linear: nn.Linear, quantizer: Any, hessian: Tensor | None = None, *more: Any) -> Any:
        given[next(path for path, each in model.named_modules() if each is linear)] = hessian
        return make(linear, quantizer, hessian, *more)

    monkeypatch.setattr(llmtools.nn.QuantizedLinear, "from_linear", noted)
    report = llmtools.quantize(model, "optq", ids, bits=8, group_size=32, route_all=all_tokens)
    rows = {row.path: row for row in report.rows}
    for name, moment in expected.items():
        path = f"model.layers.0.mlp.experts.{name}"
        assert rows[path].tokens == tokens[name[0]]
        if tokens[name[0]]:
            assert float((given[path] - moment).norm() / moment.norm()) < 0.05  # earlier linears are rounded
    assert "tokens per expert" in report.table()


def test_an_expert_without_tokens_is_calibrated_on_those_of_the_others() -> None:
    model, ids = tiny_model("mixtral"), tiny_ids(1, 16)
    for module in model.modules():
        if type(module).__name__ == "MixtralTopKRouter":
            with torch.no_grad():
                module.weight.copy_(torch.zeros_like(module.weight))
    report = llmtools.quantize(model, "optq", ids, bits=2, group_size=32)
    rows = [row for row in report.rows if ".experts." in row.path]
    assert {row.tokens for row in rows} == {0, 16}
    assert all(row.relative_proxy_loss is not None for row in rows)
    assert "tokens per expert: 0 at least" in report.table()
    assert "4 of 8 experts saw too few" in report.table()


# ------------------------------------------------------------------------------------------------------------ adapters


def adapted(model: Any, **options: Any) -> Any:
    """LoRA on all linears, by stock PEFT, with matrices that change the output."""
    import peft

    from llmtools.train.adapters import fit_config, lora_config
    from llmtools.train.options import Lora

    lora = Lora(r=2, alpha=4, **options)
    config = lora_config(lora)
    fit_config(config, model, lora)
    found = peft.get_peft_model(llmtools.prepare_for_training(model, gradient_checkpointing=False), config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return found.eval()


def updates(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each adapted linear, by its path in the base."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            path, _, side = name.removeprefix("base_model.model.").partition(".lora_")
            found.setdefault(path, {})[side[0]] = parameter
    return {path: (each["A"], each["B"]) for path, each in found.items()}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe", "nemotron_h"])
def test_adapters_of_experts_have_the_gradients_of_the_fused_dense_model(family: str) -> None:
    """The reference is transformers' own forward with W + s B A in its fused Parameters, by autograd."""
    base, ids = tiny_model(family), tiny_ids(1, 1)
    llmtools.quantize(base, "rtn", bits=4, group_size=16)
    dense = llmtools.dequantize(copy.deepcopy(base))
    dense.config._experts_implementation = "eager"
    model = adapted(base)
    own = updates(model)
    assert any(".experts." in path for path in own)
    leaves = {path: tuple(each.detach().clone().requires_grad_() for each in pair) for path, pair in own.items()}
    weights = dict(dense.named_parameters())
    with_parts = copy.deepcopy(dense)
    with unfused_within(with_parts) as parts:
        pass
    replaced: dict[str, Tensor] = {}
    for path, (a, b) in leaves.items():
        delta = 2 * b @ a  # alpha / r
        if f"{path}.weight" in parts:
            fused, part = parts[f"{path}.weight"]
            whole = torch.zeros_like(weights[fused])
            index = torch.arange(whole.numel()).view(whole.shape)
            place = part.of(index).reshape(-1)
            added = whole.flatten().index_add(0, place, delta.reshape(-1)).view(whole.shape)
            replaced[fused] = replaced.get(fused, weights[fused].detach()) + added
        else:
            replaced[f"{path}.weight"] = weights[f"{path}.weight"].detach() + delta
    reference_logits = torch.func.functional_call(dense, replaced, kwargs={"input_ids": ids}).logits
    reference_logits.square().mean().backward()
    found = model(input_ids=ids).logits
    found.square().mean().backward()
    torch.testing.assert_close(found, reference_logits, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found, logits(dense, ids), rtol=1e-3, atol=1e-4)
    hit = {False: 0, True: 0}
    for path, pair in own.items():
        for mine, reference in zip(pair, leaves[path], strict=True):
            expected = reference.grad
            reached = expected is not None and bool(expected.any())
            if ".experts." in path:
                hit[reached] += 1
                assert (mine.grad is not None) == reached, path
            if reached:
                torch.testing.assert_close(mine.grad, expected, rtol=1e-3, atol=1e-6, msg=path)
    assert hit[True] > 0
    assert hit[False] > 0, "some expert is meant to see no token"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_adapters_on_experts_are_stock_files_that_reload(family: str, tmp_path: Path) -> None:
    import peft

    base = tiny_model(family)
    llmtools.quantize(base, "rtn", bits=4, group_size=16)
    llmtools.save(base, None, tmp_path / "base")
    before = logits(base)
    model = adapted(base)
    expected = logits(model)
    assert not torch.allclose(before, expected, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    merged = llmtools.merge(again)
    assert fused_experts(merged)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "inside", "outside"),
    [
        ("attention", ["self_attn.q_proj"], ["experts", "shared_expert."]),
        ("attention+shared_experts", ["self_attn.q_proj", "shared_expert.up_proj"], [".experts."]),
        ("experts", [".experts.0.w_down"], ["self_attn", "shared_expert."]),
        ("all-linear", ["self_attn.q_proj", "shared_expert.up_proj", ".experts.0.w_down"], ["gate.weight", "lm_head"]),
    ],
)
def test_words_name_the_linears_to_adapt(words: str, inside: list[str], outside: list[str]) -> None:
    base = tiny_model("qwen2_moe")
    llmtools.quantize(base, "rtn", bits=4, group_size=16)
    paths = list(updates(adapted(base, target_modules=words)))
    assert all(any(part in path for path in paths) for part in inside)
    assert not any(part in path for path in paths for part in outside)


def test_words_that_stand_for_nothing_are_refused() -> None:
    for family, words, reason in (
        ("mixtral", "shared_experts", "has no shared_experts"),
        ("deepseek_v3", "attention+shared_experts", "PEFT takes"),
    ):
        base = tiny_model(family)
        llmtools.quantize(base, "rtn", bits=4, group_size=16)
        with pytest.raises(InputError, match=reason):
            adapted(base, target_modules=words)
