"""Block-wise reconstruction: learned rounding and block tuning come closer to the original, and change nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmtools
from llmtools.errors import InputError
from llmtools.model.options import NO_TUNING, BlockTuning
from llmtools.model.propagation import OriginalStream
from llmtools.model.quantize import INCOMPLETE, quantize
from llmtools.model.reconstruct import Reconstruction, stacked
from llmtools.model.report import Report
from llmtools.model.walk import walk
from llmtools.nn import QuantizedLinear, quantized_linears
from llmtools.quant import ALL, Packed, Quantizer, TensorSpec
from tests.models import FAMILIES, tiny_ids, tiny_model

BATCHES = [tiny_ids(4, 32, seed=seed) for seed in range(4)]
Real = Callable[[], tuple[Any, list[Tensor], Tensor]]
TUNING = BlockTuning(epochs=2, batch=4, held_out=0.25)
LEARNED: dict[str, Any] = {"bits": 2, "group_size": 32, "iterations": 40, "batch": 4}


def reconstructed(name: str = "rtn", family: str = "llama", **options: Any) -> tuple[nn.Module, Report]:
    if name == "rtn":
        options = {"bits": 2, "group_size": 32, **options}
    model = tiny_model(family)
    return model, quantize(model, name, BATCHES, **options)


def distance(model: nn.Module, original: nn.Module, ids: Tensor) -> float:
    """Of the logits from the original's, relative."""
    with torch.no_grad():
        wanted, got = original(ids).logits, model(ids).logits
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="session")
def real(stories: Path, tinystories: Path) -> Real:
    """Gives a copy of the first two layers of the real model, text to learn from and text to measure on.

    Blocks of random numbers would gain little.
    """
    model, tokenizer = llmtools.load(stories, num_hidden_layers=2)
    text = llmtools.calibration(tinystories / "train.txt", tokenizer, samples=24, tokens=48)
    held_out = llmtools.calibration(tinystories / "held_out.txt", tokenizer, samples=8, tokens=48)
    return lambda: (copy.deepcopy(model), text, torch.cat(held_out))


