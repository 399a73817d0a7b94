"""Third-party checkpoints with other scales keep their format: what was changed is in the files, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import llmtools
from llmtools import InputError
from llmtools.checkpoint.folder import load_model
from llmtools.formats.rewriting import GGUFRewriter, rewriter
from llmtools.model.recover import trained_parameters
from llmtools.nn.swap import own_linears
from tests.formats import test_awq, test_bitsandbytes, test_compressed_tensors, test_gptq, test_hqq
from tests.formats.test_gguf_reading import write_gguf
from tests.formats.writers import write
from tests.kernels.test_ggml import TYPES

pytestmark = pytest.mark.filterwarnings("ignore")

FOLDERS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "gptq": (test_gptq.writer(3, act_order=True), test_gptq.config(3), {"scales"}),
    "awq": (test_awq.gemm, test_awq.config(), {"scales"}),
    "awq gemv": (test_awq.gemv, test_awq.config(version="gemv"), {"scales"}),
    "compressed-tensors": (test_compressed_tensors.writer(4), test_compressed_tensors.config(4), {"weight_scale"}),
    "hqq": (test_hqq.writer(2, 1), test_hqq.CONFIG, {"scale"}),
    "hqq of columns": (test_hqq.writer(4, 0), test_hqq.CONFIG, {"scale"}),
    "bitsandbytes": (test_bitsandbytes.writer("nf4"), test_bitsandbytes.CONFIG, {"weight.absmax"}),
    "bitsandbytes nested": (
        test_bitsandbytes.writer("nf4", nested="usual"), test_bitsandbytes.CONFIG,
        {"weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4"},
    ),
}  # fmt: skip


def double(model: nn.Module) -> None:
    """Twice the scales and the norms: exact in every type."""
    for layer in own_linears(model).values():
        floats = layer.quantizer.unpacked(layer.packed)
        names = [name for name in layer.quantizer.tunable(floats) if name != "zeros"]
        layer.pack_(layer.quantizer.repacked(floats | {name: floats[name] * 2 for name in names}))
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data * 2


@pytest.mark.parametrize("name", FOLDERS)
def test_the_scales_of_a_folder_are_replaced_and_nothing_else(name: str, tmp_path: Path) -> None:
    writer, config, changed = FOLDERS[name]
    expected = write(tmp_path / "q", writer, config)
    model, _ = llmtools.load(tmp_path / "q")
    found = rewriter(str(tmp_path / "q"), model)
    assert found is not None and found.format == name.split()[0]
    double(model)
    (tmp_path / "again").mkdir()
    found.write(model, tmp_path / "again")
    again, _ = llmtools.load(tmp_path / "again")
    for path, layer in own_linears(again).items():
        assert torch.equal(layer.dequantize(dtype=torch.float32), 2 * expected.get_submodule(path).weight), path
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("q", "again"))
    assert before.keys() == after.keys()
    differ = {key for key in before if not torch.equal(before[key], after[key])}
    packed = {key for key in differ if not key.endswith("norm.weight")}
    assert {key.split("proj.")[-1] for key in packed} == changed and len(packed) == 14 * len(changed)
    assert differ - packed == {key for key in before if key.endswith("norm.weight")}
    for file in (tmp_path / "q").iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_float_zero_points_are_replaced(tmp_path: Path) -> None:
    write(tmp_path / "q", test_hqq.writer(4, 1), test_hqq.CONFIG)
    model, _ = llmtools.load(tmp_path / "q")
    layer = model.model.layers[0].mlp.up_proj
    layer.pack_(layer.packed | {"zeros": layer.packed["zeros"] + 1})
    (tmp_path / "again").mkdir()
    rewriter(str(tmp_path / "q"), model).write(model, tmp_path / "again")  # type: ignore[union-attr]
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("q", "again"))
    name = "model.layers.0.mlp.up_proj.zero"
    assert torch.equal(after[name], before[name] + 1)
    assert {key for key in before if not torch.equal(before[key], after[key])} == {name}


def test_what_the_files_cannot_hold_is_said_before_the_training(tmp_path: Path) -> None:
    write(tmp_path / "b", test_bitsandbytes.writer("nf4", 64), test_bitsandbytes.CONFIG)  # rows of 96 share blocks
    with pytest.raises(InputError, match="a scale of its file is that of several groups"):
        rewriter(str(tmp_path / "b"), llmtools.load(tmp_path / "b")[0])


def test_our_own_folder_is_not_rewritten(tmp_path: Path) -> None:
    write(tmp_path / "q", test_gptq.writer(), test_gptq.config())
    llmtools.save(llmtools.load(tmp_path / "q")[0], None, tmp_path / "ours")
    assert rewriter(str(tmp_path / "ours"), load_model(tmp_path / "ours")) is None


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {"tie_word_embeddings": True}), ("gemma3", {"head_dim": 256})]
)
def test_the_scales_of_a_gguf_file_are_replaced_and_no_other_byte(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    gguf: Any = pytest.importorskip("gguf")
    source = write_gguf(tmp_path, family, **options)
    model, _ = llmtools.load(source)
    found = rewriter(str(source), model)
    assert isinstance(found, GGUFRewriter)
    found.write_file(model, tmp_path / "same.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == source.read_bytes()
    double(model)
    found.write_file(model, tmp_path / "again.gguf")
    before, after = (np.fromfile(path, dtype=np.uint8) for path in (source, tmp_path / "again.gguf"))
    differ = before != after
    for one, other in zip(
        gguf.GGUFReader(source).tensors, gguf.GGUFReader(tmp_path / "again.gguf").tensors, strict=True
    ):
        kind, place = one.tensor_type.name, slice(int(one.data_offset), int(one.data_offset + one.n_bytes))
        weights = (gguf.quants.dequantize(each.data, each.tensor_type) for each in (one, other))
        old, new = (torch.from_numpy(np.array(each)) for each in weights)
        if one.name.startswith(("token_embd", "output.")):  # tied: no layer of its own
            assert torch.equal(old, new)
        elif kind in TYPES:
            assert torch.equal(new, 2 * old), one.name
            inside = differ[place].reshape(-1, TYPES[kind].bytes)
            offsets = {at + byte for at in TYPES[kind].halves for byte in (0, 1)}
            assert set(np.flatnonzero(inside.any(0)).tolist()) <= offsets
        else:  # llama.cpp adds one to Gemma's norms
            shift = 1 if family == "gemma3" else 0
            torch.testing.assert_close(new - shift, 2 * (old - shift))
        differ[place] = False
    assert not differ.any()
    again, _ = llmtools.load(tmp_path / "again.gguf")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_offsets_of_double_quantization_are_numbers_of_its_state(tmp_path: Path) -> None:
    write(tmp_path / "q", test_bitsandbytes.writer("nf4", nested="usual"), test_bitsandbytes.CONFIG)
    model, _ = llmtools.load(tmp_path / "q")
    found = rewriter(str(tmp_path / "q"), model)
    double(model)
    (tmp_path / "again").mkdir()
    found.write(model, tmp_path / "again")  # type: ignore[union-attr]
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    states = [
        json.loads(bytes(load_file(tmp_path / each / "model.safetensors")[name].tolist())) for each in ("q", "again")
    ]
    assert states[1].pop("nested_offset") == pytest.approx(2 * states[0].pop("nested_offset"), rel=1e-6)
    assert states[0] == states[1]
