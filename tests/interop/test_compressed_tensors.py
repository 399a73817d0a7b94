"""compressed-tensors compresses, we open; we export, compressed-tensors and transformers open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llmtools
from llmtools.formats.compressed_tensors import CompressedTensors
from llmtools.formats.writing import export
from llmtools.nn.swap import quantized_linears
from tests.interop.peers import opened
from tests.models import tiny_ids, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("compressed_tensors")


def scheme(bits: int, symmetric: bool, group_size: int | None = 32) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if group_size else "channel"
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group_size)
    return QuantizationScheme(targets=["Linear"], weights=args)


def compressor() -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry("pack-quantized")


def read_by_them(tensors: dict[str, Tensor], told: Any) -> Tensor:
    return compressor().decompress(dict(tensors), told)["weight"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_they_compress_we_open(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    half = 2 ** (bits - 1)
    tensors = {
        "weight": torch.randn(96, 128, dtype=dtype),
        "weight_scale": (torch.rand(96, 4) * 0.2 + 0.05).to(dtype),
        "weight_zero_point": torch.randint(-half, half, (96, 4)).to(torch.int8) * (not symmetric),
    }
    told = scheme(bits, symmetric)
    theirs = compressor().compress(tensors, told)
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": bits, "type": "int"}}},
    }
    layer = opened(CompressedTensors(config), theirs, 96, 128)
    assert torch.equal(layer.dequantize(dtype=dtype), read_by_them(theirs, told))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_what_we_export_they_open(bits: int, symmetric: bool, group_size: int, tmp_path: Path) -> None:
    model = tiny_model()
    llmtools.quantize(model, "rtn", bits=bits, group_size=group_size, symmetric=symmetric)
    export(model, None, tmp_path / "out", "compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    told = scheme(bits, symmetric, None if group_size < 0 else group_size)
    for path, layer in quantized_linears(model).items():
        own = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items() if name.startswith(f"{path}.")}
        weight = read_by_them(own, told)
        assert torch.equal(weight, layer.dequantize(dtype=weight.dtype)), path


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_opens_what_we_export(bits: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    llmtools.quantize(model, "rtn", bits=bits, group_size=32, symmetric=True, overrides={"*.1.mlp.up_proj": None})
    export(model, None, tmp_path / "out", "compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected, got = model(input_ids=tiny_ids()).logits, theirs(input_ids=tiny_ids()).logits
    torch.testing.assert_close(got.float(), expected, rtol=1e-3, atol=1e-3)
