"""Checkpoints of a run: any damage is seen and named, and no more than five minutes of work are at stake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("trl")

from llmtools.signals import Request
from llmtools.train import checkpoints
from llmtools.train.checkpoints import SEAL, Finished, damage, keep, keeper, last_intact, seal, set_aside


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Files of the kinds that the Trainer writes."""
    folder = tmp_path / "checkpoints" / "checkpoint-7"
    folder.mkdir(parents=True)
    save_file({"lora_A": torch.ones(20, 20)}, folder / "adapter_model.safetensors")
    torch.save(
        {"state": {0: torch.ones(20)}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]}, folder / "optimizer.pt"
    )
    torch.save({"last_epoch": 7}, folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    torch.save(Request, folder / "training_args.bin")
    (folder / "trainer_state.json").write_text('{"global_step": 7}')
    (folder / "adapter_config.json").write_text("{}")
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name not in (SEAL, "training_args.bin"))


def test_any_damage_is_seen_and_the_file_named(checkpoint: Path, tmp_path: Path) -> None:
    seal(checkpoint)
    assert damage(checkpoint) is None
    assert not (checkpoint / "training_args.bin").exists()
    for file in [*files(checkpoint), checkpoint / SEAL]:
        whole = file.read_bytes()
        flipped = bytes([*whole[:-1], whole[-1] ^ 1])
        for what in (None, b"", whole[: len(whole) // 2], flipped, whole + b"x"):
            if what is None:
                file.unlink()
            else:
                file.write_bytes(what)
            if file.name != SEAL or what is not None:
                assert str(file) in (damage(checkpoint) or ""), (file.name, what)
            file.write_bytes(whole)
    assert damage(checkpoint) is None


def test_without_a_seal_what_cannot_be_opened_is_damaged(checkpoint: Path) -> None:
    """The run was killed between the Trainer's last file and the seal, or is of an earlier version."""
    assert damage(checkpoint) is None
    for file in files(checkpoint):
        whole = file.read_bytes()
        if file.name != "adapter_config.json":
            file.write_bytes(whole[: len(whole) // 2])
            assert str(file) in (damage(checkpoint) or ""), file.name
            file.write_bytes(whole)
        if file.name not in ("adapter_config.json", "rng_state.pth"):
            file.unlink()
            assert f"{file} is missing" == damage(checkpoint)
            file.write_bytes(whole)


def test_the_last_intact_one_is_found_and_damaged_ones_set_aside(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint.parent
    for step in (8, 9, 10, 11):
        shutil.copytree(checkpoint, folder / f"checkpoint-{step}")
        seal(folder / f"checkpoint-{step}")
    (folder / "checkpoint-9" / "optimizer.pt").unlink()
    (folder / "checkpoint-10" / "scheduler.pt").write_bytes(b"")
    (folder / "checkpoint-11" / "trainer_state.json").unlink()  # never came to its end
    (folder / "checkpoint-x").mkdir()
    found, damages = last_intact(folder)
    assert found == folder / "checkpoint-8"
    assert [Path(each.split()[0]).name for each in damages] == ["scheduler.pt", "optimizer.pt"]
    keep(folder, tmp_path / "kept", best=None)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["checkpoint-7", "checkpoint-8"]
    assert not list((tmp_path / "kept").rglob("training_args.bin"))
    set_aside(folder, 8)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-7", "checkpoint-8", "checkpoint-x"}
    assert (folder / "damaged-checkpoint-9" / "scheduler.pt").exists()
    assert last_intact(folder) == (folder / "checkpoint-8", [])


class Run:
    """A training run of steps that take so many seconds each, as a callback sees it, on a clock of its own."""

    def __init__(self, callback: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        self.now, self.saved = 0.0, [0.0]
        monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(checkpoints, "seal", lambda folder: None)
        self.callback = callback
        self.args = SimpleNamespace(device="cpu", output_dir=str(folder))
        self.state = SimpleNamespace(global_step=0, max_steps=steps, is_world_process_zero=True)
        self.control = SimpleNamespace(should_save=False, should_training_stop=False)
        callback.on_train_begin(self.args, self.state, self.control)

    def step(self, seconds: float, evaluation: float = 0.0, saves: bool = False) -> None:
        self.now += seconds
        self.state.global_step += 1
        self.control.should_save = saves
        self.callback.on_step_end(self.args, self.state, self.control)
        if evaluation:
            self.now += evaluation
            self.callback.on_evaluate(self.args, self.state, self.control)
        if self.control.should_save:
            self.saved.append(self.now)
            self.callback.on_save(self.args, self.state, self.control)


@pytest.mark.parametrize("seconds", [1, 7, 100, 149, 151, 299])
def test_five_minutes_of_work_may_be_lost_and_saving_is_no_more_frequent_than_that(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(keeper(Request(), 300.0), tmp_path, monkeypatch, steps=10_000)
    for _ in range(2000):
        run.step(seconds)
    gaps = [later - earlier for earlier, later in zip(run.saved, run.saved[1:], strict=False)]
    assert len(gaps) > 2000 * seconds / 301 - 1
    assert max(gaps) <= 300 and min(gaps) > 300 - 2 * seconds


def test_a_long_step_and_a_long_evaluation_are_saved_at_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(keeper(Request(), 300.0), tmp_path, monkeypatch, steps=10)
    run.step(1000)
    run.step(1, evaluation=1000)
    assert run.saved == [0, 1000, 2001]
    run = Run(keeper(Request(), None), tmp_path, monkeypatch, steps=10)  # the user said when
    run.step(1000)
    assert run.saved == [0]


def test_a_request_is_met_by_saving_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request()
    callback = keeper(request, None)
    run = Run(callback, tmp_path, monkeypatch, steps=10)
    run.step(1, saves=True)
    assert not callback.stopped
    request.number = 15
    run.step(1)
    assert (run.saved, callback.stopped, run.control.should_training_stop) == ([0, 1, 2], True, True)
    last = keeper(request, None)  # in the last step there is nothing left to stop
    run = Run(last, tmp_path, monkeypatch, steps=1)
    run.step(1)
    assert run.saved == [0, 1] and not last.stopped
    with pytest.raises(Finished):
        last.on_train_begin(run.args, run.state, run.control)


def test_a_seal_is_the_last_thing_written(checkpoint: Path) -> None:
    seal(checkpoint)
    told = json.loads((checkpoint / SEAL).read_text())
    assert told.keys() == {file.name for file in files(checkpoint)}
    assert all(told[file.name]["bytes"] == file.stat().st_size for file in files(checkpoint))
