"""Quantizing whole models: every family, what it is measured on, what is left out, and what is refused."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from llmtools.errors import CheckpointError, InputError
from llmtools.model.blocks import find_blocks, linears
from llmtools.model.quantize import INCOMPLETE, quantize
from llmtools.model.report import Report
from llmtools.nn import QuantizedLinear, quantized_linears
from llmtools.nn.adapters import dequantize
from llmtools.quant import HessianSum, quantizer
from tests.models import FAMILIES, other_model, tiny_ids, tiny_model

BATCHES = [tiny_ids(2, 64, seed=seed) for seed in range(2)]
GOLDEN = Path(__file__).parents[1] / "assets" / "golden"


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(tiny_ids() if ids is None else ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_family_is_quantized_and_the_head_is_not(family: str) -> None:
    model = tiny_model(family)
    expected = [path for block in find_blocks(model) for path, _ in linears(block.module, block.path)]
    before = logits(model)
    report = quantize(model, "optq", BATCHES, bits=4, group_size=16)
    assert sorted(quantized_linears(model)) == sorted(expected) == sorted(row.path for row in report.rows)
    assert [left.path for left in report.not_quantized] == ["lm_head"]
    assert not isinstance(model.lm_head, QuantizedLinear)
    after = logits(model)
    assert torch.isfinite(after).all()
    assert 0 < (after - before).norm() < before.norm()


@pytest.mark.parametrize("name", ["rtn", "nf4"])
def test_quantizers_without_data_need_no_calibration(name: str) -> None:
    model, measured = tiny_model("llama"), tiny_model("llama")
    report = quantize(model, name)
    with_losses = quantize(measured, name, BATCHES)
    assert torch.equal(logits(model), logits(measured))
    assert all(row.proxy_loss is None and row.tokens is None for row in report.rows)
    assert all(row.proxy_loss is not None and row.tokens == 256 for row in with_losses.rows)
    assert report.relative_proxy_loss is None
    assert report.relative_error == pytest.approx(with_losses.relative_error)


def test_the_same_inputs_give_the_same_bits() -> None:
    states = []
    for threads in (1, 2):
        model = tiny_model("llama")
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        quantize(model, "optq", BATCHES, bits=3, group_size=16)
        torch.set_num_threads(before)
        states.append({path: layer.packed for path, layer in quantized_linears(model).items()})
    for path, packed in states[0].items():
        assert all(torch.equal(tensor, states[1][path][name]) for name, tensor in packed.items()), path


def test_each_linear_gets_the_hessian_of_the_network_as_quantized_so_far() -> None:
    """Replays the work with the whole network and one hook, which is slow and plainly right."""
    model, replayed = tiny_model("llama"), tiny_model("llama")
    report = quantize(model, "optq", BATCHES, bits=3, group_size=16)
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
    names += ["mlp.up_proj", "mlp.down_proj"]
    assert [row.path for row in report.rows] == [f"model.layers.{i}.{name}" for i in (0, 1) for name in names]
    for row in report.rows:
        linear = replayed.get_submodule(row.path)
        total = HessianSum(linear.in_features)
        hook = linear.register_forward_pre_hook(lambda module, args, total=total: total.add(args[0]))
        for ids in BATCHES:
            logits(replayed, ids)
        hook.remove()
        layer = QuantizedLinear.from_linear(linear, quantizer("optq", bits=3, group_size=16), total.value())
        replayed.set_submodule(row.path, layer)
        for name, tensor in layer.packed.items():
            assert torch.equal(tensor, model.get_submodule(row.path).packed[name]), row.path


def test_a_block_is_run_no_further_than_the_linears_that_are_measured() -> None:
    model = tiny_model("llama")
    last = model.model.layers[0].mlp.act_fn  # behind gate_proj and up_proj
    runs: list[int] = []
    last.register_forward_hook(lambda *_: runs.append(1))
    quantize(model, "optq", BATCHES, bits=3, group_size=16)
    # one batch to see the wiring, one to find the groups, then for the Hessian of down_proj and for the outputs
    assert len(runs) == 1 + 1 + 2 * len(BATCHES)


class Twice(nn.Module):
    """A network that its input goes through two times."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


