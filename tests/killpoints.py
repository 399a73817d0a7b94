"""Kills a run at every point where it makes, renames or deletes a name on the disk, and looks at what comes of it.

    python -m tests.killpoints                      # every point of every scenario, some minutes
    python -m tests.killpoints --every 5 finetune   # one point in five of one scenario

A run is a forked child with an audit hook (PEP 578) that sends SIGKILL at the n-th such event, so a point is the same
point each time, and imports are paid for once. After a kill the output has to be absent or whole, the new one or the
former one. Then the same command is given again, with the flag that its message asks for, if it asks for one; it has
to end with the bytes of an unbroken run, and with nothing else left beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MODEL = Path(__file__).resolve().parent.parent / "demo" / "assets" / "stories260K"
NAMES = {"os.mkdir", "os.rename", "os.rmdir", "os.remove"}
TIMED = {"run.json", "llmtools.json", "README.md", "metrics.jsonl", "trainer_state.json", "files.json"}
"""files that say when something happened, or how long it took, or hashes of such; and a model card, which is prose"""


@dataclass(frozen=True)
class Scenario:
    """A command that writes ``out`` in an empty folder."""

    name: str
    run: Callable[[Path, dict[str, Any]], None]
    """(folder, flags): gives the command"""
    before: Callable[[Path], None] = field(default=lambda folder: None)
    """what lies in the folder before"""
    flags: dict[str, Any] = field(default_factory=dict)


class Ended(NamedTuple):
    """How a child ended."""

    killed: bool
    said: str | None
    """what the user would read; None: it went well"""
    events: int


class Outcome(NamedTuple):
    """What came of one kill."""

    point: int
    what: str
    """in what way the work was brought to its end"""
    wrong: list[str]


# ------------------------------------------------------------------------------------------------------- the scenarios


def quantize(folder: Path, flags: dict[str, Any], bits: int = 4) -> None:
    from llmtools.recipes.quantize import Quantize
    from llmtools.recipes.quantize import quantize as run

    run(Quantize(model=str(MODEL), out=str(folder / "out"), quantizer="rtn", bits=bits, **flags))


def finetune(folder: Path, flags: dict[str, Any], model: Path = MODEL, out: str = "out", seed: int = 0) -> None:
    from llmtools.recipes.finetune import Finetune, Lora
    from llmtools.recipes.finetune import finetune as run

    data = folder / "data.jsonl"
    if not data.exists():
        rows = ({"prompt": f"Tom had {n} cats.", "completion": f" He gave {n} balls to them."} for n in range(6))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2, "max_length": 48}
    training |= {"logging_steps": 1, "learning_rate": 1e-3}
    here = {"data": str(data), "out": str(folder / out), "seed": seed, "training": training}
    run(Finetune(model=str(model), lora=Lora(r=2), **here, **flags))


def export(folder: Path, flags: dict[str, Any], form: str = "gptq_v2") -> None:
    from llmtools.recipes.export import Export
    from llmtools.recipes.export import export as run

    source = {"adapter": str(folder / "adapter")} if form == "lora" else {"model": str(folder / "model")}
    run(Export(format=form, out=str(folder / "out"), **source, **flags))


def _packed(folder: Path) -> None:
    from llmtools.recipes.quantize import Quantize
    from llmtools.recipes.quantize import quantize as run

    run(Quantize(model=str(MODEL), out=str(folder / "model"), quantizer="rtn", bits=4, group_size=-1))


def _packed_and_exported(folder: Path) -> None:
    _packed(folder)
    export(folder, {}, "compressed-tensors" if _has("compressed_tensors") else "dense")


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _without_exchange(run: Callable[[Path, dict[str, Any]], None]) -> Callable[[Path, dict[str, Any]], None]:
    """The same on a system that cannot exchange two names in one step."""

    def plain(folder: Path, flags: dict[str, Any]) -> None:
        from llmtools import files

        if hasattr(files, "_swapped"):
            files._swapped = lambda one, other: False
        run(folder, flags)

    return plain


OVERWRITE = {"overwrite": True}
SCENARIOS = [
    Scenario("quantize", quantize),
    Scenario("quantize-overwrite", quantize, lambda folder: quantize(folder, {}, bits=2), OVERWRITE),
    Scenario(
        "quantize-overwrite-plain",
        _without_exchange(quantize),
        lambda folder: quantize(folder, {}, bits=2),
        OVERWRITE,
    ),
    Scenario("finetune", finetune),
    Scenario("finetune-overwrite", finetune, lambda folder: finetune(folder, {}, seed=1), OVERWRITE),
    Scenario("export", export, _packed),
    Scenario("export-overwrite", export, _packed_and_exported, OVERWRITE),
    Scenario(
        "export-lora",
        lambda folder, flags: export(folder, flags, "lora"),
        lambda folder: finetune(folder, {}, out="adapter"),
    ),
]


# -------------------------------------------------------------------------------------------------------- the killing


def warm_up() -> None:
    """Imports what children use, and has this process compute with one thread, so that forking it is safe."""
    import torch

    torch.set_num_threads(1)
    import datasets  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import trl  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    import llmtools.formats.writing
    import llmtools.recipes.export
    import llmtools.recipes.finetune
    import llmtools.recipes.quantize  # noqa: F401


def forked(action: Callable[[], None], place: Path, kill_at: int | None = None) -> Ended:
    """Runs `action` in a child, which is killed at its `kill_at`-th event in the folder `place`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(action, str(place), kill_at, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        output = stream.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Ended(True, f"killed by signal {os.WTERMSIG(status)}", kill_at or 0)
    said, events = json.loads(output)
    return Ended(False, said, events)


def _in_child(action: Callable[[], None], place: str, kill_at: int | None, writing: int) -> None:
    """Never returns."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    events = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal events
        if event in NAMES or (event == "open" and _for_writing(args) and str(args[0]).startswith(place)):
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    said: str | None = None
    try:
        action()
    except BaseException as error:
        ours = type(error).__name__ in ("InputError", "NameTaken", "CheckpointError")
        said = str(error) if ours else f"TRACEBACK {''.join(traceback.format_exception(error))}"
    os.write(writing, json.dumps([said, events]).encode())
    os._exit(0)


def _for_writing(args: tuple[Any, ...]) -> bool:
    path, mode, flags = args
    if isinstance(path, int):
        return False
    return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


# ------------------------------------------------------------------------------------------------------- the outcomes


def contents(folder: Path) -> dict[str, str] | None:
    """The hash of each file whose bytes are to be the same every time, and the names of the others; None: no folder."""
    if not folder.exists():
        return None
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(folder)): "" if file.name in TIMED else hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.suffix not in (".pt", ".pth")
    } | {str(file.relative_to(folder)): "" for file in files if file.suffix in (".pt", ".pth")}


def losses(folder: Path) -> list[tuple[int, float]]:
    """What a finetuning wrote down of its steps."""
    file = folder / "metrics.jsonl"
    records = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


class Unbroken(NamedTuple):
    """A run that nothing disturbs, to compare with."""

    start: Path
    """the folder as it is before the command"""
    former: dict[str, str] | None
    new: dict[str, str] | None
    losses: list[tuple[int, float]]
    names: list[str]
    """what lies in the folder at the end"""
    events: int


def unbroken(scenario: Scenario, place: Path) -> Unbroken:
    start, done = place / "start", place / "work"
    start.mkdir(parents=True)
    ended = forked(lambda: scenario.before(start), start)
    assert ended.said is None, ended.said
    _moved(start, done)
    former = contents(done / "out")
    ended = forked(lambda: scenario.run(done, dict(scenario.flags)), done)
    assert ended.said is None, ended.said
    names = sorted(path.name for path in done.iterdir())
    return Unbroken(start, former, contents(done / "out"), losses(done / "out"), names, ended.events)


def killed(scenario: Scenario, whole: Unbroken, place: Path, point: int) -> Outcome:
    """Kills the command at a point, gives it again, and says what is not as it should be."""
    work = place / "work"  # the same path as in the unbroken run: some files name it
    shutil.rmtree(work, ignore_errors=True)
    _moved(whole.start, work)
    flags = dict(scenario.flags)
    ended = forked(lambda: scenario.run(work, flags), work, point)
    if not ended.killed:
        return Outcome(point, "not killed", [f"only {ended.events} events, {ended.said}"])
    wrong = []
    out = contents(work / "out")
    if out not in (None, whole.former, whole.new):
        wrong.append("half an output under its name")
    if out is None and whole.former is not None and "plain" not in scenario.name:
        wrong.append("neither the former nor the new output is there")
    what = "the same command"
    for _ in range(3):
        ended = forked(lambda: scenario.run(work, flags), work)
        flag = next((each for each in ("resume", "overwrite") if f"--{each}" in (ended.said or "")), None)
        if ended.said is None or "TRACEBACK" in ended.said or flag is None or flag in flags:
            break
        flags[flag], what = True, f"with --{flag}"
    if ended.said is not None:
        return Outcome(point, "not brought to an end", [*wrong, ended.said])
    if contents(work / "out") != whole.new:
        wrong.append(f"other bytes: {_difference(contents(work / 'out'), whole.new)}")
    if losses(work / "out") != whole.losses:
        wrong.append("other losses in metrics.jsonl")
    if (names := sorted(path.name for path in work.iterdir())) != whole.names:
        wrong.append(f"left beside it: {', '.join(sorted({*names} ^ {*whole.names}))}")
    return Outcome(point, what, wrong)


def _moved(start: Path, work: Path) -> None:
    """A copy of `start`, whose files name `start`, at the place that they are used at."""
    shutil.copytree(start, work)
    for file in work.rglob("*.json"):
        text = file.read_text()
        if str(start) in text:
            file.write_text(text.replace(str(start), str(work)))


def _difference(found: dict[str, str] | None, wanted: dict[str, str] | None) -> str:
    found, wanted = found or {}, wanted or {}
    return ", ".join(sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)))


def outcomes(scenario: Scenario, place: Path, points: Callable[[int], list[int]]) -> Iterator[Outcome]:
    """What comes of kills at points that are chosen by the number of events."""
    whole = unbroken(scenario, place)
    for point in points(whole.events):
        yield killed(scenario, whole, place, point)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", metavar="SCENARIO", help=", ".join(each.name for each in SCENARIOS))
    parser.add_argument("--every", type=int, default=1, help="one point in so many")
    parser.add_argument("--points", type=int, help="so many points of each scenario, spread over all")
    asked = parser.parse_args()

    def points(events: int) -> list[int]:
        if asked.points is None:
            return list(range(1, events + 1, asked.every))
        return sorted({1 + index * (events - 1) // max(asked.points - 1, 1) for index in range(asked.points)})

    warm_up()
    bad = 0
    for scenario in SCENARIOS:
        if asked.only and scenario.name not in asked.only:
            continue
        counts: Counter[str] = Counter()
        wrong: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as place:
            for outcome in outcomes(scenario, Path(place), points):
                counts[outcome.what] += 1
                wrong.update(outcome.wrong)
                bad += bool(outcome.wrong)
                for each in outcome.wrong:
                    print(f"  {scenario.name}, point {outcome.point}: {each[:400]}", file=sys.stderr)
        output = ", ".join(f"{count} {what}" for what, count in counts.items())
        print(f"{scenario.name}: {counts.total()} points: {output}; wrong: {sum(wrong.values())}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
