"""Opens damaged folders, each in a fork of a process that has imported everything, and says how it ended.

refused     an error of ours, in one line
equal       opened, with the numbers of the undamaged folder
told        opened with other numbers, and a line of the log said that the files were changed
changed     opened with other numbers, in silence
traceback   an exception that is not ours
hang        not done in time        signal      the process was killed by one
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from tests.fuzz.mutations import mutate

SECONDS = 30.0
"""Time for one folder, after which it counts as a hang; opening an undamaged one takes about a tenth of a second."""


class Outcome(NamedTuple):
    seed: str
    number: int
    damage: str
    data_only: bool
    kind: str
    message: str


class Seed(NamedTuple):
    """An undamaged folder, how it is opened, and whether it carries checksums."""

    folder: Path
    open: Callable[[Path], str]
    checksums: bool


def model_digest(folder: Path) -> str:
    """What a user gets of a model's folder: logits, tokens, the text of a chat, greedy tokens."""
    import llmtools
    from tests.models import tiny_ids

    model, tokenizer = llmtools.load(folder)
    ids = tiny_ids(1, 12)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        written = model.generate(ids, max_new_tokens=3, do_sample=False)
    words = tokenizer("w7 w9 <s> w3").input_ids, tokenizer.decode([7, 9, 4])
    return _digest(logits.float().numpy().tobytes(), repr((words, written.tolist())).encode())


def adapter_digest(base: Path) -> Callable[[Path], str]:
    """The same of an adapter's folder on `base`, with the prompt template and the card that go with it."""

    def digest(folder: Path) -> str:
        import llmtools
        from llmtools.checkpoint.loading import options_of, prompt_format_of
        from llmtools.checkpoint.model_card import card
        from llmtools.model.adapter_files import open_adapter
        from tests.models import tiny_ids

        words, options = prompt_format_of(str(folder)), options_of(str(folder), "text")
        card(folder, name="a")
        model = open_adapter(llmtools.load(base)[0], folder)
        with torch.no_grad():
            logits = model(input_ids=tiny_ids(1, 12)).logits
        return _digest(logits.float().numpy().tobytes(), json.dumps([words, options]).encode())

    return digest


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def run(seed: Seed, name: str, numbers: range) -> list[Outcome]:
    """The outcomes of these mutations of one folder; the same for the same numbers."""
    torch.set_num_threads(1)
    expected = seed.open(seed.folder)
    outcomes = []
    with tempfile.TemporaryDirectory() as place:
        for number in numbers:
            folder = Path(place) / name
            shutil.copytree(seed.folder, folder)
            damage, data_only = mutate(folder, Random(f"{name} {number}"))
            kind, message = _in_a_fork(lambda: seed.open(folder), expected, Path(place) / "outcome")  # noqa: B023
            outcomes.append(Outcome(name, number, damage, data_only, kind, message))
            shutil.rmtree(folder)
    return outcomes


def _in_a_fork(work: Callable[[], str], expected: str, report: Path) -> tuple[str, str]:
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os._exit(_child(work, expected, report))
    until = time.monotonic() + SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hang", f"more than {SECONDS:g} s"
        time.sleep(0.005)
    if os.WIFSIGNALED(status):
        return "signal", signal.Signals(os.WTERMSIG(status)).name
    kind, message = json.loads(report.read_text())
    return kind, message


def _child(work: Callable[[], str], expected: str, report: Path) -> int:
    from llmtools.errors import InputError

    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                lines.append(record.getMessage())

    logging.getLogger("llmtools").addHandler(Lines())
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    result: tuple[str, str]
    try:
        found = work()
        told = " | ".join(lines)
        result = ("equal", told) if found == expected else ("told" if lines else "changed", told)
    except InputError as error:
        result = ("refused", str(error)) if "\n" not in str(error) else ("traceback", f"two lines: {error}")
    except BaseException:
        result = ("traceback", traceback.format_exc())
    report.write_text(json.dumps(result))
    return 0


def summary(outcomes: list[Outcome]) -> dict[str, int]:
    """How many folders ended in which way; silent changes of tensor data apart from those of anything else."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        kind = f"{outcome.kind} (tensor data)" if outcome.kind == "changed" and outcome.data_only else outcome.kind
        counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items()))


def as_json(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    return [outcome._asdict() for outcome in outcomes]
