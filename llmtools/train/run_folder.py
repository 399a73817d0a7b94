"""The folder that a run works in, ``OUT.training``: checkpoints, ``metrics.jsonl``, ``run.json``.

A run that was stopped is continued there by ``--resume``, with what it began with: ``run.json`` holds hashes of the
rows, the model and the tokenizer.
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
from ..ranks import is_first, processes
from ..signals import Stopped
from .options import Finetune

log = logging.getLogger(__name__)


@contextmanager
def working(
    recipe: Finetune, out: Path, work: Path, run: dict[str, Any] | None = None, base: dict[str, Any] | None = None
) -> Iterator[Path | None]:
    """Makes the folder to work in ready, and gives the checkpoint to go on from, if any.

    run: what its ``run.json`` is to say; gets the ``id`` of the run that goes on.
    base: the fingerprint of the base model, to compare with that of the run that goes on.
    A run that ends early leaves its folder if there is a checkpoint in it, and nothing otherwise. Of several processes
    the first makes and clears folders, and the others wait for it.
    """
    from ..checkpoint.run_info import record
    from .checkpoints import all_in

    run = record("finetune", recipe) if run is None else run
    checkpoint = _begin(recipe, out, work, run, base) if is_first() else None
    together()
    if recipe.resume and not is_first():
        checkpoint = next(iter(all_in(work / "checkpoints")), None)  # what is damaged, the first has put aside
    try:
        yield checkpoint
    except BaseException as error:
        if not is_first():
            raise
        last = next(iter(all_in(work / "checkpoints")), None)
        if last is None:
            done(work, out)
        elif isinstance(error, KeyboardInterrupt):
            raise Stopped(f"stopped; --resume goes on from {last}", getattr(error, "exit_code", 130)) from error
        raise


def done(work: Path, out: Path) -> None:
    """Takes the work folder away, unless somebody has put something of theirs into it."""
    from ..files import remove, unknown_files

    if (others := unknown_files(work)) == []:
        remove(work, of=out)
    else:
        log.warning("%s stays, because it holds something that is not of this run: %s", work, (others or ["?"])[0])


def together() -> None:
    """Waits until each process of the run has come here."""
    if processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _begin(recipe: Finetune, out: Path, work: Path, run: dict[str, Any], base: dict[str, Any] | None) -> Path | None:
    from ..checkpoint.run_info import as_json
    from ..files import remove, unknown_files, write_whole
    from .checkpoints import all_in

    others = unknown_files(work) if work.exists() else []
    if others or others is None:
        what = "is no folder of such a run" if others is None else f"holds {others[0]}, which llmtools did not write"
        raise InputError(f"this run would work in {work}, which {what}; move that away, or choose another --out")
    if recipe.resume:
        checkpoint = _going_on(recipe, out, work, run, base)
        run["id"] = _run(work).get("id")
        write_whole(work / RUN, as_json(run))
        return checkpoint
    if all_in(work / "checkpoints") and not recipe.overwrite:
        raise InputError(f"{work} holds a run that was stopped; --resume goes on with it, --overwrite begins anew")
    remove(work, of=out)
    run["id"] = secrets.token_hex(8)
    _appear(work, out, {RUN: as_json(run)})
    return None


def _going_on(recipe: Finetune, out: Path, work: Path, run: dict[str, Any], base: dict[str, Any] | None) -> Path:
    """The checkpoint to go on from, in `work`; what a finished run kept is brought there."""
    from .checkpoints import SEAL, last_whole, put_aside, seal, steps_of

    former = _run(work) or _run(out)
    allowed = recipe.overwrite or bool((former.get("recipe") or {}).get("overwrite"))  # now, or when it began
    run["recipe"]["overwrite"] = allowed
    if out.exists() and any(out.iterdir()) and _run(out).get("id") != former.get("id") and not allowed:
        raise InputError(
            f"--resume: {out} is of another run than the one in {work}; pass --overwrite, too, to replace it at the end"
        )
    checkpoint, complaints = last_whole(work / "checkpoints")
    kept = None
    if checkpoint is None and _run(out).get("id") == former.get("id"):
        kept, more = last_whole(out / "checkpoints")
        complaints += more
    if checkpoint is None and kept is None:
        where = f"in {work} or {out / 'checkpoints'}"
        if complaints:
            raise InputError(f"--resume: no checkpoint {where} is whole: {complaints[0]}; begin anew with --overwrite")
        raise InputError(f"--resume: there is no checkpoint {where}; start without --resume")
    _check_base(recipe, checkpoint or kept, base)
    _check_same(recipe, former, run)
    for complaint in complaints:
        log.warning("%s; going on from %s", complaint, checkpoint or kept)
    if kept is not None:
        checkpoint = _brought(kept, out, work)
    assert checkpoint is not None
    if not (checkpoint / SEAL).exists():  # the run was killed a moment too early for it
        seal(checkpoint)
    put_aside(work / "checkpoints", steps_of(checkpoint))
    log.info("going on from %s", checkpoint)
    return checkpoint


def _brought(kept: Path, out: Path, work: Path) -> Path:
    """The checkpoint in the work folder, with what else a finished run kept, beside whatever is damaged there."""
    from ..checkpoint.run_info import as_json
    from .checkpoints import put_aside

    if not work.exists():
        _appear(work, out, {RUN: as_json(_run(out)), "metrics.jsonl": out / "metrics.jsonl"})
    put_aside(work / "checkpoints", -1)
    shutil.copytree(kept.parent, work / "checkpoints", dirs_exist_ok=True)
    return work / "checkpoints" / kept.name


def _appear(work: Path, out: Path, files: dict[str, Path | str]) -> None:
    """Makes the work folder, never without what says whose it is. files: a text, or a file to copy, by its name."""
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
    """What the run's folder, or its finished output, says of it; {} where it says nothing, or is damaged."""
    return {**json_or_empty(folder / RUN), **json_or_empty(folder / METADATA)}


