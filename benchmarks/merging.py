"""What merging an adapter into its quantized base keeps of it: exact, rounded and re-quantized, one JSON line a row.

    python -m benchmarks.merging --model DIR --data train.txt --held_out test.txt
    python -m benchmarks.merging --model DIR --gguf FILE.gguf --data train.jsonl --held_out test.txt --only FILE.gguf
    python -m benchmarks.merging … --task json --data train.jsonl --test test.jsonl --calibration train.txt
    python -m benchmarks.merging … --bits 2 --learning_rates 1e-3 2e-3 --warmups 0 0.25 --seeds 0 1 2
    python -m benchmarks.merging --quick              everything on the model that ships with the demo, in minutes
    python -m benchmarks.merging … --cost             step time and memory of exact beside plain, in one run
    python -m benchmarks.merging … --list             what would run, and what is done
    python -m benchmarks.merging --table              the rows as Markdown

A row is a base (a quantizer at a width, or a GGUF file) with a learning rate, a warm-up and a seed. Two adapters are
trained on it with the same data and steps: a plain one, and one with ``finetune --merge exact``; where zero points are
in floating point a third with ``--merge zeros``. The plain one is
merged by rounding and by re-quantizing. Perplexity on held-out text is of base, plain adapter, and all merged models; a
share is (base − merged) / (base − plain adapter) in nats per token. With --task the adapters are trained on a task's
examples, and the shares are of its score on held-out ones. Rows are appended to
benchmarks/results/merging.jsonl with versions, commit and machine; those that are there are not made again.

`--cost` trains one model whose layers switch between both ways at every step, so that other load on the machine meets
both; the ratio is of medians. Memory is the process' peak in a step.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.quality import ASSETS, HERE, Row, append, hash_of_weights, reset_peak, resident, rows_of
from llmtools.document import markdown_table

RESULTS = HERE / "results" / "merging.jsonl"
WAYS = ("exact", "zeros", "round", "requantize")


class Base(NamedTuple):
    """A quantized base."""

    label: str
    """Name in rows."""
    quantizer: str | None
    """Name of the quantizer; None for a GGUF file."""
    options: dict[str, Any]
    """Options of the quantizer, the width among them."""
    file: str | None = None
    """Path of a GGUF file."""

    @property
    def ways(self) -> list[str]:
        """Those that it has: zeros needs zero points in floating point, and no quantizer of ours makes GGUF's types."""
        without = {"zeros"} if self.quantizer not in (None, "hqq") else set()
        return [way for way in WAYS if way not in without and (way != "requantize" or self.quantizer)]


def bases(args: argparse.Namespace) -> Iterator[Base]:
    for bits in args.bits:
        yield Base(f"optq {bits}-bit g64", "optq", {"bits": bits, "group_size": 64})
        if bits == 4:
            yield Base("nf4", "nf4", {})
        yield Base(f"hqq {bits}-bit g64", "hqq", {"bits": bits, "group_size": 64})
        yield Base(f"quip_sharp {bits}-bit", "quip_sharp", {"bits": bits})
    for file in args.gguf:
        yield Base(Path(file).name, None, {}, file)


def measured(base: Base, setting: Row, args: argparse.Namespace, work: Path) -> Row:
    """The perplexities and shares of one row; work: an empty folder."""
    from llmtools.recipes.finetune import Finetune, Lora, finetune
    from llmtools.recipes.merge import Merge, merge

    model = _quantized(base, args, work)
    training = {
        "max_steps": args.steps, "max_length": args.tokens, "per_device_train_batch_size": args.batch,
        "learning_rate": setting["learning_rate"], "lr_scheduler_type": "cosine",
    }  # fmt: skip
    lora = Lora(r=args.rank, alpha=2 * args.rank, dropout=0.0)
    common = {
        "model": model, "data": args.data, "task": args.task, "training": training, "lora": lora,
        "seed": setting["seed"],
    }  # fmt: skip
    row: Row = {"perplexity": {}, "kl": {}, "seconds": {}}
    kinds: dict[str, Row] = {
        "plain": {}, "exact": {"merge": "exact", "merge_warmup": setting["warmup"]}, "zeros": {"merge": "zeros"}
    }  # fmt: skip
    for name in [name for name in kinds if name == "plain" or name in base.ways]:
        row["seconds"][name] = finetune(Finetune(out=str(work / name), **common, **kinds[name])).seconds
    for way in base.ways:
        done = merge(
            Merge(
                model=model,
                adapter=str(work / (way if way in kinds else "plain")),
                out=str(work / f"merged-{way}"),
                how=way,
                calibration=(args.calibration or args.data) if way == "requantize" else None,
                data=args.held_out,
                max_length=args.tokens,
                windows=args.windows,
            )
        )
        assert done.comparison is not None
        found = done.comparison.values
        row["perplexity"] |= {"base": found["base"], way: found["merged"]}
        row["perplexity"][f"{way}, unmerged" if way in kinds else "plain"] = found["adapter"]
        row["kl"][way] = done.comparison.kl
    scores = {name: -math.log(value) for name, value in row["perplexity"].items()}
    if args.test:
        folders = {"base": (model, None), "plain": (model, str(work / "plain"))}
        folders |= {way: (_merged(work / f"merged-{way}"), None) for way in base.ways}
        scores = row["score"] = {name: _score(*where, args) for name, where in folders.items()}
    gain = scores["plain"] - scores["base"]
    row["share"] = {way: (scores[way] - scores["base"]) / gain for way in base.ways} if gain > 0 else {}
    return row