def test_the_hessian_of_a_linear_that_runs_twice_has_both_inputs() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Twice(layer.mlp)
    tokens = {row.path.rpartition(".")[2]: row.tokens for row in quantize(model, "optq", BATCHES, bits=3).rows}
    once = sum(ids.numel() for ids in BATCHES)
    assert tokens["q_proj"] == tokens["o_proj"] == once
    assert tokens["gate_proj"] == tokens["up_proj"] == tokens["down_proj"] == 2 * once


def test_without_sequential_all_hessians_of_a_block_come_from_its_dense_weights() -> None:
    model, sequential = tiny_model("llama"), tiny_model("llama")
    runs = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    quantize(model, "optq", BATCHES, bits=3, sequential=False)
    handle.remove()
    quantize(sequential, "optq", BATCHES, bits=3)
    # one batch to see the wiring, the dry run (stubs have hooks too), one batch to find the groups, then the Hessians
    # and the outputs
    assert len(runs) == 1 + len(BATCHES) + 1 + 2 * len(BATCHES)
    first = [layers["model.layers.0.self_attn.q_proj"].packed for layers in map(quantized_linears, (model, sequential))]
    last = [layers["model.layers.0.mlp.down_proj"].packed for layers in map(quantized_linears, (model, sequential))]
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])
    assert not all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_bias_and_training_mode_are_kept() -> None:
    model = tiny_model("opt").train()
    bias = model.model.decoder.layers[0].fc1.bias.detach().clone()
    quantize(model, "optq", BATCHES, bits=4)
    layer = model.model.decoder.layers[0].fc1
    assert torch.equal(layer.bias, bias)
    assert all(module.training for module in model.modules())


def test_bfloat16_models_keep_their_type() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    quantize(model, "optq", BATCHES, bits=4)
    assert logits(model).dtype == torch.bfloat16
    assert all(layer.dtype == torch.bfloat16 for layer in quantized_linears(model).values())


def test_a_device_may_be_named() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    quantize(model, "optq", BATCHES, bits=3, device="cpu")
    quantize(plain, "optq", BATCHES, bits=3)
    assert torch.equal(logits(model), logits(plain))


# ---- overrides and skipping ------------------------------------------------------------------------------------------


def test_overrides_change_options_or_the_quantizer_or_leave_dense() -> None:
    model = tiny_model("llama")
    overrides: dict[str, Any] = {
        "model.layers.0.*": None,
        "down_proj": {"bits": 8},
        "*.o_proj": {"name": "nf4"},
        "*.layers.1.*": {"group_size": 32},
    }
    report = quantize(model, "rtn", bits=2, group_size=16, overrides=overrides)
    layers = quantized_linears(model)
    assert all(path.startswith("model.layers.1.") for path in layers)
    assert layers["model.layers.1.mlp.down_proj"].quantizer == quantizer("rtn", bits=8, group_size=16)
    assert layers["model.layers.1.self_attn.o_proj"].quantizer == quantizer("nf4")
    assert layers["model.layers.1.self_attn.q_proj"].quantizer == quantizer("rtn", bits=2, group_size=32)
    assert len(report.not_quantized) == 8
    assert report.not_quantized[0].reason == "kept dense by the override 'model.layers.0.*'"


