"""`quantize` reads a model a block at a time: the bits are those of a model in memory, and finished blocks are kept."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

import llmtools
from llmtools.checkpoint.folder import load_model
from llmtools.checkpoint.work_folder import work_folder
from llmtools.data.calibration import calibration
from llmtools.errors import CheckpointError, InputError
from llmtools.files import NameTaken
from llmtools.model import streaming
from llmtools.model.options import BlockTuning, Recovery
from llmtools.model.streaming import Streamed
from llmtools.recipes import quantize as recipe
from llmtools.recipes.quantize import Quantize, quantize
from llmtools.signals import Stopped
from tests.models import tiny_model

SAMPLES, TOKENS = 3, 24


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((tinystories / "train.txt").read_text()[:6000])
    return file


def saved(model: Any, stories: Path, folder: Path) -> Path:
    """A model in several shards, with a tokenizer of as many tokens."""
    model.save_pretrained(folder, max_shard_size="60KB")
    for file in stories.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def llama(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model("llama", num_hidden_layers=3), stories, tmp_path_factory.mktemp("llama"))


def asked(model: Path, out: Path, text: Path | None, quantizer: str = "optq", **options: Any) -> Quantize:
    return Quantize(
        model=str(model), out=str(out), quantizer=quantizer, calibration=None if text is None else str(text),
        num_samples=SAMPLES, max_length=TOKENS, **options,
    )  # fmt: skip


def tensors(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint that determine its outputs."""
    names = [*folder.glob("*.safetensors"), folder / "config.json"]
    return {file.name: file.read_bytes() for file in names}


def in_memory(recipe: Quantize, out: Path, **options: Any) -> Path:
    """The checkpoint of a model that was in memory as a whole."""
    model, tokenizer = llmtools.load(recipe.model, dtype="auto")
    ids = None
    if recipe.calibration is not None:
        ids = calibration(recipe.calibration, tokenizer, samples=SAMPLES, tokens=TOKENS)
    report = llmtools.quantize(model, recipe.quantizer, ids, **options)
    return Path(llmtools.save(model, tokenizer, out, report=report))


