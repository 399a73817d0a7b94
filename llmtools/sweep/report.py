"""The report of a sweep: what each form of the model costs, beside how good it is before and after finetuning.

It is written three times from one list of blocks: Markdown, HTML with the pictures in it (one file that loads nothing),
and the figures as JSON. Runs that differ in the seed alone are one row: their mean and their standard deviation
(n − 1). Every sentence is made from the numbers, and what is missing is said.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..document import Block, figure, markdown, page, plain_table, size, table

Made = dict[str, dict[str, Any]]
"""What each cell of a sweep gave, by its name."""


class Mean(NamedTuple):
    """A figure over seeds."""

    mean: float
    spread: float | None
    """standard deviation (n − 1); None for one run"""
    runs: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        values = list(values)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return figure(self.mean) if self.spread is None else f"{figure(self.mean)} ± {figure(self.spread, self.mean)}"


@dataclass(frozen=True)
class Row:
    """One form of the model, finetuned on one task with adapters of one rank, over all seeds."""

    form: str
    task: str
    rank: int
    seeds: list[int]
    measure: str
    before: float
    after: Mean
    measures: dict[str, Mean]
    """every measure of the task, after finetuning"""
    bits_per_weight: float
    weight_bytes: int
    """of the linear layers"""
    model_bytes: int
    """of everything that is not trained"""
    peak_bytes: float
    """at the peak of a training step, mean over seeds"""
    seconds: float
    """of a finetuning, mean over seeds"""


def rows_of(found: Made) -> list[Row]:
    """The finished cells, those that differ in the seed alone put together; in the order in which they first come."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for cell in found.values():
        if "failed" not in cell:
            groups.setdefault((cell["form"], cell["task"], cell["rank"]), []).append(cell)
    rows = []
    for (form, task, rank), cells in groups.items():
        first, after = cells[0], [cell["after"]["details"] for cell in cells]
        numbers = [key for key, value in after[0].items() if isinstance(value, float)]
        rows.append(
            Row(
                form=form,
                task=task,
                rank=rank,
                seeds=[cell["seed"] for cell in cells],
                measure=first["after"]["measure"],
                before=first["before"]["value"],
                after=Mean.of(cell["after"]["value"] for cell in cells),
                measures={key: Mean.of(details[key] for details in after) for key in numbers},
                bits_per_weight=first["bits_per_weight"],
                weight_bytes=first["weight_bytes"],
                model_bytes=first["model_bytes"],
                peak_bytes=statistics.fmean(cell["peak_bytes"] for cell in cells),
                seconds=statistics.fmean(cell["trained"]["seconds"] for cell in cells),
            )
        )
    return rows


@dataclass(frozen=True)
class Story:
    """What a sweep found."""

    recipe: Any
    sweep: str
    """the recipe as YAML"""
    rows: list[Row]
    parameters: int | None
    """of the model"""
    floors: dict[str, dict[str, Any]]
    """task → what a constant answer scores"""
    examples: dict[str, int]
    """task → how many examples were judged, where it counts them"""
    shortened: dict[str, int]
    """task → how many of these had a prompt too long for the task's limit or the model, which lost a part of it"""
    answer_tokens: dict[str, int | None]
    """task → where an answer ends, for tasks that have answers"""
    trained: dict[str, tuple[int, int]]
    """task → examples that were trained on, and left out, being too long"""
    contexts: dict[str, int]
    """task → tokens in a window, for perplexity"""
    left_out: list[str]
    missing: dict[str, str]
    """cell → why"""
    versions: dict[str, str]
    platform: str
    cells: dict[str, dict[str, Any]]

    def row(self, form: str, task: str, rank: int) -> Row | None:
        return next((row for row in self.rows if (row.form, row.task, row.rank) == (form, task, rank)), None)

    @property
    def measures(self) -> dict[str, str]:
        """task → the measure that counts"""
        return {row.task: row.measure for row in self.rows}

    @property
    def lines(self) -> list[tuple[str, int]]:
        """(form, rank), a line of a table each; forms with more bytes first"""
        found = {(row.form, row.rank): -row.weight_bytes for row in self.rows}
        return sorted(found, key=lambda line: (found[line], line[1]))


