"""gpt-oss in MXFP4: experts are opened packed, with the values that transformers decodes, and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")

import llmtools
from benchmarks.tiny import tiny_model
from llmtools.checkpoint.folder import load_model
from llmtools.errors import CheckpointError
from llmtools.formats.rewriting import rewriter_if_any
from llmtools.nn import quantized_linears
from llmtools.nn.experts import fused_experts
from tests.models import tiny_ids


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits.float()  # type: ignore[no-any-return]


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Any]:
    """A folder with random blocks, as gpt-oss is published, and the dense model that transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    dense = tiny_model("gpt_oss")
    dense.save_pretrained(tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for path, module in fused_experts(dense).items():
        for name in ("gate_up_proj", "down_proj"):
            experts, inputs, outputs = module.get_parameter(name).shape
            del tensors[f"{path}.{name}"]
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(120, 125, blocks.shape[:3], generator=generator, dtype=torch.uint8)
            tensors |= {f"{path}.{name}_blocks": blocks, f"{path}.{name}_scales": scales}
            module.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    return tmp_path / "q", dense


def test_values_are_those_of_transformers_to_the_bit(published: tuple[Path, Any], tmp_path: Path) -> None:
    folder, dense = published
    model = load_model(folder)
    assert not fused_experts(model)
    layers = quantized_linears(model)
    assert {path.rpartition(".")[2] for path in layers} == {"w_gate", "w_up", "w_down"}
    path, module = next(iter(fused_experts(dense).items()))
    gate_up: Tensor = module.get_parameter("gate_up_proj")
    assert torch.equal(layers[f"{path}.3.w_up"].dequantize(dtype=torch.float32), gate_up[3].T[1::2])
    assert torch.equal(layers[f"{path}.3.w_gate"].dequantize(dtype=torch.float32), gate_up[3].T[::2])
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    llmtools.save(model, None, tmp_path / "ours")
    assert torch.equal(logits(load_model(tmp_path / "ours")), logits(model))
    assert all(
        torch.equal(one, other)
        for one, other in zip(llmtools.dequantize(model).parameters(), dense.parameters(), strict=True)
    )


def test_they_are_trained_with_adapters(published: tuple[Path, Any]) -> None:
    import peft

    model = llmtools.prepare_for_training(load_model(published[0]))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["w_up", "w_down", "q_proj"])).train()
    adapted(input_ids=tiny_ids(), labels=tiny_ids()).loss.backward()
    assert sum(each.grad is not None for each in adapted.parameters()) > 8


def test_what_cannot_be_written_again_is_written_as_ours(published: tuple[Path, Any]) -> None:
    assert rewriter_if_any(str(published[0]), load_model(published[0]), "codes") is None


def test_damaged_blocks_are_refused(published: tuple[Path, Any]) -> None:
    file = published[0] / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj_scales"))
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has shape"):
        load_model(published[0])
