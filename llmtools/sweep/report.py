"""The report of a sweep: the cost of each variant of the model, and its quality before and after finetuning.

It is written in three formats from one list of blocks: Markdown, self-contained HTML with the plots, and the figures as
JSON. Runs that differ in the seed alone are one row: mean and standard deviation (n − 1). The text follows from the
numbers, and lists the missing runs.
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

Results = dict[str, dict[str, Any]]
"""Result of each run of a sweep, by its name."""


class Mean(NamedTuple):
    """Mean of a figure over seeds."""

    mean: float
    """Mean over seeds."""
    spread: float | None
    """Standard deviation (n − 1); None for one run."""
    runs: int
    """Number of seeds."""

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        values = list(values)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return figure(self.mean) if self.spread is None else f"{figure(self.mean)} ± {figure(self.spread, self.mean)}"


@dataclass(frozen=True)
class Row:
    """One variant of the model, finetuned on one task with adapters of one rank, over all seeds."""

    variant: str
    """Label of the variant."""
    task: str
    """Name of the task."""
    rank: int
    """Rank of the LoRA adapters."""
    seeds: list[int]
    """Random seeds of the runs."""
    measure: str
    """Name of the task's main measure."""
    before: float
    """Main measure before finetuning."""
    after: Mean
    """Main measure after finetuning."""
    measures: dict[str, Mean]
    """All measures of the task, after finetuning."""
    bits_per_weight: float
    """Bits per weight of the linear layers, scales included."""
    weight_bytes: int
    """Bytes of the linear layers."""
    model_bytes: int
    """Bytes of all frozen tensors."""
    peak_bytes: float
    """Bytes at the peak of a training step, mean over seeds."""
    seconds: float
    """Seconds of a finetuning, mean over seeds."""


def rows_of(found: Results) -> list[Row]:
    """The finished runs, grouped over seeds, in the order of their first run."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for run in found.values():
        if "failed" not in run:
            variant = run["variant"] if "variant" in run else run["form"]  # "form" in results of earlier versions
            groups.setdefault((variant, run["task"], run["rank"]), []).append(run)
    rows = []
    for (variant, task, rank), runs in groups.items():
        first, after = runs[0], [run["after"]["details"] for run in runs]
        names = [key for key, value in after[0].items() if isinstance(value, float)]
        rows.append(
            Row(
                variant=variant,
                task=task,
                rank=rank,
                seeds=[run["seed"] for run in runs],
                measure=first["after"]["measure"],
                before=first["before"]["value"],
                after=Mean.of(run["after"]["value"] for run in runs),
                measures={key: Mean.of(details[key] for details in after) for key in names},
                bits_per_weight=first["bits_per_weight"],
                weight_bytes=first["weight_bytes"],
                model_bytes=first["model_bytes"],
                peak_bytes=statistics.fmean(run["peak_bytes"] for run in runs),
                seconds=statistics.fmean(run["trained"]["seconds"] for run in runs),
            )
        )
    return rows


@dataclass(frozen=True)
class ReportData:
    """The results of a sweep, as the report states them."""

    recipe: Any
    """The sweep's options, a `runner.Sweep`."""
    sweep: str
    """The same as YAML."""
    rows: list[Row]
    """Finished runs, grouped over seeds."""
    parameters: int | None
    """Number of the model's parameters."""
    majority_baselines: dict[str, dict[str, Any]]
    """Task → scores of its majority-class baseline."""
    examples: dict[str, int]
    """Task → number of evaluated examples; 0 where it does not count them."""
    shortened: dict[str, int]
    """Task → number of evaluated examples with a truncated prompt."""
    answer_tokens: dict[str, int | None]
    """Task → maximum number of tokens of an answer; None for tasks without answers."""
    trained: dict[str, tuple[int, int]]
    """Task → numbers of training examples used, and left out for their length."""
    contexts: dict[str, int]
    """Task → tokens in a window, for perplexity; else 0."""
    left_out: list[str]
    """A line for each baseline that was skipped."""
    missing: dict[str, str]
    """Name of a run without a result → reason."""
    versions: dict[str, str]
    """Versions of the packages that the results depend on."""
    platform: str
    """Operating system and machine."""
    runs: dict[str, dict[str, Any]]
    """Name of a finished run → its result, without settings."""

    def row(self, variant: str, task: str, rank: int) -> Row | None:
        return next((row for row in self.rows if (row.variant, row.task, row.rank) == (variant, task, rank)), None)

    @property
    def measures(self) -> dict[str, str]:
        """Task → its main measure."""
        return {row.task: row.measure for row in self.rows}

    @property
    def lines(self) -> list[tuple[str, int]]:
        """(variant, rank) of each line of a table; larger variants first."""
        found = {(row.variant, row.rank): -row.weight_bytes for row in self.rows}
        return sorted(found, key=lambda line: (found[line], line[1]))


