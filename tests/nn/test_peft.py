"""Stock PEFT, unpatched, on quantized layers: every route gives equal logits, and no adapter is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmtools
from llmtools import InputError, QuantizedLinear
from llmtools.nn.adapters import inputs_uncast, plain_lora
from llmtools.nn.swap import quantized_linears
from tests.models import tiny_ids, tiny_model

IDS = tiny_ids()
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized llama on the disk."""
    model = tiny_model()
    llmtools.quantize(model, "rtn", bits=3, group_size=32)
    return llmtools.save(model, None, tmp_path_factory.mktemp("peft") / "base")


def quantized(base: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, **options)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | changes)


def shaken(model: Any, seed: int = 0) -> Any:
    """The model with adapters that do something (LoRA's B starts at zero), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise if "lora_" in name else parameter + noise)
    return model


def logits(model: Any, **options: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits.float()


def trained(model: Any, steps: int = 3) -> tuple[float, float]:
    """Loss before and after some steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> tuple[Path, Tensor]:
    """A trained adapter on the disk, and the logits it gives."""
    model = get_peft_model(quantized(base), lora())
    trained(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


# ---- the routes ------------------------------------------------------------------------------------------------------


def test_all_linear_finds_the_quantized_layers_and_leaves_the_head(base: Path) -> None:
    model = get_peft_model(quantized(base), lora())
    wrapped = [path for path, module in model.named_modules() if hasattr(module, "lora_A") and path.endswith("_proj")]
    assert len(wrapped) == 14 and not hasattr(model.base_model.model.lm_head, "lora_A")
    trainable = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}
    first, last = trained(model)
    assert last < first


def test_a_peft_model_opens_on_the_base(base: Path, adapter: tuple[Path, Tensor]) -> None:
    folder, expected = adapter
    assert torch.equal(logits(PeftModel.from_pretrained(quantized(base), folder)), expected)


def test_an_auto_peft_model_opens_by_itself(adapter: tuple[Path, Tensor]) -> None:
    folder, expected = adapter
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)


def test_an_auto_model_opens_the_adapter_folder(adapter: tuple[Path, Tensor]) -> None:
    folder, expected = adapter
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert quantized_linears(model) and torch.equal(logits(model), expected)


def test_load_adapter_puts_it_on_a_loaded_model(base: Path, adapter: tuple[Path, Tensor]) -> None:
    folder, expected = adapter
    model = quantized(base)
    model.load_adapter(folder)
    assert torch.equal(logits(model), expected)


def test_native_adapters_train_and_save_alone(base: Path, tmp_path: Path) -> None:
    model = quantized(base)
    model.add_adapter(lora())
    trained(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "native")
    assert not (tmp_path / "native" / "model.safetensors").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(quantized(base), tmp_path / "native")), expected)


def test_an_adapter_is_plain_lora_that_knows_nothing_of_us(adapter: tuple[Path, Tensor]) -> None:
    folder, _ = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and "llmtools" not in json.dumps({**config, "base_model_name_or_path": ""})


# ---- kinds of adapters -----------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "some": {"target_modules": ["q_proj", "v_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 8}},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_as_the_base_trains_and_comes_back(kind: str, base: Path, tmp_path: Path) -> None:
    model = get_peft_model(quantized(base), lora(**KINDS[kind]))
    torch.testing.assert_close(logits(model), logits(quantized(base)))
    first, last = trained(model)
    assert last < first
    model.save_pretrained(tmp_path / "adapter")
    back = PeftModel.from_pretrained(quantized(base), tmp_path / "adapter")
    assert torch.equal(logits(back), logits(model))


def test_several_adapters_live_side_by_side(base: Path) -> None:
    plain = logits(quantized(base))
    model = get_peft_model(quantized(base), lora())
    shaken(model, seed=1)
    one = logits(model)
    model.add_adapter("two", lora(r=2))
    model.set_adapter("two")
    shaken(model, seed=2)
    two = logits(model)
    assert not torch.equal(one, two)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    mixed = logits(model, adapter_names=["default", "two"])
    torch.testing.assert_close(mixed[0], one[0])
    torch.testing.assert_close(mixed[1], two[1])
    model.delete_adapter("two")
    assert torch.equal(logits(model), one)
    assert torch.equal(logits(model.unload()), plain)


def test_lora_gradients_equal_those_of_the_dense_dequantized_model(base: Path) -> None:
    ours = shaken(get_peft_model(quantized(base), lora()))
    dense = shaken(get_peft_model(llmtools.dequantize(quantized(base)), lora()))
    for model in (ours, dense):
        model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    actual = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys() and len(actual) == 28
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "dora", "rslora"])
@pytest.mark.parametrize("way", ["merge_and_unload", "merge_and_unload(safe)", "merge_adapter", "merge_adapter(safe)"])
def test_merging_into_packed_weights_is_refused_and_nothing_is_lost(way: str, kind: str, base: Path) -> None:
    model = shaken(get_peft_model(quantized(base), lora(**KINDS[kind])))
    before = logits(model)
    assert not torch.equal(before, logits(quantized(base)))
    method, _, safe = way.partition("(")
    with pytest.raises(InputError, match=r"llmtools\.merge"):
        getattr(model, method)(safe_merge=bool(safe))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_gives_the_same_function_without_adapters(kind: str, base: Path, tmp_path: Path) -> None:
    model = shaken(get_peft_model(quantized(base), lora(**KINDS[kind])))
    before = logits(model)
    merged = llmtools.merge(model)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    assert not quantized_linears(merged) and not any("lora" in name for name, _ in merged.named_parameters())
    folder = llmtools.save(merged, None, tmp_path / "merged")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(merged))


