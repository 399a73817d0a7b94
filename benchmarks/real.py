"""Quality per bit on a real model: whole-model perplexity, ours beside other libraries', one JSON line a row.

    python -m benchmarks.real --model FOLDER --calibration c4=c4.jsonl.gz --texts wikitext2=test.txt c4=c4.jsonl.gz
    python -m benchmarks.real … --only "optq;quip_sharp" --bits 2 --seed 1
    python -m benchmarks.real --list                 what would run, and what is done
    python -m benchmarks.real --table                docs/results/quality.md, from the rows

A row is a quantizer at a width: each is made in a process of its own, which measures the CPU seconds and the peak
memory of quantizing and then the perplexity on each text. Rows are appended to benchmarks/results/real.jsonl with
versions, commit and machine, and those that are there already are not made again: the command goes on where it was
stopped.

Of a file of documents (.jsonl), every fourth is held-out text and the others are calibration. The model
is loaded in the dtype that it is stored in, by everyone, as users do, or in float32 where the processor is many times
slower in that (`dtype` of a row); perplexity is computed in that dtype, too, from the dequantized weights of every
library, so that nothing but the weights differs. `kl` of a row is the Kullback–Leibler
divergence from the original model on the same text; rows of before it was measured have none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmtools
from benchmarks import baselines
from benchmarks.baselines import Case, Source
from benchmarks.quality import Row, append, hash_of_weights, note, reset_peak, resident, rows_of, window_nlls
from llmtools.data.calibration import documents_of
from llmtools.model.options import BlockTuning, Recovery
from llmtools.nn.adapters import dequantize
from llmtools.nn.wide import computed_in

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "real.jsonl"
HELD_OUT_EVERY = 4
DTYPE = computed_in(torch.bfloat16, "cpu")
BOTH: dict[str, Any] = {"rounding": "two_sided", "recovery": Recovery()}


def cases(bits: int, iterations: int) -> Iterator[Case]:
    """What is measured at a width, the cheap and the telling ones first."""
    for group_size in (64, 128):
        yield baselines.ours("rtn", {"bits": bits, "group_size": group_size})
    for name, options in (
        ("optq", {"group_size": 64}),
        ("quip_sharp", {}),
        ("qtip", {}),
        ("hqq", {"group_size": 64}),
        ("optq", {"group_size": 128}),
        ("optq", {"group_size": 64, "act_order": True, "passes": 2}),
        ("quip", {}),
        *((("quip", {"mid_rise": True}),) if bits == 2 else ()),
        ("awq", {"group_size": 64}),
    ):
        yield baselines.ours(name, {"bits": bits} | options)
    for name, options in (
        ("quip_sharp", {"passes": 2}),
        ("qtip", {}),
        ("optq", {"group_size": 64, "act_order": True, "passes": 2}),
        ("rtn", {"group_size": 64}),
    ):
        yield baselines.ours(name, {"bits": bits} | options, error_propagation=0.5)
    yield baselines.ours("quip_sharp", {"bits": bits, "passes": 2})
    for name, options in (("qtip", {}), ("quip_sharp", {"passes": 2}), ("optq", {"group_size": 64})):
        for strength in (0.5, 0.0):
            yield baselines.ours(name, {"bits": bits} | options, error_propagation=strength, rounding="two_sided")
    here = baselines.installed()
    if bits == 4:
        yield baselines.ours("nf4", {"double_quantization": True})
    peers = [case for case in baselines.cases(bits, 64, iterations) if case.by in here]
    yield from (case for case in peers if case.by in ("HQQ", "bitsandbytes"))
    yield from (case for case in peers if case.by == "GPTQModel")
    for name in ("quip_sharp", "optq"):
        options = {"bits": bits} | ({"group_size": 64} if name == "optq" else {})
        yield baselines.ours(name, options, recovery=Recovery())
    for name, options in (("quip_sharp", {"passes": 2}), ("qtip", {})):
        yield baselines.ours(name, {"bits": bits} | options, recovery=Recovery(), error_propagation=0.5)
    for size in (None, *{2: (2.25, 2.5), 3: (3.0, 3.25, 3.5), 4: (4.25,)}.get(bits, ())):
        for more in ({}, {"recovery": Recovery()}, {"rounding": "two_sided"}, BOTH):
            if size is not None or more == BOTH:
                yield baselines.ours("qtip", {"bits": bits}, error_propagation=0.5, bits_per_weight=size, **more)
    for name in ("quip_sharp", "optq", "quip"):
        options = {"bits": bits} | ({"group_size": 64} if name == "optq" else {})
        yield baselines.ours(name, options, tuning=BlockTuning())
    yield baselines.ours("signround", {"bits": bits, "group_size": 64})
    yield from (case for case in peers if case.by == "auto-round")


def dense() -> Case:
    """The model as it is stored."""
    return Case("torch", "16 bits", 16, None, {}, lambda source: baselines.Made(source.model(), 16.0))


# ---------------------------------------------------------------------------------------------------------------------
# One row, in a process of its own


def measured(case: Case, source: Source, texts: dict[str, Tensor]) -> Row:
    """Quantizes and measures: CPU and wall seconds, peak memory above the start, perplexity and windows' losses."""
    before, cpu, wall = resident("VmRSS"), _cpu_seconds(), time.perf_counter()
    reset_peak()
    with baselines.quiet():
        made = case.make(source)
    row: Row = {
        "dtype": str(DTYPE).removeprefix("torch."),
        "bits_per_weight": made.bits_per_weight,
        "cpu_seconds": _cpu_seconds() - cpu,
        "seconds": time.perf_counter() - wall,
        "peak_bytes": resident("VmHWM") - before,
        "kl": {},
        "perplexity": {},
        "nlls": {},
    }
    model = dequantize(made.model, DTYPE) if case.by == "llmtools" else made.model
    original = source.model()
    for name, windows in texts.items():
        row["kl"][name] = divergence(original, model, windows)
        nlls = window_nlls(model, windows)
        row["perplexity"][name] = math.exp(float(nlls.mean()))
        row["nlls"][name] = [round(value, 4) for value in nlls.tolist()]
    return row


