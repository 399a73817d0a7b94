"""Times the cases of the registry: ours, the baselines interleaved with it, and the limit that the machine sets.

    python -m benchmarks.run                    the cases that there are
    python -m benchmarks.run decode multiply --json         one line of JSON a measurement
    python -m benchmarks.run layers --only 128  the problems whose label contains "128"

Each problem is checked for correctness before it is timed. Candidates take turns, round after round, so that whatever
else the machine does strikes all of them; seconds of the processor stand beside seconds on the wall, since machines are
shared. A limit is what the hardware would need at least: bytes over the bandwidth of a copy, operations over the speed
of a matrix product, both measured here at the start.

A case is a function that yields problems, registered by name:

    @case("ops")
    def ops(machine: Machine) -> Iterator[Problem]: ...
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MODULES = ("ops", "layers", "level")
"""Files beside this one that register cases; adding a case is adding a file and its name here."""


Wanted = Callable[[str], bool]
"""Whether a candidate of that name is to be measured."""


@dataclass(frozen=True)
class Problem:
    """One thing to time."""

    label: str
    check: Callable[[], None]
    """raises where ours is wrong; runs before the clock"""
    ours: dict[str, Callable[[], Any]]
    baselines: dict[str, Callable[[], Any]]
    """the first is what ratios are against"""
    limit_seconds: float = 0.0
    """what the machine needs at least; 0: not known"""
    limit: str = ""
    """why"""
    make: Callable[[Wanted], tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]] | None = None
    """(ours, baselines) of those wanted, where they take up so much that they are made when it is their turn"""
    about: Callable[[str], dict[str, Any]] | None = None
    """what else can be measured of a candidate, at length: columns of its record, with `--more`"""


@dataclass
class Machine:
    """What this machine can do at best, with the threads that torch uses."""

    threads: int = field(default_factory=torch.get_num_threads)

    @functools.cached_property
    def copy_bandwidth(self) -> float:
        """Bytes a second that a copy of 256 MB reads and writes."""
        source = torch.ones(2**26, dtype=torch.float32)
        target = torch.empty_like(source)
        return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(9))

    @functools.cached_property
    def fill_bandwidth(self) -> float:
        """Bytes a second that filling 2 MB writes, which stay in the processor's cache."""
        target = torch.empty(2**19, dtype=torch.float32)
        return target.nbytes / min(_seconds(lambda: target.fill_(1.0)) for _ in range(99))

    @functools.cache  # noqa: B019  one machine lives as long as the program
    def matmul_speed(self, dtype: torch.dtype) -> float:
        """Operations a second of a product of 1024 × 2048 × 2048; of a small one in a type without instructions."""
        a, b = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        small = 2 * 64 * 512 * 512 / min(_seconds(lambda: a[:64, :512] @ b[:512, :512]) for _ in range(3))
        if small < 5e9 * self.threads:
            return small
        return 2 * 1024 * 2048 * 2048 / min(_seconds(lambda: a @ b) for _ in range(7))

    @property
    def best_matmul_speed(self) -> float:
        """In float32 or bfloat16, whichever is faster."""
        return max(self.matmul_speed(dtype) for dtype in (torch.float32, torch.bfloat16))

    __hash__ = object.__hash__


Case = Callable[[Machine], Iterator[Problem]]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    """Registers a case."""

    def register(function: Case) -> Case:
        CASES[name] = function
        return function

    return register


def measure(
    problem: Problem, rounds: int, wanted: Wanted = lambda name: True, more: bool = False
) -> list[dict[str, Any]]:
    """One record for each candidate: wall and processor seconds, best and median, and ratios."""
    problem.check()
    if problem.make is not None:
        ours, baselines = problem.make(wanted)
        problem = dataclasses.replace(problem, ours=ours, baselines=baselines)
    else:
        ours, baselines = (
            {name: function for name, function in found.items() if wanted(name)}
            for found in (problem.ours, problem.baselines)
        )
        problem = dataclasses.replace(problem, ours=ours, baselines=baselines)
    candidates = problem.ours | problem.baselines
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    processor: dict[str, list[float]] = {name: [] for name in candidates}
    for round in range(rounds + 1):
        for name, function in candidates.items():
            start, start_processor = time.perf_counter(), time.process_time()
            function()
            if round:  # the first warms up
                wall[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - start_processor)
    base, threads = next(iter(problem.baselines), None), torch.get_num_threads()

    def fastest(name: str) -> float:
        return min(min(wall[name]), min(processor[name]) / threads or float("inf"))

    return [
        {
            "problem": problem.label,
            "candidate": name,
            "ours": name in problem.ours,
            "best_seconds": min(wall[name]),
            "median_seconds": statistics.median(wall[name]),
            "best_cpu_seconds": min(processor[name]),
            "median_cpu_seconds": statistics.median(processor[name]),
            "cpu_ratio": statistics.median(processor[name]) / statistics.median(processor[base]) if base else None,
            "ratio_to": base,
            "of_limit": problem.limit_seconds / fastest(name) if problem.limit_seconds else None,
            "limit": problem.limit,
            "rounds": rounds,
            **(problem.about(name) if more and problem.about else {}),
        }
        for name in candidates
    ]