def test_merging_rounds_once(base: Path) -> None:
    """In bfloat16 the merged weight is the rounded sum, not the sum of two rounded terms."""
    model = shaken(get_peft_model(quantized(base, dtype="bfloat16"), lora()))
    layer = model.base_model.model.get_submodule(UP)
    exact = layer.base_layer.dequantize(dtype=torch.float32) + layer.get_delta_weight("default").float()
    merged = llmtools.merge(model)
    assert torch.equal(merged.get_submodule(UP).weight, exact.to(torch.bfloat16))


def test_merge_takes_a_type(base: Path) -> None:
    merged = llmtools.merge(get_peft_model(quantized(base), lora()), dtype=torch.float16)
    assert merged.get_submodule(UP).weight.dtype == torch.float16


def test_several_active_adapters_are_all_merged(base: Path) -> None:
    model = shaken(get_peft_model(quantized(base), lora()), seed=1)
    model.add_adapter("two", lora(r=2))
    model.base_model.set_adapter(["default", "two"])
    shaken(model, seed=2)
    before = logits(model)
    torch.testing.assert_close(logits(llmtools.merge(model)), before, rtol=1e-4, atol=1e-4)


def test_merge_wants_adapters(base: Path) -> None:
    with pytest.raises(InputError, match=r"llmtools\.dequantize"):
        llmtools.merge(quantized(base))


def test_the_view_of_the_weight_refuses_every_write(base: Path) -> None:
    layer = quantized(base).get_submodule(UP)
    assert isinstance(layer, QuantizedLinear)
    before = layer.dequantize()
    for write in (
        lambda: layer.weight.add_(1.0),
        lambda: layer.weight.mul_(2.0),
        lambda: setattr(layer.weight, "data", before),
        lambda: layer.weight.data.add_(1.0),
        lambda: layer.weight.data.copy_(before),
        lambda: setattr(layer, "weight", before),
        lambda: layer.weight.__setitem__(0, 1.0),
    ):
        with torch.no_grad(), pytest.raises(InputError, match=r"llmtools\.merge"):
            write()
    assert torch.equal(layer.dequantize(), before)


# ---- dequantizing, preparing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_dequantize_gives_dense_layers_with_the_same_values(family: str) -> None:
    model = tiny_model(family)
    llmtools.quantize(model, "nf4", group_size=32)
    before, weights = logits(model), {path: layer.dequantize() for path, layer in quantized_linears(model).items()}
    assert llmtools.dequantize(model) is model
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    for path, weight in weights.items():
        assert type(model.get_submodule(path)) is nn.Linear
        assert torch.equal(model.get_submodule(path).weight, weight)
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_preparing_freezes_and_casts_nothing(dtype: str, base: Path) -> None:
    model = quantized(base, dtype=dtype)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert llmtools.prepare_for_training(model) is model
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == types
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_gives_the_same_gradients(reentrant: bool, dtype: str, base: Path) -> None:
    gradients = []
    for checkpointing in (True, False):
        prepared = llmtools.prepare_for_training(quantized(base, dtype=dtype), checkpointing, reentrant)
        assert any(getattr(m, "gradient_checkpointing", False) for m in prepared.modules()) == checkpointing
        model = shaken(get_peft_model(prepared, lora()))
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_model_without_gradient_checkpointing_is_detected() -> None:
    with pytest.raises(InputError, match="gradient_checkpointing=False"):
        llmtools.prepare_for_training(nn.Linear(4, 4))
    assert not llmtools.prepare_for_training(nn.Linear(4, 4), gradient_checkpointing=False).weight.requires_grad


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2}], ids=["plain", "dropout"])
def test_inputs_that_are_not_cast_give_the_same_gradients_and_are_kept_once(
    base: Path, options: dict[str, Any]
) -> None:
    model = shaken(get_peft_model(quantized(base, dtype=torch.bfloat16), lora(**options))).train()
    layers = plain_lora(model)
    assert len(layers) == len(quantized_linears(model))

    def step(layers: list[Any]) -> tuple[Tensor, int]:
        """The adapters' gradients in one tensor, and bytes kept for backward."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.zero_grad()
        torch.manual_seed(0)
        with inputs_uncast(layers):
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
        gradients = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
        return torch.cat(gradients), sum(kept.values())

    (gradient, kept), (former, more) = step(layers), step([])
    assert torch.equal(gradient, former)
    assert kept < more


def test_variants_of_lora_cast_their_inputs(base: Path) -> None:
    assert not plain_lora(get_peft_model(quantized(base), lora(use_dora=True)))
