"""GGUF files of mixtures of experts: one tensor for the experts of a layer and projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import llmtools
from benchmarks.tiny import tiny_config
from llmtools.checkpoint.folder import load_model, skeleton
from llmtools.errors import InputError
from llmtools.formats.gguf import MIXTURES
from llmtools.formats.gguf_adapter import export_gguf_adapter
from llmtools.formats.writing import export
from llmtools.nn import quantized_linears
from tests.models import tiny_ids

gguf: Any = pytest.importorskip("gguf")


def mixture(family: str, **changes: Any) -> Any:
    """A tiny model, as llama.cpp runs the family."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    if hasattr(config, "norm_topk_prob"):
        config.norm_topk_prob = MIXTURES[family]
    config.update(changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + noise / 10)
        model.lm_head.weight[:259] = 0  # no text ends at once, or with a byte of a character
    return model


def written(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """The tensors of the exported file, by name."""
    export(model, None, folder, "gguf", **options)
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


def values(tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


@pytest.mark.parametrize("family", MIXTURES)
def test_each_expert_is_a_slice_of_the_stack(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    tensors = written(model, tmp_path / "out")
    layers = quantized_linears(model)
    for layer in range(2):
        for name, ours in (("gate", "w_gate"), ("up", "w_up"), ("down", "w_down")):
            stack = values(tensors[f"blk.{layer}.ffn_{name}_exps.weight"])
            for expert in range(4):
                held = layers[f"model.layers.{layer}.mlp.experts.{expert}.{ours}"].dequantize(dtype=torch.float32)
                assert torch.equal(stack[expert], held)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_a_file_of_a_mixture_is_opened_to_the_bit(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    llmtools.quantize(model, "rtn", bits=3, group_size=32)
    written(model, tmp_path / "out")
    opened, ids = load_model(tmp_path / "out" / "model.gguf"), tiny_ids()
    for path, layer in quantized_linears(model).items():
        if path in quantized_linears(opened):
            held = quantized_linears(opened)[path].dequantize(dtype=torch.float32)
            assert torch.equal(held, layer.dequantize(dtype=torch.float32)), path
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    export(opened, None, tmp_path / "again", "gguf")
    assert (tmp_path / "again" / "model.gguf").stat().st_size == (tmp_path / "out" / "model.gguf").stat().st_size


def test_experts_of_different_types_get_one_that_holds_all(tmp_path: Path) -> None:
    model, changed = mixture("qwen3_moe"), {"*.experts.0.w_up": {"bits": 8, "symmetric": True}}
    llmtools.quantize(model, "rtn", bits=4, group_size=32, overrides=changed)
    tensors = written(model, tmp_path / "out")
    assert tensors["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q8_0"
    assert tensors["blk.0.ffn_gate_exps.weight"].tensor_type.name == "Q5_0"


def test_dense_experts_are_written_and_a_mixture_of_both_is_refused(tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    dense = {path: each.detach().clone() for path, each in model.state_dict().items() if "layers.0.mlp.experts" in path}
    llmtools.quantize(model, "rtn", bits=4, group_size=32, overrides={"*.layers.0.mlp.experts.*": None})
    tensors = written(model, tmp_path / "out")
    both = torch.cat([values(tensors[f"blk.0.ffn_{name}_exps.weight"]) for name in ("gate", "up")], 1)
    assert torch.equal(both, dense["model.layers.0.mlp.experts.gate_up_proj"])
    model = mixture("qwen3_moe")
    llmtools.quantize(model, "rtn", bits=4, group_size=32, overrides={"*.experts.1.w_up": None})
    with pytest.raises(InputError, match=r"experts\.1\.w_up is dense"):
        written(model, tmp_path / "both")


def test_adapters_of_experts_are_one_tensor_by_checkpoint_and_by_file(tmp_path: Path) -> None:
    """With zeros for experts without one, and for the rest of a smaller rank."""
    peft = pytest.importorskip("peft")
    model = mixture("qwen3_moe")
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    llmtools.save(model, None, tmp_path / "q")
    written(model, tmp_path / "out")
    options = {"target_modules": ["0.w_up", "2.w_up"], "rank_pattern": {"experts.2.w_up": 6}}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options))
    adapted.save_pretrained(tmp_path / "a")
    held = adapted.base_model.model.model.layers[0].mlp.experts
    files = []
    for base in (tmp_path / "q", tmp_path / "out" / "model.gguf"):
        file = tmp_path / f"{base.name}.adapter.gguf"
        files.append(export_gguf_adapter(tmp_path / "a", file, str(base), skeleton=skeleton).read_bytes())
    assert files[0] == files[1]
    tensors = {each.name: torch.from_numpy(each.data.copy()) for each in gguf.GGUFReader(file).tensors}
    a, b = (tensors[f"blk.0.ffn_up_exps.weight.lora_{each}"] for each in "ab")
    assert a.shape[:2] == (4, 6) and not b[[1, 3]].any()
    for expert in (0, 2):
        delta = held.get_submodule(f"{expert}.w_up").get_delta_weight("default")
        torch.testing.assert_close(b[expert] @ a[expert] * (6 / 6), delta)  # llama.cpp's alpha over its rank


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"norm_topk_prob": False}, "norm_topk_prob=False"), ({"mlp_only_layers": [0]}, "experts in every layer")],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = mixture("qwen3_moe", **changes)
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    with pytest.raises(InputError, match=reason):
        written(model, tmp_path / "out")
