"""Quantizer × bits × rank × task × seed on one model, each evaluated before and after finetuning, in one report.

A sweep is the recipes `quantize`, `finetune` and `evaluate` over a grid. A variant is one way of storing the model's
weights; a run finetunes one variant on one task, with one rank and seed. All results lie in one folder, the measures
in small JSON files, each written atomically, with the settings it was obtained with:

    OUT/models/VARIANT, VARIANT.json       the quantized model, shared by all runs
    OUT/before/VARIANT.TASK.json           evaluation before finetuning
    OUT/adapters/VARIANT.TASK.rR.sS        adapter
    OUT/runs/VARIANT.TASK.rR.sS.json       run: before, after, bytes, memory, seconds, commands, versions
    OUT/sweep.yaml                         the sweep itself, with all flags: `llmtools sweep OUT/sweep.yaml`
    OUT/report.md, .json, .html            see `report`

A result whose settings are unchanged is reused: the same command resumes a stopped sweep, and a changed option repeats
only the runs that it concerns. So do changed data, a changed model under the same name, and a missing folder of models
or adapters: settings hold hashes of the inputs, and results hashes of the outputs. A failed run records its reason,
stops no other, and is tried again by the next sweep. (Earlier versions wrote OUT/cells for OUT/runs; such a folder is
still used.)
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from ..checkpoint.inputs import content_of_model, contents
from ..checkpoint.loading import without_data
from ..checkpoint.run_info import as_json, command, given, versions
from ..errors import InputError, did_you_mean
from ..files import METADATA, claim, clear_unfinished, read_json, write_whole
from ..options import fits, nested, type_name, with_current_names
from ..recipes import plain_yaml as config
from ..recipes.evaluate import Evaluate
from ..recipes.finetune import Finetune, Lora
from ..recipes.quantize import Quantize
from ..signals import Stopped
from .cache import ResultCache, required

log = logging.getLogger(__name__)

LORA = Lora()
HEADER = "# Written by llmtools sweep, with all its flags, and written anew each time.\n"
BASELINES = {"lora": "LoRA, not quantized", "nf4": "NF4, bitsandbytes", "int8": "int8, bitsandbytes"}
AS_GIVEN = "LoRA, as quantized"
"""The baseline "lora" where the model is quantized already, such as a GGUF file."""


@dataclass(frozen=True)
class Sweep:
    """Finetune one model in many quantized variants, and report the cost and the quality of each."""

    model: str
    """Folder or hub name of the model, not quantized; a quantized one has only the baseline lora."""
    tasks: dict[str, dict[str, Any]]
    """Tasks to train and to evaluate on, in a YAML: {NAME: {task: …, data: …, options: {…}, finetune: {training: {…}},
    evaluate: {limit: …}}}; options of one recipe under finetune or evaluate, options of both beside them."""
    out: str = "sweep"
    """Output folder; the same command again runs only what is missing in it."""
    quantizers: list[dict[str, Any]] = field(default_factory=list)
    """Quantizers, such as {name: optq, bits: [4, 3], group_size: 64}; a list of values makes a variant of each. Options
    of quantize for one of them go under its own `quantize`: {name: qtip, quantize: {bits_per_weight: 2.25}}."""
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    """Variants to compare with. lora: LoRA on the unquantized model; nf4, int8: quantized by bitsandbytes, skipped
    where it is not installed."""
    ranks: list[int] = field(default_factory=lambda: [8])
    """Ranks of the LoRA adapters."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Random seeds of LoRA initialisation, data order and dropout."""
    dtype: str | None = "bfloat16"
    """Type that the model is cast to first, so that the reference has 16 bits; null for the stored type."""
    quantize: dict[str, Any] = field(default_factory=dict)
    """Options of quantize for all quantizers, such as --quantize.calibration train.txt --quantize.num_samples 64."""
    lora: Lora = LORA
    """LoRA options; the rank comes from --ranks."""
    training: dict[str, Any] = field(default_factory=dict)
    """Arguments of trl.SFTConfig for all tasks; a task's own take precedence."""
    data: dict[str, str] = field(default_factory=dict)
    """Data of a task, in place of what the YAML says: --data.samsum FOLDER."""
    report: str | None = None
    """Path of the report without .md, .json and .html; OUT/report by default."""
    report_only: bool = False
    """Whether only the report is written, from the existing results."""
    plugin: str | list[str] | None = None
    """User-defined quantizers, as module:Class, to be named in `quantizers`."""


