"""Adapters that init from the quantization error: optimal in the Hessian's norm, and ordinary PEFT adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import llmtools
from llmtools.checkpoint.folder import LORA_INIT, load_lora_init
from llmtools.cli.app import main
from llmtools.errors import CheckpointError, InputError
from llmtools.model.quantize import quantize
from llmtools.model.report import Report
from llmtools.nn import lora_init as start_module
from llmtools.nn.lora_init import LoraInit, initialize_lora, lora_init_from_error
from llmtools.quant import proxy_loss
from tests.models import tiny_ids, tiny_model

BATCHES = [tiny_ids(2, 64, seed=seed) for seed in range(2)]


def draw(out: int = 24, n: int = 40, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """An error [out, n] and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return torch.randn(out, n, generator=generator), x.T @ x / tokens


def optimum(error: Tensor, hessian: Tensor, rank: int) -> float:
    """The least tr((E − Δ) H (E − Δ)ᵀ) over Δ of that rank: Σ σ² of E H^½ beyond it (Eckart and Young)."""
    values, vectors = torch.linalg.eigh(hessian.double())
    root = vectors * values.clamp_min(0).sqrt()
    return float(torch.linalg.svdvals(error.double() @ root)[rank:].square().sum())


@pytest.mark.parametrize("rank", [1, 4, 16, 24])
@pytest.mark.parametrize("tokens", [200, 30], ids=["regular", "singular"])
@pytest.mark.parametrize("out", [24, 60])
def test_the_start_is_the_truncated_svd_in_the_hessians_norm(out: int, tokens: int, rank: int) -> None:
    error, hessian = draw(out, tokens=tokens)
    init = lora_init_from_error(error, hessian, rank)
    left = proxy_loss(error, init.b @ init.a, hessian)
    whole = proxy_loss(error, torch.zeros_like(error), hessian)
    assert left == pytest.approx(optimum(error, hessian, rank), rel=1e-4, abs=1e-5 * whole)


def test_without_a_hessian_it_is_the_truncated_svd_of_the_error() -> None:
    error, _ = draw()
    init = lora_init_from_error(error, None, 5)
    left, sizes, right = torch.linalg.svd(error)
    torch.testing.assert_close(init.b @ init.a, (left[:, :5] * sizes[:5]) @ right[:5], rtol=1e-4, atol=1e-5)


def test_the_first_components_are_the_start_of_lower_rank() -> None:
    error, hessian = draw()
    large, small = lora_init_from_error(error, hessian, 8), lora_init_from_error(error, hessian, 3)
    torch.testing.assert_close(large.b[:, :3] @ large.a[:3], small.b @ small.a)
    torch.testing.assert_close(large.a.norm(dim=1), large.b.norm(dim=0))


def test_many_rows_are_iterated_to_nearly_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_module, "_EXACT", 8)
    error, hessian = draw(200, 120, 400)
    init = lora_init_from_error(error, hessian, 8)
    assert proxy_loss(error, init.b @ init.a, hessian) < 1.002 * optimum(error, hessian, 8)
    again = lora_init_from_error(error, hessian, 8)
    assert torch.equal(init.a, again.a) and torch.equal(init.b, again.b)


def test_without_an_error_the_start_is_zero_and_can_still_be_trained() -> None:
    init = lora_init_from_error(torch.zeros(6, 10), torch.eye(10), 4)
    assert not init.a.any() and init.b.any()


# ---- in a model ----------------------------------------------------------------------------------------------------


def quantized(**options: object) -> tuple[torch.nn.Module, Report]:
    model = tiny_model("llama")
    return model, quantize(model, "rtn", BATCHES, bits=2, group_size=32, **options)  # type: ignore[arg-type]


def config(**options: object) -> LoraConfig:
    return LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12, **options})


def test_a_report_has_a_lora_initialisation_only_on_request() -> None:
    model, report = quantized(adapter_rank=4)
    original = tiny_model("llama")
    assert quantized()[1].lora_init == {} and list(report.lora_init) == [row.path for row in report.rows]
    path = report.rows[0].path
    error = original.get_submodule(path).weight - model.get_submodule(path).dequantize()
    init = report.lora_init[path]
    assert (init.b.shape, init.a.shape) == ((64, 4), (4, 64))
    assert (error - init.b @ init.a).norm() < error.norm()
    with pytest.raises(InputError, match="adapter_rank=-1"):
        quantized(adapter_rank=-1)


@pytest.mark.parametrize("options", [{}, {"r": 2}, {"r": 9}, {"use_rslora": True}], ids=str)
def test_the_adapter_adds_the_start_whatever_its_rank_and_scale(options: dict[str, object]) -> None:
    model, report = quantized(adapter_rank=4)
    before = {path: model.get_submodule(path).dequantize() for path in report.lora_init}
    adapted = get_peft_model(model, config(**options))
    assert initialize_lora(adapted, report.lora_init) == 14
    for path, init in report.lora_init.items():
        layer = adapted.get_base_model().get_submodule(path)
        rank = min(4, layer.r["default"])
        delta = layer.get_delta_weight("default")
        torch.testing.assert_close(before[path] + delta, before[path] + init.b[:, :rank] @ init.a[:rank])


