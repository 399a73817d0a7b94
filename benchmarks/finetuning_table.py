"""The runs of the sweeps in `benchmarks/sweeps` as the tables of docs/results/finetuning.md.

    llmtools sweep benchmarks/sweeps/orders.yaml --model … --out FOLDER
    python -m benchmarks.finetuning_table FOLDER     keeps its runs in benchmarks/results/finetuning.jsonl, too
    python -m benchmarks.finetuning_table            the page from those

The prose around the tables is written by hand; a table stands between ``<!-- NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality import HERE, rows_of
from benchmarks.quality_table import fill
from llmtools.document import markdown_table
from llmtools.sweep.runner import BASELINES

RESULTS = HERE / "results" / "finetuning.jsonl"
PAGE = HERE.parent / "docs" / "results" / "finetuning.md"
Row = dict[str, Any]


def collected(folder: Path) -> list[Row]:
    """A row for each run of a sweep's folder, without paths."""
    rows = []
    for file in sorted((folder / "runs").glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        kept = (
            "variant",
            "task",
            "rank",
            "seed",
            "bits_per_weight",
            "weight_bytes",
            "peak_bytes",
            "seconds",
            "versions",
        )
        row = {key: run[key] for key in kept} | {
            "trained": run["trained"]["trainable"],
            "steps": run["trained"]["steps"],
        }
        row["scores"] = {when: run[when]["details"] for when in ("before", "after")}
        rows.append(row | {"loss": run["trained"]["train_loss"], "machine": run["platform"]})
    return rows


def _run(row: Row) -> tuple[object, ...]:
    """The key of a run: a later run with the same key replaces its row."""
    return row["variant"], row["task"], row["rank"], row["seed"]


def tables(rows: list[Row]) -> dict[str, str]:
    """Name → Markdown."""
    orders, genres = (_by_variant(rows, task) for task in ("orders", "mnli_genre"))
    ranks = sorted({row["rank"] for found in orders.values() for row in found})
    runs = [
        [
            variant,
            f"{row['bits_per_weight']:.2f}",
            str(row["rank"]),
            f"{row['scores']['after']['exact_match']:.2f}",
            f"{row['scores']['after']['fields']:.3f}",
            f"{row['loss']:.3f}",
            f"{row['weight_bytes'] / 1e6:.0f}",
            f"{4 * row['trained'] / 1e6:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for variant, found in orders.items()
        for row in sorted(found, key=lambda row: row["rank"])
    ]
    head = ["", "bits stored", "rank", "exact match", "fields right", "training loss at the end", "weights, MB",
            "adapter, MB", "peak of training, MB"]  # fmt: skip
    grid = [
        [
            variant,
            f"{found[0]['bits_per_weight']:.2f}",
            *(
                next((f"{row['scores']['after']['fields']:.3f}" for row in found if row["rank"] == rank), "")
                for rank in ranks
            ),
        ]
        for variant, found in orders.items()
    ]
    machines = sorted({row["machine"] for row in rows})
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items()) if rows else ""
    return {
        "runs": markdown_table(head, runs),
        "ranks": markdown_table(["fields right", "bits stored", *(f"rank {rank}" for rank in ranks)], grid),
        "genres": _over_seeds(genres, "accuracy"),
        "versions": f"{versions}. {'; '.join(machines)}.",
    }


def _by_variant(rows: list[Row], task: str) -> dict[str, list[Row]]:
    """The runs of a task by variant, most bits first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (-row["bits_per_weight"], row["variant"])):
        if row["task"] == task:
            found.setdefault(row["variant"], []).append(row)
    return found


def _over_seeds(variants: dict[str, list[Row]], score: str) -> str:
    """A score before and after, its mean and range over the seeds, and the mean beside that of unquantized LoRA."""
    means = {name: mean(row["scores"]["after"][score] for row in found) for name, found in variants.items()}
    reference = next((means[name] for name in means if name == BASELINES["lora"]), None)
    lines = []
    for name, found in variants.items():
        after = [row["scores"]["after"][score] for row in found]
        lines.append(
            [
                name,
                f"{found[0]['bits_per_weight']:.2f}",
                f"{found[0]['scores']['before'][score]:.3f}",
                f"{means[name]:.3f}",
                f"{min(after):.3f} … {max(after):.3f}",
                f"{means[name] / reference:.3f}" if reference else "",
                str(len(found)),
                f"{found[0]['weight_bytes'] / 1e6:.0f}",
                f"{found[0]['peak_bytes'] / 1e6:.0f}",
            ]
        )
    return markdown_table(
        ["", "bits stored", "before", f"{score} after", "range", "× 16 bits", "seeds", "weights, MB", "peak, MB"], lines
    )


def main(words: list[str]) -> int:
    if words:
        rows = {_run(row): row for row in (*rows_of(RESULTS), *collected(Path(words[0])))}
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
    rows = rows_of(RESULTS)
    print(f"{PAGE}: {len(rows)} runs in {len(fill(PAGE, tables(rows)))} tables")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