def report(
    recipe: Any,
    base: Path,
    cells: list[str],
    found: Made,
    left_out: list[str],
    parameters: int | None,
    floors: dict[str, dict[str, Any]],
    answer_tokens: dict[str, int | None],
) -> str:
    """Writes `base`.md, .json and .html; returns the table of quality as text."""
    from ..files import write_whole
    from .runner import as_yaml

    finished = {name: made for name, made in found.items() if "failed" not in made}
    story = Story(
        recipe=replace(recipe, report=None, report_only=False),
        sweep=as_yaml(recipe),
        rows=rows_of(found),
        parameters=parameters,
        floors=floors,
        examples={made["task"]: made["after"]["details"].get("examples", 0) for made in finished.values()},
        shortened={made["task"]: made["after"]["details"].get("shortened_prompts", 0) for made in finished.values()},
        answer_tokens=answer_tokens,
        trained={
            made["task"]: (made["trained"]["examples"], made["trained"]["left_out"]) for made in finished.values()
        },
        contexts={made["task"]: made["after"]["details"].get("context", 0) for made in finished.values()},
        left_out=left_out,
        missing={
            name: found[name]["failed"] if name in found else "not made yet" for name in cells if name not in finished
        },
        versions={name: version for made in finished.values() for name, version in made["versions"].items()},
        platform=next((made["platform"] for made in finished.values()), ""),
        cells={name: {key: made[key] for key in made if key != "settings"} for name, made in finished.items()},
    )
    text = blocks(story)
    base.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in (
        (".json", as_json(story)),
        (".md", markdown(text)),
        (".html", page(illustrated(text, story))),
    ):
        write_whole(base.with_name(base.name + suffix), content)
    return "\n".join(plain_table(block) for block in text if block.kind == "table")


def illustrated(text: list[Block], story: Story) -> list[Block]:
    """The report with its pictures, which stand before the first section."""
    from .plots import pictures

    first = next((index for index, block in enumerate(text) if block.kind == "section"), len(text))
    return [*text[:first], *pictures(story), *text[first:]]


def as_json(story: Story) -> str:
    rows = [
        asdict(row) | {"after": row.after._asdict(), "measures": {k: m._asdict() for k, m in row.measures.items()}}
        for row in story.rows
    ]
    document = asdict(story) | {"rows": rows}
    return json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n"


# ----------------------------------------------------------------------------------------------------------- the words


def blocks(story: Story) -> list[Block]:
    """The report, from the table that people come for to what it was made with."""
    name = Path(story.recipe.model).name
    ranks = {row.rank for row in story.rows}
    text = [
        Block("title", f"{name}: what fewer bits cost, and what finetuning gives back"),
        Block("code", "llmtools sweep sweep.yaml"),
        Block("paragraph", opening(story)),
        Block("section", "Quality"),
    ]
    if story.rows:
        text += [
            quality(story, with_rank=len(ranks) > 1),
            Block("paragraph", how_to_read(story)),
            Block("section", "What it costs"),
            costs(story, with_rank=len(ranks) > 1),
            Block(
                "words",
                "Memory is that of tensors: all that stays, and the most that a step of training allocates beside it "
                "(on a GPU the allocator's peak). It depends on the task through the length of its examples. Seconds "
                "are those of a finetuning with loading, by the clock: on a machine that was busy with other things "
                "they compare nothing.",
            ),
            Block("section", "Every measure, after finetuning"),
            *every_measure(story),
        ]
    text += [Block("section", "What these numbers can and cannot show"), Block("paragraph", limits(story))]
    text += [Block("paragraph", verdict) for verdict in verdicts(story)]
    if story.left_out or story.missing:
        gone = [f"{cell}: {why}" for cell, why in story.missing.items()]
        text += [Block("section", "Missing"), Block("list", "\n".join([*story.left_out, *gone]))]
    if story.cells:
        commands = next(iter(reversed(story.cells.values())))["commands"]
        text += [
            Block("section", "One cell by hand"),
            Block("paragraph", "Each cell's file has its commands; these are of one:"),
            Block("code", "\n".join(commands)),
        ]
    text += [Block("section", "sweep.yaml"), Block("code", story.sweep)]
    if story.versions:
        made = ", ".join(f"{name} {version}" for name, version in story.versions.items())
        text += [Block("paragraph", f"Made with {made} on {story.platform}.")]
    return text


def opening(story: Story) -> str:
    recipe = story.recipe
    size = f" ({story.parameters:,} parameters)" if story.parameters else ""
    rounded = f", rounded to {recipe.dtype} first" if recipe.dtype else ""
    budget = ", ".join(f"{key} {value}" for key, value in recipe.training.items())
    return (
        f"One model, {Path(recipe.model).name}{size}{rounded}, in each of the forms below. The linear layers of its "
        f"blocks are quantized; embeddings and norms stay as they are. LoRA adapters (alpha {recipe.lora.alpha:g}, "
        f"rank {', '.join(map(str, recipe.ranks))}) are then trained on each task with the same budget for each form"
        f"{f': {budget}' if budget else ''}. Seeds: {', '.join(map(str, recipe.seeds))}."
    )


def quality(story: Story, with_rank: bool) -> Block:
    header = ["weights", *(["rank"] if with_rank else []), "bits a weight", "linear layers", "whole model"]
    for task, measure in story.measures.items():
        header += [f"{task}: {measure} before", "after"]
    rows = []
    for form, rank in story.lines:
        found = [story.row(form, task, rank) for task in story.measures]
        any_one = next(row for row in found if row)
        line = [form, *([str(rank)] if with_rank else []), f"{any_one.bits_per_weight:.2f}"]
        line += [size(any_one.weight_bytes), size(any_one.model_bytes)]
        for row in found:
            line += [figure(row.before), str(row.after)] if row else ["–", "–"]
        rows.append(tuple(line))
    if story.floors:
        line = ["always the same answer", *([""] if with_rank else []), "", "", ""]
        for task, measure in story.measures.items():
            line += ["", figure(story.floors[task]["scores"][measure]) if task in story.floors else ""]
        rows.append(tuple(line))
    return table(header, rows)


