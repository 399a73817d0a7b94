"""Bits where they matter: the allocation is optimal for its costs, the costs are what they say, and mixing pays."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch

import llmtools
from llmtools.data.metrics import mean_nll
from llmtools.errors import InputError
from llmtools.model.allocation import Choice, allocate, choose_bits, output_gradients
from llmtools.model.quantize import quantize
from llmtools.nn import quantized_linears
from llmtools.quant import quantizer
from tests.models import tiny_ids, tiny_model

BATCHES = [tiny_ids(2, 32, seed=seed) for seed in range(2)]
RTN = quantizer("rtn", bits=3, group_size=16)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_of_that_size_is_better(seed: int) -> None:
    rng = random.Random(seed)
    weights = {name: rng.choice([64, 128, 512]) for name in "abcde"}
    choices = {
        name: [Choice(bits, bits + rng.random() / 4, rng.random() * 4.0**-bits * 100) for bits in (2, 3, 4)]
        for name in weights
    }
    size = sum(weights.values())
    budget = rng.uniform(2.4, 4.4)
    chosen = allocate(choices, weights, budget)

    def total(pick: dict[str, Choice]) -> tuple[float, float]:
        return sum(c.stored * weights[n] for n, c in pick.items()) / size, sum(c.cost for c in pick.values())

    ours = {name: next(c for c in choices[name] if c.bits == bits) for name, bits in chosen.items()}
    stored, cost = total(ours)
    assert stored <= budget + 1e-9
    for each in itertools.product(*(choices[name] for name in weights)):
        other_stored, other_cost = total(dict(zip(weights, each, strict=True)))
        if other_stored <= stored + 1e-12:
            assert cost <= other_cost + 1e-12 or _skipped_a_step(ours, choices)


def _skipped_a_step(ours: dict[str, Choice], choices: dict[str, list[Choice]]) -> bool:
    """Whether the last step did not fit, and smaller ones were taken behind it: then optimality is up to that step."""
    slopes_left, slopes_taken = [], []
    for name, chosen in ours.items():
        options = sorted(choices[name])
        at = options.index(chosen)
        slopes_left += [(chosen.cost - c.cost) / (c.stored - chosen.stored) for c in options[at + 1 :]]
        slopes_taken += [(c.cost - chosen.cost) / (chosen.stored - c.stored) for c in options[:at]]
    return bool(slopes_left and slopes_taken) and max(slopes_left) > min(slopes_taken)


def test_gradients_are_those_of_the_outputs() -> None:
    model = tiny_model("llama")
    path = "model.layers.0.mlp.gate_proj"
    found = output_gradients(model, BATCHES[:1], [path, "model.layers.1.self_attn.q_proj"], seed=3)
    kept: list[torch.Tensor] = []

    def keep(module: object, inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = model.get_submodule(path).register_forward_hook(keep)
    logits = model(BATCHES[0]).logits.flatten(0, -2)
    sampled = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(3))
    (-logits.log_softmax(-1).gather(1, sampled).sum()).backward()
    handle.remove()
    assert kept[0].grad is not None
    assert found[path] == pytest.approx(float(kept[0].grad.square().mean()), rel=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_model_is_not_changed_and_the_size_is_met() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for wanted in (4.2, 5.0, 6.1):
        found = choose_bits(model, RTN, BATCHES, wanted)
        assert found.bits_per_weight <= wanted
        assert len(set(found.bits.values())) > 1
        report = quantize(tiny_model("llama"), RTN, BATCHES, overrides=found.overrides)
        assert report.bits_per_weight == pytest.approx(found.bits_per_weight)
        assert "bits per weight" in found.table()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_more_bits_cost_less_and_the_estimate_is_of_the_divergence() -> None:
    """Of one linear quantized alone, the estimate is near the true divergence."""
    model = tiny_model("llama")
    found = choose_bits(model, RTN, BATCHES, 5.0)
    for choices in found.choices.values():
        assert [c.cost for c in choices] == sorted((c.cost for c in choices), reverse=True)
    ids = torch.cat(BATCHES)
    with torch.no_grad():
        original = model(ids).logits.log_softmax(-1)
    ratios = []
    for path in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"):
        changed = tiny_model("llama")
        others = {name: None for name in found.bits if name != path}
        quantize(changed, RTN, BATCHES, overrides=others)
        with torch.no_grad():
            logits = changed(ids).logits.log_softmax(-1)
        true = float((original.exp() * (original - logits)).sum(-1).mean())
        ratios.append(next(c.cost for c in found.choices[path] if c.bits == 3) / true)
    assert all(0.2 < ratio < 5 for ratio in ratios), ratios


def test_every_width_that_a_quantizer_has_is_a_choice() -> None:
    qtip = quantizer("qtip", state_bits=10)  # which has 1 to 6
    found = choose_bits(tiny_model("llama"), qtip, BATCHES, 7.0, overrides={"*.1.*": None})
    for choices in found.choices.values():
        assert [each.bits for each in choices] == [1, 2, 3, 4, 5, 6]
        assert [each.cost for each in choices] == sorted((each.cost for each in choices), reverse=True)
    assert {5, 6} & set(found.bits.values())


def test_mixed_widths_beat_the_line_between_uniform_ones(stories: Path, tinystories: Path) -> None:
    base = quantizer("rtn", bits=2, group_size=32)

    def nll(overrides: dict[str, dict[str, int]] | None, bits: int) -> tuple[float, float]:
        model, tokenizer = llmtools.load(stories)
        report = quantize(model, "rtn", bits=bits, group_size=32, overrides=overrides)
        ids = tokenizer((tinystories / "held_out.txt").read_text()[:12_000], return_tensors="pt").input_ids[0]
        windows = ids[: len(ids) // 256 * 256].view(-1, 256)
        with torch.no_grad():
            return report.bits_per_weight, sum(mean_nll(model, row[None]) for row in windows) / len(windows)

    model, tokenizer = llmtools.load(stories)
    text = llmtools.calibration(tinystories / "train.txt", tokenizer, samples=8, tokens=256)
    (low, worst), (high, best) = nll(None, 2), nll(None, 3)
    mixed, found = nll(choose_bits(model, base, text, (low + high) / 2).overrides, 2)
    line = worst + (best - worst) * (mixed - low) / (high - low)
    assert mixed <= (low + high) / 2
    assert found < line


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [("rtn", 1.5, r"rtn needs at least \d\.\d+ with its scales"), ("nf4", 4.0, "no option bits")],
)
def test_what_cannot_be_met_is_refused(name: str, wanted: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_bits(tiny_model("llama"), quantizer(name), BATCHES, wanted)


def test_what_overrides_name_is_kept() -> None:
    model = tiny_model("llama")
    found = choose_bits(model, RTN, BATCHES, 5.0, overrides={"down_proj": {"bits": 8}, "*.0.*": None})
    assert found.bits and not any(path.endswith("down_proj") or ".0." in path for path in found.bits)
    quantize(model, RTN, BATCHES, overrides={"down_proj": {"bits": 8}, "*.0.*": None, **found.overrides})
    assert {layer.quantizer.bits for path, layer in quantized_linears(model).items() if "down" in path} == {8}  # type: ignore[attr-defined]
    assert not math.isnan(found.cost)