def about(machine: Machine) -> dict[str, Any]:
    """Where and with what it was measured."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "machine": names[0].partition(":")[2].strip() if names else platform.processor(),
        "threads": machine.threads,
        "copy_gb_per_second": round(machine.copy_bandwidth / 1e9, 1),
        "matmul_gflop_per_second": {
            str(dtype).removeprefix("torch."): round(machine.matmul_speed(dtype) / 1e9)
            for dtype in (torch.float32, torch.bfloat16)
        },
        **_versions(),
        "python": platform.python_version(),
        "commit": git.stdout.strip() or None,
    }


def _versions() -> dict[str, str]:
    """Of torch, and of what is compared, where it is installed."""
    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel", "hqq"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main(argv: list[str] | None = None) -> int:
    for module in MODULES:
        importlib.import_module(f"benchmarks.{module}")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose label contains this")
    parser.add_argument("--candidates", default="", metavar="A,B", help="only these, by name")
    parser.add_argument("--more", action="store_true", help="peaks of memory, too, where a case has them")
    parser.add_argument("--rounds", type=int, default=9, help="how often each candidate is timed")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch")
    parser.add_argument("--json", action="store_true", help="one JSON line a measurement instead of tables")
    parser.add_argument(
        "--append", type=Path, default=None, metavar="FILE", help="append the JSON lines to a file, too"
    )
    args = parser.parse_args(argv)
    unknown = sorted(set(args.cases) - set(CASES))
    if unknown or not args.cases:
        print(*(f"no case {name!r}" for name in unknown), f"cases: {', '.join(CASES)}", sep="\n")
        return 1 if unknown else 0
    if args.threads:
        torch.set_num_threads(args.threads)
    names = set(filter(None, args.candidates.split(",")))
    machine = Machine()
    where = about(machine)
    if not args.json:
        print(*(f"{key}: {value}" for key, value in where.items()), sep="\n")
    for name in args.cases:
        for problem in CASES[name](machine):
            if args.only in problem.label:
                _report(
                    measure(problem, args.rounds, lambda name: not names or name in names, args.more),
                    name,
                    where,
                    args.json,
                    args.append,
                )
    return 0


def _report(records: list[dict[str, Any]], name: str, where: dict[str, Any], as_json: bool, file: Path | None) -> None:
    lines = [json.dumps({"case": name, **record, **where}) for record in records]
    if file:
        with file.open("a") as out:
            out.writelines(f"{line}\n" for line in lines)
    if as_json:
        print(*lines, sep="\n", flush=True)
        return
    limit = records[0]["limit"]
    print(f"\n{name}: {records[0]['problem']}{f'   (limit: {limit})' if limit else ''}")
    print(f"  {'ms':<26}{'best':>9}{'median':>9}{'cpu best':>10}{'cpu med':>9}{'cpu ratio':>11}{'of limit':>10}")
    for record in records:
        times = [record[f"{kind}_seconds"] * 1e3 for kind in ("best", "median", "best_cpu", "median_cpu")]
        ratio = f"{record['cpu_ratio']:.2f}" if record["cpu_ratio"] is not None else ""
        of_limit = f"{record['of_limit']:.0%}" if record["of_limit"] is not None else ""
        title = f"{'' if record['ours'] else '  '}{record['candidate']}"
        more = "".join(
            f"  {key.removesuffix('_bytes').replace('_', ' ')} {record[key] / 1e9:.2f} GB"
            for key in ("weight_bytes", "peak_bytes", "peak_growth_bytes")
            if key in record
        )
        print(
            f"  {title:<26}{times[0]:9.3f}{times[1]:9.3f}{times[2]:10.3f}{times[3]:9.3f}{ratio:>11}{of_limit:>10}"
            + more,
            flush=True,
        )


def _seconds(function: Callable[[], Any]) -> float:
    """On the wall, or of the processor for each thread, whichever is less: other programs may be running."""
    start, start_processor = time.perf_counter(), time.process_time()
    function()
    wall, processor = time.perf_counter() - start, time.process_time() - start_processor
    return min(wall, processor / torch.get_num_threads()) if processor else wall


if __name__ == "__main__":
    # Run as a module, this file is `__main__`, and the cases register with the `benchmarks.run` that they import.
    sys.exit(importlib.import_module("benchmarks.run").main())