def test_the_network_is_closer_to_the_original_before_any_training(tmp_path: Path) -> None:
    model, report = quantized(adapter_rank=8)
    ids = BATCHES[0]
    with torch.no_grad():
        wanted, zero = tiny_model("llama")(ids).logits, model(ids).logits
        adapted = get_peft_model(model, config(r=8)).eval()
        initialize_lora(adapted, report.lora_init)
        started = adapted(ids).logits
        assert (started - wanted).norm() < 0.9 * (zero - wanted).norm()
        adapted.save_pretrained(tmp_path)  # an ordinary adapter
        opened = PeftModel.from_pretrained(quantized()[0], tmp_path).eval()
        assert torch.equal(opened(ids).logits, started)


def test_the_initialisation_lies_beside_the_checkpoint(tmp_path: Path) -> None:
    model, report = quantized(adapter_rank=3)
    ids = BATCHES[0]
    llmtools.save(model, None, tmp_path / "with", report=report)
    inits = load_lora_init(tmp_path / "with")
    assert all(torch.equal(inits[path].a, init.a) and torch.equal(inits[path].b, init.b)
               for path, init in report.lora_init.items())  # fmt: skip
    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, model(ids).logits)

    llmtools.save(model, None, tmp_path / "without")
    with pytest.raises(CheckpointError, match="has no LoRA initialisation"):
        load_lora_init(tmp_path / "without")
    (tmp_path / "with" / LORA_INIT).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_lora_init(tmp_path / "with")


def test_what_does_not_fit_is_refused() -> None:
    model, report = quantized(adapter_rank=2)
    adapted = get_peft_model(model, config(use_dora=True))
    with pytest.raises(InputError, match="DoRA"):
        initialize_lora(adapted, report.lora_init)
    adapted = get_peft_model(quantized()[0], config())
    with pytest.raises(InputError, match=r"q_proj has an adapter but no LoRA initialisation"):
        initialize_lora(adapted, {})
    wrong = {path: LoraInit(init.a[:, 1:], init.b) for path, init in report.lora_init.items()}
    with pytest.raises(InputError, match="it belongs to another model"):
        initialize_lora(adapted, wrong)


def test_finetuning_can_start_from_the_error(
    tmp_path: Path, stories: Path, tinystories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tinystories / "train.txt"
    common = ["--calibration", text, "--samples", "2", "--tokens", "32", "--bits", "2"]
    assert run("quantize", "--model", stories, "--quantizer", "rtn", *common, "--adapter_rank", 4, "--out",
               tmp_path / "q") == 0  # fmt: skip
    arguments = ["--model", tmp_path / "q", "--data", text, "--training.max_steps", 1, "--training.max_length", 32]
    assert run("finetune", *arguments, "--lora.init", "error", "--training.learning_rate", 1e-30, "--out",
               tmp_path / "a") == 0  # fmt: skip
    inits = load_lora_init(tmp_path / "q")
    adapter = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for path, init in inits.items():
        a, b = (adapter[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(b @ a * 4, init.b @ init.a, rtol=1e-4, atol=1e-5)  # r = 8, alpha = 32
    assert "--lora.init error begins with them" not in capsys.readouterr().err
    assert run("finetune", *arguments, "--out", tmp_path / "c") == 0
    assert "--lora.init error begins with them" in capsys.readouterr().err
    assert run("finetune", *arguments, "--lora.init", "eror", "--out", tmp_path / "b") == 2
    assert "lora.init='eror'; did you mean 'error'?" in capsys.readouterr().err
    assert run("finetune", *arguments[2:], "--model", stories, "--lora.init", "error", "--out", tmp_path / "b") == 2
    assert "quantize the model with --adapter_rank" in capsys.readouterr().err


@pytest.mark.parametrize(("bits", "said"), [(2, True), (3, True), (4, False)])
def test_few_bits_alone_are_reason_to_begin_with_the_error(
    bits: int, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from llmtools.train.adapters import recommend_initialisation
    from llmtools.train.options import Lora

    model = tiny_model("llama")
    llmtools.quantize(model, "rtn", bits=bits, group_size=64)
    (tmp_path / "lora_start.safetensors").touch()
    with caplog.at_level("INFO", logger="llmtools"):
        recommend_initialisation(Lora(), str(tmp_path), model)
        assert ("begins with them" in caplog.text) == said
        caplog.clear()
        recommend_initialisation(Lora(init="error"), str(tmp_path), model)
        recommend_initialisation(Lora(), str(tmp_path / "elsewhere"), model)
        recommend_initialisation(Lora(), str(tmp_path), tiny_model("llama"))
    assert not caplog.text


def run(*args: object) -> int:
    return main([str(arg) for arg in args])
