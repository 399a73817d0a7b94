"""Rows of benchmarks/quality.py as the tables of docs/results/toys.md; the prose around them is written by hand.

A table stands between ``<!-- NAME -->`` and ``<!-- end -->`` and is replaced. Of rows that measure the same the newest
counts.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from llmtools.document import markdown_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "toys.md"
Row = dict[str, Any]


def write(results: Path, page: Path = PAGE) -> str:
    """Puts the tables into the page; says what it did."""
    rows = newest([json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()])
    names = fill(page, tables(rows))
    return f"{page}: {len(rows)} rows in {len(names)} tables"


def fill(page: Path, made: dict[str, str]) -> list[str]:
    """Replaces what stands between ``<!-- NAME -->`` and ``<!-- end -->`` in a page; the names that it has."""
    text = page.read_text(encoding="utf-8")
    names = [name for name in re.findall(r"<!-- (\w+) -->\n", text) if name != "end"]
    for name in names:
        table = made.get(name, "*Not measured yet.*")
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")
    return names


_SAME = (
    "section", "model", "by", "label", "method", "bits", "seed", "linear", "codebook", "distinct_values", "start",
)  # fmt: skip


def newest(rows: list[Row]) -> list[Row]:
    """The last of the rows that measure the same."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found[tuple(str(row.get(key)) for key in _SAME)] = row
    return list(found.values())


def tables(rows: list[Row]) -> dict[str, str]:
    """Name → Markdown."""
    by = {
        name: [row for row in rows if row["section"] == name]
        for name in ("mse", "layers", "perplexity", "finetune", "starts")
    }
    made = {"mse": _mse(by["mse"]), "layers": _layers(by["layers"]), "verdict": _verdict(by["perplexity"])}
    made["same"] = _same_settings(by["perplexity"])
    for bits in (2, 3, 4):
        made[f"perplexity{bits}"] = _models(by["perplexity"], bits)
    made["finetune"] = _finetune(by["finetune"])
    made["starts"] = _starts(by["starts"])
    made["encode"] = _encode([row for row in rows if row["section"] == "encode"])
    made["versions"] = _versions(rows)
    return {name: table for name, table in made.items() if table}


def _mse(rows: list[Row]) -> str:
    lines = [
        [row["codebook"], str(row["bits"]), f"{row['mse']:.5f} ± {row['standard_error']:.5f}", f"{row['published']}",
         f"{100 * row['difference']:+.2f} %"]
        for row in rows if "mse" in row
    ]  # fmt: skip
    table = markdown_table(["codebook", "bits", "error per element", "published", "difference"], lines)
    for row in rows:
        if "distinct_values" in row:
            table += (
                f"\n\nE8P has {row['distinct_values']} distinct values. On {row['encoder_checked']} Gaussian vectors "
                f"the encoder of 256 rows was farther from the vector than a search of all points "
                f"{row['encoder_farther_than_brute_force']} times."
            )
    return table


def _layers(rows: list[Row]) -> str:
    means = [row for row in rows if row["linear"].startswith("mean")]
    if not means:
        return ""
    losses, stored = means[-1]["relative_proxy_loss"], means[-1]["bits_per_weight"]
    lines = [
        [label, f"{stored[label]:.2f}", f"{value:.5f}"]
        for label, value in sorted(losses.items(), key=lambda pair: (_width(pair[0]), pair[1]))
    ]
    return markdown_table([f"quantizer ({means[-1]['linear']} linears)", "bits stored", "relative proxy loss"], lines)


def _width(label: str) -> int:
    return int(label.partition("-bit")[0][-1])


def _models(rows: list[Row], bits: int) -> str:
    """One line a method, one column a model: perplexity, and the bits it takes."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    dense = {row["model"]: row for row in rows if row["method"] == "float32"}
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.get("label") and row["bits"] == bits:
            cells.setdefault(row["label"], {})[row["model"]] = row
    order = sorted(cells, key=lambda label: _mean_rise(cells[label], dense))
    lines = [[label, *[_cell(cells[label].get(model)) for model in models]] for label in order]
    if not lines:
        return ""
    head = [f"{model} (float32: {dense[model]['perplexity']:.2f})" for model in models]
    return markdown_table(["", *head], lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return "fails" if "failed" in row else f"{row['perplexity']:.2f} ({row['bits_per_weight']:.2f})"


def _mean_rise(cells: dict[str, Row], dense: dict[str, Row]) -> float:
    """Mean rise of the nats per token over the dense model, the order of the lines; failures come last."""
    rises = [
        math.log(row["perplexity"] / dense[model]["perplexity"]) if "perplexity" in row else 10.0
        for model, row in cells.items()
    ]
    return sum(rises) / len(rises)


def difference(row: Row, other: Row) -> tuple[float, float]:
    """Nats per token of one model over another's on the same windows, and the standard error: paired by window."""
    gaps = [a - b for a, b in zip(row["nlls"], other["nlls"], strict=True)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1))
    return mean, spread / math.sqrt(len(gaps))