def report(
    recipe: Any,
    base: Path,
    runs: list[str],
    found: Results,
    left_out: list[str],
    parameters: int | None,
    majority_baselines: dict[str, dict[str, Any]],
    answer_tokens: dict[str, int | None],
) -> str:
    """Writes `base`.md, .json and .html; returns the table of quality as text.

    runs: names of all runs of the grid. found: results by name. The other arguments are fields of `ReportData`.
    """
    from ..files import write_whole
    from .runner import as_yaml

    finished = {name: result for name, result in found.items() if "failed" not in result}
    data = ReportData(
        recipe=replace(recipe, report=None, report_only=False),
        sweep=as_yaml(recipe),
        rows=rows_of(found),
        parameters=parameters,
        majority_baselines=majority_baselines,
        examples={result["task"]: result["after"]["details"].get("examples", 0) for result in finished.values()},
        shortened={
            result["task"]: result["after"]["details"].get("shortened_prompts", 0) for result in finished.values()
        },
        answer_tokens=answer_tokens,
        trained={
            result["task"]: (result["trained"]["examples"], result["trained"]["left_out"])
            for result in finished.values()
        },
        contexts={result["task"]: result["after"]["details"].get("context", 0) for result in finished.values()},
        left_out=left_out,
        missing={
            name: found[name]["failed"] if name in found else "not run yet" for name in runs if name not in finished
        },
        versions={name: version for result in finished.values() for name, version in result["versions"].items()},
        platform=next((result["platform"] for result in finished.values()), ""),
        runs={name: {key: result[key] for key in result if key != "settings"} for name, result in finished.items()},
    )
    text = blocks(data)
    base.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in (
        (".json", as_json(data)),
        (".md", markdown(text)),
        (".html", page(with_plots(text, data))),
    ):
        write_whole(base.with_name(base.name + suffix), content)
    return "\n".join(plain_table(block) for block in text if block.kind == "table")


def with_plots(text: list[Block], data: ReportData) -> list[Block]:
    """The report with its plots before the first section."""
    from .plots import plots

    first = next((index for index, block in enumerate(text) if block.kind == "section"), len(text))
    return [*text[:first], *plots(data), *text[first:]]


def as_json(data: ReportData) -> str:
    rows = [
        asdict(row) | {"after": row.after._asdict(), "measures": {k: m._asdict() for k, m in row.measures.items()}}
        for row in data.rows
    ]
    document = asdict(data) | {"rows": rows}
    return json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n"


# ------------------------------------------------------------------------------------------------------------ the text


