"""HQQ's tensors, packed here by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmtools
from llmtools import CheckpointError
from tests.formats.writers import assert_same, write

PACKING = {8: ("8bit_u8", 8, 1), 6: ("8bit_u8", 8, 1), 4: ("4bit_u8", 4, 2), 3: ("3bit_32", 3, 10), 2: ("2bit_u8", 2, 4), 1: ("1bit_u8", 1, 8)}  # fmt: skip  # noqa: E501


def fields_in_blocks(codes: Tensor, width: int, per_word: int) -> Tensor:
    """Rows cut in equal blocks, the first in the highest field."""
    rows = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % per_word))
    words = torch.zeros_like(rows[: len(rows) // per_word])
    for block in rows.chunk(per_word):
        words = words << width | block
    return words.to(torch.int32 if per_word == 10 else torch.uint8)


def writer(bits: int, axis: int, group_size: int = 16, dtype: torch.dtype = torch.float32, whole: bool = False) -> Any:
    def write_linear(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(sum(map(ord, path)))
        packing, width, per_word = PACKING[bits]
        groups = out * n // group_size
        codes = torch.randint(2**bits, (groups, group_size) if axis else (group_size, groups), generator=generator)
        shape = (groups, 1) if axis else (1, groups)
        scale = (torch.rand(shape, generator=generator) * 0.3 / 2**bits).to(dtype)
        zero = (torch.rand(shape, generator=generator) * (2**bits - 1)).to(dtype)
        zero = zero.round() if whole else zero
        options = {"nbits": bits, "group_size": group_size, "axis": axis, "view_as_float": 0, "quant_scale": 0}
        tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in options.items()} | {
            "W_q": fields_in_blocks(codes, width, per_word),
            "scale": scale,
            "zero": zero,
            "shape": torch.tensor([out, n]),
            "packing": torch.tensor(list(packing.encode()), dtype=torch.uint8),
        }
        return tensors, ((codes - zero.float()) * scale.float()).reshape(out, n)

    return write_linear


CONFIG = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {}}, "skip_modules": ["lm_head"]}


@pytest.mark.parametrize("bits", PACKING)
@pytest.mark.parametrize("axis", [1, 0])
def test_every_packing(bits: int, axis: int, tmp_path: Path) -> None:
    assert_same(tmp_path / "q", write(tmp_path / "q", writer(bits, axis), CONFIG), dtypes=())


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_as_hqq_does(axis: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """(code − zero) · scale with every step in the type of the scales."""
    folder = tmp_path / "q"
    expected = write(folder, writer(4, axis, dtype=dtype), CONFIG)
    model = assert_same(folder, expected, dtypes=())
    layer = model.model.layers[0].mlp.down_proj
    from safetensors.torch import load_file

    stored = {
        name.removeprefix("model.layers.0.mlp.down_proj."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if "layers.0.mlp.down_proj" in name
    }
    codes = torch.cat([stored["W_q"] >> 4, stored["W_q"] & 15]).to(dtype)
    weight = ((codes - stored["zero"]) * stored["scale"]).reshape(layer.out_features, layer.in_features)
    assert torch.equal(layer.dequantize(dtype=dtype), weight)


def test_whole_zero_points_are_stored_as_codes(tmp_path: Path) -> None:
    model = assert_same(tmp_path / "q", write(tmp_path / "q", writer(4, 1, whole=True), CONFIG))
    assert not model.model.layers[0].mlp.up_proj.quantizer.float_zeros


def test_quantized_scales_are_refused(tmp_path: Path) -> None:
    def nested(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
        tensors, weight = writer(4, 1)(path, out, n)
        return tensors | {"quant_scale": torch.ones((), dtype=torch.uint8)}, weight

    write(tmp_path / "q", nested, CONFIG)
    with pytest.raises(CheckpointError, match="quant_scale is not read"):
        llmtools.load(tmp_path / "q")


def test_what_hqq_pickles_is_refused_with_its_own_way_out(tmp_path: Path) -> None:
    """hqq's save_quantized: a config.json of the dense model, and a pickle."""
    write(tmp_path / "q", writer(4, 1), CONFIG)
    (tmp_path / "q" / "model.safetensors").rename(tmp_path / "q" / "qmodel.pt")
    with pytest.raises(CheckpointError, match=r"qmodel\.pt, which is a pickle.*hqq's save_to_safetensors"):
        llmtools.load(tmp_path / "q")