def _merged(folder: Path) -> str:
    """What `merge` wrote: a folder, or the GGUF file in it."""
    return str(next(folder.glob("*.gguf"), folder))


def _score(model: str, adapter: str | None, args: argparse.Namespace) -> float:
    """The task's score of the held-out examples: the share of fields that are right for json, else its own measure."""
    from llmtools.recipes.evaluate import Evaluate, evaluate

    done = evaluate(
        Evaluate(
            model=model, adapter=adapter, task=args.task, data=args.test, num_samples=args.examples, batch_size=20,
            options={"max_new_tokens": 48},
        )
    )  # fmt: skip
    return float(done.details.get("fields", done.value))


def _quantized(base: Base, args: argparse.Namespace, work: Path) -> str:
    """The folder or file of the quantized model; kept in --cache, if there is one, for other rows."""
    from llmtools.recipes.quantize import Quantize, quantize

    if base.quantizer is None:
        return str(base.file)
    folder = (args.cache or work) / f"{base.label.replace(' ', '-')}-{Path(args.model).name}"
    if not folder.exists():
        options = dict(base.options)
        named = {key: options.pop(key) for key in ("bits", "group_size") if key in options}
        quantize(
            Quantize(
                model=args.model, out=str(folder), quantizer=base.quantizer, options=options,
                calibration=args.calibration or args.data, num_samples=args.samples, max_length=args.tokens, **named,
            )
        )  # fmt: skip
    return str(folder)