def blocks(data: ReportData) -> list[Block]:
    """The blocks of the report, from the table of quality to the versions."""
    name = Path(data.recipe.model).name
    ranks = {row.rank for row in data.rows}
    text = [
        Block("title", f"{name}: the cost of fewer bits, and what finetuning recovers"),
        Block("code", "llmtools sweep sweep.yaml"),
        Block("paragraph", opening(data)),
        Block("section", "Quality"),
    ]
    if data.rows:
        text += [
            quality(data, with_rank=len(ranks) > 1),
            Block("paragraph", how_to_read(data)),
            Block("section", "What it costs"),
            costs(data, with_rank=len(ranks) > 1),
            Block(
                "paragraph",
                "Memory is that of tensors: all persistent ones, and the peak of what a training step allocates beside "
                "them (on a GPU the allocator's peak). It depends on the task through the length of its examples. "
                "Seconds are the wall time of a finetuning with loading: comparable only if nothing else ran on the "
                "machine.",
            ),
            Block("section", "Every measure, after finetuning"),
            *every_measure(data),
        ]
    text += [Block("section", "What these numbers can and cannot show"), Block("paragraph", limits(data))]
    text += [Block("paragraph", verdict) for verdict in verdicts(data)]
    if data.left_out or data.missing:
        gone = [f"{run}: {why}" for run, why in data.missing.items()]
        text += [Block("section", "Missing"), Block("list", "\n".join([*data.left_out, *gone]))]
    if data.runs:
        commands = next(iter(reversed(data.runs.values())))["commands"]
        text += [
            Block("section", "Reproducing one run"),
            Block("paragraph", "Each run's file lists its commands; those of one run:"),
            Block("code", "\n".join(commands)),
        ]
    text += [Block("section", "sweep.yaml"), Block("code", data.sweep)]
    if data.versions:
        versions = ", ".join(f"{name} {version}" for name, version in data.versions.items())
        text += [Block("paragraph", f"Made with {versions} on {data.platform}.")]
    return text


def opening(data: ReportData) -> str:
    from .runner import is_quantized

    recipe = data.recipe
    size = f" ({data.parameters:,} parameters)" if data.parameters else ""
    given = is_quantized(recipe.model)
    rounded = f", cast to {recipe.dtype} first" if recipe.dtype and not given else ""
    stored = "" if given else " The linear layers of its blocks are quantized; embeddings and norms are not."
    budget = ", ".join(f"{key} {value}" for key, value in recipe.training.items())
    return (
        f"One model, {Path(recipe.model).name}{size}{rounded}, "
        f"{'quantized already, as it is' if given else 'in each of the variants below'}.{stored} "
        f"LoRA adapters (alpha {recipe.lora.alpha:g}, "
        f"rank {', '.join(map(str, recipe.ranks))}) are then trained on each task with the same budget for each variant"
        f"{f': {budget}' if budget else ''}. Seeds: {', '.join(map(str, recipe.seeds))}."
    )


def quality(data: ReportData, with_rank: bool) -> Block:
    header = ["weights", *(["rank"] if with_rank else []), "bits per weight", "linear layers", "whole model"]
    for task, measure in data.measures.items():
        header += [f"{task}: {measure} before", "after"]
    rows = []
    for variant, rank in data.lines:
        found = [data.row(variant, task, rank) for task in data.measures]
        first = next(row for row in found if row)
        line = [variant, *([str(rank)] if with_rank else []), f"{first.bits_per_weight:.2f}"]
        line += [size(first.weight_bytes), size(first.model_bytes)]
        for row in found:
            line += [figure(row.before), str(row.after)] if row else ["–", "–"]
        rows.append(tuple(line))
    if data.majority_baselines:
        line = ["majority-class baseline", *([""] if with_rank else []), "", "", ""]
        for task, measure in data.measures.items():
            line += [
                "",
                figure(data.majority_baselines[task]["scores"][measure]) if task in data.majority_baselines else "",
            ]
        rows.append(tuple(line))
    return table(header, rows)


def costs(data: ReportData, with_rank: bool) -> Block:
    header = ["weights", *(["rank"] if with_rank else [])]
    header += [f"{task}: {what}" for task in data.measures for what in ("peak memory", "seconds")]
    rows = []
    for variant, rank in data.lines:
        line = [variant, *([str(rank)] if with_rank else [])]
        for task in data.measures:
            row = data.row(variant, task, rank)
            line += [size(row.peak_bytes), f"{row.seconds:.0f}"] if row else ["–", "–"]
        rows.append(tuple(line))
    return table(header, rows)