# ------------------------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("name", ["rtn", "optq", "quip_sharp"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt"])
def test_a_model_that_is_read_by_blocks_has_the_bits_of_one_in_memory(
    family: str, name: str, stories: Path, text: Path, tmp_path: Path
) -> None:
    model = saved(tiny_model(family).to(torch.bfloat16), stories, tmp_path / "model")
    recipe = asked(model, tmp_path / "out", None if name == "rtn" else text, name)
    quantize(recipe)
    assert tensors(tmp_path / "out") == tensors(in_memory(recipe, tmp_path / "expected"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "model", "out"]


@pytest.mark.parametrize(
    "options",
    [{"error_propagation": 0.5}, {"tuning": BlockTuning(epochs=1)}, {"adapter_rank": 2}, {"skip": ["up_proj"]}],
    ids=["propagated", "tuned", "adapters", "with the head"],
)
def test_options_of_the_walk_change_nothing_about_that(
    options: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    given = {{"tuning": "finetune_blocks"}.get(key, key): value for key, value in options.items()}
    recipe = asked(llama, tmp_path / "out", text, **given)
    quantize(recipe)
    assert tensors(tmp_path / "out") == tensors(in_memory(recipe, tmp_path / "expected", **options))


def test_fused_experts_are_read_as_transformers_converts_them(stories: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    made = AutoModelForCausalLM.from_config(MixtralConfig(**sizes))
    recipe = asked(saved(made, stories, tmp_path / "model"), tmp_path / "out", text)
    quantize(recipe)
    assert tensors(tmp_path / "out") == tensors(in_memory(recipe, tmp_path / "expected"))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_a_mixture_is_read_by_experts_and_resumed(family: str, stories: Path, text: Path, tmp_path: Path) -> None:
    from benchmarks.tiny import tiny_model as tiny_of

    recipe = asked(saved(tiny_of(family), stories, tmp_path / "model"), tmp_path / "out", text, route_all=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Broken):
        ended_after(1, fail, patch)
        quantize(recipe)
    with pytest.MonkeyPatch.context() as patch:
        done = ended_after(0, fail, patch)
        quantize(replace(recipe, resume=True))
    assert "model.layers.0" not in done
    assert tensors(tmp_path / "out") == tensors(in_memory(recipe, tmp_path / "expected", route_all=True))


def test_hidden_states_beyond_their_budget_are_files_and_change_nothing(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    in_file = streaming._in_file

    def counted(hidden: torch.Tensor, folder: Path) -> torch.Tensor:
        moved.append(hidden.nbytes)
        return in_file(hidden, folder)

    monkeypatch.setattr(streaming, "_in_file", counted)
    for budget in (4.0, 0.0):
        quantize(asked(llama, tmp_path / str(budget), text, hidden_states=budget))
        assert bool(moved) == (budget == 0)
    assert tensors(tmp_path / "0.0") == tensors(tmp_path / "4.0")


@pytest.mark.parametrize("name", ["rtn", "optq"])
def test_one_block_at_a_time_is_in_memory(
    name: str, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present: list[set[str]] = []
    finished = Streamed.finished

    def counted(self: Streamed, path: str, report: Any) -> None:
        blocks = {f"model.layers.{index}" for index in range(3)} - {path}
        present.append({b for b in blocks if not all(p.is_meta for p in self.model.get_submodule(b).parameters())})
        embedding = self.model.get_input_embeddings().weight  # type: ignore[operator]
        assert embedding.is_meta
        finished(self, path, report)

    monkeypatch.setattr(Streamed, "finished", counted)
    quantize(asked(llama, tmp_path / "out", None if name == "rtn" else text, name))
    assert present == [set()] * 3


# ------------------------------------------------------------------------------------------------------------ resuming


class Broken(Exception):
    """What ends a run in these tests."""


def ended_after(blocks: int, end: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ends a run when so many blocks are finished; returns the list of those that will be."""
    done: list[str] = []
    finished = Streamed.finished

    def counted(self: Streamed, path: str, report: Any) -> None:
        finished(self, path, report)
        done.append(path)
        if len(done) == blocks:
            end()

    monkeypatch.setattr(Streamed, "finished", counted)
    return done


def fail() -> None:
    raise Broken


@pytest.mark.parametrize(
    "options",
    [
        {"quantizer": "rtn"},
        {"quantizer": "optq"},
        {"quantizer": "optq", "error_propagation": 0.5},
        {"quantizer": "quip_sharp", "finetune_blocks": BlockTuning(epochs=1)},
        {"quantizer": "signround", "adapter_rank": 2, "options": {"iterations": 2}},
    ],
    ids=["rtn", "optq", "propagated", "tuned", "learned"],
)
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(
    options: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    recipe = asked(llama, tmp_path / "out", None if options["quantizer"] == "rtn" else text, **options)
    expected = quantize(replace(recipe, out=str(tmp_path / "expected")))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Broken):
        ended_after(1, fail, patch)
        quantize(recipe)
    assert not (tmp_path / "out").exists()
    with pytest.MonkeyPatch.context() as patch:
        done = ended_after(0, fail, patch)
        result = quantize(replace(recipe, resume=True))
    assert done == ["model.layers.1", "model.layers.2"]
    assert tensors(tmp_path / "out") == tensors(tmp_path / "expected")
    timeless = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in each.report["modules"]]
        for each in (result, expected)
    ]
    assert timeless[0] == timeless[1] and result.report["reconstruction"] == expected.report["reconstruction"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


KILLED = """
import os, signal, sys
from llmtools.model.streaming import Streamed
from llmtools.cli.app import main
store = Streamed.finished
def finished(self, path, report):
    store(self, path, report)
    if path == "model.layers.1":
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
Streamed.finished = finished
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_killed_process_loses_the_block_in_work_alone(
    number: str, llama: Path, text: Path, tmp_path: Path, repository: Path
) -> None:
    recipe = asked(llama, tmp_path / "out", text)
    flags = ["--model", str(llama), "--out", recipe.out, "--quantizer", "optq", "--calibration", str(text)]
    flags += ["--num_samples", str(SAMPLES), "--max_length", str(TOKENS)]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, number, "quantize", *flags],
        cwd=repository, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == (-9 if number == "SIGKILL" else 143)
    if number == "SIGTERM":
        assert ended.stderr.splitlines()[-1] == "llmtools: stopped; --resume continues from 2 finished blocks"
    with pytest.raises(InputError, match="--resume continues it, --overwrite starts anew"):
        quantize(recipe)
    with pytest.MonkeyPatch.context() as patch:
        done = ended_after(0, fail, patch)
        quantize(replace(recipe, resume=True))
    assert done == ["model.layers.2"]
    quantize(replace(recipe, out=str(tmp_path / "expected")))
    assert tensors(tmp_path / "out") == tensors(tmp_path / "expected")


def test_another_run_is_refused_by_content(llama: Path, text: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    own = Path(shutil.copy(text, tmp_path / "own.txt"))
    recipe = asked(model, tmp_path / "out", own)
    with pytest.raises(InputError, match="--resume: there is no stopped run"):
        quantize(replace(recipe, resume=True))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Broken):
        ended_after(1, fail, patch)
        quantize(recipe)
    again = replace(recipe, resume=True)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "out.quantizing").glob("*.*")}
    with pytest.raises(InputError, match=r"--resume: options.bits None, now 3"):
        quantize(replace(again, bits=3))
    with pytest.raises(InputError, match=r"--resume: options.num_samples 3, now 2"):
        quantize(replace(again, num_samples=2))
    own.write_text("Another " + text.read_text())
    with pytest.raises(InputError, match=r"--resume: inputs.calibration changed"):
        quantize(again)
    shutil.copy(text, own)
    shard = sorted(model.glob("*.safetensors"))[-1]
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(InputError, match=r"--resume: model\.model's weights changed"):
        quantize(again)
    assert kept == {file.name: file.read_bytes() for file in (tmp_path / "out.quantizing").glob("*.*")}
    moved = replace(again, model=str(shutil.copytree(llama, tmp_path / "moved")))  # the same content elsewhere
    quantize(moved)
    assert not (tmp_path / "out.quantizing").exists()


def test_what_runs_in_memory_cannot_be_resumed(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing is kept of this run, since its code comes with it"):
        quantize(asked(llama, tmp_path / "out", text, trust_remote_code=True, resume=True))
    assert not any(tmp_path.iterdir())


RECOVERY = Recovery(steps=3, batch=1, evaluations=1, top_k=8, held_out=0.34)


@pytest.mark.parametrize(
    "options",
    [{"bits_per_weight": 3.4}, {"rounding": "two_sided"}, {"bits": 2, "recover": RECOVERY, "adapter_rank": 2}],
    ids=["bits_per_weight", "two_sided", "recover"],
)
def test_what_runs_the_whole_network_has_the_bits_of_a_model_in_memory(
    options: dict[str, Any], llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, streamed = Streamed.whole, list[bool]()

    def noted(self: Streamed) -> Any:
        streamed.append(all(each.is_meta for each in self.model.model.layers.parameters()))
        return whole(self)

    monkeypatch.setattr(Streamed, "whole", noted)
    quantize(asked(llama, tmp_path / "out", text, **options))
    assert streamed == [True]
    monkeypatch.setattr(recipe, "_why_resident", lambda _: "it is to be compared")
    quantize(asked(llama, tmp_path / "resident", text, **options))
    assert streamed == [True]
    assert tensors(tmp_path / "out") == tensors(tmp_path / "resident")


def test_a_run_that_was_stopped_in_its_recovery_keeps_blocks_and_distributions(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"bits": 2, "recover": RECOVERY}
    quantize(asked(llama, tmp_path / "unbroken", text, **options))
    with monkeypatch.context() as patch:
        patch.setattr("llmtools.recipes.recover.train", _stop)
        with pytest.raises(Stopped, match="--resume continues from 3 finished blocks"):
            quantize(asked(llama, tmp_path / "out", text, **options))
    assert len(list((tmp_path / "out.quantizing" / "targets").iterdir())) == SAMPLES
    monkeypatch.setattr("llmtools.model.quantize.QuantizedLinear.from_linear", _stop)  # nothing is quantized again
    quantize(asked(llama, tmp_path / "out", text, resume=True, **options))
    assert tensors(tmp_path / "out") == tensors(tmp_path / "unbroken")


def _stop(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "both"}, "rounding='both'"),
        ({"rounding": "two_sided", "calibration": None}, "--rounding two_sided needs calibration text"),
        ({"rounding": "two_sided", "quantizer": "awq"}, "awq has no two-sided rounding; use optq"),
    ],
    ids=["unknown", "without text", "without a sweep"],
)
def test_two_sided_rounding_that_cannot_be(
    options: dict[str, Any], message: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    recipe = asked(llama, tmp_path / "out", text, "quip_sharp")
    with pytest.raises(InputError, match=message):
        quantize(replace(recipe, **({"quantizer": "rtn"} if "calibration" in options else {}) | options))
    assert not any(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- bad input


def test_a_folder_of_somebody_else_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out.quantizing").mkdir()
    (tmp_path / "out.quantizing" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is no folder of llmtools; move it away"):
            quantize(asked(llama, tmp_path / "out", None, "rtn", overwrite=overwrite))
    assert (tmp_path / "out.quantizing" / "notes.txt").read_text() == "mine"


def test_space_is_asked_for_before_the_work(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(InputError, match=r"needs about .* GiB, and 0\.0 GiB are free; make space"):
        quantize(asked(llama, tmp_path / "out", None, "rtn"))
    assert not any(tmp_path.iterdir())


def test_a_disk_that_is_full_loses_no_finished_block(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = streaming.save_file, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(streaming, "save_file", full)
    recipe = asked(llama, tmp_path / "out", text)
    with pytest.raises(InputError, match=r"no space left on the device\); --resume continues from 1 finished block, "):
        quantize(recipe)
    quantize(replace(recipe, resume=True))
    assert len(calls) == 2 + 2


class Change(NamedTuple):
    """What happens to a file of the model while it is read."""

    act: Callable[[Path], object]


@pytest.mark.parametrize(
    "change",
    [Change(lambda file: file.write_bytes(file.read_bytes()[:-8])), Change(os.remove)],
    ids=["cut", "removed"],
)
def test_a_model_that_changes_while_it_is_read_is_noticed(
    change: Change, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    shard = next(  # of the last block alone
        file for file in sorted(model.glob("*.safetensors"), reverse=True) if b"layers.2." in file.read_bytes()
    )
    ended_after(1, lambda: change.act(shard) and None, monkeypatch)
    with pytest.raises(CheckpointError, match=f"{shard.name} was changed or removed while it was read"):
        quantize(asked(model, tmp_path / "out", text))
    assert not (tmp_path / "out").exists()


def test_a_model_that_changes_while_it_runs_as_a_whole_is_noticed(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    shard = sorted(model.glob("*.safetensors"))[0]
    monkeypatch.setattr("llmtools.model.allocation.output_gradients", lambda *_, **__: os.utime(shard, (1, 1)))
    with pytest.raises(CheckpointError, match=f"{shard.name} was changed or removed while it was read"):
        quantize(asked(model, tmp_path / "out", text, bits_per_weight=3.5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_damaged_models_are_refused_before_the_work(llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    shards = sorted(model.glob("*.safetensors"))
    shards[1].rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"{shards[1].name} of the index is missing"):
        quantize(asked(model, tmp_path / "out", None, "rtn"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "model"]


@pytest.mark.parametrize("name", ["rtn", "optq"])
def test_a_weight_that_is_no_number_is_named(name: str, stories: Path, text: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    down: nn.Linear = model.get_submodule("model.layers.1.mlp.down_proj")  # type: ignore[assignment]
    with torch.no_grad():
        down.weight[0, 0] = float("nan")
    folder = saved(model, stories, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.down_proj.weight holds NaN or infinite values"):
        quantize(asked(folder, tmp_path / "out", None if name == "rtn" else text, name))


def test_a_complete_run_whose_name_was_taken_leaves_no_work(tmp_path: Path) -> None:
    with (
        pytest.raises(NameTaken),
        work_folder(
            tmp_path / "q", "quantizing", {}, resume=False, overwrite=False, kept=lambda _: "1 finished block"
        ) as work,
    ):
        assert work.is_dir()
        raise NameTaken("q appeared while this ran; the finished work is kept as q.1")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- a GGUF file


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # rows of queries and keys in another order; tied embeddings
def test_a_gguf_file_is_quantized_to_the_bits_of_its_decoded_model(
    family: str, stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    from tests.formats.test_gguf_reading import write_gguf

    changes: dict[str, Any] = {"qwen3": {"tie_word_embeddings": True, "head_dim": 128}}
    file = write_gguf(tmp_path, family, **changes.get(family, {}))
    words = AutoTokenizer.from_pretrained(stories)
    monkeypatch.setattr("llmtools.checkpoint.streaming.open_tokenizer", lambda _: words)
    quantize(asked(Path(file), tmp_path / "out", text, bits=3))
    model = llmtools.dequantize(load_model(file))
    ids = calibration(str(text), words, samples=SAMPLES, tokens=TOKENS)
    report = llmtools.quantize(model, "optq", ids, bits=3)
    llmtools.save(model, words, tmp_path / "resident", report=report)
    made = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "resident")]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(values, made[1][name]) for name, values in made[0].items())
    monkeypatch.setattr(recipe, "_why_resident", lambda _: "it is to be compared")
    quantize(asked(Path(file), tmp_path / "whole", text, bits=3))
    assert tensors(tmp_path / "out") == tensors(tmp_path / "whole")
