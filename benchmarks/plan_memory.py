"""The memory of `llmtools finetune` on a CPU, beside what `llmtools plan` says of it.

    python -m benchmarks.plan_memory --model DIR                         batches of 1 × 128, 4 × 256, 8 × 256 tokens
    python -m benchmarks.plan_memory --model DIR --shapes 8x256 --checkpointing
    python -m benchmarks.plan_memory --table                             the rows as Markdown

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


def run(args: argparse.Namespace) -> None:
    from llmtools.recipes.estimate import Plan, plan

    for shape in args.shapes:
        batch, length = map(int, shape.split("x"))
        command = [sys.executable, "-m", "benchmarks.plan_memory", "--model", args.model, "--inside"]
        command += ["--shapes", shape, "--steps", str(args.steps), *(["--checkpointing"] if args.checkpointing else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        asked = Plan(
            model=args.model,
            batch_size=batch,
            max_length=length,
            gradient_checkpointing=args.checkpointing,
            device="cpu",
        )
        planned = plan(asked)
        row = {
            "model": Path(args.model).name,
            "quantizer": planned.quantizer,
            "shape": shape,
            "checkpointing": args.checkpointing,
            "steps": args.steps,
            "planned_bytes": planned.total,
            "program_bytes": planned.memory.program,
            "measured_bytes": found["peak_anon_bytes"] + found["in_files_bytes"],
            **found,
        }
        row["planned_over_measured"] = row["planned_bytes"] / row["measured_bytes"]
        append(row, args.out)
        print(json.dumps(row), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """The newest row of each model and shape, as Markdown; GB are 10⁹ bytes."""
    from llmtools.document import markdown_table

    newest = {(row["model"], row["shape"], row["checkpointing"]): row for row in rows}
    body = [
        [
            f"{row['model']} ({row['quantizer']})",
            row["shape"].replace("x", " × "),
            "yes" if row["checkpointing"] else "no",
            f"{row['planned_bytes'] / 1e9:.2f}",
            f"{row['measured_bytes'] / 1e9:.2f}",
            f"{row['planned_over_measured']:.2f}",
        ]
        for row in newest.values()
    ]
    return markdown_table(["model", "tokens", "checkpointing", "planned", "measured", "planned / measured"], body)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_memory")
    parser.add_argument("--model", help="folder of the model, with a tokenizer")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), metavar="BATCHxLENGTH")
    parser.add_argument("--checkpointing", action="store_true")
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
