"""Adapters as GGUF: what llama.cpp adds to its rows is what PEFT adds to ours, and what it would not do is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtools
from llmtools.checkpoint.folder import skeleton
from llmtools.formats.gguf_adapter import export_gguf_adapter
from llmtools.formats.gguf_header import read_header
from tests.formats.test_gguf_reading import write_gguf
from tests.models import tiny_ids

gguf: Any = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_gguf(tmp_path_factory.mktemp("gguf"), tie_word_embeddings=True)


def save_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """An adapter of random numbers on a GGUF model, saved; returns the PEFT model."""
    from peft import LoraConfig, get_peft_model

    model, _ = llmtools.load(base)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]} | options
    adapted = get_peft_model(model, LoraConfig(**options))
    for name, each in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            each.data = torch.randn_like(each)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"v_proj": 32}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 16}, "alpha_pattern": {"q_proj": 3}},
    ],
    ids=str,
)
def test_llama_cpp_adds_what_peft_adds(base: Path, options: dict[str, Any], tmp_path: Path) -> None:
    adapted = save_adapter(base, tmp_path / "a", **options)
    out = export_gguf_adapter(tmp_path / "a", tmp_path / "out.gguf", str(base), skeleton=skeleton)
    file, stored = read_header(out), read_header(base)
    assert file.metadata["general.type"] == "adapter" and file.metadata["adapter.type"] == "lora"
    assert file.metadata["general.architecture"] == stored.metadata["general.architecture"]
    alpha, checked = file.metadata["adapter.lora.alpha"], 0
    for path, name in (
        ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
        ("mlp.down_proj", "ffn_down"),
    ):  # fmt: skip
        for layer in (0, 1):
            tensor = f"blk.{layer}.{name}.weight"
            a, b = file.read(f"{tensor}.lora_a"), file.read(f"{tensor}.lora_b")
            kind = gguf.GGMLQuantizationType[stored.tensors[tensor].kind]
            weight = torch.from_numpy(gguf.quants.dequantize(stored.read(tensor).numpy(), kind))
            theirs = weight + alpha / a.shape[0] * b @ a  # as llama.cpp does, in its order of rows
            module = adapted.base_model.model.get_submodule(f"model.layers.{layer}.{path}")
            ours = module.base_layer.dequantize() + module.get_delta_weight("default")
            order = torch.arange(len(ours))
            if name in ("attn_q", "attn_k"):  # pairs of a head lie side by side in the file
                heads = 4 if name == "attn_q" else 2
                order = order.reshape(heads, 2, -1).transpose(1, 2).reshape(-1)
            torch.testing.assert_close(theirs, ours[order].detach(), rtol=1e-4, atol=1e-4)
            checked += 1
    assert checked == 8 and len(file.tensors) == 16


def test_a_folder_or_a_file(base: Path, tmp_path: Path) -> None:
    from llmtools.recipes.export import Export, export

    save_adapter(base, tmp_path / "a")
    told = export(Export("gguf", out=str(tmp_path / "out"), adapter=str(tmp_path / "a")))
    assert told.out == str(tmp_path / "out" / "adapter.gguf") and "a LoRA for llama.cpp" in str(told)
    told = export(Export("gguf", out=str(tmp_path / "b.gguf"), adapter=str(tmp_path / "a")))
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "out" / "adapter.gguf").read_bytes()
    with pytest.raises(llmtools.InputError, match=r"b\.gguf exists"):
        export(Export("gguf", out=str(tmp_path / "b.gguf"), adapter=str(tmp_path / "a")))
    export(Export("gguf", out=str(tmp_path / "b.gguf"), adapter=str(tmp_path / "a"), overwrite=True))
    (tmp_path / "c.gguf").write_text("my notes")
    with pytest.raises(llmtools.InputError, match="is no GGUF file, so it is not replaced"):
        export(Export("gguf", out=str(tmp_path / "c.gguf"), adapter=str(tmp_path / "a"), overwrite=True))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b.gguf", "c.gguf", "out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts lm_head, which llama.cpp cannot apply"),
        ({"modules_to_save": ["input_layernorm"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding"),
    ],
    ids=str,
)
def test_what_llama_cpp_does_not_apply_is_refused(
    base: Path, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_adapter(base, tmp_path / "a", **options)
    with pytest.raises(llmtools.InputError, match=message):
        export_gguf_adapter(tmp_path / "a", tmp_path / "out.gguf", str(base), skeleton=skeleton)
    assert not (tmp_path / "out.gguf").exists()
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_an_adapter_of_our_checkpoint_goes_with_its_gguf(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from llmtools.formats.writing import export
    from tests.models import tiny_model

    model = tiny_model("llama")
    llmtools.quantize(model, "rtn", bits=4, group_size=32, symmetric=True)
    llmtools.save(model, None, tmp_path / "ours")
    export(model, None, tmp_path / "gguf", "gguf")
    for name in ("ours", "gguf/model.gguf"):
        torch.manual_seed(0)
        again = llmtools.checkpoint.folder.load_model(tmp_path / name)
        adapted = get_peft_model(again, LoraConfig(r=2, target_modules="all-linear"))
        for key, each in adapted.named_parameters():
            if "lora_" in key:
                each.data = torch.randn_like(each)
        folder = tmp_path / name.replace("/", "_")
        adapted.save_pretrained(f"{folder}_a")
        export_gguf_adapter(f"{folder}_a", f"{folder}_a.gguf", str(tmp_path / name), skeleton=skeleton)
    assert (tmp_path / "ours_a.gguf").read_bytes() == (tmp_path / "gguf_model.gguf_a.gguf").read_bytes()


def test_another_base_is_refused_by_its_fingerprint(base: Path, tmp_path: Path) -> None:
    from llmtools.model.fingerprint import FINGERPRINT, as_text, fingerprint
    from llmtools.recipes.export import Export, export

    save_adapter(base, tmp_path / "a")
    found = fingerprint(llmtools.load(base)[0])
    (tmp_path / "a" / FINGERPRINT).write_text(as_text(found))
    spec = found["quantizers"][found["modules"]["model.embed_tokens"]["quantizer"]]
    assert spec["name"] == "gguf" and found["modules"]["model.embed_tokens"]["shape"] == [512, 256]
    assert found["modules"]["lm_head"]["packed"] == found["modules"]["model.embed_tokens"]["packed"]  # they are tied
    (tmp_path / "other").mkdir()
    torch.manual_seed(1)
    other = write_gguf(tmp_path / "other", tie_word_embeddings=True)
    recipe = Export("gguf", out=str(tmp_path / "out"), adapter=str(tmp_path / "a"), model=str(other))
    with pytest.raises(llmtools.CheckpointError, match="was trained on a base with other weights"):
        export(recipe)
    assert not (tmp_path / "out").exists()
    export(dataclasses.replace(recipe, allow_other_base=True))
    export(Export("gguf", out=str(tmp_path / "out.gguf"), adapter=str(tmp_path / "a")))
    assert (tmp_path / "out" / "adapter.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_an_adapter_opens_with_the_model_and_tokenizer_of_its_file(base: Path, tmp_path: Path) -> None:
    adapted = save_adapter(base, tmp_path / "a")
    again, tokenizer = llmtools.load(tmp_path / "a")
    assert tokenizer.get_vocab() == llmtools.load(base)[1].get_vocab()
    with torch.no_grad():
        assert torch.equal(again(input_ids=tiny_ids()).logits, adapted.eval()(input_ids=tiny_ids()).logits)
