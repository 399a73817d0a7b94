"""An adapter belongs to its base: the same base is known wherever it lies, and another one is refused by name."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llmtools
from llmtools import CheckpointError
from llmtools.model.adapter_files import open_adapter
from llmtools.model.fingerprint import FINGERPRINT, as_text, compare, fingerprint, read_fingerprint
from tests.models import tiny_ids, tiny_model


def quantized(name: str = "rtn", seed: int = 0, **options: Any) -> nn.Module:
    model = tiny_model(seed=seed)
    data = [tiny_ids(seed=1)] if llmtools.quantizers.get(name).needs_hessian else None
    llmtools.quantize(model, name, data, **{"bits": 4, "group_size": 32} | options)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llmtools.save(quantized(), None, tmp_path_factory.mktemp("base") / "rtn")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A folder as PEFT writes it, and the fingerprint of its base."""
    import peft

    model = llmtools.checkpoint.folder.load_model(base)
    text = as_text(fingerprint(model))
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / FINGERPRINT).write_text(text)
    return tmp_path / "adapter"


def test_the_same_base_is_known_in_another_place_and_in_other_shards(base: Path, tmp_path: Path) -> None:
    load = llmtools.checkpoint.folder.load_model
    expected = json.loads(as_text(fingerprint(load(base))))
    moved = shutil.copytree(base, tmp_path / "moved")
    shards = llmtools.save(load(base), None, tmp_path / "shards", max_shard_size="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    for model in (load(moved), load(shards), load(base, dtype=torch.bfloat16), load(base).to(torch.float16)):
        assert compare(expected, json.loads(as_text(fingerprint(model)))) is None


@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loaded", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_dense_base_is_the_same_in_another_type(kept: torch.dtype, loaded: torch.dtype) -> None:
    model = tiny_model().to(kept)
    model.lm_head.weight.data[0] *= 1e-5  # beyond float16's normal numbers
    former, again = fingerprint(model), fingerprint(copy.deepcopy(model).to(loaded))
    assert compare(former, again) is None
    trained = copy.deepcopy(model)
    trained.lm_head.weight.data *= 1.02
    assert "a base with other weights (lm_head differs)" in str(compare(former, fingerprint(trained.to(loaded))))


def scaled(part: str) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        model.get_parameter(part).data.mul_(1.001)
        return model

    return change


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            lambda _: quantized(bits=3),
            "a base with rtn 4 bits, this is rtn 3 bits (model.layers.0.self_attn.q_proj and 13 more modules differ)",
        ),
        (lambda _: quantized("optq"), "a base with rtn 4 bits, this is optq 4 bits"),
        (lambda _: quantized(group_size=16), "with group_size=32, this is rtn 4 bits with group_size=16"),
        (lambda model: llmtools.dequantize(model), "a base with rtn 4 bits, this is dense"),
        (lambda _: quantized(seed=1), "a base with other weights"),
        (scaled("model.norm.weight"), "a base with other weights (model.norm differs)"),
        (scaled("model.embed_tokens.weight"), "a base with other weights (model.embed_tokens differs)"),
    ],
    ids=["bits", "quantizer", "group", "dense", "weights", "norm", "embedding"],
)
def test_another_base_is_refused_by_name_unless_it_is_allowed(
    other: Callable[[nn.Module], nn.Module], said: str, base: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def changed() -> nn.Module:
        return other(llmtools.checkpoint.folder.load_model(base))

    with pytest.raises(CheckpointError) as refused:
        open_adapter(changed(), adapter)
    assert said in str(refused.value) and "--allow_other_base" in str(refused.value)
    with caplog.at_level(logging.WARNING, "llmtools"):
        open_adapter(changed(), adapter, allow_other_base=True)
    assert said in caplog.text


def test_the_folder_of_an_adapter_is_opened_with_its_base_or_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    load = llmtools.checkpoint.folder.load_model
    assert load(adapter)(input_ids=tiny_ids()).logits.isfinite().all()
    config = json.loads((adapter / "adapter_config.json").read_text())
    other = llmtools.save(quantized(bits=3), None, tmp_path / "other")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    with pytest.raises(CheckpointError, match="rtn 4 bits, this is rtn 3 bits"):
        load(adapter)
    assert load(adapter, allow_other_base=True)(input_ids=tiny_ids()).logits.isfinite().all()


def test_an_adapter_of_plain_peft_opens_on_any_base_and_peft_ignores_the_file(base: Path, adapter: Path) -> None:
    import peft

    load = llmtools.checkpoint.folder.load_model
    stock = peft.PeftModel.from_pretrained(load(base), str(adapter))
    ours = open_adapter(load(base), adapter)
    assert torch.equal(stock(input_ids=tiny_ids()).logits, ours(input_ids=tiny_ids()).logits)
    (adapter / FINGERPRINT).unlink()
    open_adapter(quantized(bits=3), adapter)


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found | {"version": 99},
        lambda found: found | {"modules": 3},
        lambda found: found | {"quantizers": []},
        lambda found: found | {"modules": {"x": {"quantizer": 0, "shape": [1], "dtype": None, "values": "%"}}},
    ],
    ids=["version", "modules", "quantizers", "values"],
)
def test_a_damaged_fingerprint_is_named(damage: Callable[[Any], Any], adapter: Path) -> None:
    found = read_fingerprint(adapter)
    (adapter / FINGERPRINT).write_text(json.dumps(damage(found)))
    with pytest.raises(CheckpointError, match=FINGERPRINT):
        open_adapter(quantized(), adapter)


@pytest.mark.parametrize("nested", [False, True], ids=["float32 scales", "quantized scales"])
def test_a_base_that_bitsandbytes_quantized_is_known_by_its_scales(nested: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)

    def loaded(seed: int) -> nn.Module:
        tiny_model(seed=seed).save_pretrained(tmp_path / str(seed))
        return AutoModelForCausalLM.from_pretrained(tmp_path / str(seed), quantization_config=config)

    model = loaded(0)
    former = fingerprint(model)
    assert compare(former, fingerprint(loaded(0))) is None
    assert "other weights" in str(compare(former, fingerprint(loaded(1))))
    assert "bitsandbytes nf4, this is dense" in str(compare(former, fingerprint(tiny_model())))
    assert llmtools.count_parameters(model).total == llmtools.count_parameters(tiny_model()).total
