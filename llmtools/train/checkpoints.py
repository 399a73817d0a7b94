"""Checkpoints of a training run: when they are written, whether they are whole, and which one to go on from.

The Trainer writes them. As soon as it has, a checkpoint is sealed: its files are on the disk, and ``files.json`` says
their sizes and hashes. A run goes on from the last one that is as it was sealed. Nothing in a checkpoint is unpickled
beyond tensors and plain values (``torch.load(weights_only=True)``): a file that holds more is taken for damaged. The
Trainer's ``training_args.bin``, a pickle of everything with the hub's token in it, is not needed and not kept.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import clear_unfinished, read_json, sha256, sync, write_whole
from ..signals import Request

log = logging.getLogger(__name__)

SEAL = "files.json"
ARGUMENTS = "training_args.bin"
STATE = "trainer_state.json"
NEEDED = (STATE, "optimizer.pt", "scheduler.pt", "adapter_model.safetensors")
"""without these there is no going on to the bit"""
SECONDS = 300.0
"""of work that may be lost, where the user did not say how often to save"""


def seal(checkpoint: Path) -> None:
    """Has a finished checkpoint on the disk, and writes down what it consists of."""
    (checkpoint / ARGUMENTS).unlink(missing_ok=True)
    clear_unfinished(checkpoint)
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != SEAL]
    for file in [*files, checkpoint]:
        sync(file)
    sums = {
        file.relative_to(checkpoint).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in files
    }
    write_whole(checkpoint / SEAL, json.dumps(sums, indent=1) + "\n")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None where it is as it was sealed, and can be opened.

    One without a seal (the run was killed a moment too early, or is of an earlier version) is whole if every file of
    it can be opened.
    """
    try:
        sealed = read_json(checkpoint / SEAL)
        for name, expected in sealed.items():
            if (why := _altered(checkpoint / name, expected)) is not None:
                return why
    except (InputError, TypeError, KeyError, AttributeError):
        return f"{checkpoint / SEAL} is damaged"
    for name in NEEDED:
        if not (checkpoint / name).is_file():
            return f"{checkpoint / name} is missing"
    return next((why for file in sorted(checkpoint.rglob("*")) if (why := _unreadable(file)) is not None), None)


def all_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder that have come to their end once, the last first; not all of them may be whole."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / STATE).exists()), key=steps_of, reverse=True)


def steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint in a folder, and what is wrong with those after it."""
    complaints: list[str] = []
    for checkpoint in all_in(folder):
        if (why := damage(checkpoint)) is None:
            return checkpoint, complaints
        complaints.append(why)
    return None, complaints


def put_aside(folder: Path, after: int) -> None:
    """Renames the checkpoints with more than `after` steps, which are damaged, so that nobody counts on them."""
    for path in list(folder.glob("checkpoint-*")):
        if re.fullmatch(r"checkpoint-\d+", path.name) and steps_of(path) > after:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def keep(folder: Path, target: Path, best: int | None) -> None:
    """Copies what a later `--resume` may need: the last two whole checkpoints, and the best one."""
    whole = [path for path in all_in(folder) if damage(path) is None]
    for path in [*whole[:2], *(path for path in whole[2:] if steps_of(path) == best)]:
        shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns(ARGUMENTS))


class Finished(Exception):
    """The checkpoint that a run goes on from has all its steps already."""


def keeper(
    request: Request, seconds: float | None, also: Iterable[Path] = (), notes: Mapping[str, str] | None = None
) -> Any:
    """The TrainerCallback that has checkpoints written in time, seals them, and ends the run when that was asked for.

    request: where a signal is noted. The current step is finished and saved then, and training stops.
    seconds: of work that may be lost; None: the Trainer's arguments alone say when to save.
    also: files beside the checkpoints that are to be on the disk with them.
    notes: name → text of files to put into each checkpoint.

    Of several processes each has its own, and they act as one.
    """
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):
        stopped = False
        """whether training ended because of `request`"""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                raise Finished
            self._saved = self._last = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.monotonic()
            step, self._last = now - self._last, now
            self._save_if_due(args, control, now + step)  # the next one would be too late

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._last = time.monotonic()
            self._save_if_due(args, control, self._last)

        def _save_if_due(self, args: Any, control: Any, now: float) -> None:
            due = seconds is not None and now - self._saved > seconds
            self._stop, due = _anywhere(request.number is not None, due, args.device)
            if self._stop or due:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _together()  # each process has written its part
            if state.is_world_process_zero:
                for file in also:
                    if file.exists():
                        sync(file)
                checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                for name, text in (notes or {}).items():
                    write_whole(checkpoint / name, text)
                seal(checkpoint)
            self._saved = time.monotonic()
            if self._stop and state.global_step < state.max_steps:
                self.stopped = control.should_training_stop = True

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.stopped:  # in the midst of one
                control.should_log = control.should_evaluate = control.should_save = False

    return Keeper()


def _anywhere(stop: bool, due: bool, device: Any) -> tuple[bool, bool]:
    """Either flag, if any process of the run has it."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return stop, due
    flags = torch.tensor([stop, due], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    stop, due = (bool(flag) for flag in flags.tolist())
    return stop, due


def _together() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _altered(file: Path, expected: dict[str, Any]) -> str | None:
    """How a file differs from what the seal says of it."""
    if not file.is_file():
        return f"{file} is missing"
    if (size := file.stat().st_size) != expected["bytes"]:
        return f"{file} is damaged ({size} bytes of {expected['bytes']})"
    return None if sha256(file) == expected["sha256"] else f"{file} is damaged (not what was written)"


def _unreadable(file: Path) -> str | None:
    """Why a file that training reads cannot be opened, or is not going to be."""
    if file.suffix in (".pt", ".pth", ".bin") and file.name != ARGUMENTS and file.is_file():
        import torch
        from transformers.trainer_pt_utils import safe_globals  # NumPy's, for the state of its random numbers

        try:
            with safe_globals():
                torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever is in there
            log.debug("%s: %s", file, error)
            return f"{file} is damaged, or holds more than tensors and plain values, which is not opened"
    elif file.suffix == ".safetensors":
        from ..model.integrity import read_headers

        try:
            read_headers([file])
        except InputError:
            return f"{file} is damaged"
    elif file.name == STATE:
        try:
            read_json(file, InputError)
        except (OSError, InputError, RecursionError):
            return f"{file} is damaged"
    return None
