"""What the demo found, in words, tables and one picture; every sentence is made from the numbers of this run."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from llmtools.document import Block, figure, markdown, page, plain_table, size, table

NAMES = {"none": "original", "rtn": "RTN", "qtip": "QTIP"}


@dataclass(frozen=True)
class ModelRow:
    """One model: what it weighs, how well it knows held-out text, what it says."""

    bits: int
    quantizer: str
    bits_per_weight: float
    """of the linear layers, scales and zero points included"""
    weight_bytes: int
    """of the linear layers"""
    file_bytes: int
    """of the whole model: linear layers, and embeddings in 16 bits"""
    perplexity: float
    answers: dict[str, str]
    """prompt → answer"""

    @property
    def title(self) -> str:
        return f"{self.bits} bits, {NAMES[self.quantizer]}"


@dataclass(frozen=True)
class FinetunedRow:
    """One model before and after finetuning on a task that is new to it."""

    bits: int
    measure: str
    """main measure: exact_match, or perplexity"""
    before: dict[str, Any]
    after: dict[str, Any]
    trainable: int
    adapter_bytes: int
    seconds: float

    @property
    def shares(self) -> bool:
        """Whether the measures are shares of 1, of which more is better."""
        return self.measure != "perplexity"


@dataclass(frozen=True)
class Sample:
    """What one model says to one prompt of the task."""

    bits: int
    prompt: str
    expected: str
    before: str
    after: str


@dataclass
class Results:
    """Everything that the demo measured."""

    model: str
    bits: int
    goal: str
    """what the adapters learn"""
    text: str
    """what the perplexity was measured on"""
    settings: dict[str, Any] = field(default_factory=dict)
    models: list[ModelRow] = field(default_factory=list)
    finetuned: list[FinetunedRow] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    next_commands: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def name_of(self, bits: int) -> str:
        """The title of the model that was finetuned at `bits`: the original, or QTIP's."""
        return next(row for row in self.models if row.bits == bits and row.quantizer in ("none", "qtip")).title


