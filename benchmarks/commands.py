"""Seconds of the processor that whole commands take, from the first import to the last file, beside another checkout's.

    python -m benchmarks.commands start --rounds 3                               what is spent before the work
    python -m benchmarks.commands quantize --model DIR --against ../llmtools-before --append FILE

Each command is a process of its own; the checkouts take turns. `start` is of commands whose work is nothing: on the
model that ships with the demo. `quantize` takes `--model`, with 32 × 256 tokens of calibration text.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .run import Machine, about

HERE = Path(__file__).resolve().parent.parent
STORIES = HERE / "demo" / "assets" / "stories260K"
TEXT = HERE / "demo" / "assets" / "wikitext2" / "train.txt"
CALIBRATION = ["--calibration", str(TEXT), "--num_samples", "32", "--max_length", "256"]


def commands(section: str, model: str) -> dict[str, list[str]]:
    """The commands of a section by name; OUT and DATA stand for a new folder, and a file of eight examples."""
    if section == "start":
        small = ["--model", str(STORIES)]
        return {
            "quantize": ["quantize", *small, "--quantizer", "rtn", "--bits", "4", "--out", "OUT"],
            "generate": ["generate", *small, "--prompt", "Once", "--max_new_tokens", "1"],
            "finetune": ["finetune", *small, "--data", "DATA", "--training.max_steps", "1", "--out", "OUT"],
        }
    kinds = {"rtn 4 bits": ["rtn", "4"], "optq 4 bits": ["optq", "4"], "quip_sharp 2 bits": ["quip_sharp", "2"]}
    return {
        name: ["quantize", "--model", model, "--quantizer", kind, "--bits", bits, "--out", "OUT"]
        + (CALIBRATION if kind != "rtn" else [])
        for name, (kind, bits) in kinds.items()
    }


def seconds(command: list[str], checkout: Path) -> tuple[float, float]:
    """(seconds of the processor, on the wall) of a command as that checkout has it. Raises where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"OUT": f"{folder}/out", "DATA": f"{folder}/data.jsonl"}
        Path(places["DATA"]).write_text('{"text": "Once upon a time there was a cat."}\n' * 8)
        args = [places.get(arg, arg) for arg in command]
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "llmtools", *args], cwd=folder, env=environment, capture_output=True, text=True
        )
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(f"{' '.join(args)}: {done.stderr.strip().splitlines()[-1]}")
        shutil.rmtree(f"{folder}/out", ignore_errors=True)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def commit(checkout: Path) -> str | None:
    """The commit of a checkout; None where it is none of git's."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=checkout)
    return git.stdout.strip() or None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.commands", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("section", choices=("start", "quantize"))
    parser.add_argument("--model", default=str(STORIES), help="model to quantize")
    parser.add_argument("--only", default="", help="commands whose name contains this")
    parser.add_argument("--against", type=Path, default=None, metavar="DIR", help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--append", type=Path, default=None, metavar="FILE", help="append JSON lines to a file, too")
    args = parser.parse_args(argv)
    checkouts = {"now": HERE} | ({"before": args.against.resolve()} if args.against else {})
    where = about(Machine())
    for name, command in commands(args.section, args.model).items():
        if args.only not in name:
            continue
        taken: dict[str, list[tuple[float, float]]] = {key: [] for key in checkouts}
        for _ in range(args.rounds):
            for key, checkout in checkouts.items():
                taken[key].append(seconds(command, checkout))
        for key, pairs in taken.items():
            row: dict[str, Any] = {"case": f"commands, {args.section}", "problem": name, "candidate": key}
            row["commit"] = commit(checkouts[key])
            row["median_cpu_seconds"] = statistics.median(cpu for cpu, _ in pairs)
            row["median_seconds"] = statistics.median(wall for _, wall in pairs)
            row |= {
                "rounds": args.rounds,
                "model": Path(args.model).name if args.section == "quantize" else "stories260K",
            }
            print(f"{name:<20}{key:<8}{row['median_cpu_seconds']:8.2f} CPU s{row['median_seconds']:9.2f} s", flush=True)
            if args.append:
                with args.append.open("a") as out:
                    out.write(json.dumps(where | row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
