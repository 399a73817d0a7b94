"""The picture of a run's losses, drawn by matplotlib: a PNG beside the adapter."""

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


def draw_losses(folder: Path) -> None:
    """Draws the losses in a run's ``metrics.jsonl`` over the steps, training and validation, as ``loss.png`` beside it.

    Nothing is drawn where no loss was logged. Where it cannot be drawn, one line of the log says why.
    """
    lines = losses(folder / "metrics.jsonl")
    if not any(lines.values()):
        return
    if find_spec("matplotlib") is None:
        log.info("pictures of the losses %s", NO_PICTURES)
        return
    try:
        _draw_lines(lines, folder / LOSSES)
    except Exception as error:  # of matplotlib, its fonts, its caches: no reason to lose an adapter
        log.warning("%s could not be drawn: %s", LOSSES, first_line(error))
        (folder / LOSSES).unlink(missing_ok=True)


def losses(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of training and of validation, in the order of the steps."""
    text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
    records = [json.loads(line) for line in text.splitlines()]
    return {
        name: sorted({record["step"]: record[key] for record in records if key in record}.items())
        for name, key in (("training", "loss"), ("validation", "eval_loss"))
    }


def _draw_lines(lines: dict[str, list[tuple[int, float]]], file: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for (name, points), colour in zip(lines.items(), _COLOURS, strict=True):
            if points:
                axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, color=colour, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e6e8eb", zorder=-1)
        axes.legend(frameon=False)
        figure.savefig(file, dpi=120)
