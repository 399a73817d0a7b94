"""What the demo found, in words, tables and one picture; every sentence is made from the numbers of this run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from llmtools.document import Block, markdown, plain_table, size, table

NAMES = {"none": "original", "rtn": "RTN", "optq": "OPTQ"}


@dataclass(frozen=True)
class QuantizeRow:
    """One model after quantizing: what it weighs, how well it knows the text it was made for."""

    bits: int
    quantizer: str
    bits_per_weight: float
    """of the linear layers, scales and zero points included"""
    weight_bytes: int
    """of the linear layers"""
    perplexity: float


@dataclass(frozen=True)
class FinetuneRow:
    """One model before and after finetuning on a domain that is new to it."""

    bits: int
    trainable: int
    adapter_bytes: int
    before: float
    after: float
    seconds: float


@dataclass(frozen=True)
class Sample:
    """What one model writes."""

    bits: int
    story: str
    """before finetuning"""
    article: str
    """after"""


@dataclass
class Results:
    """Everything that the demo measured."""

    model: str
    settings: dict[str, Any]
    quantized: list[QuantizeRow] = field(default_factory=list)
    finetuned: list[FinetuneRow] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def embedded(self) -> bool:
        """Whether this is the model that ships with the demo, about which we know more."""
        return self.model == "stories260K"

    @property
    def original(self) -> QuantizeRow:
        return self.quantized[0]

    def weights_of(self, bits: int) -> QuantizeRow:
        """The row of the model that is finetuned at `bits`: the original, or OPTQ's."""
        return next(row for row in self.quantized if row.bits == bits and row.quantizer in ("none", "optq"))