@dataclass(frozen=True)
class SweepResult:
    """The report of a sweep, and the number of its runs."""

    report: str
    """Path of the report without suffix."""
    runs: int
    """Number of runs in the grid."""
    computed: int
    """Number of runs finished by this sweep."""
    reused: int
    """Number of runs finished before, with the same settings."""
    failed: dict[str, str]
    """Reason of each failed run, by its name."""
    missing: list[str]
    """Names of the runs without a result."""
    table: str
    """Table of the quality of each variant, as text."""

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0

    def __str__(self) -> str:
        lines = [f"failed: {name}: {reason}" for name, reason in self.failed.items()]
        lines += [f"missing: {len(self.missing)} runs"] if self.missing else []
        counts = f"{self.runs} runs: {self.computed} computed, {self.reused} reused, {len(self.failed)} failed"
        return "\n".join([self.table, *lines, f"{counts}\n{self.report}.html, .md, .json"])


class Variant(NamedTuple):
    """One way of storing the model's weights: dense, quantized by llmtools, or by bitsandbytes."""

    label: str
    """Name in the report."""
    quantizer: dict[str, Any] | None = None
    """Name and options of the quantizer; None for a baseline."""
    load: str | None = None
    """Quantization by bitsandbytes while loading, nf4 or int8; None for none."""

    @property
    def slug(self) -> str:
        """The label as a part of file names."""
        label = re.sub(r"(?<= )-(?=[\d.])", "minus ", self.label.lower())
        return re.sub(r"[^a-z0-9]+", "-", label).strip("-")


class Run(NamedTuple):
    """One run: a variant of the model, finetuned on a task."""

    variant: Variant
    """Variant of the model."""
    task: str
    """Name of the task in the sweep."""
    rank: int
    """Rank of the LoRA adapters."""
    seed: int
    """Random seed."""

    @property
    def name(self) -> str:
        return f"{self.variant.slug}.{self.task}.r{self.rank}.s{self.seed}"


def sweep(recipe: Sweep) -> SweepResult:
    """Performs the missing runs, and writes the report."""
    from ..checkpoint.loading import check_model, import_plugins, quiet_libraries

    check_model(recipe.model)
    import_plugins(recipe.plugin)
    runner = _Runner(recipe)
    runs, left_out = runner.runs(), list(_left_out(recipe).values())
    for line in left_out:
        log.warning("%s", line)
    quiet_libraries()
    _check_report(_report_of(recipe))
    if recipe.report_only:
        return _run_all(recipe, runner, runs, left_out)
    with claim(runner.out, adding=True):
        _prepare(recipe, runner.out)
        try:
            return _run_all(recipe, runner, runs, left_out)
        except KeyboardInterrupt as stopped:
            text = "stopped; the same command resumes with the missing runs"
            raise Stopped(text, getattr(stopped, "exit_code", 130)) from stopped


def _prepare(recipe: Sweep, out: Path) -> None:
    """Creates the output folder with its metadata file and sweep.yaml."""
    metadata = read_json(out / METADATA)
    if metadata and metadata.get("command") != "sweep":
        raise InputError(f"{out} is a model or an adapter that llmtools wrote; choose another folder for the sweep")
    out.mkdir(parents=True, exist_ok=True)
    if not metadata:
        write_whole(out / METADATA, as_json({"command": "sweep", "versions": versions()}))
    own = out / "sweep.yaml"
    if own.exists() and not own.read_text(encoding="utf-8", errors="replace").startswith(HEADER):
        log.info("%s was not written by llmtools and stays as it is", own)
    else:
        write_whole(own, HEADER + as_yaml(recipe))
    for folder in (out, *(out / name for name in ("models", "before", "runs", "cells"))):
        clear_unfinished(folder)


