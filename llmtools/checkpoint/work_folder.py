"""The folder beside an output in which a long run keeps what is done, so that ``--resume`` goes on from there.

The settings of the run, with hashes of its inputs, are in it: another run is refused by content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import NameTaken, disk_error, json_or_empty, partial_of, remove, write_whole
from ..signals import Stopped
from .inputs import differences
from .run_info import as_json

SETTINGS = "settings.json"


@contextmanager
def work_folder(
    out: Path,
    suffix: str,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    kept: Callable[[Path], str | None],
) -> Iterator[Path]:
    """OUT.suffix; it is kept where the run ends early and something is done, and removed otherwise.

    settings, resume, overwrite: as in `begun`. kept: what is done in the folder, as the end of "--resume continues from
    …"; None for nothing.

    Raises InputError as `begun`; also where the disk is full, with what is kept.
    """
    out = out.expanduser().resolve()
    work = begun(out, suffix, settings, resume=resume, overwrite=overwrite)
    try:
        yield work
    except NameTaken:  # the run is complete, under another name
        remove(work, of=out)
        raise
    except BaseException as error:
        done = kept(work)
        if done is None:
            remove(work, of=out)
            raise
        if isinstance(error, KeyboardInterrupt):
            text = f"stopped; --resume continues from {done}"
            raise Stopped(text, getattr(error, "exit_code", 130)) from error
        causes = (error, error.__cause__)
        if reason := next((found for each in causes if each is not None and (found := disk_error(each))), None):
            raise InputError(
                f"{out}: cannot be written ({reason}); --resume continues from {done}, which {work} keeps"
            ) from error
        raise
    remove(work, of=out)


def begun(out: Path, suffix: str, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Path:
    """OUT.suffix, new, or that of the run to be resumed.

    settings: what must be the same for a run to be resumed. Raises InputError for a folder that is left of another run,
    or is none of ours, and where there is nothing to resume.
    """
    out = out.expanduser().resolve()
    work = out.with_name(f"{out.name}.{suffix}")
    now = json.loads(as_json(dict(settings)))
    if work.exists() and not (work / SETTINGS).exists():
        raise InputError(f"this run would use {work}, which is no folder of llmtools; move it away, or choose another "
                         "--out")  # fmt: skip
    if resume:
        if not work.exists():
            raise InputError(f"--resume: there is no stopped run in {work}; start without --resume")
        if changed := differences(json_or_empty(work / SETTINGS), now):
            raise InputError(f"--resume: {'; '.join(changed)}; resume with the same, or start anew with --overwrite")
    elif work.exists() and not overwrite:
        raise InputError(f"{work} holds a run that was stopped; --resume continues it, --overwrite starts anew")
    else:
        remove(work, of=out)
        fresh = partial_of(out)
        fresh.mkdir(parents=True)
        write_whole(fresh / SETTINGS, json.dumps(now, indent=2) + "\n")
        fresh.rename(work)
    return work