def test_data_are_asked_for_only_if_some_module_needs_them() -> None:
    with pytest.raises(InputError, match="optq needs calibration text"):
        quantize(tiny_model("llama"), "rtn", overrides={"down_proj": {"name": "optq"}})
    quantize(tiny_model("llama"), "optq", overrides={"*": {"name": "rtn"}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.q_porj": None}, r"'\*.q_porj' matches no linear; paths look like .*q_proj"),
        ({"lm_head": {"bits": 8}}, "'lm_head' matches only what is skipped"),
        ({"*": None}, "nothing is quantized"),
        ({"*": {"bit": 4}}, r"override '\*': rtn: no option 'bit'; did you mean 'bits'"),
        ({"*": {"bits": 9}}, r"override '\*'"),
        ({"*": {"name": "rtm"}}, r"override '\*'.*did you mean 'rtn'"),
        ({"*": 4}, "4 is neither options"),
    ],
)
def test_wrong_overrides_are_refused(overrides: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match=message):
        quantize(model, "rtn", overrides=overrides)
    assert not quantized_linears(model)


@pytest.mark.parametrize("name", ["rtn", "optq"])
def test_the_head_is_quantized_when_asked_for(name: str) -> None:
    model = tiny_model("llama")
    report = quantize(model, name, BATCHES if name == "optq" else None, skip=(), overrides={"lm_head": {"bits": 8}})
    assert isinstance(model.lm_head, QuantizedLinear)
    assert report.rows[-1].path == "lm_head"
    assert report.rows[-1].quantizer["bits"] == 8
    assert report.not_quantized == []