def _report_of(recipe: Sweep) -> Path:
    return Path(recipe.report or Path(recipe.out) / "report").expanduser()


def _check_report(base: Path) -> None:
    """Raises InputError where a report would replace files that are not a sweep's report."""
    there = [file for suffix in (".md", ".html", ".json") if (file := base.with_name(base.name + suffix)).exists()]
    record = read_json(base.with_name(f"{base.name}.json")) if there else {}
    if there and not {"recipe", "sweep", "rows"} <= record.keys():
        raise InputError(f"{there[0]} is no report of a sweep and will not be overwritten; choose another --report")


def _run_all(recipe: Sweep, runner: _Runner, runs: list[Run], left_out: list[str]) -> SweepResult:
    from ..progress import duration
    from .report import report

    lengths = {name: runner.answer_tokens(name) for name in recipe.tasks}
    majority = {name: scored for name in recipe.tasks if (scored := runner.majority_baseline(name))}
    found: dict[str, dict[str, Any]] = {}
    began, computed = time.monotonic(), 0
    for number, run in enumerate(runs, start=1):
        result = runner.result(run)
        if result is None:
            continue
        found[run.name] = result
        fresh = run.name in runner.cache.computed
        computed += fresh
        log.info(
            "run %d of %d, %s: %s%s",
            number,
            len(runs),
            run.name,
            f"failed: {result['failed']}" if "failed" in result else _summary(result),
            f", about {duration((time.monotonic() - began) / computed * (len(runs) - number))} left"
            if fresh and number < len(runs)
            else ""
            if fresh
            else " (finished before)",
        )
    base = _report_of(recipe)
    original = runner.original() or {}
    table = report(
        recipe, base, [run.name for run in runs], found, left_out, original.get("parameters"), majority, lengths
    )
    failed = {name: result["failed"] for name, result in found.items() if "failed" in result}
    return SweepResult(
        report=str(base),
        runs=len(runs),
        computed=computed - len(runner.cache.computed & failed.keys()),
        reused=len(found) - computed - len(failed.keys() - runner.cache.computed),
        failed=failed,
        missing=[run.name for run in runs if run.name not in found],
        table=table,
    )


def _summary(result: dict[str, Any]) -> str:
    before, after = result["before"], result["after"]
    return f"{after['measure']} {before['value']:.4g} → {after['value']:.4g} in {result['seconds']:.0f} s"


def _left_out(recipe: Sweep) -> dict[str, str]:
    """A line for each baseline that is skipped, by its name: bitsandbytes cannot make it, or is not installed."""
    if is_quantized(recipe.model):
        why = "left out, the model is quantized already"
    elif find_spec("bitsandbytes") is None:
        why = "left out, bitsandbytes is not installed: pip install 'llmtools[bitsandbytes]'"
    else:
        return {}
    return {name: f"{BASELINES[name]}: {why}" for name in recipe.baselines if name != "lora"}


def is_quantized(model: str) -> bool:
    """Whether the model is quantized already, such as a GGUF file; False where its config is damaged, as a run says."""
    from ..checkpoint import loading

    try:
        return loading.is_quantized(model)
    except InputError:
        return False


# ------------------------------------------------------------------------------------------------------------ the runs


