"""`recover` as a run: what it writes, what it resumes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtools
from llmtools.cli.app import read_recipe
from llmtools.errors import InputError
from llmtools.files import unknown_files
from llmtools.model import recover as model_recover
from llmtools.model.options import NO_RECOVERY, RECOVERY, Recovery
from llmtools.nn import quantized_linears
from llmtools.recipes.quantize import Quantize, quantize
from llmtools.recipes.recover import Recover, recover
from llmtools.signals import Stopped

SHORT = Recovery(steps=4, batch=1, evaluations=2, learning_rate=5e-3, dense_learning_rate=5e-3)


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text((tinystories / "train.txt").read_text()[:20_000])
    return file


@pytest.fixture(scope="module")
def packed(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "q"
    quantize(Quantize(model=str(stories), out=str(out), quantizer="rtn", bits=2, group_size=32))
    return out


@pytest.fixture
def asked(packed: Path, text: Path, tmp_path: Path) -> Recover:
    return Recover(
        model=str(packed), calibration=str(text), out=str(tmp_path / "r"), num_samples=8, max_length=48, recover=SHORT
    )


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return dict(llmtools.load(folder)[0].state_dict())


def test_the_result_is_a_checkpoint_closer_to_the_original(asked: Recover, packed: Path, stories: Path) -> None:
    result = recover(asked)
    assert result.kl < result.kl_before
    model, _ = llmtools.load(asked.out)
    assert [layer.quantizer.spec() for layer in quantized_linears(model).values()] == [
        layer.quantizer.spec() for layer in quantized_linears(llmtools.load(packed)[0]).values()
    ]
    info = json.loads((Path(asked.out) / "llmtools.json").read_text())
    assert info["base_model"] == str(stories)  # not the checkpoint that was recovered
    assert info["report"] and info["recovery"]["after"] == result.kl
    assert sorted(path.name for path in Path(asked.out).parent.iterdir()) == ["r"]


def test_a_stopped_run_is_resumed_to_the_same_bytes(asked: Recover, tmp_path: Path, monkeypatch: Any) -> None:
    whole = replace(asked, out=str(tmp_path / "whole"))
    recover(whole)
    evaluate = model_recover._Text.held_out_kl
    calls: list[int] = []

    def stopping(self: Any) -> float:
        calls.append(1)
        if len(calls) == 3:  # before training, after two steps, after four
            raise KeyboardInterrupt
        return evaluate(self)

    monkeypatch.setattr(model_recover._Text, "held_out_kl", stopping)
    with pytest.raises(Stopped, match="--resume continues"):
        recover(asked)
    monkeypatch.undo()
    assert not Path(asked.out).exists()
    with pytest.raises(InputError, match="holds a run that was stopped; --resume continues it"):
        recover(asked)
    with pytest.raises(InputError, match=r"--resume: options\.seed 0, now 1; resume with the same"):
        recover(replace(asked, resume=True, seed=1))
    moved = {"model": shutil.copytree(asked.model, tmp_path / "moved"), "calibration": tmp_path / "moved.txt"}
    shutil.copy(asked.calibration, moved["calibration"])
    recover(replace(asked, resume=True, **{name: str(place) for name, place in moved.items()}))
    found, expected = weights(asked.out), weights(whole.out)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recover": NO_RECOVERY}, "steps=0;"),
        ({"resume": True}, "no stopped run"),
        ({"original": "nowhere"}, "nowhere"),
        ({"calibration": "nowhere.txt"}, r"nowhere\.txt"),
    ],
)
def test_wrong_runs_are_refused_and_leave_nothing(asked: Recover, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recover(replace(asked, **changes))
    assert not list(Path(asked.out).parent.iterdir())


def test_a_quantized_original_and_a_dense_model_are_refused(asked: Recover, packed: Path, stories: Path) -> None:
    with pytest.raises(InputError, match="is quantized, too; pass the original"):
        recover(replace(asked, original=str(packed)))
    with pytest.raises(InputError, match="quantized"):
        recover(replace(asked, model=str(stories), original=str(stories)))
    assert not list(Path(asked.out).parent.iterdir())


def test_quantize_recovers_what_it_has_quantized(stories: Path, text: Path, tmp_path: Path) -> None:
    asked = Quantize(
        model=str(stories), out=str(tmp_path / "q"), quantizer="rtn", bits=2, group_size=32, calibration=str(text),
        num_samples=8, max_length=48, recover=SHORT,
    )  # fmt: skip
    result = quantize(asked)
    assert result.recovery and result.recovery["after"] < result.recovery["before"]
    quantize(replace(asked, out=str(tmp_path / "plain"), recover=NO_RECOVERY))
    recovered, plain = weights(tmp_path / "q"), weights(tmp_path / "plain")
    codes = [name for name in plain if name.endswith(("qweight", "qzeros"))]
    assert codes and all(torch.equal(recovered[name], plain[name]) for name in codes)
    assert any(not torch.equal(recovered[name], plain[name]) for name in plain if name.endswith("scales"))


def divergence(model: Any, folder: Path, text: Path, original: Path) -> float:
    from llmtools.data.calibration import calibration
    from llmtools.model.recover import Targets, mean_kl_divergence

    teacher, tokenizer = llmtools.load(original)
    sequences = calibration(str(text), tokenizer, samples=8, tokens=48, seed=0)
    return mean_kl_divergence(model, sequences, Targets.of(teacher, sequences, folder, 64), [len(sequences) - 1])


@pytest.mark.parametrize("verb", ["quantize", "recover"])
def test_an_adapter_is_trained_beside(verb: str, asked: Recover, stories: Path, text: Path, tmp_path: Path) -> None:
    """It is PEFT's, on the checkpoint that it lies in, and what finetune --lora.init error begins with."""
    from llmtools.checkpoint.folder import load_lora_init

    if verb == "quantize":
        done = quantize(Quantize(
            model=str(stories), out=asked.out, quantizer="rtn", bits=2, group_size=32, calibration=str(text),
            num_samples=8, max_length=48, recover=SHORT, adapter_rank=4,
        ))  # fmt: skip
        assert done.recovery is not None
        base, both = done.recovery["after"], done.recovery["with_adapter"]
        assert f"with the adapter {both:.4f}" in str(done)
    else:
        result = recover(replace(asked, adapter_rank=4))
        base, both = result.kl, result.kl_adapter
    assert both < base
    adapted = llmtools.load(Path(asked.out) / "adapter")[0]
    assert divergence(adapted, tmp_path / "targets", text, stories) == pytest.approx(both, rel=1e-3)
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    init = load_lora_init(asked.out)["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(layer.get_delta_weight("default"), init.b @ init.a, rtol=1e-3, atol=1e-5)
    assert "`adapter`, trained" in (Path(asked.out) / "README.md").read_text()
    assert unknown_files(Path(asked.out)) == []  # the same command with --overwrite replaces it


def test_quantize_names_options_of_recovery_that_cannot_be(stories: Path, text: Path, tmp_path: Path) -> None:
    asked = Quantize(model=str(stories), out=str(tmp_path / "q"), quantizer="rtn", recover=SHORT)
    with pytest.raises(InputError, match="--recover needs calibration text"):
        quantize(asked)
    with pytest.raises(InputError, match=r"recover\.steps is 0"):
        quantize(replace(asked, calibration=str(text), recover=Recovery(steps=0, batch=2)))


def test_the_flag_alone_means_the_defaults() -> None:
    words = ["--model", "m", "--out", "o", "--calibration", "t.txt"]
    assert not read_recipe("llmtools quantize", Quantize, words).recover.steps
    assert read_recipe("llmtools quantize", Quantize, [*words, "--recover"]).recover == RECOVERY
    assert read_recipe("llmtools quantize", Quantize, ["--recover", *words]).recover == RECOVERY
    longer = read_recipe("llmtools quantize", Quantize, [*words, "--recover", "--recover.batch", "2"])
    assert longer.recover == replace(RECOVERY, batch=2)


def other(model: Any, tokenizer: Any, folder: Path) -> Path:
    """An original for a quantized model whose weights are random: the same weights, each norm a half larger."""
    from llmtools.checkpoint.folder import save_dense
    from llmtools.model.recover import trained_parameters

    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data * 1.5
    return save_dense(model, tokenizer, folder)


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Text in the words of the tiny models."""
    file = tmp_path / "letters.txt"
    file.write_text(" ".join(f"w{3 + index * 7 % 500}" for index in range(2000)))
    return file


@pytest.mark.filterwarnings("ignore")
def test_a_gptq_folder_stays_one(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    from llmtools.formats import Format
    from llmtools.formats.gptq import GPTQ
    from tests.formats import test_gptq
    from tests.formats.writers import tiny_tokenizer, write

    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "q", test_gptq.writer(), test_gptq.config())
    tiny_tokenizer().save_pretrained(tmp_path / "in" / "q")
    original = other(*llmtools.load(tmp_path / "in" / "q"), tmp_path / "in" / "dense")
    asked = Recover(
        model=str(tmp_path / "in" / "q"), original=str(original), calibration=str(letters), out=str(tmp_path / "r"),
        num_samples=8, max_length=24, recover=SHORT,
    )  # fmt: skip
    result = recover(asked)
    assert result.kl < result.kl_before and result.format == "gptq"
    before, after = (load_file(Path(each) / "model.safetensors") for each in (asked.model, asked.out))
    differ = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert differ == {"scales", "weight"} and before.keys() == after.keys()
    assert json.loads((tmp_path / "r" / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    info = json.loads((tmp_path / "r" / "llmtools.json").read_text())
    assert info["recovery"]["after"] == result.kl and info["base_model"] == str(original)
    llmtools.load(asked.out, verify=True)

    monkeypatch.setattr(GPTQ, "scales", Format.scales)  # as of a format that cannot say where its scales are
    ours = recover(replace(asked, out=str(tmp_path / "ours")))
    assert ours.format == "llmtools" and ours.kl == result.kl
    assert "gptq files cannot be written with other scales" in caplog.text and "`llmtools export`" in caplog.text
    one, again = weights(asked.out), weights(ours.out)
    assert all(torch.equal(one[name], again[name]) for name in again)


@pytest.mark.filterwarnings("ignore")
def test_a_gguf_file_stays_one(tmp_path: Path, letters: Path) -> None:
    pytest.importorskip("gguf")
    from llmtools.formats.gguf_reading import GGUFModel
    from llmtools.formats.rewriting import GGUFRewriter
    from tests.formats.test_gguf_reading import write_gguf

    torch.manual_seed(0)
    wild, source = write_gguf(tmp_path, tie_word_embeddings=True), tmp_path / "in.gguf"
    model, tokenizer = llmtools.load(wild)
    model.model.norm.weight.data *= 0.01  # else one token has all the probability
    GGUFRewriter(GGUFModel(str(wild), wild), model).write_file(model, source)
    original = other(model, tokenizer, tmp_path / "dense")
    asked = Recover(
        model=str(source), original=str(original), calibration=str(letters), out=str(tmp_path / "r.gguf"),
        num_samples=8, max_length=24, recover=SHORT,
    )  # fmt: skip
    result = recover(asked)
    assert result.kl < result.kl_before and result.format == "gguf"
    assert (tmp_path / "r.gguf").stat().st_size == source.stat().st_size
    model, former = llmtools.load(tmp_path / "r.gguf")[0], llmtools.load(source)[0]
    layer, before = model.model.layers[1].mlp.down_proj, former.model.layers[1].mlp.down_proj
    assert layer.quantizer == before.quantizer and not torch.equal(layer.packed["blocks"], before.packed["blocks"])
    with pytest.raises(InputError, match=r"r\.gguf exists; pass --overwrite"):
        recover(asked)
    with pytest.raises(InputError, match="is an input of this run"):
        recover(replace(asked, out=asked.model, overwrite=True))
    with pytest.raises(InputError, match="is no GGUF file; choose a folder"):
        recover(replace(asked, model=asked.original or "", out=str(tmp_path / "s.gguf")))
    into = recover(replace(asked, out=str(tmp_path / "folder")))
    assert (tmp_path / "folder" / "in.gguf").read_bytes() == (tmp_path / "r.gguf").read_bytes()
    assert into.kl == result.kl and (tmp_path / "folder" / "llmtools.json").exists()
