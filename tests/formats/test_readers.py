"""Who reads what: the table of readers, and an export for one of them is refused where that one would not open it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtools
from llmtools import InputError
from llmtools.checkpoint.folder import save_dense
from llmtools.cli.app import main
from llmtools.formats.readers import READERS, readers_of
from llmtools.formats.uniform import Uniform
from llmtools.formats.writing import export
from tests.models import tiny_ids, tiny_model


def layer(bits: int = 4, group_size: int = 32, *, symmetric: bool = True, reordered: bool = False) -> Uniform:
    codes = torch.zeros(8, 256, dtype=torch.uint8)
    groups = 256 // group_size
    order = torch.arange(256).flip(0) // group_size if reordered else None
    scales = torch.ones(8, groups, dtype=torch.float16)
    return Uniform(bits, group_size, symmetric, codes, scales, codes[:, :groups], order)


@pytest.mark.parametrize(
    ("form", "layers", "expected"),
    [
        ("gptq", [layer()], {"vllm", "gptqmodel", "transformers"}),
        ("gptq", [layer(8, 128)], {"vllm", "gptqmodel", "transformers"}),
        ("gptq", [layer(8, 256)], {"vllm", "gptqmodel", "transformers"}),
        ("gptq", [layer(3)], {"gptqmodel", "transformers"}),
        ("gptq", [layer(4, 16)], {"gptqmodel", "transformers"}),
        ("gptq", [layer(reordered=True)], {"gptqmodel", "transformers"}),
        ("gptq", [layer(), layer(8)], {"gptqmodel", "transformers"}),
        ("gptq", [layer(symmetric=False)], {"transformers"}),
        ("gptq_v2", [layer(symmetric=False)], {"gptqmodel", "transformers"}),
        ("compressed-tensors", [layer(), layer(8)], {"vllm", "transformers"}),
        ("compressed-tensors", [layer(3)], {"transformers"}),
        ("compressed-tensors", [layer(symmetric=False)], set()),
        ("gguf", [], {"transformers", "llama.cpp"}),
        ("dense", [], {"vllm", "transformers"}),
    ],
)  # fmt: skip
def test_the_table(form: str, layers: list[Uniform], expected: set[str]) -> None:
    assert set(readers_of(form, layers, [])) == expected
    for reader in READERS:
        if reader in expected:
            readers_of(form, layers, [], reader)
        else:
            with pytest.raises(InputError, match=f"{reader} would not open this {form} export"):
                readers_of(form, layers, [], reader)


def test_dense_linears_in_the_blocks_are_one_setting_too_many_for_vllm() -> None:
    assert "vllm" in readers_of("gptq", [layer()], [])
    assert "vllm" not in readers_of("gptq", [layer()], ["model.layers.0.mlp.up_proj"])


def test_the_defaults_are_said_and_refused_with_the_option_that_would_do(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = llmtools.load(stories)
    llmtools.quantize(model, "rtn", bits=4)
    llmtools.save(model, tokenizer, tmp_path / "q")
    words = ["export", "--model", str(tmp_path / "q"), "--format", "gptq_v2", "--out", str(tmp_path / "out")]
    assert main([*words, "--for", "vllm"]) == 2
    assert "vllm would not open" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*words, "--for", "gptqmodel", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["readers"] == ["gptqmodel", "transformers"]
    model = tiny_model()
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    with pytest.raises(InputError, match=r"--options\.symmetric true"):
        export(model, tokenizer, tmp_path / "ct", "compressed-tensors", reader="transformers")
    with pytest.raises(InputError, match="no reader 'vlm'; did you mean 'vllm'"):
        export(model, tokenizer, tmp_path / "ct", "compressed-tensors", reader="vlm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_dense_export_keeps_the_type_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for asked in (None, torch.float32):
        model: Any = tiny_model().to(dtype)
        llmtools.quantize(model, "rtn", bits=8, group_size=32)
        with torch.no_grad():
            expected = model(input_ids=tiny_ids()).logits
        folder = tmp_path / str(asked)
        save_dense(model, None, folder, dtype=asked)
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {asked or dtype}
        back = llmtools.checkpoint.folder.load_model(folder, dtype="auto")
        with torch.no_grad():
            logits = back(input_ids=tiny_ids()).logits
        assert (logits.float() - expected.float()).norm() < 0.02 * expected.float().norm()
