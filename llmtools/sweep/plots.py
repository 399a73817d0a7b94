"""The plots of a sweep's report: SVG by matplotlib, embedded in the HTML, so that it is self-contained."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from ..document import Block
from ..train.losses import NO_PICTURES
from .report import ReportData

COLOURS = ("#1b1b1b", "#2563a8", "#2e8b57", "#c2571a", "#7d4fa3", "#b0304f", "#6b7280", "#0e8a8a", "#a68a00")


def plots(data: ReportData) -> list[Block]:
    """The plots as images with data: addresses (that over ranks only for several ranks); a line without matplotlib."""
    if not data.rows:
        return []
    if find_spec("matplotlib") is None:
        return [Block("paragraph", f"The plots {NO_PICTURES}.")]
    drawn = [
        _panels(data, "Quality against bytes of the linear layers", _against("weight_bytes", "linear layers")),
        _panels(data, "Quality against peak memory of training", _against("peak_bytes", "peak memory")),
        _panels(data, "Before and after finetuning", _before_and_after),
    ]
    if len({row.rank for row in data.rows}) > 1:
        drawn.insert(2, _panels(data, "Quality against the rank of the adapters", _over_ranks))
    return drawn


Draw = Callable[[Any, ReportData, str, dict[str, str]], None]
"""(axes, data, task, colour of each variant) → None; draws into the axes."""


def _panels(data: ReportData, title: str, draw: Draw) -> Block:
    """One figure with a panel per task."""
    import matplotlib
    from matplotlib.figure import Figure

    variants = list(dict.fromkeys(variant for variant, _ in data.lines))
    colours = {variant: COLOURS[index % len(COLOURS)] for index, variant in enumerate(variants)}
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": title}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6 * len(data.measures) + 0.4, 4.4), layout="constrained")
        for axes, (task, measure) in zip(
            figure.subplots(1, len(data.measures), squeeze=False)[0], data.measures.items(), strict=True
        ):
            draw(axes, data, task, colours)
            axes.set_title(f"{task}: {measure}{' (lower is better)' * (measure == 'perplexity')}", loc="left")
            axes.grid(color="#e6e8eb", zorder=-1)
            if measure == "perplexity":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("{x:g}")
            if task in data.majority_baselines:
                axes.axhline(data.majority_baselines[task]["scores"][measure], color="#8a8f98", lw=1, ls=":")
        legend: dict[str, Any] = {}
        for axes in figure.axes:
            legend |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    code = base64.b64encode(file.getvalue()).decode()
    return Block("image", title, source=f"data:image/svg+xml;base64,{code}")


def _against(cost: str, name: str) -> Draw:
    """Quality over a number of bytes: hollow before finetuning, filled after, standard deviation as a bar."""

    def draw(axes: Any, data: ReportData, task: str, colours: dict[str, str]) -> None:
        rows = [row for row in data.rows if row.task == task]
        unit, scale = next((u, s) for u, s in UNITS if max(getattr(row, cost) for row in rows) >= s or s == 1e3)
        seen: set[str] = set()
        for row in rows:
            x, colour = getattr(row, cost) / scale, colours[row.variant]
            label = row.variant if row.variant not in seen else None
            seen.add(row.variant)
            axes.plot([x, x], [row.before, row.after.mean], color=colour, lw=0.8, alpha=0.5)
            axes.plot(x, row.before, "o", color=colour, mfc="white")
            axes.errorbar(x, row.after.mean, yerr=row.after.spread, fmt="o", color=colour, capsize=3, label=label)
        axes.set_xlabel(f"{name}, {unit} (hollow: before finetuning)")

    return draw


UNITS = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3))


def _over_ranks(axes: Any, data: ReportData, task: str, colours: dict[str, str]) -> None:
    for variant, colour in colours.items():
        rows = sorted(
            (row for row in data.rows if (row.task, row.variant) == (task, variant)), key=lambda row: row.rank
        )
        means, spreads = [row.after.mean for row in rows], [row.after.spread or 0.0 for row in rows]
        axes.errorbar([row.rank for row in rows], means, spreads, fmt="o-", color=colour, capsize=3, label=variant)
    ranks = sorted({row.rank for row in data.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_xlabel("rank of the adapters")


def _before_and_after(axes: Any, data: ReportData, task: str, colours: dict[str, str]) -> None:
    for variant, colour in colours.items():
        label: str | None = variant
        for row in data.rows:
            if (row.task, row.variant) == (task, variant):
                values, spread = [row.before, row.after.mean], [0.0, row.after.spread or 0.0]
                axes.errorbar([0, 1], values, spread, fmt="o-", color=colour, capsize=3, label=label)
                label = None
    axes.set_xticks([0, 1], ["before finetuning", "after"])
    axes.set_xlim(-0.25, 1.25)
