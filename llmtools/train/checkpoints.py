"""Checkpoints of a training run: when they are written, whether they are intact, and which one to resume from.

The Trainer writes them. Then a checkpoint is sealed: its files are synced to disk, and ``files.json`` holds their sizes
and hashes. A run resumes from the last checkpoint that matches its seal. Nothing in a checkpoint is unpickled beyond
tensors and plain values (``torch.load(weights_only=True)``): a file that holds more counts as damaged. The Trainer's
``training_args.bin``, a pickle of all arguments with the hub's token, is not needed and not kept.
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
"""Name of the file with the sizes and hashes of a checkpoint's files."""
ARGUMENTS = "training_args.bin"
STATE = "trainer_state.json"
NEEDED = (STATE, "optimizer.pt", "scheduler.pt", "adapter_model.safetensors")
"""Files without which a run cannot be resumed bit for bit."""
SECONDS = 300.0
"""Seconds between checkpoints, where the arguments do not set the saving strategy."""


def seal(checkpoint: Path) -> None:
    """Syncs a complete checkpoint to disk, and writes its seal: sizes and hashes of its files."""
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
    """The damage of a checkpoint, with the file's name; None where it matches its seal and can be opened.

    One without a seal (the run was killed before, or is of an earlier version) is intact if all its files can be
    opened.
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
    """The checkpoints in a folder that were written completely once, the last first; some may be damaged."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / STATE).exists()), key=steps_of, reverse=True)


def steps_of(checkpoint: Path) -> int:
    """Number of optimizer steps of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def last_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """(the last intact checkpoint in a folder, the damages of those after it)."""
    damages: list[str] = []
    for checkpoint in all_in(folder):
        if (why := damage(checkpoint)) is None:
            return checkpoint, damages
        damages.append(why)
    return None, damages


def set_aside(folder: Path, after: int) -> None:
    """Renames the checkpoints with more than `after` steps, which are damaged."""
    for path in list(folder.glob("checkpoint-*")):
        if re.fullmatch(r"checkpoint-\d+", path.name) and steps_of(path) > after:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def keep(folder: Path, target: Path, best: int | None) -> None:
    """Copies the checkpoints that a later `--resume` may need: the last two intact ones, and the best one."""
    intact = [path for path in all_in(folder) if damage(path) is None]
    for path in [*intact[:2], *(path for path in intact[2:] if steps_of(path) == best)]:
        shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns(ARGUMENTS))


class Finished(Exception):
    """Raised where the checkpoint that a run resumes from has all its steps already."""


def keeper(
    request: Request, seconds: float | None, also: Iterable[Path] = (), notes: Mapping[str, str] | None = None
) -> Any:
    """The TrainerCallback that triggers checkpoints, seals them, and stops the run after a signal.

    request: holds a received signal; the current step is then finished and saved, and training stops.
    seconds: time between checkpoints; None: the Trainer's arguments alone determine it.
    also: files beside the checkpoints that are synced to disk with them.
    notes: name → text of files to write into each checkpoint.

    Every process of a run has its own; they decide together.
    """
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):
        stopped = False
        """Whether training stopped because of `request`."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                raise Finished
            self._saved = self._last = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.monotonic()
            step, self._last = now - self._last, now
            self._save_if_due(args, control, now + step)  # the next step would be too late

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._last = time.monotonic()
            self._save_if_due(args, control, self._last)

        def _save_if_due(self, args: Any, control: Any, now: float) -> None:
            due = seconds is not None and now - self._saved > seconds
            self._stop, due = _any_process(request.number is not None, due, args.device)
            if self._stop or due:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _wait_for_all()  # every process has written its part
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
            if self.stopped:  # within the epoch
                control.should_log = control.should_evaluate = control.should_save = False

    return Keeper()


def _any_process(stop: bool, due: bool, device: Any) -> tuple[bool, bool]:
    """Each flag, true where any process of the run has it."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return stop, due
    flags = torch.tensor([stop, due], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    stop, due = (bool(flag) for flag in flags.tolist())
    return stop, due


def _wait_for_all() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _altered(file: Path, expected: dict[str, Any]) -> str | None:
    """How a file differs from the seal; None where it does not."""
    if not file.is_file():
        return f"{file} is missing"
    if (size := file.stat().st_size) != expected["bytes"]:
        return f"{file} is damaged ({size} bytes of {expected['bytes']})"
    return None if sha256(file) == expected["sha256"] else f"{file} is damaged (not what was written)"


def _unreadable(file: Path) -> str | None:
    """Why a file that training reads cannot or must not be opened; None where it can."""
    if file.suffix in (".pt", ".pth", ".bin") and file.name != ARGUMENTS and file.is_file():
        import torch
        from transformers.trainer_pt_utils import safe_globals  # NumPy's types, for the state of its random generator

        try:
            with safe_globals():
                torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the file holds
            log.debug("%s: %s", file, error)
            return f"{file} is damaged, or holds more than tensors and plain values, and is not opened"
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
