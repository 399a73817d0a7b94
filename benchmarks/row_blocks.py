"""Row materialisation: time and memory of a layer against the rows that are decoded at a time, one to all.

    python -m benchmarks.row_blocks [--threads N] [--rounds N]       rows in benchmarks/results/row_blocks.jsonl
    python -m benchmarks.row_blocks --table                          docs/results/rows.md and its picture

A forward and a backward of one quantized layer with bfloat16 inputs: CPU milliseconds, the median of interleaved
rounds, and the growth of allocated memory at its peak without the output and the gradient of the input, from the
allocator's own record. Beside them the dense bfloat16 layer, and the whole weight decoded at once, as other libraries
do.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import llmtools
from benchmarks.materialize import forward, seconds
from benchmarks.memory import peak_growth
from benchmarks.quality import _origin
from benchmarks.quality_table import fill
from llmtools.document import markdown_table
from llmtools.nn.linear import QuantizedLinear

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "row_blocks.jsonl"
PAGE = HERE.parent / "docs" / "results" / "rows.md"
SHAPES = ((576, 1536), (4096, 4096))
"""(in, out): the MLP of SmolLM2-135M, and the attention of a model of 7 billion parameters."""
QUANTIZERS: dict[str, dict[str, Any]] = {
    "rtn 4 bits": {"name": "rtn", "bits": 4, "clip": False},
    "quip_sharp 2 bits": {"name": "quip_sharp", "bits": 2, "passes": 0},
}


def measure(shape: tuple[int, int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each quantizer and number of rows, and one for the dense layer."""
    n, out = shape
    torch.manual_seed(0)
    linear = nn.Linear(n, out, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    work, found = {}, {}
    blocks = [2**k for k in range(0, 20, 2) if 2**k < out] + [out]
    for label, options in QUANTIZERS.items():
        quantizer = llmtools.quantizer(**options)
        layer = QuantizedLinear.from_linear(linear, quantizer, torch.eye(n) if quantizer.needs_hessian else None)
        grid = getattr(quantizer, "grid", quantizer)
        bytes_of_a_row = layer.in_features * grid.scratch_bytes(torch.device("cpu"), torch.bfloat16)
        for rows in blocks:
            work[label, rows] = forward(layer, tokens, rows * bytes_of_a_row, 0)
    work["dense bfloat16", out] = forward(linear, tokens, 1, 0)
    results = 2 * tokens * (n + out)  # bytes of y and of the gradient of x
    for key, run in work.items():
        found[key] = peak_growth(run)
    times = seconds(work, rounds)
    return [
        {
            "layer": label, "in": n, "out": out, "tokens": tokens, "rows": rows, "ms": 1e3 * times[label, rows],
            "growth_bytes": max(0, found[label, rows] - results), "weight_bytes": 2 * n * out,
        }
        for label, rows in work
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, and their picture beside the page."""
    sections = []
    for n, out in SHAPES:
        here = [row for row in rows if (row["in"], row["out"]) == (n, out)]
        if not here:
            continue
        labels = list(dict.fromkeys(row["layer"] for row in here if not row["layer"].startswith("dense")))
        dense = next(row for row in here if row["layer"].startswith("dense"))
        cells = {(row["layer"], row["rows"]): row for row in here}
        blocks = sorted({row["rows"] for row in here})
        lines = [
            [f"{block}" + (" (all)" if block == out else "")]
            + [f"{cells[label, block]['ms'] / dense['ms']:.2f}" for label in labels]
            + [f"{cells[label, block]['growth_bytes'] / 2**20:.2f}" for label in labels]
            for block in blocks
        ]
        head = ["rows at a time", *(f"{label}: time, × dense" for label in labels)]
        body = markdown_table([*head, *(f"{label}: MiB" for label in labels)], lines)
        sections.append(
            f"### {out} × {n}, {dense['tokens']} tokens\n\nDense bfloat16: {dense['ms']:.1f} CPU ms; the weight "
            f"takes {dense['weight_bytes'] / 2**20:.1f} MiB.\n\n{body}"
        )
    return "\n\n".join(sections)


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    """Time beside the dense layer's, and memory, against the rows of a block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for n, out in SHAPES:
        here = [row for row in rows if (row["in"], row["out"]) == (n, out)]
        dense = next((row for row in here if row["layer"].startswith("dense")), None)
        for label in QUANTIZERS if dense else ():
            line = [row for row in here if row["layer"] == label]
            x = [row["rows"] for row in line]
            left.plot(x, [row["ms"] / dense["ms"] for row in line], marker="o", label=f"{label}, {out} × {n}")
            right.plot(x, [row["growth_bytes"] / 2**20 for row in line], marker="o")
    left.axhline(1, color="grey", linewidth=0.8)
    for axes, title in ((left, "time, × dense bfloat16"), (right, "memory at the peak, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="rows at a time", title=title)
    left.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="write the page from the newest rows")
    args = parser.parse_args(argv)
    if args.table:
        rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
        newest = {(row["layer"], row["in"], row["out"], row["rows"]): row for row in rows}
        fill(PAGE, {"rows": table(list(newest.values()))})
        picture(list(newest.values()), PAGE.with_suffix(".png"))
        print(PAGE)
        return 0
    torch.set_num_threads(args.threads)
    for shape in SHAPES:
        for row in measure(shape, args.tokens, args.rounds):
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | _origin()) + "\n")
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
