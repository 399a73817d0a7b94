"""Plot of a run's losses, by matplotlib: a PNG beside the adapter."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path

from ..checkpoint.model_card import LOSSES
from ..errors import first_line

log = logging.getLogger(__name__)

NO_PICTURES = "are drawn by matplotlib: pip install 'llmtools[plot]'"
_COLOURS = ("#2563a8", "#c2571a")


def plot_losses(folder: Path) -> None:
    """Plots the training and validation losses of a run's ``metrics.jsonl`` over the steps, as ``loss.png`` beside it.

    Nothing is plotted where no loss was logged; a failure is one line of the log.
    """
    curves = losses(folder / "metrics.jsonl")
    if not any(curves.values()):
        return
    if find_spec("matplotlib") is None:
        log.info("plots of the losses %s", NO_PICTURES)
        return
    try:
        _draw(curves, folder / LOSSES)
    except Exception as error:  # of matplotlib, its fonts, its caches: none may lose the adapter
        log.warning("%s could not be plotted: %s", LOSSES, first_line(error))
        (folder / LOSSES).unlink(missing_ok=True)


def losses(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """``training`` and ``validation`` → [(step, loss)], in the order of the steps."""
    text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
    records = [json.loads(line) for line in text.splitlines()]
    return {
        name: sorted({record["step"]: record[key] for record in records if key in record}.items())
        for name, key in (("training", "loss"), ("validation", "eval_loss"))
    }


def _draw(curves: dict[str, list[tuple[int, float]]], file: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for (name, points), colour in zip(curves.items(), _COLOURS, strict=True):
            if points:
                axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, color=colour, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e6e8eb", zorder=-1)
        axes.legend(frameon=False)
        figure.savefig(file, dpi=120)