def test_a_tied_head_is_refused_and_can_be_untied() -> None:
    model = tiny_model("qwen3")
    with pytest.raises(InputError, match=r"lm_head shares its weight with model\.embed_tokens; skip it"):
        quantize(model, "rtn", skip=())
    assert not quantized_linears(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    quantize(model, "rtn", skip=())
    assert isinstance(model.lm_head, QuantizedLinear)


# ---- what cannot be quantized, or only in part -----------------------------------------------------------------------


class Routed(nn.Module):
    """A mixture that sends every token to its first expert."""

    def __init__(self, expert: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([expert, other])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


def test_an_expert_without_tokens_is_rounded_to_nearest_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, twin = tiny_model("llama"), tiny_model("llama", seed=1)
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        layer.mlp = Routed(layer.mlp, other.mlp)
    dense = model.model.layers[0].mlp.experts[1].up_proj
    nearest = QuantizedLinear.from_linear(dense, quantizer("rtn", bits=3, group_size=16))
    report = quantize(model, "optq", BATCHES, bits=3, group_size=16)
    lines = [record.getMessage() for record in caplog.records if "got no token" in record.getMessage()]
    assert len(lines) == 2  # one a block
    assert lines[0].startswith("3 linears of model.layers.0 got no token")
    idle = [row for row in report.rows if ".experts.1." in row.path]
    assert len(idle) == 6
    assert all(row.proxy_loss is None and row.tokens is None for row in idle)
    layer = model.model.layers[0].mlp.experts[1].up_proj
    assert (layer.dequantize() - dense.weight).norm() <= 1.01 * (nearest.dequantize() - dense.weight).norm()


def test_patterns_without_wildcards_match_as_those_with_them() -> None:
    from llmtools.model.targets import _matches, _matching

    drawn = random.Random(0)
    paths = [
        f"model.layers.{i}.mlp.experts.{e}.w_{kind}" for i in range(3) for e in range(4) for kind in ("up", "down")
    ]
    patterns = [
        *paths[:5],
        "w_up",
        "experts.2.w_down",
        "*.layers.0.*",
        "*up",
        "mlp.*",
        "lay?rs.0.mlp.experts.1.w_up",
        "x",
    ]
    for _ in range(50):
        overrides: dict[str, Any] = dict.fromkeys(drawn.sample(patterns, drawn.randint(0, len(patterns))))
        globs = [pattern for pattern in overrides if set(pattern) & set("*?[")]
        for path in paths:
            assert _matching(path, overrides, globs) == [each for each in overrides if _matches(path, each)]


def test_what_is_no_linear_stays_and_is_named_with_its_share(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=512, num_key_value_heads=2, num_local_experts=4, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[0].mlp.experts.register_parameter("scale", nn.Parameter(torch.ones(4)))  # of no known layout
    with caplog.at_level(logging.WARNING):
        report = quantize(model, "optq", BATCHES, bits=4)
    assert sorted(row.path.rpartition(".")[2] for row in report.rows) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    (line,) = [record.getMessage() for record in caplog.records if "are not" in record.getMessage()]
    assert "75 % of the weights in the blocks" in line
    assert "gate_up_proj (MixtralExperts)" in line
    assert any("MixtralExperts" in left.reason for left in report.not_quantized)


def test_gpt2_is_refused() -> None:
    with pytest.raises(InputError, match=r"nothing to quantize in GPT2LMHeadModel.*Conv1D"):
        quantize(tiny_model("gpt2"), "rtn")


def test_a_quantized_model_is_refused() -> None:
    model = tiny_model("llama")
    quantize(model, "rtn")
    with pytest.raises(InputError, match="quantized already"):
        quantize(model, "rtn")


def test_a_model_with_adapters_is_refused() -> None:
    import peft

    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(InputError, match="carries adapters"):
        quantize(model, "rtn")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named_before_anything_changes(bad: float) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj: NaN or infinity"):
        quantize(model, "rtn")
    assert not quantized_linears(model)


def test_damaged_activations_name_the_first_module_that_reads_them() -> None:
    model = tiny_model("llama")
    model.model.layers[1].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(InputError, match=r"model.layers.1.self_attn.q_proj.*NaN") as caught:
        quantize(model, "optq", BATCHES)
    assert "half quantized (7 of 14 linears)" in caught.value.__notes__[0]


def test_a_model_without_weights_in_memory_is_refused() -> None:
    with pytest.raises(InputError, match="meta device"):
        quantize(tiny_model("llama").to("meta"), "rtn")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "empty"),
        ([torch.zeros(1, 0, dtype=torch.long)], r"calibration\[0\] is torch.int64 \[1, 0\]"),
        ([torch.zeros(1, 3)], r"calibration\[0\] is torch.float32"),
        (["text"], r"calibration\[0\] is str"),
        ([tiny_ids(1, 8), tiny_ids(1, 129)], r"calibration\[1\] has 129 tokens, the model 128 positions"),
        ([torch.tensor([[512]])], "holds token 512, and the model knows 0 to 511"),
        ([torch.tensor([[-100]])], "holds token -100"),
        (None, "optq needs calibration text"),
    ],
)
def test_unusable_calibration_is_refused(calibration: Any, message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match=message):
        quantize(model, "optq", calibration)
    assert not quantized_linears(model)


def test_options_beside_a_quantizer_are_refused() -> None:
    with pytest.raises(InputError, match="options bits come with a name"):
        quantize(tiny_model("llama"), quantizer("rtn"), bits=3)


def test_an_interrupted_model_says_so() -> None:
    model = tiny_model("llama")

    def stop(done: int, total: int, path: str) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        quantize(model, "optq", BATCHES, on_step=stop)
    assert "half quantized (9 of 14 linears)" in caught.value.__notes__[0]
    assert getattr(model, INCOMPLETE)
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def test_nothing_is_marked_when_nothing_was_changed_or_all_is_done() -> None:
    model = tiny_model("llama")
    model.model.layers[0].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(InputError):
        quantize(model, "optq", BATCHES)
    assert not hasattr(model, INCOMPLETE)
    done = tiny_model("llama")
    quantize(done, "rtn")
    assert not hasattr(done, INCOMPLETE)


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_is_stored() -> None:
    steps: list[tuple[int, int, str]] = []
    model = tiny_model("llama")
    report = quantize(model, "optq", BATCHES, bits=3, group_size=16, on_step=lambda *step: steps.append(step))
    assert steps == [(index + 1, 14, row.path) for index, row in enumerate(report.rows)]
    assert report.packed_bytes == sum(
        tensor.nbytes for layer in quantized_linears(model).values() for tensor in layer.packed.values()
    )
    assert 3 < report.bits_per_weight < 5
    row = report.rows[0]
    assert row.shape == (64, 64)
    assert row.quantizer["name"] == "optq"
    assert row.tokens == 256
    assert row.relative_proxy_loss is not None and 0 < row.relative_proxy_loss < row.relative_error
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["totals"]["modules"] == len(plain["modules"]) == 14
    assert plain["not_quantized"][0]["path"] == "lm_head"
    assert Report.from_json(plain) == report
    former = (report.left, report.taught, report.starts)  # names of earlier versions
    assert former == (report.not_quantized, report.reconstruction, report.lora_init) and report.left


