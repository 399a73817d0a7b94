"""What is written in the formats of others is what they define: read back by the hand-made readers here, bit for bit.

The programs themselves read our files in `tests/interop`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llmtools
from llmtools import InputError
from llmtools.checkpoint.folder import save_dense
from llmtools.formats.gguf import as_blocks
from llmtools.formats.uniform import uniform_of
from llmtools.formats.writing import export
from llmtools.nn.swap import quantized_linears
from tests.models import tiny_ids, tiny_model

UP = "model.layers.0.mlp.up_proj"


def quantized(name: str = "rtn", family: str = "llama", **options: Any) -> Any:
    model = tiny_model(family)
    llmtools.quantize(model, name, tiny_calibration() if name == "optq" else None, **options)
    return model


def tiny_calibration() -> list[Tensor]:
    return [tiny_ids(1, 32, seed=seed) for seed in range(4)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits


def unstream(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, w] -> codes [rows, count], by NumPy."""
    digits = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return torch.from_numpy((digits.reshape(len(words), count, bits) << np.arange(bits)).sum(-1))


def from_gptq(tensors: dict[str, Tensor], path: str, bits: int, version: str) -> Tensor:
    """W[j, i] = s[g_idx[i], j] (q − z[g_idx[i], j]), float32."""
    qweight, qzeros, scales, g_idx = (tensors[f"{path}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx"))
    codes = unstream(qweight.T, bits, len(g_idx))
    zeros = unstream(qzeros, bits, scales.shape[1]).T + (version == "gptq")
    return (codes - zeros[:, g_idx.long()]).float() * scales.T.float()[:, g_idx.long()]


def from_compressed(tensors: dict[str, Tensor], path: str, bits: int) -> Tensor:
    out, n = tensors[f"{path}.weight_shape"].tolist()
    codes, scales = unstream(tensors[f"{path}.weight_packed"], bits, n), tensors[f"{path}.weight_scale"]
    zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int64)
    if f"{path}.weight_zero_point" in tensors:
        zeros = unstream(tensors[f"{path}.weight_zero_point"].T, bits, out).T
    group = torch.arange(n) // (n // scales.shape[1])
    return (codes - zeros[:, group]).float() * scales.float()[:, group]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_uniform_grids_are_the_same_in_every_format(bits: int, symmetric: bool, tmp_path: Path) -> None:
    model = quantized(bits=bits, group_size=32, symmetric=symmetric)
    forms = ["gptq_v2", "compressed-tensors"] + ["gptq"] * symmetric
    for form in forms:
        done = export(model, None, tmp_path / form, form)
        assert done.modules == 14 and not done.requantized
        tensors = load_file(tmp_path / form / "model.safetensors")
        for path, layer in quantized_linears(model).items():
            weight = (
                from_compressed(tensors, path, bits)
                if form == "compressed-tensors"
                else from_gptq(tensors, path, bits, form)
            )
            assert torch.equal(weight, layer.dequantize(dtype=torch.float32)), (form, path)
        assert torch.equal(tensors["model.norm.weight"], model.model.norm.weight)
        assert not any(name.endswith(("columns", "perm")) for name in tensors)


def test_the_order_of_columns_is_kept_or_refused(tmp_path: Path) -> None:
    model = quantized("optq", bits=3, group_size=32, act_order=True)
    export(model, None, tmp_path / "out", "gptq_v2")
    read = from_gptq(load_file(tmp_path / "out" / "model.safetensors"), UP, 3, "gptq_v2")
    assert torch.equal(read, model.get_submodule(UP).dequantize(dtype=torch.float32))
    with pytest.raises(InputError, match="groups are of reordered columns"):
        export(model, None, tmp_path / "ct", "compressed-tensors")


@pytest.mark.parametrize("form", ["gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_what_we_write_we_read(form: str, family: str, tmp_path: Path) -> None:
    """Mixed widths and a dense module; biases; tied embeddings."""
    from llmtools.formats.reading import detect, open_model

    overrides: dict[str, Any] = {"*layers.0.*": {"bits": 2, "group_size": 16}, "*.1.*v_proj": None}
    model = quantized(family=family, bits=4, group_size=32, overrides=overrides)
    export(model, None, tmp_path / "out", form)
    found = detect(str(tmp_path / "out"), {})
    assert found is not None
    back, info = open_model(found, {})
    assert not info["missing_keys"] and torch.equal(logits(back), logits(model))
    before, after = quantized_linears(model), quantized_linears(back)
    assert {path: layer.quantizer.bits for path, layer in before.items()} == {
        path: layer.quantizer.bits for path, layer in after.items()
    }


def test_zero_points_of_zero_are_refused_in_gptq_v1(tmp_path: Path) -> None:
    model = tiny_model()
    for path in (UP, "model.layers.1.self_attn.q_proj"):
        model.get_submodule(path).weight.data.abs_()  # no negatives: the zero point is code 0
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    with pytest.raises(InputError, match=r"up_proj: it has zero points of 0.*gptq_v2.*--lossy"):
        export(model, None, tmp_path / "v1", "gptq")
    assert not any(tmp_path.iterdir())
    done = export(model, None, tmp_path / "v1", "gptq", lossy=True)
    assert UP in {one.path for one in done.requantized} and 0 < done.requantized[0].relative_error < 0.3


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "compressed-tensors"])
def test_other_grids_are_refused_or_rounded_again(form: str, tmp_path: Path) -> None:
    model = quantized("nf4", group_size=32)
    with pytest.raises(InputError, match="nf4 is not a uniform grid; nothing was written"):
        export(model, None, tmp_path / "out", form)
    done = export(model, None, tmp_path / "out", form, lossy=True)
    assert len(done.requantized) == 14 and all(one.relative_error < 0.2 for one in done.requantized)