def packed(model: nn.Module) -> dict[str, Packed]:
    return {path: layer.packed for path, layer in quantized_linears(model).items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- targets -------------------------------------------------------------------------------------------------------


def test_batches_are_joined_to_sequences_of_one_length() -> None:
    rows = [tiny_ids(1, length, seed=seed) for seed, length in enumerate([8, 8, 8, 5, 8])] + [tiny_ids(3, 8)]
    assert [tuple(ids.shape) for ids in stacked(rows, 2)] == [(2, 8), (1, 8), (1, 5), (2, 8), (2, 8)]
    assert torch.equal(torch.cat([ids.flatten() for ids in stacked(rows, 2)]), torch.cat([r.flatten() for r in rows]))


def test_the_targets_are_the_original_network_whatever_happens_to_its_blocks() -> None:
    model, original_stream, parts, inputs = tiny_model("gemma3"), OriginalStream(), [], []
    with torch.no_grad():
        hidden = [model(ids, output_hidden_states=True).hidden_states for ids in BATCHES]

    def damage(block: Any, calls: Any) -> None:
        parts.append(list(original_stream.advance(calls)))
        inputs.append(calls.hidden)
        for parameter in block.module.parameters():
            parameter.mul_(0.5)

    walk(model, BATCHES, damage)
    assert all(torch.equal(target, states[1]) for target, states in zip(parts[0], hidden, strict=True))
    inputs_changed = any(not torch.equal(a, s[1]) for a, s in zip(inputs[1], hidden, strict=True))
    assert inputs_changed


def test_the_held_out_batches_are_not_trained_on() -> None:
    calls = type("Calls", (), {"hidden": []})()
    for batches, share, train in ((4, 0.25, 3), (8, 0.125, 7), (1, 0.5, 1), (5, 0.0, 5), (2, 0.9, 1)):
        reconstruction = Reconstruction(calls, [torch.ones(1)] * batches, share)  # type: ignore[arg-type]
        assert list(reconstruction.train) == list(range(train))
        assert list(reconstruction.held_out) == (list(range(train, batches)) or list(range(train)))


# ---- learned rounding ----------------------------------------------------------------------------------------------


def test_rounding_learned_on_blocks_beats_optq_and_the_nearest(real: Real) -> None:
    errors = {}
    for name in ("rtn", "optq", "signround"):
        (model, text, ids), (original, _, _) = real(), real()
        report = quantize(model, name, text, bits=2, group_size=64, **{"iterations": 50} if name == "signround" else {})
        errors[name] = distance(model, original, ids)
    assert errors["signround"] < 0.85 * errors["optq"] < 0.85 * errors["rtn"]
    assert list(report.reconstruction) == ["model.layers.0", "model.layers.1"]
    assert all(after < before for losses in report.reconstruction.values() for before, after in losses)
    assert (
        "2 block reconstructions" in report.table()
        and report.to_json()["reconstruction"]["model.layers.0"][0]["before"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_reconstructed(family: str) -> None:
    model, report = reconstructed("signround", family, tuning=BlockTuning(epochs=1), **LEARNED | {"iterations": 4})
    assert len(report.rows) == len(quantized_linears(model)) > 0
    assert all(isinstance(module, QuantizedLinear) for path, module in model.named_modules() if path in packed(model))
    assert 0 < distance(model, tiny_model(family), BATCHES[0]) < 1.1
    assert all(after <= before for losses in report.reconstruction.values() for before, after in losses)


def test_learned_and_other_quantizers_share_a_block() -> None:
    overrides = {"*.0.*": None, "down_proj": {"name": "rtn", "bits": 4}}
    model, report = reconstructed("signround", overrides=overrides, **LEARNED)
    names = {row.path: row.quantizer["name"] for row in report.rows}
    assert set(names.values()) == {"signround", "rtn"} and not any(".0." in path for path in names)
    assert set(quantized_linears(model)) == set(names)


def test_reconstruction_is_deterministic() -> None:
    runs = [reconstructed("signround", tuning=TUNING, adapter_rank=2, **LEARNED | {"iterations": 8}) for _ in range(2)]
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1].reconstruction == runs[1][1].reconstruction


def test_the_head_is_learned_by_itself() -> None:
    model, report = reconstructed("signround", skip=(), **LEARNED | {"iterations": 4})
    assert isinstance(model.lm_head, QuantizedLinear) and report.rows[-1].path == "lm_head"


def test_a_checkpoint_of_learned_rounding_opens_as_it_was(tmp_path: Path) -> None:
    model, report = reconstructed("signround", **LEARNED | {"iterations": 4})
    llmtools.save(model, None, tmp_path / "model", report=report)
    from transformers import AutoModelForCausalLM

    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)


# ---- block tuning --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Half(Quantizer):
    """A third-party quantizer: the weight in float16, less accurate than it looks."""

    name = "half"

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {"values": TensorSpec((out_features, in_features), torch.float16)}

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        return {"values": (weight * 0.9).to(torch.float16)}

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        return packed["values"][rows].to(dtype)


QUANTIZERS: dict[str, tuple[str | Quantizer, dict[str, Any]]] = {
    "rtn": ("rtn", {"bits": 2, "group_size": 32}),
    "optq": ("optq", {"bits": 2, "group_size": 32, "act_order": True}),
    "nf4": ("nf4", {"double_quantization": True}),
    "hqq": ("hqq", {"bits": 2, "group_size": 32}),
    "quip_sharp": ("quip_sharp", {"bits": 2}),
    "trellis with a table": ("qtip", {"bits": 2, "state_bits": 8, "code": "hyb"}),
    "third-party": (Half(), {}),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_tuning_brings_any_quantizer_closer_to_the_original(name: str, real: Real) -> None:
    quantizer, options = QUANTIZERS[name]
    (plain, text, ids), (tuned, _, _), (original, _, _) = real(), real(), real()
    quantize(plain, quantizer, text, **options)
    report = quantize(tuned, quantizer, text, tuning=TUNING, **options)
    assert distance(tuned, original, ids) < 0.95 * distance(plain, original, ids)
    assert all(after <= before for losses in report.reconstruction.values() for before, after in losses)


def test_tuning_moves_floats_and_no_codes() -> None:
    """Without the rates of what is dense the codes are those of an untuned block, in the block that comes first."""
    options: dict[str, Any] = {"bits": 2, "group_size": 32}
    plain, _ = reconstructed(**options)
    tuned, _ = reconstructed(tuning=BlockTuning(epochs=2, batch=4, learning_rate=0.0), **options)
    scales_moved = 0
    for path, tensors in packed(tuned).items():
        before = packed(plain)[path]
        assert torch.equal(tensors["qweight"], before["qweight"]) and torch.equal(tensors["qzeros"], before["qzeros"])
        scales_moved += not torch.equal(tensors["scales"], before["scales"])
        assert tensors["scales"].dtype == torch.float16
    assert scales_moved >= 7
    others = {name for name in plain.state_dict() if "proj" not in name}
    assert all(torch.equal(plain.state_dict()[name], tuned.state_dict()[name]) for name in others)


def test_a_rate_that_ruins_the_block_changes_nothing() -> None:
    wild = BlockTuning(epochs=1, batch=4, learning_rate=50.0, packed_learning_rate=50.0)
    plain, _ = reconstructed("optq", bits=3, group_size=32)
    tuned, report = reconstructed("optq", bits=3, group_size=32, tuning=wild)
    assert same(plain, tuned)
    assert all(before == after for losses in report.reconstruction.values() for before, after in losses)


def test_zero_epochs_are_no_tuning() -> None:
    assert same(reconstructed(tuning=NO_TUNING)[0], reconstructed()[0])
    assert reconstructed(tuning=NO_TUNING)[1].reconstruction == {}


def test_types_flags_and_modes_stay() -> None:
    model = tiny_model("opt").to(torch.bfloat16).train()
    frozen = model.model.decoder.layers[0].fc1.bias.requires_grad_(False)
    before = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters() if "layer_norm" in name}
    quantize(model, "signround", BATCHES, tuning=TUNING, **LEARNED | {"iterations": 4})
    after = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters() if "layer_norm" in name}
    assert before == after and all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules()) and not frozen.requires_grad
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16, torch.float16}
    assert not any(p.requires_grad for layer in quantized_linears(model).values() for p in layer.parameters())


def test_an_interruption_within_a_reconstruction_is_said() -> None:
    model = tiny_model("llama")

    def stop(done: int, total: int, path: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        quantize(model, "signround", BATCHES, on_step=stop, **LEARNED | {"iterations": 2})
    assert getattr(model, INCOMPLETE) and "half quantized (7 of 14 linears)" in caught.value.__notes__[0]


def test_tuning_without_text_is_refused() -> None:
    with pytest.raises(InputError, match="block tuning needs calibration text"):
        quantize(tiny_model("llama"), "rtn", tuning=TUNING)
    with pytest.raises(InputError, match="signround needs calibration text"):
        quantize(tiny_model("llama"), "signround")


@pytest.mark.parametrize(
    "options",
    [{"epochs": -1}, {"batch": 0}, {"patience": 0}, {"held_out": 1.0}, {"packed_learning_rate": -1.0}],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"block tuning: {next(iter(options))}="):
        BlockTuning(**options)