class _Runner:
    """The recipes of a sweep's runs, and their results on the disk."""

    def __init__(self, recipe: Sweep) -> None:
        self.recipe = recipe
        self.out = Path(recipe.out).expanduser()
        self.cache = ResultCache(compute=not recipe.report_only)
        earlier = self.out / "cells"
        self.results = earlier if earlier.is_dir() else self.out / "runs"
        _check(recipe)

    def runs(self) -> list[Run]:
        """All runs of the grid, seed by seed, so that an unfinished sweep has every variant once."""
        left_out, labels = _left_out(self.recipe), BASELINES | {"lora": self._lora_label()}
        names = [name for name in self.recipe.baselines if name not in left_out]
        variants = [Variant(labels[name], load=None if name == "lora" else name) for name in names]
        variants += [Variant(_label(options), quantizer=options) for options in _unrolled(self.recipe.quantizers)]
        grid = itertools.product(self.recipe.seeds, self.recipe.ranks, self.recipe.tasks, variants)
        runs = [Run(variant, task, rank, seed) for seed, rank, task, variant in grid]
        for run in runs:  # every option is checked before the first run starts
            self._check(run)
        return runs

    def _lora_label(self) -> str:
        """The label of the baseline "lora". Raises InputError for quantizers on a model that is quantized already."""
        if not is_quantized(self.recipe.model):
            return BASELINES["lora"]
        if self.recipe.quantizers or "lora" not in self.recipe.baselines:
            raise InputError(
                f"{self.recipe.model} is quantized already, and other variants are made of a model that is not; train "
                "on it as it is (baselines: [lora], quantizers: []), or give the original model"
            )
        return AS_GIVEN

    def _check(self, run: Run) -> None:
        """Raises InputError, led by the run's name, for options that can be seen to be wrong without a model."""
        from ..recipes.evaluate import evaluator_of
        from ..recipes.quantize import checked_quantizer
        from ..train.rows import training_task

        finetune, evaluate, quantize = self.finetune(run), self.evaluate(run), self.quantize(run.variant)
        if self.recipe.report_only:
            return
        try:
            training_task(finetune), evaluator_of(evaluate)
            if quantize is not None:
                checked_quantizer(quantize)
        except InputError as error:
            raise InputError(f"{run.name}: {error}") from error

    def result(self, run: Run) -> dict[str, Any] | None:
        """The run's result, from the cache or computed now; None under `report_only` where there is none."""
        finetune, after = self.finetune(run), self.evaluate(run, adapter=True)
        settings = {
            **self._variant_settings(run.variant),
            "finetune": given(finetune),
            "evaluate": given(after),
            "finetune reads": contents(finetune),
            "evaluate reads": contents(after),
        }
        file = self.results / f"{run.name}.json"
        return self.cache.get(file, settings, lambda: self._make(run, finetune, after), Path(finetune.out))

    def _make(self, run: Run, finetune: Finetune, after: Evaluate) -> dict[str, Any]:
        from ..checkpoint.run_info import record
        from ..recipes.evaluate import evaluate
        from ..recipes.finetune import finetune as run_finetune
        from .memory import meter

        variant = required(self.prepare(run.variant), "the model could not be prepared")
        before = required(self.before(run), "the evaluation before finetuning failed")
        memory = meter()
        try:
            _free()
            trained = run_finetune(finetune, callbacks=[memory])
            _free()
            evaluated = evaluate(after)
        finally:
            memory.close()
            _free()
        info = record("sweep", self.recipe)
        return {
            "variant": run.variant.label,
            "task": run.task,
            "rank": run.rank,
            "seed": run.seed,
            "before": before["evaluation"],
            "after": asdict(evaluated),
            "bits_per_weight": evaluated.bits_per_weight,
            "weight_bytes": evaluated.weight_bytes,
            "model_bytes": memory.model_bytes,
            "peak_bytes": memory.peak_bytes,
            "device": memory.device,
            "trained": asdict(trained),
            "commands": [
                *variant["commands"],
                command("evaluate", self.evaluate(run)),
                command("finetune", finetune),
                command("evaluate", after),
            ],
            **{key: info[key] for key in ("versions", "python", "platform", "started")},
        }

    def before(self, run: Run) -> dict[str, Any] | None:
        """The evaluation of a variant before finetuning, shared by ranks and seeds."""
        from ..recipes.evaluate import evaluate

        recipe = self.evaluate(run)
        return self.cache.get(
            self.out / "before" / f"{run.variant.slug}.{run.task}.json",
            {**self._variant_settings(run.variant), "evaluate": given(recipe), "evaluate reads": contents(recipe)},
            lambda: {"evaluation": asdict(evaluate(recipe))},
        )

    def prepare(self, variant: Variant) -> dict[str, Any] | None:
        """The result of writing a variant of the model to the disk."""
        from ..recipes.quantize import quantize

        original = required(self.original(), "the model could not be prepared")
        recipe = self.quantize(variant)
        if recipe is None:
            return original

        def make() -> dict[str, Any]:
            quantized = quantize(recipe)
            return {"bits_per_weight": quantized.bits_per_weight, "commands": [command("quantize", recipe)]}

        return self.cache.get(
            self.out / "models" / f"{variant.slug}.json", self._variant_settings(variant), make, Path(recipe.out)
        )

    def original(self) -> dict[str, Any] | None:
        """The result of casting the model to `_dtype`, from which all variants derive."""

        def make() -> dict[str, Any]:
            import torch

            from ..checkpoint.folder import load, save, skeleton

            empty = skeleton(self.recipe.model)
            if self._dtype is not None:
                kind = getattr(torch, self._dtype, None)
                if not isinstance(kind, torch.dtype):
                    raise InputError(f"dtype={self._dtype!r}: bfloat16, float16 or float32 is expected")
                with claim(self._original, overwrite=True, reads=[self.recipe.model]):
                    save(*load(self.recipe.model, dtype=kind), self._original, overwrite=True)
            return {"parameters": sum(p.numel() for p in empty.parameters()), "commands": []}

        settings = {"model": self.recipe.model, "dtype": self._dtype, "model reads": self._model_content}
        folder = None if self._dtype is None else Path(self._original)
        return self.cache.get(self.out / "models" / "original.json", settings, make, folder)

    def answer_tokens(self, name: str) -> int | None:
        """Maximum number of tokens of an answer; None for tasks without answers."""
        from ..checkpoint.loading import task_class

        recipe = self.evaluation(name)
        if recipe.harness or not task_class(recipe.task).has_answers:
            return None
        return int(recipe.options.get("max_new_tokens", task_class(recipe.task).max_new_tokens))

    def majority_baseline(self, name: str) -> dict[str, Any] | None:
        """The majority-class baseline: scores of always giving the most common reference answer.

        None for tasks without answers.
        """
        from collections import Counter

        from ..data.tasks import make_task
        from ..data.tasks.base import answer, spread

        recipe = self.evaluation(name)

        def make() -> dict[str, Any]:
            task = make_task(recipe.task, **{"data": recipe.data, **recipe.options})
            rows = spread(task.test(), recipe.num_samples)
            if not rows:
                raise InputError(
                    f"task {recipe.task!r} has no test rows; a task without answers sets has_answers = False"
                )
            constant = Counter(map(answer, rows)).most_common(1)[0][0].strip()
            shown = constant if len(constant) <= 20 else f"{constant[:19]}…"
            return {"scores": task.score([constant] * len(rows), rows), "answer": shown}

        if self.answer_tokens(name) is None:
            return None
        file = self.out / "before" / f"constant-answer.{name}.json"
        found = self.cache.get(file, {"evaluate": given(recipe), "evaluate reads": contents(recipe)}, make)
        if found is not None and "failed" in found:
            log.warning("%s: no majority-class baseline: %s", name, found["failed"])
            return None
        return found

    # ------------------------------------------------------------------------------------------------------ recipes

    @cached_property
    def _dtype(self) -> str | None:
        """The type that the model is cast to first; None for the model as it is, as where it is quantized already."""
        return None if is_quantized(self.recipe.model) else self.recipe.dtype

    @property
    def _original(self) -> str:
        return self.recipe.model if self._dtype is None else str(self.out / "models" / "original")

    def _model(self, variant: Variant) -> str:
        return self._original if variant.quantizer is None else str(self.out / "models" / variant.slug)

    def _variant_settings(self, variant: Variant) -> dict[str, Any]:
        recipe = self.quantize(variant)
        return {
            "model": self.recipe.model,
            "dtype": self._dtype,
            "load": variant.load,
            "quantize": recipe and given(recipe),
            "model reads": self._model_content,
            "quantize reads": recipe and contents(recipe),
        }

    @cached_property
    def _model_content(self) -> dict[str, str]:
        return content_of_model(self.recipe.model)

    def quantize(self, variant: Variant) -> Quantize | None:
        from ..recipes.quantize import without_unread_text

        if variant.quantizer is None:
            return None
        options = dict(variant.quantizer)
        fixed = {
            "model": self._original,
            "out": self._model(variant),
            "quantizer": options.pop("name"),
            "overwrite": True,
        }
        fixed["plugin"] = self.recipe.plugin
        common, own = (
            with_current_names("quantize", each) for each in (self.recipe.quantize, options.pop("quantize", {}))
        )
        fixed |= {key: options.pop(key, None) for key in ("bits", "group_size")} | {"options": options}
        recipe: Quantize = _built(Quantize, fixed, {**common, **own}, "quantize")
        return without_unread_text(recipe)

    def finetune(self, run: Run) -> Finetune:
        section = self._section(run.task, "finetune")
        training = {"save_strategy": "no", "eval_strategy": "no", **self.recipe.training, **section.pop("training", {})}
        fixed = {
            "model": self._model(run.variant),
            "load": run.variant.load,
            "out": str(self.out / "adapters" / run.name),
            "lora": replace(self.recipe.lora, r=run.rank),
            "seed": run.seed,
            "training": training,
            "plugin": self.recipe.plugin,
            "overwrite": True,
        }
        recipe: Finetune = _built(Finetune, fixed, section, f"tasks.{run.task}")
        return recipe

    def evaluate(self, run: Run, adapter: bool = False) -> Evaluate:
        """The evaluation of a run, before finetuning or with its adapter."""
        folder = str(self.out / "adapters" / run.name) if adapter else None
        return self.evaluation(run.task, self._model(run.variant), run.variant.load, folder)

    def evaluation(
        self, name: str, model: str | None = None, load: str | None = None, adapter: str | None = None
    ) -> Evaluate:
        """The evaluation of a model on the task `name`, by default of the model that all variants start from."""
        fixed = {"model": model or self._original, "load": load, "adapter": adapter, "plugin": self.recipe.plugin}
        section, trained = (self._section(name, verb) for verb in ("evaluate", "finetune"))
        if section.get("task") == trained["task"]:  # the prompt template of the training, also before it
            section["options"] = {**without_data(trained.get("options", {})), **section.get("options", {})}
        recipe: Evaluate = _built(Evaluate, fixed, section, f"tasks.{name}")
        return recipe

    def _section(self, name: str, verb: str) -> dict[str, Any]:
        task = with_current_names("sweep", {"tasks": {name: self.recipe.tasks[name]}})["tasks"][name]
        own = {"finetune": task.pop("finetune", {}), "evaluate": task.pop("evaluate", {})}[verb]
        data = {"data": self.recipe.data[name]} if name in self.recipe.data else {}
        named = {} if own.get("harness") else {"task": name}
        return {**named, **task, **own, **data}


