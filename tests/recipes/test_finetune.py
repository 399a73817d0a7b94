"""Finetuning: learns, keeps what it promises about folders, and a resumed run has the bits of an unbroken one."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from llmtools.errors import InputError
from llmtools.kernels import build
from llmtools.nn import adapters
from llmtools.recipes.finetune import Finetune, FinetuneResult, Lora, finetune
from tests.models import training_rows

TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "max_length": 48,
    "logging_steps": 1,
    "learning_rate": 1e-3,
}


@pytest.fixture
def data(tmp_path: Path) -> str:
    return training_rows(tmp_path / "train.jsonl")


@pytest.fixture(scope="module")
def packed(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    from llmtools.recipes.quantize import Quantize, quantize

    out = tmp_path_factory.mktemp("packed") / "q"
    quantize(Quantize(model=str(stories), out=str(out), quantizer="rtn", bits=4))
    return str(out)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def losses(folder: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def recipe(model: str | Path, data: str, out: Path, **changes: Any) -> Finetune:
    changes.setdefault("training", TRAINING)
    return Finetune(model=str(model), data=data, out=str(out), lora=Lora(r=2), **changes)


@pytest.mark.parametrize("kind", ["dense", "quantized"])
def test_the_output_is_a_peft_folder_that_knows_its_base(
    kind: str, stories: Path, packed: str, data: str, tmp_path: Path
) -> None:
    model = str(stories) if kind == "dense" else packed
    result = finetune(recipe(model, data, tmp_path / "a"))
    assert result.steps == 4
    assert result.examples == 8
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 32, "LORA")
    assert {tensor.dtype for tensor in adapter(tmp_path / "a").values()} == {torch.float32}
    run = json.loads((tmp_path / "a" / "llmtools.json").read_text())
    assert run["prompt_format"]["record_format"] == "prompt"
    assert run["recipe"]["training"] == TRAINING
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert not (tmp_path / "a.training").exists()


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(
    packed: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    training = {**TRAINING, "max_steps": 6, "save_steps": 2}
    finetune(recipe(packed, data, tmp_path / "whole", training=training))

    step, taken = Trainer.training_step, []

    def ctrl_c_in_the_fourth(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", ctrl_c_in_the_fourth)
        finetune(recipe(packed, data, tmp_path / "broken", training=training))
    assert not (tmp_path / "broken").exists()
    with pytest.raises(InputError, match="--resume continues"):
        finetune(recipe(packed, data, tmp_path / "broken", training=training))
    with pytest.raises(InputError, match="--resume: seed was 0 and is 1"):
        finetune(recipe(packed, data, tmp_path / "broken", training=training, seed=1, resume=True))
    finetune(recipe(packed, data, tmp_path / "broken", training=training, resume=True))

    whole, broken = adapter(tmp_path / "whole"), adapter(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_weights_in_files_give_the_bits_of_resident_ones_and_a_run_may_resume_with_either(
    packed: str, data: str, tinystories: Path, tmp_path: Path
) -> None:
    from llmtools.recipes.evaluate import Evaluate, evaluate
    from llmtools.recipes.generate import Generate, generate

    training = {**TRAINING, "lr_scheduler_type": "constant", "gradient_checkpointing": True}
    finetune(recipe(packed, data, tmp_path / "resident", training=training))
    two = {**training, "max_steps": 2}
    finetune(recipe(packed, data, tmp_path / "files", training=two, offload="disk"))
    finetune(recipe(packed, data, tmp_path / "files", training={**training, "max_steps": 3}, resume=True))
    finetune(recipe(packed, data, tmp_path / "files", training=training, resume=True, offload="disk"))
    resident, files = adapter(tmp_path / "resident"), adapter(tmp_path / "files")
    assert all(torch.equal(resident[key], files[key]) for key in resident) and resident.keys() == files.keys()
    assert losses(tmp_path / "resident") == losses(tmp_path / "files")

    opened = {"model": packed, "adapter": str(tmp_path / "files")}
    text = str(tinystories / "held_out.txt")
    values = [
        evaluate(Evaluate(**opened, data=text, num_samples=2, max_length=64, offload=place)).value
        for place in (None, "disk")
    ]
    assert values[0] == values[1]
    texts = [
        generate(Generate(**opened, prompt="Tom", max_new_tokens=8, offload=place)).completions
        for place in (None, "disk")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("merge", [None, "exact"])
def test_weights_in_host_memory_give_the_bits_of_resident_ones(
    merge: str | None, packed: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtools.model import offload
    from tests.model.test_transfer import Unkind

    monkeypatch.setattr(offload, "has_gpu", lambda: True)
    monkeypatch.setattr("llmtools.checkpoint.folder.this_device", Unkind)
    training = {**TRAINING, "max_steps": 2}
    finetune(recipe(packed, data, tmp_path / "resident", training=training, merge=merge))
    finetune(recipe(packed, data, tmp_path / "host", training=training, merge=merge, offload="cpu"))
    resident, host = adapter(tmp_path / "resident"), adapter(tmp_path / "host")
    assert all(torch.equal(resident[key], host[key]) for key in resident) and resident.keys() == host.keys()
    assert losses(tmp_path / "resident") == losses(tmp_path / "host")


def test_what_offloading_does_not_go_with_is_said_before_anything_is_written(
    stories: Path, data: str, tmp_path: Path
) -> None:
    for changes, said in (({"offload": "gpu"}, "offload='gpu'"), ({"offload": "disk", "load": "nf4"}, "--load nf4")):
        with pytest.raises(InputError, match=said):
            finetune(recipe(stories, data, tmp_path / "a", **changes))
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.training").exists()


def test_a_finished_run_goes_on_with_more_steps(stories: Path, data: str, tmp_path: Path) -> None:
    training = {**TRAINING, "max_steps": 2, "lr_scheduler_type": "constant"}
    finetune(recipe(stories, data, tmp_path / "a", training=training))
    result = finetune(recipe(stories, data, tmp_path / "a", training={**training, "max_steps": 3}, resume=True))
    assert result.steps == 3


def as_run_folder(output: Path) -> None:
    """Makes the folder of a finished run what it was before the end."""
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (output / name).unlink()
    (output / "llmtools.json").rename(output / "run.json")


@pytest.mark.parametrize("how", ["finished", "killed before the end", "fewer steps", "epochs"])
def test_a_run_that_has_its_steps_is_written_and_not_trained(
    how: str, stories: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    training = {**TRAINING, "max_steps": 2, "save_steps": 1, "lr_scheduler_type": "constant"}
    if how == "epochs":
        training = {**training, "num_train_epochs": 0.4}  # 2 of 4 steps
        del training["max_steps"]
    finetune(recipe(stories, data, tmp_path / "a", training=training))
    former, checkpoints = adapter(tmp_path / "a"), sorted((tmp_path / "a" / "checkpoints").iterdir())
    if how == "killed before the end":
        (tmp_path / "a").rename(tmp_path / "a.training")
        as_run_folder(tmp_path / "a.training")
    elif how == "fewer steps":
        training["max_steps"] = 1

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a step was trained")

    monkeypatch.setattr(Trainer, "training_step", never)
    result = finetune(recipe(stories, data, tmp_path / "a", training=training, resume=True))
    assert result.steps == 2
    again = adapter(tmp_path / "a")
    assert all(torch.equal(again[key], former[key]) for key in former)
    assert sorted((tmp_path / "a" / "checkpoints").iterdir()) == checkpoints
    assert [step for step, _ in losses(tmp_path / "a")] == [1, 2]


def test_the_best_checkpoint_is_still_the_best_when_a_finished_run_is_resumed(
    stories: Path, data: str, tmp_path: Path
) -> None:
    """The first of five, because the largest loss is asked for; it is kept beside the last two."""
    training = {**TRAINING, "max_steps": 5, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    training |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    training |= {"learning_rate": 1e-2}
    finetune(recipe(stories, data, tmp_path / "a", training=training, validation=0.25))
    former = adapter(tmp_path / "a")
    kept = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert kept == ["checkpoint-1", "checkpoint-5"]  # save_total_limit is 2
    finetune(recipe(stories, data, tmp_path / "a", training=training, validation=0.25, resume=True))
    again = adapter(tmp_path / "a")
    assert all(torch.equal(again[key], former[key]) for key in former)
    (tmp_path / "a" / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors").unlink()
    with pytest.raises(
        InputError,
        match=r"load_best_model_at_end needs the best checkpoint, and .*adapter_model\.safetensors is missing",
    ):
        finetune(recipe(stories, data, tmp_path / "a", training=training, validation=0.25, resume=True))


def test_a_run_goes_on_with_what_it_began_with(stories: Path, data: str, tmp_path: Path) -> None:
    import shutil

    model, validation = chat_model(stories, tmp_path / "model"), tmp_path / "validation.jsonl"
    shutil.copy(data, validation)
    training = {**TRAINING, "max_steps": 2, "save_steps": 1, "lr_scheduler_type": "constant"}
    asked = recipe(model, data, tmp_path / "a", training=training, validation=str(validation))
    finetune(asked)
    former, more = adapter(tmp_path / "a"), {"resume": True, "training": {**training, "max_steps": 3}}
    changes = {
        data: "training data",
        str(validation): "validation data",
        f"{model}/chat_template.jinja": "tokenizer",
        f"{model}/model.safetensors": "model's weights",
        f"{model}/config.json": "model's configuration",
    }
    for file, name in changes.items():
        bytes_ = Path(file).read_bytes()
        if file.endswith(".jsonl"):
            Path(file).write_text(bytes_.decode().replace("Tom had 3", "Tim had 3"), encoding="utf-8")
        elif file.endswith(".safetensors"):
            Path(file).write_bytes(bytes_[:-1] + bytes([bytes_[-1] ^ 1]))
        else:
            Path(file).write_bytes(bytes_ + b"\n")
        with pytest.raises(InputError, match=f"--resume: the {name} changed since this run began"):
            finetune(replace(asked, **more))
        Path(file).write_bytes(bytes_)
    assert all(torch.equal(tensor, former[key]) for key, tensor in adapter(tmp_path / "a").items())
    assert not (tmp_path / "a.training").exists()
    shutil.move(
        data, tmp_path / "elsewhere.jsonl"
    )  # the same rows are the same data, and the same files the same model
    shutil.move(model, tmp_path / "moved")
    moved = replace(asked, data=str(tmp_path / "elsewhere.jsonl"), model=str(tmp_path / "moved"), **more)
    assert finetune(moved).steps == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_that_is_asked_to_end_saves_its_step_and_says_how_to_go_on(
    number: int, stories: Path, data: str, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    training = {**TRAINING, "max_steps": 6, "save_steps": 6}
    finetune(recipe(stories, data, tmp_path / "whole", training=training))

    class Kill(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt, match=r"stopped; --resume continues from .*checkpoint-4") as ended:
        finetune(recipe(stories, data, tmp_path / "a", training=training), callbacks=[Kill()])
    assert ended.value.exit_code == 128 + number  # type: ignore[attr-defined]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.training", "train.jsonl", "whole"]
    finetune(recipe(stories, data, tmp_path / "a", training=training, resume=True))
    whole, broken = adapter(tmp_path / "whole"), adapter(tmp_path / "a")
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "a")
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "train_runtime" in record] == [6]


@pytest.fixture(scope="module")
def stopped(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, an unbroken run of four steps in `whole`, and in `a.training` one killed at its end."""
    place = tmp_path_factory.mktemp("stopped")
    finetune(recipe(stories, training_rows(place / "train.jsonl"), place / "whole", training=SAVED))
    (place / "a.training").mkdir()
    for name in ("checkpoints", "metrics.jsonl"):
        copy(place / "whole" / name, place / "a.training" / name)
    copy(place / "whole" / "llmtools.json", place / "a.training" / "run.json")
    return place