def test_reports_of_earlier_versions_are_read() -> None:
    stored = json.loads((GOLDEN / "optq" / "llmtools.json").read_text(encoding="utf-8"))["report"]
    assert {"left", "taught"} <= stored.keys()
    stored["taught"] = {"model.layers.0": [{"before": 0.5, "after": 0.25}]}
    read = Report.from_json(stored).to_json()
    assert read["modules"] == stored["modules"] and read["totals"] == pytest.approx(stored["totals"])
    assert read["not_quantized"] == stored["left"] and read["reconstruction"] == stored["taught"]
    with pytest.raises(CheckpointError, match="damaged"):
        Report.from_json({**stored, "modules": [{"path": "lm_head"}]})


def test_the_table_has_a_line_for_each_kind_of_module() -> None:
    report = quantize(tiny_model("llama"), "rtn", bits=4, group_size=16)
    lines = report.table().splitlines()
    assert len(lines) == 1 + 7 + 1 + 1
    assert lines[1].split()[:5] == ["model.layers.*.self_attn.q_proj", "2", "rtn", "4-bit", "g16"]
    assert lines[-1] == "not quantized: lm_head (1): outside the blocks, skipped by default"
    assert Report().table()


# ---- a real model ----------------------------------------------------------------------------------------------------


def test_optq_reads_better_than_rtn_on_a_real_model(stories: Path, tinystories: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmtools.data.calibration import calibration
    from llmtools.data.metrics import perplexity

    tokenizer = AutoTokenizer.from_pretrained(stories)
    text = calibration(tinystories / "train.txt", tokenizer, samples=16, tokens=128)
    later = (tinystories / "held_out.txt").read_text()[:6_000]
    held_out = tokenizer(later, return_tensors="pt").input_ids

    def quality(name: str | None, bits: int) -> float:
        model = AutoModelForCausalLM.from_pretrained(stories)
        if name is not None:
            quantize(model, name, text if name == "optq" else None, bits=bits)
        return perplexity(model, held_out, context=256).value

    dense = quality(None, 16)
    for bits in (3, 2):
        assert dense < quality("optq", bits) < quality("rtn", bits)


# ---- which linears, and what they keep -------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """No linear: it multiplies by eight."""

    def forward(self, input: Tensor) -> Tensor:
        return 8 * super().forward(input)


class Clipped(nn.Linear):
    """A linear for small inputs only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-10, 10))


class Spelt(nn.Linear):
    """A linear with a forward of its own, as Falcon's."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Named(nn.Linear):
    """A linear that knows more."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.rank_of_group = 3


def with_up_proj(kind: type[nn.Linear]) -> Any:
    model = tiny_model("llama")
    for layer in model.model.layers:
        former = layer.mlp.up_proj
        layer.mlp.up_proj = kind(64, 96, bias=False)
        layer.mlp.up_proj.weight = former.weight
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "taken"), [(Scaled, False), (Clipped, False), (Spelt, True), (Named, True)], ids=lambda each: str(each)
)
@pytest.mark.parametrize("meta", [False, True])
def test_a_subclass_is_taken_if_it_computes_what_a_linear_does(kind: type[nn.Linear], taken: bool, meta: bool) -> None:
    model = with_up_proj(kind)
    found = [path for path, _ in linears(model.to("meta") if meta else model)]
    assert (("model.layers.0.mlp.up_proj" in found), len(found)) == (taken, 15 if taken else 13)


def test_a_subclass_that_computes_something_else_stays_and_is_named() -> None:
    model = with_up_proj(Scaled)
    before = logits(model)
    report = quantize(model, "rtn", bits=8, group_size=32)
    assert isinstance(model.model.layers[0].mlp.up_proj, Scaled)
    assert any("Scaled, which computes something else" in left.reason for left in report.not_quantized)
    assert (logits(model) - before).norm() < 0.05 * before.norm()


def test_attributes_and_hooks_of_a_linear_are_kept_through_saving_learning_and_dequantizing() -> None:
    model = with_up_proj(Named)
    layer = model.model.layers[0].mlp.up_proj
    seen: list[str] = []
    handle = layer.register_forward_hook(lambda m, a, out: seen.append("after") or 2 * out)
    layer.register_forward_pre_hook(lambda m, a: seen.append("before") or (0.5 * a[0],))
    before = logits(model)
    quantize(model, "rtn", bits=8, group_size=32)
    packed = model.model.layers[0].mlp.up_proj
    assert isinstance(packed, QuantizedLinear)
    assert packed.rank_of_group == 3
    seen.clear()
    assert (logits(model) - before).norm() < 0.05 * before.norm()
    assert seen == ["before", "after"]
    dequantize(model)
    seen.clear()
    assert (logits(model) - before).norm() < 0.05 * before.norm()
    assert seen == ["before", "after"]
    handle.remove()
    seen.clear()
    logits(model)
    assert seen == ["before"]


def test_hessians_are_of_what_a_linear_reads_behind_its_hooks() -> None:
    losses = []
    for factor in (1, 2):
        model = tiny_model("llama")
        model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, a, factor=factor: (factor * a[0],))
        report = quantize(model, "optq", BATCHES, bits=4, group_size=16)
        losses.append({row.path: row.proxy_loss for row in report.rows}["model.layers.0.self_attn.q_proj"])
    assert losses[1] == pytest.approx(4 * losses[0])


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm", "spectral_norm", "pruned", "patched"])
def test_a_weight_that_is_made_at_each_call_is_refused_by_name(kind: str) -> None:
    model = tiny_model("llama")
    linear = model.model.layers[1].mlp.up_proj
    match kind:
        case "weight_norm":
            torch.nn.utils.parametrizations.weight_norm(linear)
        case "old_weight_norm":
            with pytest.warns(FutureWarning):
                torch.nn.utils.weight_norm(linear)
        case "spectral_norm":
            torch.nn.utils.parametrizations.spectral_norm(linear)
        case "pruned":
            prune.random_unstructured(linear, "weight", amount=0.5)
        case "patched":
            linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj cannot be packed as it is"):
        quantize(model, "rtn")
    assert not quantized_linears(model)
    report = quantize(model, "rtn", overrides={"layers.1.mlp.up_proj": None})
    assert len(report.rows) == 13


def test_a_linear_that_is_listed_twice_is_replaced_in_both_places() -> None:
    model = tiny_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj = first.mlp.up_proj
    quantize(model, "rtn", bits=4, group_size=16)
    assert isinstance(first.mlp.up_proj, QuantizedLinear)
    assert second.mlp.up_proj is first.mlp.up_proj
    dequantize(model)
    assert type(first.mlp.up_proj) is nn.Linear
    assert second.mlp.up_proj is first.mlp.up_proj


# ---- stacks ----------------------------------------------------------------------------------------------------------


def test_the_language_model_is_quantized_where_the_vision_tower_is_larger(caplog: pytest.LogCaptureFixture) -> None:
    model = other_model("llava")
    with caplog.at_level(logging.WARNING):
        report = quantize(model, "optq", [tiny_ids(2, 16)], bits=4, group_size=16)
    assert {row.path.rpartition(".layers.")[0] for row in report.rows} == {"model.language_model"}
    assert len(report.rows) == 14
    (line,) = [each.getMessage() for each in caplog.records if "outside embeddings and head" in each.getMessage()]
    share = report.weights / sum(
        each.numel()
        for path, each in other_model("llava").named_parameters()
        if each.dim() > 1 and "embed_tokens" not in path and "lm_head" not in path and "position_embedding" not in path
    )
    assert line.startswith(f"{100 * share:.0f} % of the weights")
    assert "model.language_model.layers" in line
    assert "vision_tower" in line


def test_a_pattern_chooses_the_vision_tower() -> None:
    report = quantize(other_model("llava"), "rtn", skip=["lm_head", "*language_model*", "*projector*"])
    assert {row.path.split(".layers.")[0] for row in report.rows} == {"model.vision_tower.encoder"}


@pytest.mark.parametrize("name", ["rtn", "optq"])
def test_both_stacks_of_an_encoder_decoder_are_quantized_and_said_nothing_about(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = other_model("t5")
    with caplog.at_level(logging.WARNING):
        report = quantize(model, name, [tiny_ids(2, 16)], bits=4, group_size=16)
    assert {row.path.split(".")[0] for row in report.rows} == {"encoder", "decoder"}
    assert len(report.rows) == len(list(linears(other_model("t5")))) - 1  # but the head
    assert "outside embeddings and head" not in caplog.text


class Spare(nn.Module):
    """A network with a second list of blocks that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 16)
        self.layers, self.further = (
            nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)) for _ in range(2)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_stack_that_does_not_run_stays_dense_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    report = quantize(Spare(), "optq", BATCHES, bits=4, group_size=16)
    assert [row.path for row in report.rows] == ["layers.0.0", "layers.1.0"]
    assert [left.path for left in report.not_quantized] == ["further.0.0", "further.1.0"]
    assert "further: none of its blocks ran" in caplog.text


