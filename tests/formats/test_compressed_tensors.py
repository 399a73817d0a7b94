"""compressed-tensors' pack-quantized tensors, packed here by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmtools
from llmtools import CheckpointError
from tests.formats.writers import assert_same, dense, draw, stream, write


def padded(codes: Tensor, bits: int) -> Tensor:
    """Whole codes in a word, as versions before 0.18 wrote."""
    per_word = 32 // bits
    fields = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
    return (fields << torch.arange(0, per_word * bits, bits)).sum(-1).to(torch.int32)


def writer(bits: int, group_size: int = 32, pack: Any = stream, *, act_order: bool = False, **kind: Any) -> Any:
    def write_linear(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
        size = n if group_size < 0 else group_size
        codes, scales, zeros = draw(path, bits, out, n // size, n, **kind)
        group_of = torch.arange(n) // size
        if act_order:
            group_of = group_of[torch.randperm(n, generator=torch.Generator().manual_seed(n))]
        tensors = {
            "weight_packed": pack(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([out, n]),
        }
        if not kind.get("symmetric"):
            tensors["weight_zero_point"] = pack(zeros.T.contiguous(), bits).T
        if act_order:
            tensors["weight_g_idx"] = group_of.to(torch.int32)
        return tensors, dense(codes, scales, zeros, group_of)

    return write_linear


def config(bits: int, group_size: int = 32, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        **more,
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_every_width(bits: int, symmetric: bool, tmp_path: Path) -> None:
    assert_same(tmp_path / "q", write(tmp_path / "q", writer(bits, symmetric=symmetric), config(bits)))


@pytest.mark.parametrize("bits", [3, 5])
def test_the_old_packing(bits: int, tmp_path: Path) -> None:
    assert_same(tmp_path / "q", write(tmp_path / "q", writer(bits, 32, padded), config(bits, version="0.12.2")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_channels_and_other_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    assert_same(tmp_path / "q", write(tmp_path / "q", writer(4, -1, dtype=dtype), config(4, -1)))


def test_columns_in_another_order(tmp_path: Path) -> None:
    assert_same(tmp_path / "q", write(tmp_path / "q", writer(3, 32, act_order=True), config(3)))


def test_widths_are_told_by_the_shapes(tmp_path: Path) -> None:
    four, eight = writer(4), writer(8)

    def mixed(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
        return eight(path, out, n) if "v_proj" in path else four(path, out, n)

    told = config(4)
    told["config_groups"]["group_1"] = config(8)["config_groups"]["group_0"] | {"targets": ["re:.*v_proj"]}
    assert_same(tmp_path / "q", write(tmp_path / "q", mixed, told))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (config(2), "words per row"),
        (config(4, transform_config={"config_groups": {"a": {}}}), "transforms"),
        (config(4, config_groups={}), "no config group"),
    ],
    ids=["width", "transforms", "no groups"],
)
def test_what_cannot_be_read_is_refused(told: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "q", writer(4), told)
    with pytest.raises(CheckpointError, match=message):
        llmtools.load(tmp_path / "q")


def mixed_precision(**formats: str) -> dict[str, Any]:
    """A config whose groups name their own formats."""
    groups = {name: config(4)["config_groups"]["group_0"] | {"format": form} for name, form in formats.items()}
    return config(4, format="mixed-precision", config_groups=groups)


def test_mixed_precision_opens_where_every_group_is_packed(tmp_path: Path) -> None:
    told = mixed_precision(group_0="pack-quantized", group_1="pack-quantized")
    assert_same(tmp_path / "q", write(tmp_path / "q", writer(4), told))


@pytest.mark.parametrize("form", ["float-quantized", "nvfp4-pack-quantized", "int-quantized"])
def test_other_formats_are_named_in_one_line(form: str, tmp_path: Path) -> None:
    """Neither the reader here nor, without tensors of theirs, transformers opens them."""
    write(tmp_path / "q", writer(4), mixed_precision(group_0="pack-quantized", group_1=form))
    with pytest.raises(CheckpointError, match=r"compressed-tensors \(format mixed-precision\), which .* dense") as said:
        llmtools.load(tmp_path / "q")
    assert "\n" not in str(said.value)
