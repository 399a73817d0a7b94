"""`llmtools export`: from a checkpoint to the formats of others, and back through `llmtools.load`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import llmtools
from llmtools.cli.app import main


@pytest.fixture(scope="module")
def checkpoint(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = llmtools.load(stories)
    llmtools.quantize(model, "rtn", bits=4, group_size=-1)
    return llmtools.save(model, tokenizer, tmp_path_factory.mktemp("export") / "quantized")


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = llmtools.load(checkpoint)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits.float()


def run(*args: str, code: int = 0) -> None:
    assert main(["export", *args]) == code


@pytest.mark.parametrize("form", ["gptq_v2", "compressed-tensors"])
def test_a_round_trip_gives_the_same_model(form: str, checkpoint: Path, tmp_path: Path) -> None:
    run("--model", str(checkpoint), "--format", form, "--out", str(tmp_path / "out"))
    back, _ = llmtools.load(tmp_path / "out")
    assert torch.equal(logits(back), logits(llmtools.load(checkpoint)[0]))


def test_a_merged_model_is_dense_and_nearly_the_same(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    expected = logits(PeftModel.from_pretrained(llmtools.load(checkpoint)[0], adapter))
    for options, dtype, share in (([], torch.float32, 1e-5), (["--dtype", "bfloat16"], torch.bfloat16, 0.05)):
        out = tmp_path / f"merged {dtype}"
        run("--adapter", str(adapter), "--format", "dense", "--out", str(out), *options)
        merged, _ = llmtools.load(out)
        assert merged.dtype == dtype
        assert (logits(merged) - expected).norm() < share * expected.norm()


def test_an_adapter_alone(adapter: Path, tmp_path: Path) -> None:
    run("--adapter", str(adapter), "--format", "lora", "--out", str(tmp_path / "lora"), "--base_name", "me/model")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/model"


FORMATS = ["compressed-tensors", "gptq", "gptq_v2", "dense", "merged", "lora"]


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_is_the_same_bytes_and_replaces_itself_alone(
    form: str, checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    source = ("--adapter", str(adapter)) if form in ("lora", "merged") else ("--model", str(checkpoint))
    command = (*source, "--format", "dense" if form == "merged" else form, "--out", str(out), "--lossy")
    run(*command)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    run(*command, "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "thesis.tex").write_text("years of work")
    run(*command, "--overwrite", code=2)
    assert "holds thesis.tex, which llmtools did not write" in capsys.readouterr().err
    assert (out / "thesis.tex").read_text() == "years of work"


def test_an_export_never_replaces_what_it_reads(
    checkpoint: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (checkpoint / "model.safetensors").read_bytes()
    for words in (
        ("--model", str(checkpoint), "--format", "gptq_v2", "--out", str(checkpoint)),
        ("--adapter", str(adapter), "--format", "dense", "--out", str(checkpoint)),  # the base that the adapter names
        ("--adapter", str(adapter), "--format", "lora", "--out", str(adapter)),
    ):
        run(*words, "--overwrite", code=2)
        assert "is an input of this run" in capsys.readouterr().err
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_what_cannot_be_is_said(
    checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    run("--model", str(checkpoint), "--adapter", str(adapter), "--format", "gptq", "--out", out, code=2)
    assert "--format dense for a merged model" in capsys.readouterr().err
    run("--model", str(checkpoint), "--format", "gptq3", "--out", out, code=2)
    assert "did you mean 'gptq'" in capsys.readouterr().err
    run("--format", "lora", "--out", out, code=2)
    assert "no adapter" in capsys.readouterr().err
    assert not Path(out).exists()


def test_requantized_modules_are_listed(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = llmtools.load(stories)
    llmtools.quantize(model, "nf4", group_size=32)
    llmtools.save(model, tokenizer, tmp_path / "nf4")
    run("--model", str(tmp_path / "nf4"), "--format", "gptq_v2", "--out", str(tmp_path / "out"), code=2)
    assert "not a uniform grid" in capsys.readouterr().err
    run("--model", str(tmp_path / "nf4"), "--format", "gptq_v2", "--out", str(tmp_path / "out"), "--lossy")
    assert "re-quantized, relative error" in capsys.readouterr().out