# ---- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_padding_is_no_text(side: str) -> None:
    """A padded batch gives, to the bit, what its sequences give without padding."""
    rows = [tiny_ids(1, length, seed=length) for length in (7, 12, 9)]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for index, row in enumerate(rows):
        length = row.shape[1]
        start = {"right": 0, "left": 12 - length, "both": (12 - length) // 2}[side]
        ids[index, start : start + length], mask[index, start : start + length] = row[0], 1
    padded, plain = tiny_model("llama"), tiny_model("llama")
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    padded_report = quantize(padded, "optq", [batch, tiny_ids(2, 8)], bits=3, group_size=16)
    plain_report = quantize(plain, "optq", [*rows, tiny_ids(2, 8)], bits=3, group_size=16)
    assert [row.tokens for row in padded_report.rows] == [7 + 12 + 9 + 16] * 14
    assert [row.proxy_loss for row in padded_report.rows] == [row.proxy_loss for row in plain_report.rows]
    assert torch.equal(logits(padded), logits(plain))


def test_a_mask_with_gaps_is_refused() -> None:
    batch = {"input_ids": tiny_ids(1, 4), "attention_mask": torch.tensor([[1, 0, 1, 1]])}
    with pytest.raises(InputError, match=r"calibration\[0\], row 0: the attention_mask has gaps"):
        quantize(tiny_model("llama"), "optq", batch)


@pytest.mark.parametrize("positions", [-1, 0])
def test_positions_that_are_no_number_are_no_limit(positions: int) -> None:
    model = tiny_model("llama")
    model.config.max_position_embeddings = positions
    assert quantize(model, "optq", [tiny_ids(1, 200)], bits=4, group_size=16).rows[0].tokens == 200