def write_report(results: Results, out: Path, console: Console) -> None:
    """The tables to `console`; report.html, report.md, report.json and quality.png to `out`."""
    from llmtools.checkpoint.run_info import versions

    document = asdict(results) | {"versions": versions()}
    (out / "report.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(results, out / "quality.png")
    (out / "report.md").write_text(markdown(blocks(results, "quality.png")), encoding="utf-8")
    inline = base64.b64encode((out / "quality.png").read_bytes()).decode()
    (out / "report.html").write_text(page(blocks(results, f"data:image/png;base64,{inline}")), encoding="utf-8")

    console.print()
    for block in told(results):
        if block.kind == "section":
            console.rule(f"[bold]{block.text}[/bold]", align="left")
        elif block.kind == "table":
            console.print(plain_table(block), markup=False, soft_wrap=True)
        elif block.kind == "list":
            for line in block.text.splitlines():
                console.print(f"  {line}", markup=False)
        else:
            console.print(block.text, markup=False, soft_wrap=block.kind == "code")
    files = ", ".join(("report.html", "report.md", "report.json", "quality.png", "models/"))
    console.print(f"\nWritten in {results.seconds:.0f} s to {out}: {files}")


# ----------------------------------------------------------------------------------------------------------- the report


def blocks(results: Results, picture: str) -> list[Block]:
    """The report with its picture."""
    title = f"{results.model} in {results.bits} bits: what quantizing costs, and what finetuning buys"
    said = "perplexity and bytes of each model; the task before and after finetuning"
    settings = ", ".join(f"{key} {value}" for key, value in results.settings.items() if key not in ("model", "out"))
    made = f"Made in {results.seconds:.0f} s by `make demo`; the same figures as data are in `report.json`."
    made += f" Settings: {settings}."
    return [Block("title", title), Block("image", said, source=picture), *told(results), Block("paragraph", made)]


def told(results: Results) -> list[Block]:
    """The part that is printed, too."""
    return [
        Block("section", "What quantizing costs"),
        Block("paragraph", quantizing_in_words(results)),
        quantized_table(results),
        *answers(results),
        Block("section", "What finetuning buys"),
        Block("paragraph", finetuning_in_words(results)),
        finetuned_table(results),
        *samples(results),
        Block("section", "How to read this"),
        Block("paragraph", caveats(results)),
        Block("section", "What to type next"),
        Block("code", "\n".join(results.next_commands)),
    ]


def quantized_table(results: Results) -> Block:
    header = ["model", "bits per weight", "linear layers", "whole model", "perplexity"]
    rows = [
        [row.title, f"{row.bits_per_weight:.2f}", size(row.weight_bytes), size(row.file_bytes), figure(row.perplexity)]
        for row in results.models
    ]
    return table(header, rows)


def finetuned_table(results: Results) -> Block:
    keys = [key for key, value in results.finetuned[0].before.items() if isinstance(value, float) and key != "nll"]
    header = ["model", "adapter", *[f"{key.replace('_', ' ')}: before → after" for key in keys], "training"]
    rows = [
        [
            results.name_of(row.bits),
            size(row.adapter_bytes),
            *[f"{_score(row, row.before[key])} → {_score(row, row.after[key])}" for key in keys],
            f"{row.seconds:.0f} s",
        ]
        for row in results.finetuned
    ]
    return table(header, rows)


def _score(row: FinetunedRow, value: float) -> str:
    return f"{100 * value:.0f} %" if row.shares else figure(value)


def answers(results: Results) -> list[Block]:
    """What each model says, side by side."""
    found: list[Block] = []
    for prompt in results.models[0].answers:
        lines = [f"{row.title}: {shortened(row.answers[prompt])}" for row in results.models]
        found += [Block("paragraph", f"“{prompt}”"), Block("list", "\n".join(lines))]
    return found


def samples(results: Results) -> list[Block]:
    """What each model says to the task before and after finetuning, prompt by prompt."""
    found: list[Block] = []
    for prompt in dict.fromkeys(sample.prompt for sample in results.samples):
        of_prompt = [sample for sample in results.samples if sample.prompt == prompt]
        lines = [f"{results.name_of(one.bits)}, before: {shortened(one.before)}" for one in of_prompt]
        lines += [f"{results.name_of(one.bits)}, after: {shortened(one.after)}" for one in of_prompt]
        found += [Block("paragraph", f"“{prompt.strip()}”"), Block("list", "\n".join(lines))]
    return found


def shortened(text: str, most: int = 110) -> str:
    return (text if len(text) <= most else f"{text[:most].rstrip()} …") or "(nothing)"


# ----------------------------------------------------------------------------------------------------------- the words


def quantizing_in_words(results: Results) -> str:
    original, rtn, qtip = results.models
    better = "further from" if qtip.perplexity > rtn.perplexity else "closer to"
    return (
        f"Perplexity on {results.text} says how unsure a model is of the next token: 1 is certainty, lower is better. "
        f"RTN rounds each weight to the nearest value of its grid: {figure(original.perplexity)} becomes "
        f"{figure(rtn.perplexity)}. QTIP rotates the weights, and rounds 256 at a time along the paths of a "
        f"trellis with a sample of text at hand, so that later weights make up for the errors of earlier ones: "
        f"{figure(qtip.perplexity)}, {better} the original. Its linear layers take {size(qtip.weight_bytes)} instead "
        f"of {size(original.weight_bytes)}."
    )


def finetuning_in_words(results: Results) -> str:
    whole, packed = results.finetuned
    examples = f"{whole.before['examples']} held-out examples" if "examples" in whole.before else "held-out text"
    scores = [_score(row, each[row.measure]) for row in (whole, packed) for each in (row.before, row.after)]
    return (
        f"The models learn to {results.goal}. The weights stay as they are, in {results.bits} bits too; only the "
        f"adapters learn, in {results.settings['max_steps']} steps on the same examples. Those of the quantized model "
        f"start from the error of its quantization (--lora.init error), the others from zero. "
        f"{whole.measure.replace('_', ' ').capitalize()} on {examples}: in 16 bits {scores[0]} before and {scores[1]} "
        f"after, in {results.bits} bits {scores[2]} before and {scores[3]} after."
    )


def caveats(results: Results) -> str:
    of_json = (
        "Exact match is the share of answers that are the right JSON record as a whole, fields the share of its single "
        "fields, valid the share of answers that are JSON at all. "
        if results.finetuned[0].shares
        else ""
    )
    return (
        "Linear layers are what is quantized; embeddings stay in 16 bits, and weigh much in a small model. "
        "Perplexities depend on the tokenizer, the text and the window, so compare them within this report only. "
        f"{of_json}Each number is from one run with one seed. Large models lose less at 2 bits than small ones."
    )


# --------------------------------------------------------------------------------------------------------- the picture

GREY, BLUE, GREEN, LIGHT = "#8a8f98", "#2563a8", "#2e8b57", "#c9ced6"


def draw(results: Results, path: Path) -> None:
    """Two panels of bars: perplexity and bytes of each model, and the task before and after finetuning."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    made, (left, right) = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    _draw_models(results, left)
    _draw_task(results, right)
    made.suptitle(f"{results.model}: quantized to {results.bits} bits, then finetuned", x=0.01, ha="left", fontsize=13)
    made.savefig(path, dpi=120)
    plt.close(made)


def _draw_models(results: Results, axes: Any) -> None:
    rows = results.models
    values = [row.perplexity for row in rows]
    axes.bar(range(len(rows)), values, color=["black", GREY, BLUE], width=0.6)
    for place, value in enumerate(values):
        axes.annotate(figure(value), (place, value), xytext=(0, 4), textcoords="offset points", ha="center")
    axes.set_yscale("log")
    axes.set_ylim(1, max(values) * 3)
    axes.set_xticks(range(len(rows)), [f"{row.title}\nlinears: {size(row.weight_bytes)}" for row in rows])
    axes.set_title(
        f"What quantizing costs: {results.text}\nperplexity, lower is better (logarithmic)", loc="left", fontsize=10
    )


def _draw_task(results: Results, axes: Any) -> None:
    rows, measure = results.finetuned, results.finetuned[0].measure
    scale = 100 if rows[0].shares else 1
    for shift, colour, label in ((-0.18, LIGHT, "before finetuning"), (0.18, GREEN, "after")):
        values = [scale * (row.before if shift < 0 else row.after)[measure] for row in rows]
        places = [place + shift for place in range(len(rows))]
        axes.bar(places, values, color=colour, width=0.34, label=label)
        for row, place, value in zip(rows, places, values, strict=True):
            text = _score(row, value / scale)
            axes.annotate(text, (place, value), xytext=(0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(
        range(len(rows)), [f"{results.name_of(row.bits)}\n+ {size(row.adapter_bytes)} of adapters" for row in rows]
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.2)
    better = "higher" if rows[0].shares else "lower"
    name = measure.replace("_", " ")
    axes.set_title(f"What finetuning buys: {results.goal}\n{name}, {better} is better", loc="left", fontsize=10)
    axes.legend(loc="upper left", frameon=False, ncols=2)
