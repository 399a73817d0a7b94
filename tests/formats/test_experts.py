"""GPTQ and compressed-tensors files of mixtures: a matrix per expert, under the names of the family's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("transformers")

import llmtools
from benchmarks.tiny import tiny_model
from llmtools.checkpoint.folder import load_model
from llmtools.errors import InputError
from llmtools.formats.expert_names import stored_paths
from llmtools.formats.writing import export
from llmtools.nn import quantized_linears
from llmtools.nn.experts import fused_experts, unfused_experts, unfused_within
from tests.models import tiny_ids


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits.float()  # type: ignore[no-any-return]


def names_in(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= set(opened.keys())
    return found


STORED = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.3.w3",
    "qwen3_moe": "model.layers.0.mlp.experts.3.up_proj",
    "gpt_oss": "model.layers.0.mlp.experts.3.up_proj",
    "jamba": "model.layers.1.feed_forward.experts.3.up_proj",
    "nemotron_h": "backbone.layers.1.mixer.experts.3.up_proj",
}


@pytest.mark.parametrize("family", STORED)
def test_names_are_those_of_the_familys_own_files(family: str) -> None:
    model = tiny_model(family)
    assert stored_paths(model) == {}
    path = next(iter(fused_experts(model)))
    with unfused_within(model):
        found = stored_paths(model)
        expected = {each for each, _ in model.named_modules() if each.endswith((".w_up", ".w_down", ".w_gate"))}
    assert found[f"{path}.3.w_up"] == STORED[family]
    assert expected <= found.keys()
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_is_written_and_read_again(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    export(model, None, tmp_path / "out", kind)
    names = names_in(tmp_path / "out")
    assert any(name.startswith(STORED[family]) for name in names)
    assert not any("w_up" in name or "gate_up_proj" in name for name in names)
    opened = load_model(tmp_path / "out")
    assert quantized_linears(opened).keys() == quantized_linears(model).keys()
    for path, layer in quantized_linears(model).items():
        assert torch.equal(quantized_linears(opened)[path].dequantize(), layer.dequantize()), path
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-3, atol=1e-3)
    llmtools.save(opened, None, tmp_path / "ours")
    assert torch.equal(logits(load_model(tmp_path / "ours")), logits(opened))


def test_layers_that_are_dense_in_the_file_stay_fused(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    llmtools.quantize(model, "rtn", bits=4, group_size=32, overrides={"*.layers.0.mlp.experts.*": None})
    export(model, None, tmp_path / "out", "gptq")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in names_in(tmp_path / "out")
    opened = load_model(tmp_path / "out")
    assert list(fused_experts(opened)) == ["model.layers.0.mlp.experts"]
    assert list(unfused_experts(opened)) == ["model.layers.1.mlp.experts"]
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-3, atol=1e-3)


def test_families_that_gguf_export_does_not_know_are_refused(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    with pytest.raises(InputError, match="GGUF export of deepseek_v3"):
        export(model, None, tmp_path / "out", "gguf")


def test_an_adapter_is_merged_into_the_files_codes(tmp_path: Path) -> None:
    """`llmtools merge --into base` writes the same format again, experts under their own names."""
    import peft

    from llmtools.formats.rewriting import rewriter
    from llmtools.nn.adapters import merge_into_packed

    model = tiny_model("qwen3_moe")
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    export(model, None, tmp_path / "base", "gptq")
    base = load_model(tmp_path / "base")
    writes = rewriter(str(tmp_path / "base"), base, "codes")
    assert writes is not None
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["w_up", "q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 8
    merged, lost = merge_into_packed(adapted)
    assert any(".experts." in path for path in lost)
    (tmp_path / "merged").mkdir()
    writes.write(merged, tmp_path / "merged", set(lost))
    assert names_in(tmp_path / "merged") == names_in(tmp_path / "base")
    assert torch.equal(logits(load_model(tmp_path / "merged")), logits(merged))


def test_awq_files_of_a_mixture_are_opened_to_the_bit(tmp_path: Path) -> None:
    from tests.formats.test_awq import config, gemm

    model = tiny_model("qwen3_moe")
    model.config.quantization_config = config()
    tensors: dict[str, Tensor] = {}
    with unfused_within(model):
        for path, stored in stored_paths(model).items():
            linear = model.get_submodule(path)
            if isinstance(linear, nn.Linear) and path != "lm_head":
                written, weight = gemm(stored, *linear.weight.shape)
                tensors |= {f"{stored}.{name}": tensor.contiguous() for name, tensor in written.items()}
                linear.weight = nn.Parameter(weight)
            else:
                tensors[f"{stored}.weight"] = model.get_parameter(f"{path}.weight").detach().contiguous()
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = load_model(tmp_path)
    assert len(quantized_linears(opened)) == 2 * (4 + 3 * 4)
    torch.testing.assert_close(logits(opened), logits(model))
