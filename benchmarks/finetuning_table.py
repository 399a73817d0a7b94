"""The runs of `benchmarks/sweeps/orders.yaml` as the tables of docs/results/finetuning.md.

    llmtools sweep benchmarks/sweeps/orders.yaml --model … --out FOLDER
    python -m benchmarks.finetuning_table FOLDER     keeps its runs in benchmarks/results/finetuning.jsonl, too
    python -m benchmarks.finetuning_table            the page from those

The prose around the tables is written by hand; a table stands between ``<!-- NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.quality import HERE, rows_of
from benchmarks.quality_table import fill
from llmtools.document import markdown_table

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
    ranks = sorted({row["rank"] for row in rows})
    variants: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (-row["bits_per_weight"], row["variant"])):
        variants.setdefault(row["variant"], []).append(row)
    runs = [
        [
            row["variant"],
            f"{row['bits_per_weight']:.2f}",
            str(row["rank"]),
            f"{row['scores']['after']['exact_match']:.2f}",
            f"{row['scores']['after']['fields']:.3f}",
            f"{row['loss']:.3f}",
            f"{row['weight_bytes'] / 1e6:.0f}",
            f"{4 * row['trained'] / 1e6:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for found in variants.values()
        for row in sorted(found, key=lambda row: row["rank"])
    ]
    head = ["", "bits stored", "rank", "exact match", "fields right", "training loss at the end", "weights, MB",
            "adapter, MB", "peak of training, MB"]  # fmt: skip
    grid = [
        [
            name,
            f"{found[0]['bits_per_weight']:.2f}",
            *(
                next((f"{row['scores']['after']['fields']:.3f}" for row in found if row["rank"] == rank), "")
                for rank in ranks
            ),
        ]
        for name, found in variants.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items()) if rows else ""
    return {
        "runs": markdown_table(head, runs),
        "ranks": markdown_table(["fields right", "bits stored", *(f"rank {rank}" for rank in ranks)], grid),
        "versions": f"{versions}. {'; '.join(sorted({row['machine'] for row in rows}))}.",
    }


def main(words: list[str]) -> int:
    if words:
        rows = {_run(row): row for row in (*rows_of(RESULTS), *collected(Path(words[0])))}
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
    rows = rows_of(RESULTS)
    print(f"{PAGE}: {len(rows)} runs in {len(fill(PAGE, tables(rows)))} tables")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
