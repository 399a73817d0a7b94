"""End-to-end recovery: what it trains, what it keeps, and that a stopped run ends as an unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtools.errors import CheckpointError, InputError
from llmtools.model.options import Recovery
from llmtools.model.quantize import quantize
from llmtools.model.recover import Target, Targets, kl_divergence, recover, train_adapters
from llmtools.nn import QuantizedLinear, quantized_linears
from llmtools.nn.adapters import dequantize
from llmtools.nn.lora_init import LoraInit
from llmtools.nn.tuning import TuningLinear
from llmtools.quant import quantizer
from tests.models import tiny_ids, tiny_model

SEQUENCES = [tiny_ids(1, 24, seed=seed) for seed in range(8)]
SHORT = Recovery(steps=6, batch=2, learning_rate=4e-3, dense_learning_rate=4e-3, evaluations=3, patience=3)


AFFINE = {"bits": 2, "group_size": 16}


def quantized(name: str = "rtn", options: dict[str, Any] = AFFINE) -> nn.Module:
    model = tiny_model("llama")
    quantize(model, name, SEQUENCES, **options)
    return model


@pytest.fixture
def targets(tmp_path: Path) -> Targets:
    return Targets.of(tiny_model("llama"), SEQUENCES, tmp_path / "targets", 1000)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_with_all_tokens_kept_it_is_the_divergence_of_two_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 40, generator=generator).log_softmax(-1)
    everything = Target(torch.arange(40).expand(5, 40), p)
    assert kl_divergence(q + 3, everything).item() == pytest.approx(
        F.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-5
    )


def test_tokens_that_are_not_kept_count_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 40, generator=generator).log_softmax(-1)
    best = p.topk(3, -1)
    merged = [
        torch.cat([each.gather(-1, best.indices), (1 - each.gather(-1, best.indices).exp().sum(-1, True)).log()], -1)
        for each in (p, q)
    ]
    expected = F.kl_div(merged[1], merged[0], log_target=True, reduction="batchmean").item()
    assert kl_divergence(q, Target(best.indices, best.values)).item() == pytest.approx(expected, rel=1e-5)


def test_targets_are_the_models_distributions(targets: Targets) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        logits = model(SEQUENCES[3]).logits[0].log_softmax(-1)
    found = targets[3]
    torch.testing.assert_close(logits.gather(-1, found.ids), found.log_probabilities)
    assert torch.equal(found.ids[:, 0], logits.argmax(-1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rtn", AFFINE),
        ("rtn", AFFINE | {"symmetric": True}),
        ("hqq", AFFINE),
        ("awq", AFFINE),
        ("quip_sharp", {"bits": 2}),
        ("qtip", {"bits": 2, "state_bits": 8, "code": "hyb"}),
        ("nf4", {}),
    ],
)
def test_scales_and_norms_are_trained_and_codes_are_not(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    one = SEQUENCES[:1] * 3  # held out is what is trained on: a random network has nothing in common between texts
    model = quantized(name, options)
    before = tensors(model)
    report = recover(model, one, Targets.of(tiny_model("llama"), one, tmp_path, 1000), SHORT)
    assert report.after < report.before
    after = tensors(model)
    trained = {key for layer in quantized_linears(model).values() for key in layer.quantizer.tunable(layer.packed)}
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert {key.rpartition(".")[2] for key in changed} <= trained | {"weight"}  # of norms
    assert {key for key in changed if key.endswith("norm.weight")}
    assert {key.rpartition(".")[2] for key in changed} >= trained
    assert {key: tensor.dtype for key, tensor in after.items()} == {key: tensor.dtype for key, tensor in before.items()}
    assert not any(
        parameter.requires_grad for layer in quantized_linears(model).values() for parameter in layer.parameters()
    )


def test_the_divergence_that_is_reported_is_that_of_the_model(targets: Targets) -> None:
    model = quantized()
    report = recover(model, SEQUENCES, targets, SHORT)
    with torch.no_grad():
        found = kl_divergence(model(SEQUENCES[-1]).logits[0], targets[len(SEQUENCES) - 1]).item()
    assert report.after == pytest.approx(found, rel=1e-5)  # an eighth is held out: the last sequence


def test_a_layers_gradients_are_those_of_the_dense_weight() -> None:
    linear = nn.Linear(48, 40)
    layer = QuantizedLinear.from_linear(linear, quantizer("rtn", bits=3, group_size=16, scale_type="float32"))
    x, grads = torch.randn(7, 48), []
    for materialize in (True, False):
        tuned = TuningLinear(layer, materialize=materialize)
        tuned.deltas["scales"].requires_grad_(True)
        (tuned(x) * torch.arange(40)).sum().backward()
        grads.append(tuned.deltas["scales"].grad)
    torch.testing.assert_close(*grads)


def test_a_stopped_run_ends_as_an_unbroken_one(targets: Targets, tmp_path: Path) -> None:
    whole, broken = quantized(), quantized()
    before = tensors(broken)
    expected = recover(whole, SEQUENCES, targets, SHORT)

    def stop(step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        recover(broken, SEQUENCES, targets, SHORT, state=state, on_step=stop)
    for name, tensor in tensors(broken).items():
        assert torch.equal(tensor, before[name]), name  # an interrupted model is the one it was
        assert tensor.dtype == before[name].dtype
    steps: list[int] = []
    found = recover(broken, SEQUENCES, targets, SHORT, state=state, on_step=lambda step, *_: steps.append(step))
    assert steps == [3, 4, 5, 6] or steps == [4, 5, 6]
    assert found == expected
    for name, tensor in tensors(broken).items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_what_does_not_help_is_not_kept(targets: Targets) -> None:
    model = quantized()
    before = tensors(model)
    report = recover(model, SEQUENCES, targets, Recovery(steps=2, learning_rate=50.0, dense_learning_rate=50.0))
    assert report.after == report.before
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


def test_a_damaged_state_is_refused(targets: Targets, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    state.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(CheckpointError, match=r"not the state of this recovery .*--resume"):
        recover(quantized(), SEQUENCES, targets, SHORT, state=state)


def test_a_model_that_is_not_quantized_is_refused(targets: Targets) -> None:
    with pytest.raises(InputError, match="no quantized layers; quantize it first"):
        recover(tiny_model("llama"), SEQUENCES, targets, SHORT)


def test_one_sequence_is_too_few(targets: Targets) -> None:
    with pytest.raises(InputError, match="at least two"):
        recover(quantized(), SEQUENCES[:1], targets, SHORT)


def test_adapters_are_trained_beside_the_model_that_stays(tmp_path: Path) -> None:
    one = SEQUENCES[:1] * 3
    model, targets = quantized(), Targets.of(tiny_model("llama"), one, tmp_path, 1000)
    before = tensors(model)
    report = train_adapters(model, one, targets, SHORT, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
    assert report.adapters.keys() == quantized_linears(model).keys()
    for path, layer in quantized_linears(model).items():
        found = report.adapters[path]
        assert found.a.shape == (4, layer.in_features) and found.b.shape == (layer.out_features, 4)
    merged = dequantize(model, torch.float32)  # independent: the updates in dense weights
    for path, found in report.adapters.items():
        merged.get_submodule(path).weight.data += found.b @ found.a  # type: ignore[operator]
    with torch.no_grad():
        expected = kl_divergence(merged(one[0]).logits[0], targets[0]).item()
    assert report.after == pytest.approx(expected, rel=1e-3) and report.after < report.before


def test_adapters_begin_with_what_they_are_given(targets: Targets) -> None:
    model = quantized()
    given = {path: LoraInit(torch.randn(2, each.in_features), torch.randn(each.out_features, 2)) for path, each in
             quantized_linears(model).items()}  # fmt: skip
    still = Recovery(steps=1, adapter_learning_rate=0.0)
    report = train_adapters(model, SEQUENCES, targets, still, 3, initial=given)
    assert report.after == report.before  # such updates do not help, and are not kept
    for path, found in report.adapters.items():
        assert torch.equal(found.a[:2], given[path].a) and len(found.a) == 3
        assert not found.b.any()


def test_adapters_of_a_stopped_run_end_as_those_of_an_unbroken_one(targets: Targets, tmp_path: Path) -> None:
    model, state = quantized(), tmp_path / "adapter.safetensors"
    expected = train_adapters(model, SEQUENCES, targets, SHORT, 2)

    def stop(step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_adapters(model, SEQUENCES, targets, SHORT, 2, state=state, on_step=stop)
    found = train_adapters(model, SEQUENCES, targets, SHORT, 2, state=state)
    assert found[:3] == expected[:3]
    for path, adapter in found.adapters.items():
        assert all(map(torch.equal, adapter, expected.adapters[path]))
