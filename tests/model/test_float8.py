"""float8 checkpoints as sources: the values of transformers and of a dequantization written out, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtools.checkpoint.streaming import open_unread, opened_whole
from llmtools.errors import CheckpointError
from llmtools.model.float8 import dequantized
from llmtools.recipes.quantize import Quantize, quantize
from tests.models import tiny_mixture, tiny_model

Cut = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A weight [out, in] → its scales as they are stored, and one for each element."""
BLOCKS: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


def in_tiles(height: int, width: int) -> Cut:
    def cut(weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = weight.shape
        scales = torch.empty(-(-rows // height), -(-columns // width))
        for i, j in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
            tile = weight[i * height : (i + 1) * height, j * width : (j + 1) * width]
            scales[i, j] = tile.abs().max() / 448
        return scales, torch.kron(scales, torch.ones(height, width))[:rows, :columns]

    return cut


def by_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 448
    return scales, scales.expand_as(weight)


def whole(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().max() / 448
    return scale.reshape(1), scale.expand_as(weight)


def groups(**weights: Any) -> dict[str, Any]:
    described = {"weights": {"num_bits": 8, "type": "float", **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": described}}


KINDS: dict[str, tuple[dict[str, Any], str, Cut]] = {
    "tiles": (BLOCKS, "weight_scale_inv", in_tiles(32, 32)),
    "tiles that do not divide": (BLOCKS | {"weight_block_size": [40, 48]}, "weight_scale_inv", in_tiles(40, 48)),
    "tensor": (groups(strategy="tensor"), "weight_scale", whole),
    "channel": (groups(strategy="channel"), "weight_scale", by_rows),
    "block": (groups(strategy="block", block_structure=[32, 64]), "weight_scale", in_tiles(32, 64)),
}


def write(folder: Path, config: dict[str, Any], suffix: str, cut: Cut) -> Path:
    """A float8 checkpoint in `folder`/float8, and the model that it stands for, in bfloat16, in `folder`/dense."""
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(folder / "dense")
    model.save_pretrained(folder / "float8")
    dense, codes = load_file(folder / "dense/model.safetensors"), dict[str, Tensor]()
    for name, weight in dense.items():
        if not name.endswith("proj.weight"):
            codes[name] = weight
            continue
        scales, each = cut(weight.float())
        codes[name] = (weight.float() / each).to(torch.float8_e4m3fn)
        codes[name.removesuffix("weight") + suffix] = scales
        codes[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
        dense[name] = (codes[name].float() * each).to(torch.bfloat16)
    save_file(dense, folder / "dense/model.safetensors", metadata={"format": "pt"})
    save_file(codes, folder / "float8/model.safetensors", metadata={"format": "pt"})
    file = folder / "float8/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return folder


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models have none."""
    monkeypatch.setattr(
        "llmtools.checkpoint.streaming.load", lambda name, **options: (_load_model(name, **options), None)
    )


def _load_model(name: str, **options: Any) -> Any:
    from llmtools.checkpoint.folder import load_model

    return load_model(name, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_float8_checkpoint_is_quantized_to_the_bytes_of_the_model_that_it_stands_for(
    kind: str, tokenizer: None, tmp_path: Path
) -> None:
    folder = write(tmp_path, *KINDS[kind])
    for source in ("dense", "float8"):
        quantize(Quantize(model=str(folder / source), out=str(folder / f"{source}-2"), quantizer="rtn", bits=2))
    made = [(folder / f"{source}-2/model.safetensors").read_bytes() for source in ("dense", "float8")]
    assert made[0] == made[1]


def test_the_values_are_those_of_transformers(tokenizer: None, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = write(tmp_path, *KINDS["tiles"])
    how = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    theirs = AutoModelForCausalLM.from_pretrained(folder / "float8", quantization_config=how, dtype=torch.bfloat16)
    with opened_whole(str(folder / "float8")) as (ours, _):
        found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert values.dtype == torch.bfloat16 and torch.equal(found[name], values), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), "its scales .* are missing"),
        (lambda tensors: tensors.update(_other(tensors, "weight", torch.float8_e5m2)), "F8_E5M2; float8 weights"),
        (
            lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "missing",
        ),
        (lambda tensors: tensors.update(_other(tensors, "weight_scale_inv", torch.int32)), "floating scales"),
        (lambda tensors: tensors.update(_cut(tensors)), r"has shape \[3, 1\] for a weight of \[96, 64\] in tiles"),
    ],
    ids=["no scales", "e5m2", "head without", "integers", "misshapen"],
)
def test_what_is_not_understood_is_refused_in_one_line(change: Any, said: str, tokenizer: None, tmp_path: Path) -> None:
    file = write(tmp_path, *KINDS["tiles"]) / "float8/model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said) as caught:
        quantize(Quantize(model=str(tmp_path / "float8"), out=str(tmp_path / "out"), quantizer="rtn", bits=2))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def _other(tensors: dict[str, Tensor], last: str, dtype: torch.dtype) -> dict[str, Tensor]:
    name = f"model.layers.0.mlp.up_proj.{last}"
    return {name: tensors[name].float().to(dtype)}


def _cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    return {name: tensors[name][:, :1].contiguous()}


def test_another_float8_is_refused_by_its_config(tokenizer: None, tmp_path: Path) -> None:
    config, suffix, cut = KINDS["tiles"]
    folder = write(tmp_path, {**config, "fmt": "e5m2"}, suffix, cut)
    with pytest.raises(CheckpointError, match="fmt='e5m2'"):
        open_unread(str(folder / "float8"), tmp_path / "converted")


def test_experts_that_are_float8_are_refused(tokenizer: None, tmp_path: Path) -> None:
    tiny_mixture("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": BLOCKS}))
    with pytest.raises(CheckpointError, match=r"experts .* float8 are not read"):
        open_unread(str(tmp_path), tmp_path / "converted")


def test_misshapen_scales_raise() -> None:
    codes = torch.zeros(4, 6, dtype=torch.float8_e4m3fn)
    for shape in ((2,), (4, 2), (6,)):
        with pytest.raises(ValueError, match=r"for a weight of \[4, 6\]"):
            dequantized(codes, torch.ones(shape))
