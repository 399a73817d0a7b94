"""The run folder, ``OUT.training``: checkpoints, ``metrics.jsonl``, ``run.json``.

A run that was stopped is resumed there, with the same inputs: ``run.json`` holds hashes of the training and validation
data, the model and the tokenizer.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import METADATA, RUN, json_or_empty
from ..options import with_current_names
from ..ranks import is_first, processes
from ..signals import Stopped
from .options import Finetune

log = logging.getLogger(__name__)


@contextmanager
def run_folder(
    recipe: Finetune, out: Path, work: Path, run: dict[str, Any] | None = None, base: dict[str, Any] | None = None
) -> Iterator[Path | None]:
    """Prepares the run folder `work`, and yields the checkpoint to resume from, if any.

    run: contents of its ``run.json``; a resumed run keeps its ``id``.
    base: the fingerprint of the base model, compared with that of the resumed run.
    A run that ends early leaves its folder if there is a checkpoint in it, and nothing otherwise. Of several processes
    the first creates and clears folders, and the others wait for it. Raises InputError where the run cannot be resumed,
    and where a folder holds files that llmtools did not write.
    """
    from ..checkpoint.run_info import record
    from .checkpoints import all_in

    run = record("finetune", recipe) if run is None else run
    checkpoint = _prepare(recipe, out, work, run, base) if is_first() else None
    wait_for_all()
    if recipe.resume and not is_first():
        checkpoint = next(iter(all_in(work / "checkpoints")), None)  # the first process has set damaged ones aside
    try:
        yield checkpoint
    except BaseException as error:
        if not is_first():
            raise
        last = next(iter(all_in(work / "checkpoints")), None)
        if last is None:
            clear(work, out)
        elif isinstance(error, KeyboardInterrupt):
            raise Stopped(f"stopped; --resume continues from {last}", getattr(error, "exit_code", 130)) from error
        raise


def clear(work: Path, out: Path) -> None:
    """Removes the run folder, unless it holds files that llmtools did not write."""
    from ..files import remove, unknown_files

    if (others := unknown_files(work)) == []:
        remove(work, of=out)
    else:
        log.warning("%s is kept, because it holds a file that is not of this run: %s", work, (others or ["?"])[0])


def wait_for_all() -> None:
    """Waits until every process of the run has come here."""
    if processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _prepare(recipe: Finetune, out: Path, work: Path, run: dict[str, Any], base: dict[str, Any] | None) -> Path | None:
    from ..checkpoint.run_info import as_json
    from ..files import remove, unknown_files, write_whole
    from .checkpoints import all_in

    others = unknown_files(work) if work.exists() else []
    if others or others is None:
        why = "is no run folder" if others is None else f"holds {others[0]}, which llmtools did not write"
        raise InputError(f"this run would use the folder {work}, which {why}; move it away, or choose another --out")
    if recipe.resume:
        checkpoint = _resumed(recipe, out, work, run, base)
        run["id"] = _run(work).get("id")
        write_whole(work / RUN, as_json(run))
        return checkpoint
    if all_in(work / "checkpoints") and not recipe.overwrite:
        raise InputError(f"{work} holds a run that was stopped; --resume continues it, --overwrite starts anew")
    remove(work, of=out)
    run["id"] = secrets.token_hex(8)
    _create(work, out, {RUN: as_json(run)})
    return None


def _resumed(recipe: Finetune, out: Path, work: Path, run: dict[str, Any], base: dict[str, Any] | None) -> Path:
    """The checkpoint to resume from, in `work`; those of a finished run are copied there."""
    from ..checkpoint.run_info import as_json
    from ..files import write_whole
    from ..model.fingerprint import FINGERPRINT, as_text
    from .checkpoints import SEAL, last_intact, seal, set_aside, steps_of

    former = _run(work) or _run(out)
    allowed = recipe.overwrite or bool((former.get("recipe") or {}).get("overwrite"))  # now, or when the run began
    run["recipe"]["overwrite"] = allowed
    if out.exists() and any(out.iterdir()) and _run(out).get("id") != former.get("id") and not allowed:
        raise InputError(
            f"--resume: {out} is of another run than the one in {work}; pass --overwrite, too, to replace it at the end"
        )
    checkpoint, damages = last_intact(work / "checkpoints")
    kept = None
    if checkpoint is None and _run(out).get("id") == former.get("id"):
        kept, more = last_intact(out / "checkpoints")
        damages += more
    if checkpoint is None and kept is None:
        where = f"in {work} or {out / 'checkpoints'}"
        if damages:
            raise InputError(f"--resume: no checkpoint {where} is intact: {damages[0]}; start anew with --overwrite")
        raise InputError(f"--resume: there is no checkpoint {where}; start without --resume")
    _check_base(recipe, checkpoint or kept, base)
    _check_same(recipe, former, run)
    for damage in damages:
        log.warning("%s; resuming from %s", damage, checkpoint or kept)
    if kept is not None:
        checkpoint = _copied_back(kept, out, work)
    assert checkpoint is not None
    if not (checkpoint / SEAL).exists():  # the run was killed before it was sealed
        if base is not None:
            write_whole(checkpoint / FINGERPRINT, as_text(base))
        if run.get("merge"):
            write_whole(checkpoint / METADATA, as_json({"merge": run["merge"]}))
        seal(checkpoint)
    set_aside(work / "checkpoints", steps_of(checkpoint))
    log.info("resuming from %s", checkpoint)
    return checkpoint


def _copied_back(kept: Path, out: Path, work: Path) -> Path:
    """The checkpoint of a finished run, copied into the run folder with its others, beside damaged ones there."""
    from ..checkpoint.run_info import as_json
    from .checkpoints import set_aside

    if not work.exists():
        _create(work, out, {RUN: as_json(_run(out)), "metrics.jsonl": out / "metrics.jsonl"})
    set_aside(work / "checkpoints", -1)
    shutil.copytree(kept.parent, work / "checkpoints", dirs_exist_ok=True)
    return work / "checkpoints" / kept.name


def _create(work: Path, out: Path, files: dict[str, Path | str]) -> None:
    """Creates the run folder, atomically with its files. files: name → text, or file to copy."""
    from ..files import partial_of, write_whole

    fresh = work.with_name(partial_of(out).name)
    fresh.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, str):
            write_whole(fresh / name, content)
        elif content.exists():
            shutil.copy(content, fresh / name)
    fresh.rename(work)


def _run(folder: Path) -> dict[str, Any]:
    """The metadata in a run folder, or in a finished output; {} where there are none, or they are damaged."""
    return {**json_or_empty(folder / RUN), **json_or_empty(folder / METADATA)}


def _check_base(recipe: Finetune, checkpoint: Path | None, base: dict[str, Any] | None) -> None:
    """Raises InputError where the base model is not that of the checkpoint, unless the recipe allows it."""
    from ..model.fingerprint import compare, read_fingerprint

    former = None if checkpoint is None else read_fingerprint(checkpoint)
    difference = None if former is None or base is None else compare(former, base)
    if difference is None:
        return
    if not recipe.allow_other_base:
        raise InputError(
            f"--resume: the model's weights changed since this run began: it {difference}; resume with the same, pass "
            "--allow_other_base, or start anew with --overwrite"
        )
    log.warning("the resumed run %s", difference)


ROWS = ("training data", "validation data")
"""Names of the hashes of data in ``inputs`` of run.json; the others are of the model."""


MODEL = (
    "model's configuration",
    "model's weights",
    "model's revision on the hub",
    "tokenizer",
)  # names of the hashes of the model


_LATER = {"merge_warmup": 0.0}
"""Defaults of options that runs of earlier versions lack, other than None."""


TENSORS = "model's tensors"
"""Name of the hash that does not depend on how the weights are sharded."""


def _check_same(recipe: Finetune, former: dict[str, Any], run: dict[str, Any]) -> None:
    """Raises InputError unless model, data, adapter and task are those that the run began with.

    Training arguments may change, which is logged.
    """
    from ..checkpoint.run_info import as_json

    before, inputs, here = former.get("recipe"), former.get("inputs") or {}, run.get("inputs") or {}
    if not isinstance(before, dict):
        log.warning("run.json cannot be read, so it was not checked whether the recipe is the same")
        return
    before = with_current_names("finetune", before)
    remedy = "resume with the same, or start anew with --overwrite"
    now = json.loads(as_json(asdict(recipe)))  # without secrets, as it was written
    ignored = {TENSORS}  # runs of earlier versions have none
    if recipe.allow_other_base:
        ignored |= {*MODEL}
    elif inputs.get(TENSORS) is not None and inputs[TENSORS] == here.get(TENSORS):
        ignored |= {"model's weights"}
    changed = [key for key in {**inputs, **here} if inputs.get(key) != here.get(key) and key not in ignored]
    moved = {  # the same contents under another path are the same
        "data": not {*ROWS} & {*changed},
        "validation": not {*ROWS} & {*changed},
        "model": not {*changed} - {*ROWS},
    }
    moved |= {key: True for key in ("model", "load") if recipe.allow_other_base}
    for key in (
        "model",
        "load",
        "merge",
        "merge_warmup",
        "data",
        "validation",
        "num_samples",
        "lora",
        "task",
        "options",
        "seed",
    ):
        if before.get(key, _LATER.get(key)) != now[key] and not moved.get(key):
            raise InputError(f"--resume: {key} was {before.get(key)!r} and is {now[key]!r}; {remedy}")
    if not inputs:
        log.warning("run.json has no hashes of the data and the model, so it was not checked whether they are the same")
    elif changed:
        raise InputError(f"--resume: the {changed[0]} changed since this run began; {remedy}")
    former_arguments, arguments = before.get("training") or {}, now["training"]
    for key in dict.fromkeys([*former_arguments, *arguments]):
        was, is_now = former_arguments.get(key), arguments.get(key)
        if was != is_now and "token" not in key:  # of the hub, a secret
            log.warning("training.%s was %r and is %r", key, was, is_now)


def base_model_name(model: str) -> str:
    """The base model's name in the adapter's configuration: a hub name unchanged, a folder by its full path."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.exists() else model