@torch.no_grad()
def divergence(original: torch.nn.Module, model: torch.nn.Module, windows: Tensor) -> float:
    """KL divergence from the original's next-token distributions in nats, the mean over windows [n, t] of tokens."""
    total = 0.0
    for ids in windows:
        one, other = (each(ids[None]).logits[0].float().log_softmax(-1) for each in (original, model))
        total += float((one.exp() * (one - other)).sum(-1).mean())
    return total / len(windows)


def _cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def documents(file: Path, *, held_out: bool) -> list[str]:
    """The documents of a file; of a .jsonl file every fourth where held-out text is wanted, the others where it is
    not."""
    found = documents_of(file, split="test")
    if ".jsonl" not in file.suffixes:
        return found
    return [text for index, text in enumerate(found) if (index % HELD_OUT_EVERY == 0) == held_out]


def spread_windows(tokenizer: Any, text: list[str], count: int, tokens: int) -> Tensor:
    """`count` windows of `tokens` tokens at equal distances in the text: int64 [count, tokens]."""
    ids = tokenizer("\n\n".join(text), return_tensors="pt", verbose=False).input_ids[0]
    whole = len(ids) // tokens
    chosen = [index * whole // min(count, whole) for index in range(min(count, whole))]
    return torch.stack([ids[index * tokens : (index + 1) * tokens] for index in chosen])


def _one(args: argparse.Namespace) -> Row:
    """The row of the case whose label is given, for the subprocess."""
    from llmtools.checkpoint.loading import quiet_libraries

    quiet_libraries()
    torch.manual_seed(0)
    named = dict(each.split("=", 1) for each in args.texts)
    _, _, file = args.calibration.partition("=")
    bare = Source(Path(args.model), [], dtype="auto")
    tokenizer = bare.tokenizer()
    texts = {
        key: spread_windows(tokenizer, documents(Path(path), held_out=True), args.windows, args.context)
        for key, path in named.items()
    }
    own = documents(Path(file), held_out=False)
    windows = llmtools.calibration(own, tokenizer, samples=args.samples, tokens=args.tokens, seed=args.seed)
    (case,) = [case for case in _all_cases(args) if case.label == args.one]
    dtype = "auto" if torch.bfloat16 == DTYPE else DTYPE
    return measured(case, Source(Path(args.model), windows, dtype=dtype), texts)


# ---------------------------------------------------------------------------------------------------------------------
# All rows, one process after the other


def _all_cases(args: argparse.Namespace) -> list[Case]:
    return [dense(), *(case for bits in args.bits for case in cases(bits, args.iterations))]


def _setting(args: argparse.Namespace) -> Row:
    """What a row belongs to: rows of one setting can be compared."""
    return {
        "model": Path(args.model).name if Path(args.model).name != "hf" else Path(args.model).parent.name,
        "weights": hash_of_weights(args.model),
        "calibration": f"{args.calibration.partition('=')[0]}, {args.samples} × {args.tokens} tokens",
        "windows": f"{args.windows} × {args.context} tokens",
        "texts": [text.partition("=")[0] for text in args.texts],
        "seed": args.seed,
    }


def _key(row: Row) -> str:
    setting = {key: row[key] for key in ("model", "weights", "windows", "texts", "label")}
    data_free = row["label"].startswith(DATA_FREE) and "error_propagation" not in row["label"]
    return json.dumps(setting | ({} if data_free else {"calibration": row["calibration"], "seed": row["seed"]}))


DATA_FREE = ("torch", "llmtools rtn", "llmtools hqq", "llmtools nf4", "HQQ", "bitsandbytes")
"""Labels that begin so depend neither on the calibration text nor on the seed."""


def rows(file: Path) -> list[Row]:
    """The rows of the file, the newest of each kind."""
    return list({_key(row): row for row in rows_of(file)}.values())


def run(args: argparse.Namespace) -> None:
    setting = _setting(args)
    wanted, unwanted = ([part for part in each.split(";") if part] for each in (args.only, args.without))
    chosen = [
        case
        for case in _all_cases(args)
        if (not wanted or any(part in case.label for part in wanted)) and not any(p in case.label for p in unwanted)
    ]
    for number, case in enumerate(chosen, 1):
        row = setting | {
            "label": case.label, "by": case.by, "method": case.method, "bits": case.bits,
            "group_size": case.group_size, "options": case.options,
        }  # fmt: skip
        if _key(row) in {_key(each) for each in rows(args.out) if args.list or "failed" not in each}:
            print(f"{number}/{len(chosen)}  there already: {case.label}", flush=True)
            continue
        if args.list:
            print(f"{number}/{len(chosen)}  to be made:    {case.label}")
            continue
        command = [sys.executable, "-m", "benchmarks.real", *args.words, "--one", case.label]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
        try:
            row |= json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            reason = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
            row["failed"] = reason[-1][:300]
        append(row, args.out)
        shown = row.get("failed") or ", ".join(f"{name} {value:.2f}" for name, value in row["perplexity"].items())
        print(f"{number}/{len(chosen)}  {case.label}: {shown}; {row.get('cpu_seconds', 0):.0f} CPU s", flush=True)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the model in 16 bits")
    parser.add_argument("--calibration", help="NAME=FILE of the calibration text")
    parser.add_argument("--texts", nargs="+", default=[], metavar="NAME=FILE", help="held-out texts")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a calibration sequence")
    parser.add_argument("--windows", type=int, default=32, help="windows of each held-out text")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a window of held-out text")
    parser.add_argument("--iterations", type=int, default=200, help="auto-round's steps for a block")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration sequences")
    parser.add_argument("--only", default="", help="rows whose label holds this, or one of these parted by ;")
    parser.add_argument("--without", default="", help="no rows whose label holds this, or one of these")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that rows are appended to")
    parser.add_argument("--list", action="store_true", help="show what would run")
    parser.add_argument("--table", action="store_true", help="write the page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.words = words
    if args.one:
        print(json.dumps(_one(args)))
        return 0
    if args.table:
        from benchmarks.real_table import write

        print(write(rows(args.out)))
        return 0
    if not (args.model and args.calibration and args.texts):
        parser.error("--model, --calibration and --texts are needed")
    for name in baselines.PACKAGES.keys() - baselines.installed().keys():
        note(f"{name} is not installed and skipped")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