def every_measure(data: ReportData) -> Iterator[Block]:
    for task in data.measures:
        rows = [row for variant, rank in data.lines if (row := data.row(variant, task, rank))]
        names = [name for name in rows[0].measures if name != "nll"]
        lines = [(f"{row.variant}, rank {row.rank}", *(str(row.measures[name]) for name in names)) for row in rows]
        if task in data.majority_baselines:
            scores = data.majority_baselines[task]["scores"]
            lines.append(("majority-class baseline", *(figure(scores[n]) if n in scores else "" for n in names)))
        yield table((task, *names), lines)


def how_to_read(data: ReportData) -> str:
    runs = sorted({row.after.runs for row in data.rows})
    spread = (
        f"± is the standard deviation (n − 1) over {' or '.join(map(str, runs))} seeds of training"
        f"{', and a figure without it is of one' if runs[0] == 1 else ''}; quantization and the figures before "
        f"finetuning do not depend on the seed."
        if runs[-1] > 1
        else "Each figure is of one run with one seed, so small differences are not significant."
    )
    given = ", ".join(f"{task}: {scored['answer']!r}" for task, scored in data.majority_baselines.items())
    majority = f" The majority-class baseline always gives the most common reference answer ({given})."
    return f"Perplexity is better when lower, all else when higher. {spread}{majority if given else ''}"


SMALL = 100_000_000
"""Number of parameters below which the report warns that the model is too small for meaningful scores."""


def limits(data: ReportData) -> str:
    small = (
        f"A model of {data.parameters:,} parameters, with so short a training, cannot be expected to master such "
        f"tasks. The table compares the variants at this size and with this budget. It says little about large "
        f"models, which lose less quality at the same bits per weight. "
        if data.parameters and data.parameters < SMALL
        else ""
    )
    evaluated = [
        f"{count} examples of {task} ({data.shortened[task]} with a truncated prompt, answers of at most "
        f"{data.answer_tokens.get(task)} tokens)"
        for task, count in data.examples.items()
        if count
    ]
    cut = "A reference answer longer than these limits can be matched only in part. " if evaluated else ""
    evaluated += [f"{task} in windows of {length} tokens" for task, length in data.contexts.items() if length]
    evaluation = f"The evaluation took {', '.join(evaluated)}. " if evaluated else ""
    long = [f"{out} of {kept + out} examples of {task}" for task, (kept, out) in data.trained.items() if out]
    left_out = f"Left out of the training for their length were {', '.join(long)}. " if long else ""
    return (
        f"{small}{evaluation}{cut}{left_out}The standard deviation is over training seeds alone: it does not include "
        f"the sampling of test examples. Perplexities depend on the tokenizer and the window."
    )


def verdicts(data: ReportData) -> Iterator[str]:
    """For each task with answers: which variants are better than its majority-class baseline."""
    for task, scored in data.majority_baselines.items():
        rows = [row for row in data.rows if row.task == task]
        if not rows:
            continue
        measure, constant = rows[0].measure, scored["scores"][rows[0].measure]
        count = data.examples.get(task, 0)
        error = math.sqrt(constant * (1 - constant) / count) if measure == "accuracy" and count else 0.0
        above = [row for row in rows if row.after.mean - 2 * max(error, row.after.spread or 0.0) > constant]
        margin = "more than two standard deviations over seeds (where there are several)"
        if error:
            margin = f"more than two standard errors ({figure(error)} each, with {count} examples) or deviations"
        names = ", ".join(dict.fromkeys(row.variant for row in above))
        others = [name for name in dict.fromkeys(row.variant for row in rows) if name not in {r.variant for r in above}]
        baseline = f"the majority-class baseline ({measure} {figure(constant)})"
        if above:
            rest = f" Not better: {', '.join(others)}." if others else ""
            yield f"{task}: better than {baseline} by {margin}: {names}.{rest}"
        else:
            yield (
                f"{task}: no variant is better than {baseline} by {margin}. These figures are at chance level, and "
                f"differences between them say nothing about the variants."
            )