def _verdict(rows: list[Row]) -> str:
    """For each model and width the best row of each side, and how sure the difference is."""
    lines = []
    for bits in (2, 3, 4):
        for model in dict.fromkeys(row["model"] for row in rows):
            here = [row for row in rows if row["model"] == model and row["bits"] == bits and "nlls" in row]
            sides = [
                min(
                    (row for row in here if (row["by"] == "llmtools") == ours),
                    key=lambda r: r["perplexity"],
                    default=None,
                )
                for ours in (True, False)
            ]
            if sides[0] is None or sides[1] is None:
                continue
            mean, error = difference(sides[0], sides[1])
            shown = [
                f"{r['label'].removeprefix('llmtools ')}: {r['perplexity']:.2f} ({r['bits_per_weight']:.2f})"
                for r in sides
            ]
            lines.append([f"{bits} bits, {model}", *shown, f"{mean:+.4f} ± {error:.4f}"])
    return markdown_table(
        ["", "our best: perplexity (bits)", "best of the others", "difference, nats per token"], lines
    )


SAME = {
    "plain": ("llmtools optq {}-bit g64", "GPTQModel gptq {}-bit g64, mse 2.4, damp_percent 0.01, no act_group_aware"),
    "act-order": ("llmtools optq {}-bit g64, act_order", "GPTQModel gptq {}-bit g64, mse 2.4, desc_act"),
}
"""Rows of OPTQ with the same settings."""


def _same_settings(rows: list[Row]) -> str:
    lines = []
    for bits in (2, 3, 4):
        for model in dict.fromkeys(row["model"] for row in rows):
            for kind, labels in SAME.items():
                pair = [
                    next(
                        (
                            r
                            for r in rows
                            if r.get("label") == label.format(bits) and r["model"] == model and "nlls" in r
                        ),
                        None,
                    )
                    for label in labels
                ]
                if pair[0] is not None and pair[1] is not None:
                    mean, error = difference(pair[0], pair[1])
                    figures = [f"{row['perplexity']:.2f}" for row in pair if row]
                    lines.append([f"{bits} bits, {model}, {kind}", *figures, f"{mean:+.4f} ± {error:.4f}"])
    return markdown_table(["", "our optq", "GPTQModel", "difference, nats per token"], lines)


def _finetune(rows: list[Row]) -> str:
    ranked = sorted(rows, key=lambda row: (row["bits"], row.get("perplexity", math.inf)))
    lines = [
        [
            row.get("label", "float32"),
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity_before']:.1f}",
            f"{row['perplexity']:.2f}",
        ]
        for row in ranked
        if "perplexity" in row
    ]
    return markdown_table(["", "bits stored", "before", "after"], lines)


def _starts(rows: list[Row]) -> str:
    pairs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault((row["model"], row["label"]), {})[row["start"]] = row
    lines = [
        [model, label, f"{pair['zero']['bits_per_weight']:.2f}"]
        + [f"{pair[start][key]:.2f}" for key in ("perplexity_before", "perplexity") for start in ("zero", "error")]
        for (model, label), pair in pairs.items()
        if len(pair) == 2
    ]
    head = ["", "", "bits stored", "before: from zero", "from the error", "after: from zero", "from the error"]
    return markdown_table(head, lines)


def _encode(rows: list[Row]) -> str:
    lines = [
        [
            f"{row['shape'][0]} × {row['shape'][1]}",
            str(row["threads"]),
            f"{row['seconds']:.1f}",
            f"{row['peak_over_weight']:.2f}",
        ]
        for row in rows[-1:]
    ]
    return markdown_table(["layer", "threads", "seconds", "peak memory, × the float32 weight"], lines)


def _versions(rows: list[Row]) -> str:
    found: dict[str, str] = {}
    for row in rows:
        found |= row.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in found.items()) + "."