def costs(story: Story, with_rank: bool) -> Block:
    header = ["weights", *(["rank"] if with_rank else [])]
    header += [f"{task}: {what}" for task in story.measures for what in ("memory at the peak", "seconds")]
    rows = []
    for form, rank in story.lines:
        line = [form, *([str(rank)] if with_rank else [])]
        for task in story.measures:
            row = story.row(form, task, rank)
            line += [size(row.peak_bytes), f"{row.seconds:.0f}"] if row else ["–", "–"]
        rows.append(tuple(line))
    return table(header, rows)


def every_measure(story: Story) -> Iterator[Block]:
    for task in story.measures:
        rows = [row for form, rank in story.lines if (row := story.row(form, task, rank))]
        names = [name for name in rows[0].measures if name != "nll"]
        lines = [(f"{row.form}, rank {row.rank}", *(str(row.measures[name]) for name in names)) for row in rows]
        if task in story.floors:
            scores = story.floors[task]["scores"]
            lines.append(("always the same answer", *(figure(scores[n]) if n in scores else "" for n in names)))
        yield table((task, *names), lines)


def how_to_read(story: Story) -> str:
    runs = sorted({row.after.runs for row in story.rows})
    spread = (
        f"After ± stands the standard deviation (n − 1) over {' or '.join(map(str, runs))} seeds of training"
        f"{', and a figure without it is of one' if runs[0] == 1 else ''}; quantizing and the figures before "
        f"finetuning have no seed."
        if runs[-1] > 1
        else "Each figure is of one run with one seed, so small differences mean nothing."
    )
    given = ", ".join(f"{task}: {floor['answer']!r}" for task, floor in story.floors.items())
    same = f' "Always the same answer" is what the commonest right answer scores, given each time ({given}).'
    return f"Perplexity is better when lower, all else when higher. {spread}{same if given else ''}"


SMALL = 100_000_000
"""Parameters below which a model is said to be too small for its scores to mean much."""


def limits(story: Story) -> str:
    small = (
        f"A model of {story.parameters:,} parameters, with so short a training, cannot be expected to master such "
        f"tasks. The table shows how the forms compare at this size and after this budget, and that each goes the "
        f"whole way. It does not show what they would do to a large model, which has more to spare at the same bits. "
        if story.parameters and story.parameters < SMALL
        else ""
    )
    judged = [
        f"{count} examples of {task} ({story.shortened[task]} with a shortened prompt, answers of at most "
        f"{story.answer_tokens.get(task)} tokens)"
        for task, count in story.examples.items()
        if count
    ]
    cut = "Right answers that are longer than these limits can be met in part alone. " if judged else ""
    judged += [f"{task} in windows of {length} tokens" for task, length in story.contexts.items() if length]
    was_judged = f"Judged were {', '.join(judged)}. " if judged else ""
    long = [f"{out} of {kept + out} examples of {task}" for task, (kept, out) in story.trained.items() if out]
    left_out = f"Left out of the training, being too long, were {', '.join(long)}. " if long else ""
    return (
        f"{small}{was_judged}{cut}{left_out}The spread is over seeds of training alone: it does not "
        f"count that other examples would have given other scores. Perplexities depend on the tokenizer and the window."
    )


def verdicts(story: Story) -> Iterator[str]:
    """For each task with answers: which forms do better than always giving the same one."""
    for task, floor in story.floors.items():
        rows = [row for row in story.rows if row.task == task]
        if not rows:
            continue
        measure, constant = rows[0].measure, floor["scores"][rows[0].measure]
        count = story.examples.get(task, 0)
        error = math.sqrt(constant * (1 - constant) / count) if measure == "accuracy" and count else 0.0
        above = [row for row in rows if row.after.mean - 2 * max(error, row.after.spread or 0.0) > constant]
        margin = "more than two standard deviations over seeds, as far as there are several"
        if error:
            margin = f"more than two standard errors ({figure(error)} each, with {count} examples) or deviations"
        names = ", ".join(dict.fromkeys(row.form for row in above))
        others = [form for form in dict.fromkeys(row.form for row in rows) if form not in {row.form for row in above}]
        constantly = f"always giving the same answer ({measure} {figure(constant)})"
        if above:
            rest = f" Not so: {', '.join(others)}." if others else ""
            yield f"{task}: better than {constantly} by {margin}: {names}.{rest}"
        else:
            yield (
                f"{task}: no form is better than {constantly} by {margin}. These figures are those of guessing, and "
                f"differences between them say nothing about the forms."
            )