def _check_base(recipe: Finetune, checkpoint: Path | None, base: dict[str, Any] | None) -> None:
    """Raises InputError where the base model is another one than that of the checkpoint, unless that is allowed."""
    from ..model.fingerprint import compare, read_fingerprint

    former = None if checkpoint is None else read_fingerprint(checkpoint)
    difference = None if former is None or base is None else compare(former, base)
    if difference is None:
        return
    if not recipe.allow_other_base:
        raise InputError(
            f"--resume: the model's weights changed since this run began: it {difference}; go on with the same, pass "
            "--allow_other_base, or begin anew with --overwrite"
        )
    log.warning("the run that goes on %s", difference)


ROWS = ("training data", "validation data")
"""names of the hashes of rows in ``inputs`` of run.json; the others are of the model"""


MODEL = ("model's configuration", "model's weights", "model's revision on the hub", "tokenizer")


TENSORS = "model's tensors"
"""the name of the hash that is the same for other shards of the same weights"""


def _check_same(recipe: Finetune, former: dict[str, Any], run: dict[str, Any]) -> None:
    """A run goes on with the model, data and adapter it began with; only the training arguments may change."""
    from ..checkpoint.run_info import as_json

    before, inputs, here = former.get("recipe"), former.get("inputs") or {}, run.get("inputs") or {}
    if not isinstance(before, dict):
        log.warning("run.json cannot be read; whether the recipe is still the same is not known")
        return
    way_out = "go on with the same, or begin anew with --overwrite"
    now = json.loads(as_json(asdict(recipe)))  # without secrets, as what was written
    ignored = {TENSORS}  # runs of earlier versions have none
    if recipe.allow_other_base:
        ignored |= {*MODEL}
    elif inputs.get(TENSORS) is not None and inputs[TENSORS] == here.get(TENSORS):
        ignored |= {"model's weights"}
    changed = [key for key in {**inputs, **here} if inputs.get(key) != here.get(key) and key not in ignored]
    moved = {  # the same from another place is the same
        "data": not {*ROWS} & {*changed},
        "validation": not {*ROWS} & {*changed},
        "model": not {*changed} - {*ROWS},
    }
    moved |= {key: True for key in ("model", "load") if recipe.allow_other_base}
    for key in ("model", "load", "data", "validation", "limit", "lora", "task", "options", "seed"):
        if before.get(key) != now[key] and not moved.get(key):
            raise InputError(f"--resume: {key} was {before.get(key)!r} and is {now[key]!r}; {way_out}")
    if not inputs:
        log.warning("run.json has no hashes of the data and the model; whether they are still the same is not known")
    elif changed:
        raise InputError(f"--resume: the {changed[0]} changed since this run began; {way_out}")
    former_arguments, arguments = before.get("training") or {}, now["training"]
    for key in dict.fromkeys([*former_arguments, *arguments]):
        was, is_now = former_arguments.get(key), arguments.get(key)
        if was != is_now and "token" not in key:  # of the hub, which is nobody's to read
            log.warning("training.%s was %r and is %r", key, was, is_now)


def lasting_name(model: str) -> str:
    """What the adapter calls its base: a hub name as it is, a folder by its full path."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.exists() else model