def _free() -> None:
    """Frees the memory of the last model before the next is loaded."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------ settings


def _check(recipe: Sweep) -> None:
    """Raises InputError for options that can be seen to be wrong without a model."""
    for name in recipe.baselines:
        if name not in BASELINES:
            raise InputError(f"baselines: no baseline {name!r}; {did_you_mean(name, BASELINES)}")
    for name, task in recipe.tasks.items():
        _check_mapping(f"tasks.{name}", task)
        for verb in ("finetune", "evaluate"):
            _check_mapping(f"tasks.{name}.{verb}", task.get(verb, {}))
            for key in ("options", "training"):
                _check_mapping(f"tasks.{name}.{verb}.{key}", task.get(verb, {}).get(key, {}))
        _check_mapping(f"tasks.{name}.options", task.get("options", {}))
    for name, data in recipe.data.items():
        if name not in recipe.tasks:
            raise InputError(f"--data.{name}: no such task in this sweep; {did_you_mean(name, recipe.tasks)}")
        own = [verb for verb in ("finetune", "evaluate") if "data" in recipe.tasks[name].get(verb, {})]
        if own:
            raise InputError(
                f"--data.{name}: under {' and '.join(own)} this task names data of its own, so that it is not "
                f"evaluated on its training data; change them in the YAML"
            )
        if Path(data).expanduser().is_file():
            raise InputError(
                f"--data.{name} {data}: a file would be trained on and evaluated on; a folder with a file for each "
                f"split is expected, or a name on the hub"
            )
    for name in recipe.tasks:
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"tasks: {name!r} becomes part of file names; letters, digits, - and _ are expected")
    for what, values in (("tasks", recipe.tasks), ("ranks", recipe.ranks), ("seeds", recipe.seeds)):
        if not values:
            raise InputError(f"{what}: at least one is expected")
    if not (recipe.quantizers or recipe.baselines):
        raise InputError("quantizers, baselines: at least one of either is expected")
    if min(recipe.ranks) < 1:
        raise InputError(f"ranks={recipe.ranks}: at least 1 is expected")
    for options in recipe.quantizers:
        if not isinstance(options.get("name"), str):
            raise InputError(f"quantizers: {{name: …, bits: …, options}} is expected, not {options!r}")
        _check_mapping(f"quantizers.{options['name']}.quantize", options.get("quantize", {}))
        if empty := [key for key, value in options.items() if value == []]:
            raise InputError(f"quantizers: {options['name']} has {empty[0]}: [], which makes no variant; give a value")


def _check_mapping(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a mapping of options (key: value) is expected, not {config.shown(value)}")


def _unrolled(quantizers: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each combination of the values that are lists: {bits: [4, 3]} is two quantizers."""
    for options in quantizers:
        values = [value if isinstance(value, list) else [value] for value in options.values()]
        for combination in itertools.product(*values):
            yield dict(zip(options, combination, strict=True))


