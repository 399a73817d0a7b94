"""The memory of `llmtools finetune` on a CPU, beside what `llmtools plan` says of it.

    python -m benchmarks.plan_memory --model DIR                         batches of 1 × 128, 4 × 256, 8 × 256 tokens
    python -m benchmarks.plan_memory --model DIR --shapes 8x256 --checkpointing
    python -m benchmarks.plan_memory --model DENSE --fit 800MB --shapes 1x128 [--calibration FILE]
    python -m benchmarks.plan_memory --table                             the rows as Markdown

With --fit the model is quantized by `llmtools quantize --fit` for that step first, and the process is held against the
budget.

Each shape is a run of its own process, of a few steps on made-up text in windows of full length. Measured is the peak
of RssAnon, sampled every 5 ms from the first step's beginning to the last one's end, and the bytes of weights that are
mapped from the checkpoint's files (which transformers does on a CPU wherever it can), since the plan counts all
weights. `begin` is RssAnon before the first step, with the adapters.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .llama_memory import status
from .offload import peaks
from .quality import HERE, append, rows_of

RESULTS = HERE / "results" / "plan_memory.jsonl"
SHAPES = ("1x128", "4x256", "8x256")
WORDS = ("the", "a", "cat", "dog", "sat", "on", "under", "mat", "tree", "house", "and", "but", "blue", "red", "slow")


def measure(model: str, batch: int, length: int, checkpointing: bool, steps: int) -> dict[str, Any]:
    """So many steps of finetuning, in this process."""
    from transformers import TrainerCallback

    from llmtools.model.offload import bytes_in_files
    from llmtools.recipes.finetune import Finetune, finetune

    found: dict[str, Any] = {}

    class Watching(TrainerCallback):
        def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
            found["in_files_bytes"] = bytes_in_files(model)[0]
            found["adapter_bytes"] = sum(each.nbytes for each in model.parameters() if each.requires_grad)
            found["begin_anon_bytes"] = status("RssAnon")
            self.sampling = peaks(0.005)
            found["peak"] = self.sampling.__enter__()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.sampling.__exit__(None, None, None)

    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "train.jsonl"
        rows = (" ".join(draw.choices(WORDS, k=2 * length)) for _ in range(batch * steps))
        data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        training = {
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "max_length": length,
            "gradient_checkpointing": checkpointing,
            "save_strategy": "no",
        }
        out = str(Path(place) / "adapter")
        finetune(Finetune(model=model, task="text", data=str(data), out=out, training=training), [Watching()])
    return found | {"peak_anon_bytes": found.pop("peak")["RssAnon"]}


def fitted(args: argparse.Namespace, shape: str, folder: Path) -> str:
    """The model quantized so that the step fits into --fit, in a new folder."""
    batch, length = shape.split("x")
    command = [sys.executable, "-m", "llmtools", "quantize", "--model", args.model, "--out", str(folder / "fitted")]
    command += ["--quantizer", "rtn", "--group_size", "64", "--fit", args.fit, "--fit_step.device", "cpu"]
    command += ["--fit_step.batch_size", batch, "--fit_step.max_length", length]
    command += ["--fit_step.gradient_checkpointing", str(args.checkpointing).lower()]
    if args.calibration:
        command += ["--calibration", args.calibration, "--num_samples", "16", "--max_length", "128"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return str(folder / "fitted")


def run(args: argparse.Namespace) -> None:
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as place:
            model = args.model if args.fit is None else fitted(args, shape, Path(place))
            row = row_of(args, shape, model)
        append(row, args.out)
        print(json.dumps(row), flush=True)


def row_of(args: argparse.Namespace, shape: str, model: str) -> dict[str, Any]:
    """What is planned for a model and a shape, and what was measured."""
    from llmtools.recipes.estimate import Plan, plan
    from llmtools.recipes.fit import bytes_of

    batch, length = map(int, shape.split("x"))
    command = [sys.executable, "-m", "benchmarks.plan_memory", "--model", model, "--inside"]
    command += ["--shapes", shape, "--steps", str(args.steps), *(["--checkpointing"] if args.checkpointing else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    asked = Plan(
        model=model, batch_size=batch, max_length=length, gradient_checkpointing=args.checkpointing, device="cpu"
    )
    planned = plan(asked)
    row = {
        "model": Path(args.model).name,
        "quantizer": planned.quantizer,
        "bits_per_weight": planned.bits_per_weight,
        "shape": shape,
        "checkpointing": args.checkpointing,
        "steps": args.steps,
        "planned_bytes": planned.total,
        "program_bytes": planned.memory.program,
        "measured_bytes": found["peak_anon_bytes"] + found["in_files_bytes"],
        **found,
    }
    if args.fit is not None:
        row |= {"fit": args.fit, "measured_over_budget": row["measured_bytes"] / bytes_of(args.fit)}
    return row | {"planned_over_measured": row["planned_bytes"] / row["measured_bytes"]}


def table(rows: list[dict[str, Any]]) -> str:
    """The newest row of each model and shape, as Markdown; GB are 10⁹ bytes."""
    from llmtools.document import markdown_table

    newest = {(row["model"], row["shape"], row["checkpointing"], row.get("fit")): row for row in rows}
    body = [
        [
            f"{row['model']} ({row['quantizer']}{_bits(row)})",
            row["shape"].replace("x", " × "),
            "yes" if row["checkpointing"] else "no",
            f"{row['planned_bytes'] / 1e9:.2f}",
            f"{row['measured_bytes'] / 1e9:.2f}",
            f"{row['planned_over_measured']:.2f}",
            f"{row['fit']}, {row['measured_over_budget']:.2f}" if "fit" in row else "–",
        ]
        for row in newest.values()
    ]
    columns = ["model", "tokens", "checkpointing", "planned", "measured", "planned / measured", "--fit, measured / it"]
    return markdown_table(columns, body)


def _bits(row: dict[str, Any]) -> str:
    return f", {row['bits_per_weight']:.2f} bits per weight" if "fit" in row else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_memory")
    parser.add_argument("--model", help="folder of the model, with a tokenizer")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), metavar="BATCHxLENGTH")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--fit", help="memory for the step, as of `llmtools quantize --fit`; --model is dense then")
    parser.add_argument("--calibration", help="text by which --fit divides what is left among the linears")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.table:
        print(table(rows_of(args.out)))
    elif args.model is None:
        parser.error("give --model, or --table")
    elif args.inside:
        batch, length = map(int, args.shapes[0].split("x"))
        print(json.dumps(measure(args.model, batch, length, args.checkpointing, args.steps)))
    else:
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