SAVED = {**TRAINING, "save_steps": 1}


def copy(source: Path, target: Path) -> None:
    import shutil

    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


@pytest.fixture
def killed(stopped: Path, tmp_path: Path) -> Path:
    copy(stopped, tmp_path / "x")
    return tmp_path / "x"


def go_on(place: Path, stories: Path, **changes: Any) -> FinetuneResult:
    asked = recipe(stories, str(place / "train.jsonl"), place / "a", training=SAVED, resume=True)
    return finetune(replace(asked, **changes))


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    killed: Path, stories: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = killed / "a.training" / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with (killed / "a.training" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 4, "lo')  # a power cut
    go_on(killed, stories)
    assert "optimizer.pt is damaged (1000 bytes of" in caplog.text
    assert re.search(r"resuming from .*a\.training/checkpoints/checkpoint-3", caplog.text)
    whole, mended = adapter(killed / "whole"), adapter(killed / "a")
    assert all(torch.equal(whole[key], mended[key]) for key in whole)
    assert losses(killed / "a") == losses(killed / "whole")
    assert sorted(path.name for path in killed.iterdir()) == ["a", "train.jsonl", "whole"]


def test_a_finished_run_helps_its_damaged_continuation(
    killed: Path, stories: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go_on(killed, stories)
    more = {**SAVED, "max_steps": 5}
    copy(killed / "a", killed / "a.training")
    as_run_folder(killed / "a.training")
    for state in (killed / "a.training").rglob("trainer_state.json"):
        state.write_text("{")
    assert go_on(killed, stories, training=more).steps == 5
    assert "trainer_state.json is damaged" in caplog.text
    assert not (killed / "a.training").exists()


def test_where_no_checkpoint_is_whole_the_damaged_file_is_named(killed: Path, stories: Path) -> None:
    for file in (killed / "a.training").rglob("adapter_model.safetensors"):
        file.unlink()
    with pytest.raises(
        InputError, match=r"no checkpoint .* is intact: .*checkpoint-4/adapter_model.* is missing; start"
    ):
        go_on(killed, stories)
    assert len(list((killed / "a.training" / "checkpoints").iterdir())) == 2


PICKLES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "adapter_model.bin", "pytorch_model.bin"]


@pytest.mark.parametrize("file", [*PICKLES, "training_args.bin"])
def test_nothing_is_ever_unpickled(file: str, killed: Path, stories: Path) -> None:
    from llmtools.train.checkpoints import SEAL, seal

    canary = killed / "canary"

    class Hostile:
        def __reduce__(self) -> Any:
            return (canary.touch, ())

    for sealed in (False, True):
        for checkpoint in (killed / "a.training" / "checkpoints").iterdir():
            torch.save(Hostile(), checkpoint / file)
            if file == "training_args.bin" or not sealed:
                (checkpoint / SEAL).unlink(missing_ok=True)
            else:
                seal(checkpoint)  # by whoever wrote the file
        if file == "training_args.bin":
            continue
        with pytest.raises(InputError, match=f"{file} is damaged, or holds more than tensors and plain values"):
            go_on(killed, stories)
    if file == "training_args.bin":  # which nobody reads, and which goes
        go_on(killed, stories, training={**SAVED, "max_steps": 5})
        assert not list(killed.rglob("training_args.bin"))
    assert not canary.exists()


def test_what_a_run_keeps_holds_no_pickled_arguments(stopped: Path) -> None:
    assert list(stopped.rglob("optimizer.pt")) and not list(stopped.rglob("training_args.bin"))


def test_the_adapters_targets_are_in_order(stopped: Path) -> None:
    """PEFT keeps them in a set, whose order is another one in each process."""
    for file in stopped.rglob("adapter_config.json"):
        targets = json.loads(file.read_text())["target_modules"]
        assert len(targets) == 7 and targets == sorted(targets)


def test_the_work_folder_is_not_somebody_elses(killed: Path, stories: Path, data: str) -> None:
    (killed / "b.training" / "checkpoints").mkdir(parents=True)
    precious = killed / "b.training" / "checkpoints" / "thesis.tex"
    precious.write_text("years of work")
    asked = recipe(stories, data, killed / "b")
    for changes in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match=r"would use the folder .*b\.training, which is no run folder"):
            finetune(replace(asked, **changes))
    (killed / "a.training" / "thesis.tex").write_text("years of work")
    for changes in ({"resume": False, "overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match=r"holds thesis\.tex, which llmtools did not write"):
            go_on(killed, stories, **changes)
    (killed / "a.training" / "thesis.tex").unlink()
    copy(killed / "train.jsonl", killed / "a.training" / "checkpoints" / "rows.jsonl")
    with pytest.raises(InputError, match=r"rows\.jsonl, which is an input of this run"):
        go_on(killed, stories, data=str(killed / "a.training" / "checkpoints" / "rows.jsonl"), overwrite=True)

    from transformers import TrainerCallback

    class Put(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            (killed / "a.training" / "thesis.tex").write_text("years of work")

    more = recipe(stories, str(killed / "train.jsonl"), killed / "a", training={**SAVED, "max_steps": 5}, resume=True)
    finetune(more, callbacks=[Put()])
    assert (killed / "a.training" / "thesis.tex").read_text() == precious.read_text() == "years of work"


def test_another_run_of_the_same_output_is_refused_and_a_result_kept(stories: Path, data: str, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    refused: list[str] = []

    class Meanwhile(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            def other_run() -> None:
                try:
                    finetune(recipe(stories, data, tmp_path / "a", overwrite=True))
                except InputError as error:
                    refused.append(str(error))

            thread = threading.Thread(target=other_run)
            thread.start()
            thread.join()
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "x").touch()

    with pytest.raises(InputError, match=r"a appeared while this ran; the finished work is kept as .*a\.1"):
        finetune(recipe(stories, data, tmp_path / "a"), callbacks=[Meanwhile()])
    assert len(refused) == 1 and re.search(rf"another run \(pid {os.getpid()}\) writes to .*a\.training", refused[0])
    assert adapter(tmp_path / "a.1") and [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.1", "train.jsonl"]


@pytest.mark.parametrize("at", [1, 3])
def test_a_full_disk_is_one_line_and_what_was_saved_stays(
    at: int, stories: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = torch.save, []

    def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(1) if "optimizer" in str(file) else None
        if len(saved) == at:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        save(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    left = "no checkpoint was kept" if at == 1 else "--resume continues from the last intact one"
    with pytest.raises(InputError, match=f"cannot be written .*is there space left.*{left}"):
        finetune(recipe(stories, data, tmp_path / "a", training=SAVED))
    monkeypatch.undo()
    assert (tmp_path / "a.training").exists() == (at == 3)
    if at == 3:
        assert finetune(recipe(stories, data, tmp_path / "a", training=SAVED, resume=True)).steps == 4


def test_a_result_of_another_run_is_not_replaced_by_going_on(killed: Path, stories: Path) -> None:
    copy(killed / "whole", killed / "a")
    run = json.loads((killed / "a" / "llmtools.json").read_text())
    (killed / "a" / "llmtools.json").write_text(json.dumps({**run, "id": "another"}))
    with pytest.raises(InputError, match=r"is of another run than the one in .*; pass --overwrite, too"):
        go_on(killed, stories)
    assert go_on(killed, stories, overwrite=True).steps == 4


@pytest.mark.parametrize("form", ["text", "txt", "packed prompts"])
def test_other_forms_of_data_train(form: str, stories: Path, data: str, tinystories: Path, tmp_path: Path) -> None:
    training = {**TRAINING, "max_steps": 2}
    if form == "packed prompts":
        training["packing"] = True
    elif form == "text":
        path = tmp_path / "text.jsonl"
        path.write_text('{"text": "Once upon a time there was a long story that went on."}\n' * 6, encoding="utf-8")
        data = str(path)
    else:
        path = tmp_path / "text.txt"
        path.write_text((tinystories / "held_out.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
        data = str(path)
    validation = 0.2
    result = finetune(recipe(stories, data, tmp_path / "a", training=training, validation=validation))
    assert result.steps == 2
    assert result.validation_loss is not None


def chat_model(stories: Path, folder: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(stories).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_chats_train_in_the_tokenizers_own_template(stories: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}] * 2
    data = tmp_path / "chat.jsonl"
    data.write_text((json.dumps({"messages": chat}) + "\n") * 3, encoding="utf-8")
    with pytest.raises(InputError, match="no chat template"):
        finetune(recipe(stories, str(data), tmp_path / "a"))
    result = finetune(recipe(chat_model(stories, tmp_path / "model"), str(data), tmp_path / "a"))
    assert result.examples == 6  # an example for each answer
    assert json.loads((tmp_path / "a" / "llmtools.json").read_text())["prompt_format"]["record_format"] == "messages"


@pytest.mark.parametrize("max_length", [48, None], ids=str)
def test_a_chat_that_the_template_refuses_is_said(stories: Path, tmp_path: Path, max_length: int | None) -> None:
    model = chat_model(stories, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template.write_text(refusal + template.read_text(encoding="utf-8"), encoding="utf-8")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    data = tmp_path / "chat.jsonl"
    rows = [chat, [{"role": "system", "content": "Be kind."}, *chat]]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(InputError, match="no system role") as said:
        finetune(recipe(model, str(data), tmp_path / "a", training={**TRAINING, "max_length": max_length}))
    assert "training example 2" in str(said.value)
    assert not (tmp_path / "a.training").exists()


def test_the_loss_is_on_the_completion_alone(stories: Path, data: str, tmp_path: Path, monkeypatch: Any) -> None:
    from trl import SFTTrainer

    seen: list[Any] = []
    monkeypatch.setattr(SFTTrainer, "train", lambda self, **kw: seen.append(self.train_dataset[0]))
    finetune(recipe(stories, data, tmp_path / "a"))
    ids, labels = seen[0]["input_ids"], seen[0]["labels"]
    learned = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    assert tokenizer.decode(learned).strip() == "He gave 0 balls to them.</s>"


def test_our_loss_is_that_of_trl(packed: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {**TRAINING, "gradient_accumulation_steps": 2}
    finetune(recipe(packed, data, tmp_path / "ours", training=training))
    monkeypatch.setattr("llmtools.train.trainer._with_chunked_loss", lambda trainer: trainer)
    finetune(recipe(packed, data, tmp_path / "trl", training=training))
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("ours", "trl")
    ]
    for ours, trl in zip(*records, strict=True):
        for key in ours.keys() & {"loss", "grad_norm", "mean_token_accuracy"}:
            assert ours[key] == pytest.approx(trl[key], rel=1e-3, abs=0.02 if "accuracy" in key else 1e-6), key
    ours_adapter, trl_adapter = adapter(tmp_path / "ours"), adapter(tmp_path / "trl")
    assert all(torch.allclose(ours_adapter[name], trl_adapter[name], atol=1e-4) for name in trl_adapter)


@pytest.mark.parametrize(("dtype", "has"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_a_bfloat16_model_computes_in_bfloat16_where_the_processor_does_and_keeps_float32_adapters(
    dtype: torch.dtype, has: bool, stories: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(stories, dtype=dtype).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(build, "has_bfloat16", lambda: has)
    uncast, real = [], adapters.inputs_uncast

    def inputs_uncast(layers: list[Any]) -> Any:
        uncast.append(len(layers))
        return real(layers)

    monkeypatch.setattr(adapters, "inputs_uncast", inputs_uncast)
    finetune(recipe(tmp_path / "model", data, tmp_path / "a"))
    run = json.loads((tmp_path / "a" / "llmtools.json").read_text())
    assert run["training"]["bf16"] == (dtype == torch.bfloat16 and has)
    assert uncast and all(bool(count) == run["training"]["bf16"] for count in uncast)
    assert {tensor.dtype for tensor in adapter(tmp_path / "a").values()} == {torch.float32}


def test_an_answer_is_never_cut_without_a_word(
    stories: Path, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open(data, "a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "Tom", "completion": " ran and" * 60}) + "\n")
    with caplog.at_level("WARNING", logger="llmtools"):
        result = finetune(recipe(stories, data, tmp_path / "a", training={**TRAINING, "max_steps": 1}))
    assert result.left_out == 1
    assert "number 9 (" in caplog.text
    with pytest.raises(InputError, match="all 9 training examples are longer than max_length=4"):
        finetune(recipe(stories, data, tmp_path / "b", training={**TRAINING, "max_length": 4}))


def test_a_loss_that_is_no_number_stops_the_run(stories: Path, data: str, tmp_path: Path) -> None:
    training = {**TRAINING, "learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 8}
    with pytest.raises(InputError, match="diverged"):
        finetune(recipe(stories, data, tmp_path / "a", training=training))
    assert not (tmp_path / "a").exists()


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has finetune open a model that something was done to."""
    from llmtools.checkpoint import loading

    def change(what: Any) -> None:
        def opened(*args: Any, former: Any = loading.open_model, **kwargs: Any) -> Any:
            model, tokenizer = former(*args, **kwargs)
            what(model)
            return model, tokenizer

        monkeypatch.setattr(loading, "open_model", opened)

    return change


def bypass(model: Any) -> None:
    model.model.layers[1].mlp.forward = lambda x: x


def nan_behind(model: Any) -> None:
    model.model.layers[2].register_full_backward_hook(lambda module, ins, outs: (ins[0] * float("nan"),))


def test_an_adapter_that_the_model_bypasses_is_named(
    changed: Any, packed: str, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed(bypass)
    with caplog.at_level("WARNING", logger="llmtools"):
        finetune(recipe(packed, data, tmp_path / "a", training={**TRAINING, "max_steps": 2}))
    (warning,) = [each for each in caplog.messages if "no gradient" in each]
    assert "3 of 35 adapters" in warning
    assert {f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")} == {
        each.strip() for each in warning.rpartition(": ")[2].split(",")
    }


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"bf16": True},
        {"warmup_steps": 1},
        {"learning_rate": 0.0},
    ],
    ids=["plain", "accumulated and recomputed", "bf16", "warm-up", "no rate"],
)
@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [5, 6, 300]}], ids=str
)
def test_training_as_usual_gives_no_warning(
    training: Any, options: Any, packed: str, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if training and options:
        pytest.skip("one of the two is enough")
    asked = recipe(packed, data, tmp_path / "a", training={**TRAINING, "max_steps": 2, **training}, validation=0.25)
    with caplog.at_level("WARNING", logger="llmtools"):
        result = finetune(replace(asked, lora=Lora(r=2, options=options)))
    assert "adapters" not in caplog.text
    assert 0 < result.trainable < result.parameters and result.validation_loss is not None


def test_a_step_that_changes_nothing_is_said(
    packed: str, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with caplog.at_level("WARNING", logger="llmtools"):
        finetune(recipe(packed, data, tmp_path / "a", training={**TRAINING, "max_steps": 1, "optim": "adamw_torch"}))
    assert "35 of 35 adapters have a gradient, and the first step did not change them" in caplog.text


def test_adapters_that_the_loss_does_not_reach_are_an_error(
    changed: Any, packed: str, data: str, tmp_path: Path
) -> None:
    changed(bypass)
    target = r".*layers\.1\.mlp\..*_proj"
    with pytest.raises(InputError, match=r"no adapter .*lora.target_modules"):
        finetune(replace(recipe(packed, data, tmp_path / "a"), lora=Lora(r=2, target_modules=target)))
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.training").exists()


def test_a_gradient_that_is_no_number_is_an_error_before_the_step(
    changed: Any, packed: str, data: str, tmp_path: Path
) -> None:
    training = {**TRAINING, "max_steps": 2, "save_steps": 1, "lr_scheduler_type": "constant"}
    finetune(recipe(packed, data, tmp_path / "a", training=training))
    former = adapter(tmp_path / "a")
    changed(nan_behind)
    with pytest.raises(
        InputError, match=r"step 3 the gradient of 14 of 35 adapters is not finite .*layers\.0"
    ) as error:
        finetune(recipe(packed, data, tmp_path / "a", training={**training, "max_steps": 3}, resume=True))
    assert "layers.3" not in str(error.value)
    assert all(torch.equal(tensor, former[key]) for key, tensor in adapter(tmp_path / "a").items())
    assert len(list((tmp_path / "a.training" / "checkpoints").glob("checkpoint-2"))) == 1


def test_every_verb_refuses_another_base_and_resuming_knows_the_same_one_in_shards(
    stories: Path, packed: str, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    import llmtools
    from llmtools.recipes.evaluate import Evaluate, evaluate
    from llmtools.recipes.export import Export, export
    from llmtools.recipes.generate import Generate, generate
    from llmtools.recipes.push import Push, push

    training = {**TRAINING, "max_steps": 2, "save_steps": 1, "lr_scheduler_type": "constant"}
    asked = recipe(packed, data, tmp_path / "a", training=training)
    finetune(asked)
    last = tmp_path / "a" / "checkpoints" / "checkpoint-2"
    texts = {(folder / "base_fingerprint.json").read_text() for folder in (tmp_path / "a", last)}
    assert len(texts) == 1
    assert "base_fingerprint.json" in push(Push(str(tmp_path / "a"), "me/adapter", dry_run=True)).files

    said = "a base with rtn 4 bits, this is dense"
    text = tmp_path / "text.txt"
    text.write_text("Tom had three cats and a ball. " * 20)
    more = {**training, "max_steps": 3}
    for folder in (str(tmp_path / "a"), str(last)):
        with pytest.raises(InputError, match=said):
            generate(Generate(model=str(stories), adapter=folder, prompt="Tom", max_new_tokens=1))
    generate(Generate(model=str(stories), adapter=folder, prompt="Tom", max_new_tokens=1, allow_other_base=True))
    assert said in caplog.text
    with pytest.raises(InputError, match=said):
        evaluate(Evaluate(model=str(stories), adapter=folder, data=str(text), max_length=32))
    for form in ("dense", "lora"):
        out = tmp_path / form
        with pytest.raises(InputError, match=said):
            export(Export(format=form, model=str(stories), adapter=folder, out=str(out)))
        assert not out.exists()
        export(Export(format=form, model=str(stories), adapter=folder, out=str(out), allow_other_base=True))
    assert (tmp_path / "lora" / "base_fingerprint.json").exists()
    with pytest.raises(InputError, match=f"the model's weights changed since this run began: it was .*{said}"):
        finetune(replace(asked, model=str(stories), training=more, resume=True))
    shards = llmtools.save(llmtools.load(packed)[0], None, tmp_path / "shards", max_shard_size="60KB")
    for file in Path(packed).glob("tokenizer*"):
        shutil.copy(file, shards)
    shutil.copy(Path(packed) / "config.json", shards)
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert finetune(replace(asked, model=str(shards), training=more, resume=True)).steps == 3
    again = replace(asked, model=str(stories), training={**more, "max_steps": 4}, resume=True, allow_other_base=True)
    assert finetune(again).steps == 4


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "lora_ga"])
def test_a_start_that_cannot_be_made_names_the_one_that_can(start: str, packed: str, data: str, tmp_path: Path) -> None:
    lora = Lora(options={"init_lora_weights": start})
    with pytest.raises(InputError, match=rf"{start}.*quantize --adapter_rank R, then finetune --lora.init error"):
        finetune(replace(recipe(packed, data, tmp_path / "a"), lora=lora))
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"training": {"max_steps": "many"}}, "int is expected"),
        ({"training": {"output_dir": "x"}}, "the output folder is --out"),
        ({"training": {"max_length": 4096}}, "512 positions"),
        ({"training": {"load_best_model_at_end": True}}, "no validation examples; pass --validation"),
        ({"training": {"eval_strategy": "epoch"}}, "no validation examples; pass --validation"),
        ({"training": {"fsdp": "full_shard", "fsdp_config": {"version": 1}}}, "use FSDP2"),
        ({"training": {"fsdp_config": {"fsdp_version": 1}}}, "use FSDP2"),
        ({"validation": 1.5}, "from 0 to below 1"),
        ({"options": {"prompts": "x"}}, "did you mean 'prompt'"),
        ({"resume": True}, "there is no checkpoint"),
        ({"lora": Lora(r=0)}, "r at least 1"),
        ({"lora": Lora(options={"use_dorra": True})}, "did you mean 'use_dora'"),
        ({"lora": Lora(target_modules=["q_prj"])}, "q_prj"),
        ({"model": "no/such/folder"}, "there is no folder"),
        ({"data": "no.jsonl"}, "there is no file"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else next(iter(value)),
)
def test_mistakes_are_said_and_leave_nothing(
    changes: dict[str, Any], says: str, stories: Path, data: str, tmp_path: Path
) -> None:
    everything = {"model": str(stories), "data": data, "out": str(tmp_path / "out" / "a"), **changes}
    with pytest.raises(InputError, match=says):
        finetune(Finetune(**everything))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_output_folder_is_not_replaced_unasked(stories: Path, data: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="--overwrite"):
        finetune(recipe(stories, data, tmp_path / "a"))


def test_a_missing_extra_is_named(stories: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(InputError, match=r"pip install 'llmtools\[train\]'"):
        finetune(recipe(stories, data, tmp_path / "a"))


def test_of_several_processes_only_the_first_makes_and_clears_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtools.train import run_folder as module

    monkeypatch.setattr(module, "wait_for_all", lambda: None)
    out, work = tmp_path / "a", tmp_path / "a.training"
    made = recipe("model", "data", out)
    monkeypatch.setenv("RANK", "1")
    with module.run_folder(made, out, work) as checkpoint:
        assert checkpoint is None and not work.exists()
    monkeypatch.setenv("RANK", "0")
    with module.run_folder(made, out, work):
        assert work.is_dir()
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(KeyError), module.run_folder(made, out, work):
            raise KeyError
        assert work.is_dir()
        monkeypatch.setenv("RANK", "0")


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(packed: str, data: str, tmp_path: Path) -> None:
    """They share the gradient accumulation: the same examples in each step, up to the order of sums."""
    import subprocess
    import sys

    out = tmp_path / "a"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    training = {**TRAINING, "gradient_accumulation_steps": 2, "max_steps": 3}
    words = ["--model", packed, "--data", data, "--out", str(out), "--lora.r", "2", "--lora.dropout", "0"]
    words += [word for key, value in training.items() for word in (f"--training.{key}", str(value))]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # a group of CPU processes
    command = [sys.executable, *launcher, "-m", "llmtools", "finetune", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "train.jsonl"]
    alone = tmp_path / "alone"
    finetune(replace(recipe(packed, data, alone), lora=Lora(r=2, dropout=0.0), training=training))
    (steps, found), (_, expected) = (tuple(zip(*losses(folder), strict=True)) for folder in (out, alone))
    assert steps == (1, 2, 3)
    assert found == pytest.approx(expected, rel=1e-4)
    for name, tensor in adapter(alone).items():
        torch.testing.assert_close(adapter(out)[name], tensor, rtol=1e-2, atol=1e-4)


def test_processes_share_the_accumulation_or_say_that_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtools.train.arguments import shared_accumulation

    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (shared_accumulation(16), shared_accumulation(1)) == (4, 1)
    with pytest.raises(InputError, match="6 cannot be shared by 4 processes; choose a multiple of 4, or 1"):
        shared_accumulation(6)