def cost(base: Base, args: argparse.Namespace, work: Path) -> Row:
    """Seconds and peak bytes of a step, exact and plain by turns, on the same model and batch."""
    import peft

    import llmtools
    from llmtools.data.calibration import text_ids
    from llmtools.model.exact_lora import exact_layers, register
    from llmtools.train.heap import map_large_blocks

    map_large_blocks()  # as finetune does: freed memory is given back, so that a peak is one
    model, tokenizer = llmtools.load(_quantized(base, args, work))
    model = llmtools.prepare_for_training(model, gradient_checkpointing=args.gradient_checkpointing)
    config = register(peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"))
    adapted: Any = peft.get_peft_model(model, config).train()
    layers = exact_layers(adapted)
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-3)
    ids = text_ids(args.data, tokenizer)[:, : args.batch * args.tokens].reshape(args.batch, -1)
    seconds: dict[str, list[float]] = {"plain": [], "exact": []}
    peaks: dict[str, list[int]] = {"plain": [], "exact": []}
    for step in range(2 * args.cost_steps + 2):
        name = ("plain", "exact")[step % 2]
        for layer in layers.values():
            layer.rounds = name == "exact"
        reset_peak()
        began = time.perf_counter()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 2:  # the first of each makes the optimizer's state
            seconds[name].append(time.perf_counter() - began)
            peaks[name].append(resident("VmHWM"))
    found = {name: statistics.median(values) for name, values in seconds.items()}
    memory = {name: statistics.median(values) for name, values in peaks.items()}
    return {
        "step_seconds": found, "time_ratio": found["exact"] / found["plain"],
        "peak_bytes": memory, "memory_ratio": memory["exact"] / memory["plain"],
        "tokens": args.batch * args.tokens, "gradient_checkpointing": args.gradient_checkpointing,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def settings(args: argparse.Namespace) -> Iterator[tuple[Base, Row]]:
    """What would be measured: bases, and what rows of them differ in."""
    common = {
        "model": Path(args.model).name, "weights": hash_of_weights(args.model),
        "data": Path(args.data).name, "held_out": Path(args.held_out).name, "steps": args.steps, "rank": args.rank,
        "batch": f"{args.batch} × {args.tokens} tokens", "windows": args.windows, "task": args.task,
        **({"test": Path(args.test).name, "examples": args.examples} if args.test else {}),
    }  # fmt: skip
    for base in bases(args):
        if args.cost:
            yield base, {**common, "label": base.label, "kind": f"cost{' checkpointed' * args.gradient_checkpointing}"}
            continue
        for rate in args.learning_rates:
            for warmup in args.warmups:
                for seed in args.seeds:
                    yield base, {
                        **common, "label": base.label, "kind": "quality", "learning_rate": rate, "warmup": warmup,
                        "seed": seed,
                    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    wanted = [part for part in args.only.split(",") if part]
    chosen = [
        (base, setting) for base, setting in settings(args) if not wanted or any(part in base.label for part in wanted)
    ]
    for number, (base, setting) in enumerate(chosen, 1):
        there = any(setting.items() <= row.items() and "failed" not in row for row in rows_of(args.out))
        shown = f"{number}/{len(chosen)}  {base.label}, {setting['kind']}"
        shown += "".join(f", {key} {setting[key]}" for key in ("learning_rate", "warmup", "seed") if key in setting)
        if there or args.list:
            print(f"{shown}: {'there already' if there else 'to be made'}", flush=True)
            continue
        row: Row
        with tempfile.TemporaryDirectory(prefix="merging-") as work:
            try:
                row = cost(base, args, Path(work)) if args.cost else measured(base, setting, args, Path(work))
            except Exception as error:  # a row that fails says why
                row = {"failed": f"{type(error).__name__}: {error}"[:300]}
        append(setting | row, args.out)
        kept = {key: row[key] for key in ("failed", "share", "time_ratio", "memory_ratio") if key in row}
        print(f"{shown}: {json.dumps(kept)}", flush=True)


def table(found: list[Row]) -> str:
    """The rows as Markdown: shares of the gain, with their spread over seeds; and what a step costs."""
    quality: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        if row["kind"] == "quality" and row.get("share"):
            key = tuple(row[name] for name in ("model", "label", "learning_rate", "warmup"))
            quality.setdefault(key, []).append(row)
    lines = [
        [*map(str, key), *(_spread(_values(each)[name] for each in group) for name in ("base", "plain", "exact")),
         *(_spread(each["share"].get(way) for each in group) for way in WAYS), str(len(group))]
        for key, group in quality.items()
    ]  # fmt: skip
    head = ["model", "base", "learning rate", "warm-up", "score or perplexity: base", "adapter beside it", "exact"]
    parts = [markdown_table([*head, *(f"share kept: {way}" for way in WAYS), "seeds"], lines)] if lines else []
    costs = [
        [
            row["model"],
            row["label"],
            row["kind"],
            f"{row['time_ratio']:.2f}",
            f"{row['memory_ratio']:.3f}",
            row["batch"],
        ]
        for row in found
        if "time_ratio" in row
    ]
    if costs:
        parts.append(markdown_table(["model", "base", "", "step time", "peak memory", "batch"], costs))
    return "\n\n".join(parts)


def _values(row: Row) -> dict[str, float]:
    found: dict[str, float] = row.get("score") or row["perplexity"]
    return found


def _spread(values: Iterator[float | None]) -> str:
    """The mean, and half the spread where there are several; a dash where there is none."""
    every = [value for value in values if value is not None]
    if not every:
        return "–"
    half = (max(every) - min(every)) / 2
    return f"{statistics.mean(every):.3g}" + (f" ± {half:.2g}" if len(every) > 1 else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the model in 16 bits")
    parser.add_argument("--gguf", nargs="*", default=[], help="GGUF files of the same model, further bases")
    parser.add_argument("--data", help="training data")
    parser.add_argument("--held_out", help="held-out text")
    parser.add_argument("--task", default="text", help="task of the training data (llmtools list tasks)")
    parser.add_argument("--test", help="held-out examples of the task; shares are then of its score")
    parser.add_argument("--examples", type=int, default=60, help="number of them")
    parser.add_argument("--calibration", help="calibration text; by default the training data")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--warmups", type=float, nargs="+", default=[0.0], help="shares of the steps, for exact")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--windows", type=int, default=32, help="windows of held-out text")
    parser.add_argument("--cost", action="store_true", help="step time and memory instead")
    parser.add_argument("--cost_steps", type=int, default=10, help="steps of each way")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="for --cost")
    parser.add_argument("--only", default="", help="bases whose name holds this, or one of these parted by commas")
    parser.add_argument("--cache", type=Path, help="folder that keeps quantized bases")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that rows are appended to")
    parser.add_argument("--quick", action="store_true", help="the model that ships with the demo, and few steps")
    parser.add_argument("--list", action="store_true", help="show what would run")
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown")
    args = parser.parse_args(argv)
    if args.table:
        print(table(rows_of(args.out)))
        return 0
    if args.quick:
        text = ASSETS / "wikitext2"
        args.model, args.data, args.held_out = (
            str(ASSETS / "stories260K"),
            str(text / "train.txt"),
            str(text / "test.txt"),
        )
        args.steps, args.tokens, args.rank, args.samples, args.windows = 60, 64, 8, 16, 24
        args.learning_rates = [5e-3] if args.learning_rates == [1e-3] else args.learning_rates
    if not (args.model and args.data and args.held_out):
        parser.error("--model, --data and --held_out are needed, or --quick")
    logging.getLogger("llmtools").setLevel(logging.ERROR)
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