def _label(quantizer: dict[str, Any]) -> str:
    """``optq 3-bit, group_size 32``"""
    bits = f" {quantizer['bits']}-bit" if quantizer.get("bits") is not None else ""
    options = {key: value for key, value in quantizer.items() if key not in ("name", "bits", "quantize")}
    others = [f"{key} {value}" for key, value in _flat({**options, **quantizer.get("quantize", {})})]
    return ", ".join([f"{quantizer['name']}{bits}", *others])


def _flat(options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of options of any depth: {recover: {steps: 60}} is ("recover steps", 60)."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from ((f"{key} {inner}", each) for inner, each in _flat(value))
        else:
            yield key, value


def _built(cls: Any, fixed: dict[str, Any], asked: dict[str, Any], where: str) -> Any:
    """The recipe from the options that the sweep sets (`fixed`) and those that the user gave (`asked`).

    Raises InputError, led by `where`, for an unknown option, one that the sweep sets, a wrong type or a missing one.
    """
    known = [each.name for each in fields(cls) if each.name not in fixed]
    for key in asked:
        if key not in known:
            why = "the sweep sets it" if key in fixed else did_you_mean(key, known)
            raise InputError(f"{where}: {key!r} cannot be given for {cls.__name__.lower()}; {why}")
    hints = get_type_hints(cls)
    asked = nested(where, cls, asked)
    for key, value in asked.items():
        if not fits(value, hints[key]):
            raise InputError(f"{where}: {key}={config.shown(value)}; {type_name(hints[key])} is expected")
    for each in fields(cls):
        if each.default is MISSING and each.default_factory is MISSING and each.name not in {*asked, *fixed}:
            raise InputError(f"{where}: {each.name!r} is missing, which {cls.__name__.lower()} needs")
    return cls(**asked, **fixed)


def as_yaml(recipe: Sweep) -> str:
    """The sweep as `llmtools sweep FILE` reads it."""
    return config.as_yaml(given(replace(recipe, report=None, report_only=False)))