def write_report(results: Results, out: Path, console: Console) -> None:
    """The tables to `console`; report.json, report.md and quality.png to `out`."""
    from llmtools.checkpoint.run_info import versions

    document = asdict(results) | {"versions": versions()}
    (out / "report.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    (out / "report.md").write_text(markdown(blocks(results)))
    draw(results, out / "quality.png")

    console.print()
    console.rule("[bold]What quantizing costs[/bold]", align="left")
    console.print(quantizing_in_words(results))
    console.print(plain_table(quantized_table(results)), highlight=False)
    console.rule("[bold]What finetuning buys[/bold]", align="left")
    console.print(finetuning_in_words(results))
    console.print(plain_table(finetuned_table(results)), highlight=False)
    console.rule("[bold]What the models write[/bold]", align="left")
    for sample in results.samples:
        console.print(f"[bold]{sample.bits} bits[/bold], before: {one_line(sample.story)}", markup=True)
        console.print(f"         after: {one_line(sample.article)}\n")
    console.rule(align="left")
    console.print(caveats(results))
    console.print(f"\nWritten in {results.seconds:.0f} s: {out}/report.md, report.json, quality.png, models/")


# ---------------------------------------------------------------------------------------------------------- the tables


def quantized_table(results: Results) -> Block:
    header = ["model", "bits per weight", "weights", "perplexity, stories", "× original"]
    rows = [
        [
            f"{row.bits} bits, {NAMES[row.quantizer]}",
            f"{row.bits_per_weight:.2f}",
            size(row.weight_bytes),
            f"{row.perplexity:.2f}",
            f"{row.perplexity / results.original.perplexity:.2f}",
        ]
        for row in results.quantized
    ]
    return table(header, rows)


def finetuned_table(results: Results) -> Block:
    header = ["model", "weights", "adapter", "perplexity, articles", "after finetuning"]
    rows = [
        [
            f"{row.bits} bits, {NAMES[results.weights_of(row.bits).quantizer]}",
            size(results.weights_of(row.bits).weight_bytes),
            size(row.adapter_bytes),
            f"{row.before:.1f}",
            f"{row.after:.1f}",
        ]
        for row in results.finetuned
    ]
    return table(header, rows)


# ----------------------------------------------------------------------------------------------------------- the words


def quantizing_in_words(results: Results) -> str:
    widths = sorted({row.bits for row in results.quantized} - {16}, reverse=True)
    found = {(row.quantizer, row.bits): row.perplexity for row in results.quantized}
    better = [bits for bits in widths if found["optq", bits] < found["rtn", bits]]
    verdict = f"here at {listed(better)} bits" if better else "though not here"
    return (
        f"Perplexity says how unsure a model is of the next token: 1 is certainty. RTN rounds each weight to the "
        f"nearest value of its grid. OPTQ rounds with a sample of text at hand, so that later weights make up for the "
        f"errors of earlier ones, and comes out closer to the original, {verdict}. Storage includes the scales: one "
        f"for every {results.settings['group_size']} weights."
    )


def finetuning_in_words(results: Results) -> str:
    original, *packed = results.finetuned
    gains = ", ".join(f"the {row.bits}-bit one's from {row.before:.1f} to {row.after:.1f}" for row in packed)
    opening = "Wikipedia articles are new to this model." if results.embedded else "Now Wikipedia articles are learned."
    ahead = [row.bits for row in packed if row.after < original.before]
    said = f" At {listed(ahead)} bits it then beats the original without adapters on articles." if ahead else ""
    return (
        f"{opening} The packed weights stay as they are; only the adapters learn, with "
        f"the same {results.settings['steps']} steps for each model. On held-out articles the original's perplexity "
        f"goes from {original.before:.1f} to {original.after:.1f}, {gains}.{said}"
    )


def caveats(results: Results) -> str:
    small = (
        " A model as small as the embedded one has little to spare, so 2 bits hurt it more than they would a large "
        "one, and its adapters are large beside it."
    )
    return (
        "How to read this: sizes are those of the linear layers in the blocks, which were quantized; embeddings stay "
        "as they were and are not counted. Perplexities depend on the tokenizer and the window, so compare them within "
        "this report only. Each number is from one run with one seed." + (small if results.embedded else "")
    )


def blocks(results: Results) -> list[Block]:
    """The report, from what people come for to what it was made with."""
    settings = ", ".join(f"{key} {value}" for key, value in results.settings.items() if key not in ("model", "out"))
    text = [
        Block("title", f"What quantizing {results.model} costs, and what finetuning buys"),
        Block("image", "bits against perplexity, before and after finetuning", source="quality.png"),
        Block("section", "What quantizing costs"),
        Block("paragraph", quantizing_in_words(results)),
        quantized_table(results),
        Block("section", "What finetuning buys"),
        Block("paragraph", finetuning_in_words(results)),
        finetuned_table(results),
        Block("section", "What the models write"),
    ]
    for sample in results.samples:
        text += [
            Block("paragraph", f"{sample.bits} bits"),
            Block("list", f"before: {one_line(sample.story)}\nafter: {one_line(sample.article)}"),
        ]
    made = f"Made in {results.seconds:.0f} s by `make demo`; the same figures as data are in `report.json`."
    return [*text, Block("paragraph", caveats(results)), Block("paragraph", f"Settings: {settings}. {made}")]


def listed(numbers: list[int]) -> str:
    """4, 3 and 2."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def one_line(text: str) -> str:
    return " ".join(text.split())


# --------------------------------------------------------------------------------------------------------- the picture


def draw(results: Results, path: Path) -> None:
    """Two panels over the same widths: what quantizing costs on known text, what finetuning buys on new text."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    blue, grey, green = "#2563a8", "#8a8f98", "#2e8b57"
    widths = [row.bits for row in results.finetuned]
    places = range(len(widths))
    labels = [f"{bits} bits\n{size(results.weights_of(bits).weight_bytes)}" for bits in widths]
    packed = [place for place, bits in zip(places, widths, strict=True) if bits != 16]

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), constrained_layout=True)

    for name, colour, offset, side in (("rtn", grey, (-7, 6), "right"), ("optq", blue, (7, -12), "left")):
        values = [row.perplexity for row in results.quantized if row.quantizer == name]
        left.plot(packed, values, "o-", color=colour, lw=2, ms=7, label=NAMES[name])
        for place, value in zip(packed, values, strict=True):
            label = {"xytext": offset, "textcoords": "offset points", "ha": side, "color": colour}
            left.annotate(f"{value:.2f}", (place, value), **label)
    reference = results.original.perplexity
    left.axhline(reference, color="black", lw=1, ls=":", zorder=0)
    left.plot(0, reference, "o", color="black", ms=7, label="original")
    left.annotate(f"{reference:.2f}", (0, reference), xytext=(0, 7), textcoords="offset points", ha="center")
    left.set_title("What quantizing costs\nperplexity on held-out stories", loc="left", fontsize=12)
    left.legend(loc="upper left", framealpha=1, edgecolor="white", borderpad=0.2)

    before = [row.before for row in results.finetuned]
    after = [row.after for row in results.finetuned]
    for place, high, low in zip(places, before, after, strict=True):
        right.annotate(
            "",
            (place, low),
            (place, high),
            arrowprops={"arrowstyle": "-|>", "color": "#b5bac2", "lw": 2, "shrinkA": 7, "shrinkB": 7},
        )
        right.annotate(f"{high:.0f}", (place, high), xytext=(0, 8), textcoords="offset points", ha="center", color=blue)
        right.annotate(
            f"{low:.1f}", (place, low), xytext=(0, -18), textcoords="offset points", ha="center", color=green
        )
    right.plot(places, before, "o", color=blue, mfc="white", mew=2, ms=8, label="before finetuning")
    right.plot(places, after, "o", color=green, ms=8, label="after finetuning adapters")
    right.set_title("What finetuning buys\nperplexity on held-out Wikipedia articles", loc="left", fontsize=12)
    right.legend(loc="upper left", framealpha=1, edgecolor="white", borderpad=0.2)

    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xticks(list(places), labels)
        axes.set_xlim(-0.5, len(widths) - 0.5)
        low, high = axes.get_ylim()
        axes.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** 0.22)
        ticks = [value for value in TICKS if axes.get_ylim()[0] <= value <= axes.get_ylim()[1]]
        axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
        axes.grid(axis="y", color="#e6e8eb", zorder=-1)
        axes.set_xlabel("bits per weight, and bytes of the linear layers (OPTQ, scales included)")
    figure.suptitle(
        f"{results.model}: quantized, then finetuned (lower is better, logarithmic)", fontsize=13, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


TICKS = [
    1,
    2,
    3,
    4,
    5,
    7,
    10,
    15,
    20,
    30,
    50,
    70,
    100,
    150,
    200,
    300,
    500,
    700,
    1000,
    2000,
    5000,
    10_000,
    100_000,
    1_000_000,
]
