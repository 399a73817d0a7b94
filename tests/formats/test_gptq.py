"""GPTQ's versions and options, packed here by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmtools
from llmtools import CheckpointError
from tests.formats.writers import assert_same, dense, draw, stream, write

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def in_planes(codes: Tensor, bits: int) -> Tensor:
    runs = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 32)).unflatten(1, (-1, 32))
    words = []
    for run in runs.unbind(1):
        low = 0
        for width in PLANES[bits]:
            words.append(stream((run >> low) & (2**width - 1), width))
            low += width
    return torch.cat(words, 1)


def writer(
    bits: int = 4,
    group_size: int = 32,
    version: str = "gptq",
    *,
    act_order: bool = False,
    g_idx: bool = True,
    **kind: Any,
) -> Any:
    def write_linear(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
        size = n if group_size < 0 else group_size
        groups = -(-n // size)
        codes, scales, zeros = draw(path, bits, out, groups, n, **kind)
        group_of = torch.arange(n) // size
        if act_order:
            group_of = group_of[torch.randperm(n, generator=torch.Generator().manual_seed(n))]
        stored = (zeros - 1) % 2**bits if version == "gptq" else zeros
        pack = in_planes if version == "gptq_p" else stream
        tensors = {
            "qweight": pack(codes, bits).T,
            "qzeros": pack(stored.T.contiguous(), bits),
            "scales": scales.T,
        }
        if g_idx:
            tensors["g_idx"] = group_of.to(torch.int32)
        return tensors, dense(codes, scales, zeros, group_of)

    return write_linear


def config(bits: int = 4, group_size: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": False, **more}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act-order"])
def test_every_width_and_version(bits: int, version: str, act_order: bool, tmp_path: Path) -> None:
    expected = write(
        tmp_path / "q", writer(bits, 32, version, act_order=act_order), config(bits, checkpoint_format=version)
    )
    assert_same(tmp_path / "q", expected)


@pytest.mark.parametrize("bits", PLANES)
def test_fields_in_planes(bits: int, tmp_path: Path) -> None:
    expected = write(tmp_path / "q", writer(bits, 32, "gptq_p"), config(bits, checkpoint_format="gptq_p"))
    assert_same(tmp_path / "q", expected)


@pytest.mark.parametrize(
    "options",
    [{"group_size": -1}, {"symmetric": True}, {"g_idx": False}, {"dtype": torch.bfloat16}, {"group_size": 40}],
    ids=["whole rows", "symmetric", "no g_idx", "bfloat16 scales", "a short last group"],
)
def test_variants(options: dict[str, Any], tmp_path: Path) -> None:
    expected = write(
        tmp_path / "q", writer(3, **{"group_size": 32} | options), config(3, options.get("group_size", 32))
    )
    assert_same(tmp_path / "q", expected)


def test_symmetric_checkpoints_store_no_zeros(tmp_path: Path) -> None:
    expected = write(tmp_path / "q", writer(symmetric=True), config())
    model = assert_same(tmp_path / "q", expected)
    assert model.model.layers[0].mlp.up_proj.quantizer.symmetric


def test_a_file_beside_the_config_will_do(tmp_path: Path) -> None:
    told = {key: value for key, value in config().items() if key != "quant_method"}
    assert_same(tmp_path / "q", write(tmp_path / "q", writer(), told, side="quantize_config.json"))


def test_the_model_may_have_biases_or_the_file_zeros_for_them(tmp_path: Path) -> None:
    assert_same(tmp_path / "opt", write(tmp_path / "opt", writer(), config(), family="opt"))

    def with_zeros(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
        tensors, weight = writer()(path, out, n)
        return tensors | {"bias": torch.zeros(out, dtype=torch.float16)}, weight

    assert_same(tmp_path / "zeros", write(tmp_path / "zeros", with_zeros, config()))


def test_dynamic_gives_modules_other_options(tmp_path: Path) -> None:
    down, other = writer(8, 16), writer(4, 32)

    def mixed(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
        return down(path, out, n) if "down_proj" in path else other(path, out, n)

    dynamic = {r"-:.*lm_head": {}, r"+:.*\.down_proj$": {"bits": 8, "group_size": 16}, r".*": {}}
    model = assert_same(tmp_path / "q", write(tmp_path / "q", mixed, config(dynamic=dynamic)))
    assert model.model.layers[1].mlp.down_proj.quantizer.bits == 8
    write(tmp_path / "odd", other, config(dynamic={r"-:.*up_proj": {}}))
    with pytest.raises(CheckpointError, match=r"leaves it dense"):
        llmtools.load(tmp_path / "odd")


def test_autoround_in_gptq_packing(tmp_path: Path) -> None:
    told = config(quant_method="auto-round", packing_format="auto_round:gptqmodel")
    assert_same(tmp_path / "q", write(tmp_path / "q", writer(version="gptq_v2"), told))


def test_zeros_that_overwrote_their_neighbours_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def careless(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
        tensors, weight = writer()(path, out, n)
        tensors["qzeros"][:] = 0x11111111
        tensors["qzeros"][0, 0] = -1  # −1 in the lowest field, and on to the top
        return tensors, weight

    write(tmp_path / "q", careless, config())
    with caplog.at_level(logging.WARNING, "llmtools"):
        llmtools.load(tmp_path / "q")
    assert "overwritten their neighbours" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, r"qweight has shape \[12, 64\], expected \[9, 64\]"),
        ({"group_size": 16}, "qzeros has shape"),
        ({"checkpoint_format": "marlin"}, "'marlin' is not read"),
        ({"bits": None}, "bits=None, an integer is expected"),
        ({"bits": 16}, "16 bits is not read"),
        ({"pack_dtype": "int8"}, "pack_dtype"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "q", writer(), config(**changes))
    with pytest.raises(CheckpointError, match=message):
        llmtools.load(tmp_path / "q")


def test_groups_that_are_none_are_refused(tmp_path: Path) -> None:
    def odd(path: str, out: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
        tensors, weight = writer()(path, out, n)
        tensors["g_idx"][:] = 0
        return tensors, weight

    write(tmp_path / "q", odd, config())
    with pytest.raises(CheckpointError, match="g_idx does not sort"):
        llmtools.load(tmp_path / "q")