def test_short_last_groups_fit_gptq_alone(tmp_path: Path) -> None:
    model = quantized(bits=3, group_size=40)
    with pytest.raises(InputError, match="group_size=40 to divide"):
        export(model, None, tmp_path / "ct", "compressed-tensors")
    export(model, None, tmp_path / "gptq", "gptq_v2")
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    weight = from_gptq(tensors, UP, 3, "gptq_v2")
    assert torch.equal(weight, model.get_submodule(UP).dequantize(dtype=torch.float32))


def test_configs_describe_what_differs(tmp_path: Path) -> None:
    model = quantized(bits=4, group_size=32, overrides={"*0.mlp.up_proj": {"bits": 3}, "*1.mlp.up_proj": None})
    export(model, None, tmp_path / "gptq", "gptq_v2")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["desc_act"]) == (4, 32, False)
    assert config["dynamic"] == {
        r"-:^model\.layers\.1\.mlp\.up_proj$": {},
        r"+:^model\.layers\.0\.mlp\.up_proj$": {"bits": 3, "group_size": 32, "sym": False, "desc_act": False},
    }
    export(model, None, tmp_path / "ct", "compressed-tensors")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert sorted(config["ignore"]) == ["lm_head", "model.layers.1.mlp.up_proj"]
    groups = list(config["config_groups"].values())
    assert [group["weights"]["num_bits"] for group in groups] in ([4, 3], [3, 4])
    assert [UP] in [group["targets"] for group in groups]


def test_dense_is_an_ordinary_model(tmp_path: Path) -> None:
    model = quantized("nf4")
    expected = {path: layer.dequantize(dtype=torch.bfloat16) for path, layer in quantized_linears(model).items()}
    save_dense(model, None, tmp_path / "dense", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert all(torch.equal(tensors[f"{path}.weight"], weight) for path, weight in expected.items())


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    from llmtools.formats.reading import detect, open_model

    model = quantized(bits=4, group_size=32)
    export(model, None, tmp_path / "out", "gptq_v2", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found = detect(str(tmp_path / "out"), {})
    assert found is not None and torch.equal(logits(open_model(found, {})[0]), logits(model))


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    model = quantized(bits=4, group_size=32)
    export(model, None, tmp_path / "out", "gptq_v2")
    with pytest.raises(InputError, match="exists"):
        export(model, None, tmp_path / "out", "gptq_v2")
    with pytest.raises(InputError, match="did you mean 'gptq_v2'"):
        export(model, None, tmp_path / "other", "gptq_v3")


# ---- GGUF's blocks -------------------------------------------------------------------------------------------------


def from_blocks(kind: str, data: Tensor) -> Tensor:
    """llama.cpp's definitions, a block at a time: bytes [out, …] -> float32 [out, in]."""
    size = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34}[kind]
    blocks = data.numpy().reshape(len(data), -1, size)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        return torch.from_numpy(scale * blocks[..., 2:].copy().view(np.int8)).flatten(1)
    body = blocks[..., -16:]
    codes = np.concatenate([body & 15, body >> 4], -1).astype(np.int32)
    if kind == "Q4_0":
        return torch.from_numpy(scale * (codes - 8)).flatten(1)
    if kind == "Q4_1":
        return torch.from_numpy(scale * codes + blocks[..., 2:4].copy().view(np.float16).astype(np.float32)).flatten(1)
    tops = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little").astype(np.int32)
    return torch.from_numpy(scale * (codes + 16 * tops - 16)).flatten(1)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"bits": 2, "group_size": 32}, "Q4_0"),
        ({"bits": 3, "group_size": 64}, "Q4_0"),
        ({"bits": 4, "group_size": 32, "symmetric": True}, "Q4_0"),
        ({"bits": 4, "group_size": -1, "symmetric": True}, "Q4_0"),
        ({"bits": 4, "group_size": 32}, "Q5_0"),
        ({"bits": 8, "group_size": 32, "symmetric": True}, "Q8_0"),
    ],
    ids=str,
)
def test_blocks_hold_the_same_numbers(options: dict[str, Any], kind: str) -> None:
    model = quantized(**options)
    kinds = set()
    for layer in quantized_linears(model).values():
        uniform = uniform_of(layer)
        assert not isinstance(uniform, str)
        blocks = as_blocks(uniform)
        assert not isinstance(blocks, str)
        kinds.add(blocks[0])
        assert torch.equal(from_blocks(*blocks), layer.dequantize(dtype=torch.float32))
    assert kind in kinds


def test_scale_and_minimum_are_used_where_they_are_exact() -> None:
    layer = quantized(bits=4, group_size=32).get_submodule(UP)
    layer.packed["scales"].data.fill_(2.0**-6)  # a power of two: zero · scale is a float16
    uniform = uniform_of(layer)
    assert not isinstance(uniform, str)
    blocks = as_blocks(uniform)
    assert blocks[0] == "Q4_1" and torch.equal(from_blocks(*blocks), layer.dequantize(dtype=torch.float32))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 4, "group_size": 16}, "group_size=16"),
        ({"bits": 8, "group_size": 32}, "beyond Q8_0"),
        ({"name": "optq", "bits": 3, "group_size": 32, "act_order": True}, "reordered columns"),
    ],
    ids=str,
)
def test_blocks_that_cannot_be_exact_say_why(options: dict[str, Any], reason: str) -> None:
    uniform = uniform_of(quantized(**{"name": "rtn"} | options).get_submodule(UP))
    assert not isinstance(uniform, str)
    assert reason in str(as_blocks(uniform))
