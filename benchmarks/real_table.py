"""Rows of benchmarks/real.py as the tables of docs/results/quality.md; the prose around them is written by hand.

A table stands between ``<!-- NAME -->`` and ``<!-- end -->`` and is replaced.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.quality_table import difference, fill
from llmtools.document import markdown_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "quality.md"
Row = dict[str, Any]


def write(rows: list[Row], page: Path = PAGE) -> str:
    """Puts the tables into the page; says what it did."""
    names = fill(page, tables(rows))
    return f"{page}: {len(rows)} rows in {len(names)} tables"


def tables(rows: list[Row]) -> dict[str, str]:
    """Name → Markdown. The main tables have the held-out text and the calibration that most rows were made with."""
    by_text: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        by_text.setdefault((row["windows"], *row["texts"]), []).append(row)
    most, *others = sorted(by_text.values(), key=len, reverse=True)
    (main, _), *_ = Counter(row["calibration"] for row in most if row["by"] != "torch").most_common()
    whole = _whole(most)
    here = [row for row in most if row["calibration"] == main or row["by"] == "torch"]
    made = {f"bits{bits}": _width([row for row in here if row["bits"] == bits], whole) for bits in (2, 3, 4)}
    made["best"] = _best(here)
    made["calibration"] = _calibration(most, whole)
    made["calibration_text"] = "\n\n".join(_calibration(found, _whole(found)) for found in others)
    made["dense"] = ", ".join(f"{name} {value:.2f}" for name, value in whole["perplexity"].items()) + "."
    made["versions"] = _versions(rows)
    return {name: body for name, body in made.items() if body}


def _whole(rows: list[Row]) -> Row:
    """The row of the model in 16 bits."""
    return [row for row in rows if row["by"] == "torch"][-1]


def _width(rows: list[Row], whole: Row) -> str:
    """A line for each quantizer: the mean over seeds, and half the spread where there are two."""
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    texts = list(whole["perplexity"])
    ranked = sorted(by_label.values(), key=lambda found: _mean(found, "perplexity", texts[0]))
    lines = [_line(found, whole, texts) for found in ranked]
    head = ["", "bits stored", *(f"{text}: perplexity" for text in texts), f"× 16 bits, {texts[0]}"]
    head += [f"KL from 16 bits, {texts[0]}", "CPU seconds", "peak memory, MB", "seeds"]
    return markdown_table(head, lines) if lines else ""


def _line(found: list[Row], whole: Row, texts: list[str]) -> list[str]:
    label = found[0]["label"].replace(f" {found[0]['bits']}-bit", "")
    if any("failed" in row for row in found):
        return [label, "fails", *[""] * (len(texts) + 5)]
    ratio = _mean(found, "perplexity", texts[0]) / whole["perplexity"][texts[0]]
    return [
        label,
        f"{found[0]['bits_per_weight']:.2f}",
        *(_spread([row["perplexity"][text] for row in found]) for text in texts),
        f"{ratio:.3f}",
        _spread([row["kl"][texts[0]] for row in found], 3) if all("kl" in row for row in found) else "",
        f"{sum(row['cpu_seconds'] for row in found) / len(found):.0f}",
        f"{max(row['peak_bytes'] for row in found) / 1e6:.0f}",
        str(len(found)),
    ]


def _spread(values: list[float], digits: int = 2) -> str:
    mean = sum(values) / len(values)
    half = (max(values) - min(values)) / 2
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def _mean(found: list[Row], key: str, text: str) -> float:
    values = [row[key][text] if key in row else float("inf") for row in found]
    return sum(values) / len(values)


def _best(rows: list[Row]) -> str:
    """At each width our best and the best of the others at that many bits or fewer, on the same windows."""
    lines = []
    for bits in (2, 3, 4):
        here = [row for row in rows if row["bits"] == bits and "nlls" in row and not row["seed"]]
        for text in dict.fromkeys(text for row in here for text in row["nlls"]):
            ours = [row for row in here if row["by"] == "llmtools"]
            others = [row for row in here if row["by"] != "llmtools"]
            if not ours or not others:
                continue
            pair = [min(side, key=lambda row: row["perplexity"][text]) for side in (ours, others)]
            mean, error = difference(*({"nlls": row["nlls"][text]} for row in pair))
            shown = [
                f"{row['label'].replace(f' {bits}-bit', '').removeprefix('llmtools ')}: "
                f"{row['perplexity'][text]:.2f} ({row['bits_per_weight']:.2f} bits, {row['cpu_seconds']:.0f} s)"
                for row in pair
            ]
            lines.append([f"{bits} bits, {text}", *shown, f"{mean:+.3f} ± {error:.3f}"])
    return markdown_table(["", "ours", "the others'", "difference, nats per token"], lines) if lines else ""


def _calibration(rows: list[Row], whole: Row) -> str:
    """The same quantizer after other calibration texts and sizes."""
    texts = list(whole["perplexity"])
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        if "nlls" in row and row["by"] != "torch" and row["seed"] == 0:
            by_label.setdefault(row["label"], []).append(row)
    repeated = [row for found in by_label.values() if len(found) > 1 for row in sorted(found, key=_sequences)]
    lines = [["16 bits", "", *(f"{whole['perplexity'][text]:.2f}" for text in texts), ""]] if repeated else []
    for row in repeated:
        figures = [f"{row['perplexity'][text]:.2f}" for text in texts]
        label = row["label"].removeprefix("llmtools ")
        lines.append([label, row["calibration"], *figures, f"{row['cpu_seconds']:.0f}"])
    head = ["", "calibration", *(f"{text}: perplexity" for text in texts), "CPU seconds"]
    return markdown_table(head, lines) if lines else ""


def _sequences(row: Row) -> int:
    """Number of calibration sequences, of "c4, 16 × 1024 tokens"."""
    return int(row["calibration"].split()[-4])


def _versions(rows: list[Row]) -> str:
    found: dict[str, str] = {}
    for row in rows:
        found |= row.get("versions", {})
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    return f"{', '.join(f'{name} {version}' for name, version in found.items())}. Commits {commits}. {machines}."
