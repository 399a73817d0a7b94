"""Quantizer × bits × rank × task × seed on one model, each judged before and after finetuning, in one report.

A sweep is the recipes `quantize`, `finetune` and `evaluate` over a grid. What is made lies in one folder, and what was
measured in small JSON files, each written whole or not at all, with the settings that it belongs to:

    OUT/models/NAME, NAME.json         the model in each form, quantized once
    OUT/before/NAME.TASK.json          judged before finetuning
    OUT/adapters/NAME.TASK.rR.sS       finetuned
    OUT/cells/NAME.TASK.rR.sS.json     the cell: before, after, bytes, memory, seconds, commands, versions
    OUT/sweep.yaml                     the sweep itself, with all flags: `llmtools sweep OUT/sweep.yaml`
    OUT/report.md, .json, .html        see `tradeoff`

A file whose settings are still the same is not made again, so a sweep that was stopped is run again as it is, and a
changed option makes those cells again that it concerns. So does changed data, a changed model under the same name, and
a folder of models or adapters that is gone: settings hold hashes of what is read, and results of what was made. A cell
that failed says why, stops no other, and is tried again the next time.
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
from ..files import MARK, claim, clear_unfinished, read_json, write_whole
from ..options import fits, type_name, with_current_names
from ..recipes import plain_yaml as config
from ..recipes.evaluate import Evaluate
from ..recipes.finetune import Finetune, Lora
from ..recipes.quantize import Quantize
from ..signals import Stopped
from .cache import Kept, needed

log = logging.getLogger(__name__)

LORA = Lora()
HEADER = "# Written by llmtools sweep, with all its flags, and written anew each time.\n"
BASELINES = {"lora": "LoRA, not quantized", "nf4": "NF4, bitsandbytes", "int8": "int8, bitsandbytes"}


@dataclass(frozen=True)
class Sweep:
    """Finetune one model in many quantized forms, and report what each costs beside how good it is."""

    model: str
    """folder or hub name of the model, not quantized"""
    tasks: dict[str, dict[str, Any]]
    """what to train on and to judge by, in a YAML: {NAME: {task: …, data: …, options: {…}, finetune: {training: {…}},
    evaluate: {limit: …}}}; under finetune and evaluate stand options of these recipes, what both share beside them"""
    out: str = "sweep"
    """folder for everything; run again with the same, only what is missing is made"""
    quantizers: list[dict[str, Any]] = field(default_factory=list)
    """as in {name: optq, bits: [4, 3], group_size: 64}; a list of values is run through"""
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    """lora: adapters on the model as it is; nf4, int8: quantized by bitsandbytes, left out where it is not installed"""
    ranks: list[int] = field(default_factory=lambda: [8])
    """of the adapters"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """of the adapters' start, the order of the data, dropout"""
    dtype: str | None = "bfloat16"
    """round the model to this type first, so that 16 bits are what is compared with; null: as it is stored"""
    quantize: dict[str, Any] = field(default_factory=dict)
    """options of quantize for all quantizers, such as --quantize.calibration train.txt --quantize.num_samples 64"""
    lora: Lora = LORA
    """the adapter; its rank comes from --ranks"""
    training: dict[str, Any] = field(default_factory=dict)
    """arguments of trl.SFTConfig for all tasks; a task's own come before these"""
    data: dict[str, str] = field(default_factory=dict)
    """where a task's data lie, in place of what the YAML says: --data.samsum FOLDER"""
    report: str | None = None
    """the report's name without .md, .json and .html; by default OUT/report"""
    report_only: bool = False
    """make nothing, draw the report of what is there"""
    plugin: str | list[str] | None = None
    """module:Class of your own quantizer, to use it by its name"""


@dataclass(frozen=True)
class Swept:
    """Where the report lies, and how many cells it is made of."""

    report: str
    cells: int
    made: int
    kept: int
    """finished before, with the same settings"""
    failed: dict[str, str]
    missing: list[str]
    table: str

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0

    def __str__(self) -> str:
        lines = [f"failed: {name}: {reason}" for name, reason in self.failed.items()]
        lines += [f"missing: {len(self.missing)} cells"] if self.missing else []
        counts = f"{self.cells} cells: {self.made} made, {self.kept} kept, {len(self.failed)} failed"
        return "\n".join([self.table, *lines, f"{counts}\n{self.report}.html, .md, .json"])


class Form(NamedTuple):
    """One way in which the model's weights are stored."""

    label: str
    quantizer: dict[str, Any] | None = None
    load: str | None = None

    @property
    def slug(self) -> str:
        label = re.sub(r"(?<= )-(?=[\d.])", "minus ", self.label.lower())
        return re.sub(r"[^a-z0-9]+", "-", label).strip("-")


class Cell(NamedTuple):
    """One run: a form of the model, finetuned on a task."""

    form: Form
    task: str
    rank: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.form.slug}.{self.task}.r{self.rank}.s{self.seed}"


def sweep(recipe: Sweep) -> Swept:
    """Runs the cells that are missing, and draws the report."""
    from ..checkpoint.loading import check_model, import_plugins, quiet_libraries

    check_model(recipe.model)
    import_plugins(recipe.plugin)
    run = _Run(recipe)
    cells, left_out = run.cells(), _left_out(recipe)
    for line in left_out:
        log.warning("%s", line)
    quiet_libraries()
    _check_report(_report_of(recipe))
    if recipe.report_only:
        return _swept(recipe, run, cells, left_out)
    with claim(run.out, adding=True):
        _prepare(recipe, run.out)
        try:
            return _swept(recipe, run, cells, left_out)
        except KeyboardInterrupt as stopped:
            text = "stopped; the same command makes what is missing"
            raise Stopped(text, getattr(stopped, "exit_code", 130)) from stopped


def _prepare(recipe: Sweep, out: Path) -> None:
    """Makes the folder ready, and says in it whose it is."""
    note = read_json(out / MARK)
    if note and note.get("command") != "sweep":
        raise InputError(f"{out} is a model or an adapter that llmtools wrote; choose another folder for the sweep")
    out.mkdir(parents=True, exist_ok=True)
    if not note:
        write_whole(out / MARK, as_json({"command": "sweep", "versions": versions()}))
    own = out / "sweep.yaml"
    if own.exists() and not own.read_text(encoding="utf-8", errors="replace").startswith(HEADER):
        log.info("%s is your own and stays as it is", own)
    else:
        write_whole(own, HEADER + as_yaml(recipe))
    for folder in (out, out / "models", out / "before", out / "cells"):
        clear_unfinished(folder)


def _report_of(recipe: Sweep) -> Path:
    return Path(recipe.report or Path(recipe.out) / "report").expanduser()


def _check_report(base: Path) -> None:
    """Raises InputError where a report would replace files that are none."""
    there = [file for suffix in (".md", ".html", ".json") if (file := base.with_name(base.name + suffix)).exists()]
    record = read_json(base.with_name(f"{base.name}.json")) if there else {}
    if there and not {"recipe", "sweep", "rows"} <= record.keys():
        raise InputError(f"{there[0]} is no report of a sweep and is not going to be replaced; choose another --report")


def _swept(recipe: Sweep, run: _Run, cells: list[Cell], left_out: list[str]) -> Swept:
    from ..progress import duration
    from .report import report

    lengths = {name: run.answer_tokens(name) for name in recipe.tasks}
    floors = {name: floor for name in recipe.tasks if (floor := run.floor(name))}
    found: dict[str, dict[str, Any]] = {}
    began, made = time.monotonic(), 0
    for number, cell in enumerate(cells, start=1):
        result = run.cell(cell)
        if result is None:
            continue
        found[cell.name] = result
        fresh = cell.name in run.kept.made
        made += fresh
        log.info(
            "cell %d of %d, %s: %s%s",
            number,
            len(cells),
            cell.name,
            f"failed: {result['failed']}" if "failed" in result else _in_words(result),
            f", about {duration((time.monotonic() - began) / made * (len(cells) - number))} left"
            if fresh and number < len(cells)
            else ""
            if fresh
            else " (finished before)",
        )
    base = _report_of(recipe)
    original = run.original() or {}
    table = report(
        recipe, base, [cell.name for cell in cells], found, left_out, original.get("parameters"), floors, lengths
    )
    failed = {name: result["failed"] for name, result in found.items() if "failed" in result}
    return Swept(
        report=str(base),
        cells=len(cells),
        made=made - len(run.kept.made & failed.keys()),
        kept=len(found) - made - len(failed.keys() - run.kept.made),
        failed=failed,
        missing=[cell.name for cell in cells if cell.name not in found],
        table=table,
    )


def _in_words(cell: dict[str, Any]) -> str:
    before, after = cell["before"], cell["after"]
    return f"{after['measure']} {before['value']:.4g} → {after['value']:.4g} in {cell['seconds']:.0f} s"


def _left_out(recipe: Sweep) -> list[str]:
    """Baselines that cannot be had here, a line each."""
    if find_spec("bitsandbytes") is not None:
        return []
    why = "left out, bitsandbytes is not installed: pip install 'llmtools[bitsandbytes]'"
    return [f"{BASELINES[name]}: {why}" for name in recipe.baselines if name != "lora"]


# ------------------------------------------------------------------------------------------------------------- the run


class _Run:
    """A sweep's recipes, and the files of what came of them."""

    def __init__(self, recipe: Sweep) -> None:
        self.recipe = recipe
        self.out = Path(recipe.out).expanduser()
        self.kept = Kept(make=not recipe.report_only)
        _check(recipe)

    def cells(self) -> list[Cell]:
        """All of them, seed by seed, so that what is there early is a whole picture."""
        forms = [Form(BASELINES[name], load=None if name == "lora" else name) for name in self.recipe.baselines]
        forms = [form for form in forms if form.load is None or find_spec("bitsandbytes") is not None]
        forms += [Form(_label(options), quantizer=options) for options in _unrolled(self.recipe.quantizers)]
        grid = itertools.product(self.recipe.seeds, self.recipe.ranks, self.recipe.tasks, forms)
        cells = [Cell(form, task, rank, seed) for seed, rank, task, form in grid]
        for cell in cells:  # every option is looked at before the first hour
            self._check(cell)
        return cells

    def _check(self, cell: Cell) -> None:
        """Raises InputError, led by the cell's name, for what can be seen to be wrong with it without a model."""
        from ..recipes.evaluate import evaluator_of
        from ..recipes.quantize import checked_quantizer
        from ..train.rows import training_task

        trained, judged, made = self.finetune(cell), self.evaluate(cell), self.quantize(cell.form)
        if self.recipe.report_only:
            return
        try:
            training_task(trained), evaluator_of(judged)
            if made is not None:
                checked_quantizer(made)
        except InputError as error:
            raise InputError(f"{cell.name}: {error}") from error

    def cell(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured, now or before; None where nothing is to be made and nothing is there."""
        finetune, after = self.finetune(cell), self.evaluate(cell, adapter=True)
        settings = {
            **self._form_settings(cell.form),
            "finetune": given(finetune),
            "evaluate": given(after),
            "finetune reads": contents(finetune),
            "evaluate reads": contents(after),
        }
        file = self.out / "cells" / f"{cell.name}.json"
        return self.kept.get(file, settings, lambda: self._make_cell(cell, finetune, after), Path(finetune.out))

    def _make_cell(self, cell: Cell, finetune: Finetune, after: Evaluate) -> dict[str, Any]:
        from ..checkpoint.run_info import record
        from ..recipes.evaluate import evaluate
        from ..recipes.finetune import finetune as run_finetune
        from .memory import meter

        form = needed(self.form(cell.form), "the model could not be made ready")
        before = needed(self.before(cell), "it could not be judged before finetuning")
        memory = meter()
        try:
            _free()
            trained = run_finetune(finetune, callbacks=[memory])
            _free()
            judged = evaluate(after)
        finally:
            memory.close()
            _free()
        run = record("sweep", self.recipe)
        return {
            "form": cell.form.label,
            "task": cell.task,
            "rank": cell.rank,
            "seed": cell.seed,
            "before": before["evaluation"],
            "after": asdict(judged),
            "bits_per_weight": judged.bits_per_weight,
            "weight_bytes": judged.weight_bytes,
            "model_bytes": memory.model_bytes,
            "peak_bytes": memory.peak_bytes,
            "device": memory.device,
            "trained": asdict(trained),
            "commands": [
                *form["commands"],
                command("evaluate", self.evaluate(cell)),
                command("finetune", finetune),
                command("evaluate", after),
            ],
            **{key: run[key] for key in ("versions", "python", "platform", "started")},
        }

    def before(self, cell: Cell) -> dict[str, Any] | None:
        """The judgement of a form before finetuning; ranks and seeds share it."""
        from ..recipes.evaluate import evaluate

        recipe = self.evaluate(cell)
        return self.kept.get(
            self.out / "before" / f"{cell.form.slug}.{cell.task}.json",
            {**self._form_settings(cell.form), "evaluate": given(recipe), "evaluate reads": contents(recipe)},
            lambda: {"evaluation": asdict(evaluate(recipe))},
        )

    def form(self, form: Form) -> dict[str, Any] | None:
        """The model in one form, on the disk."""
        from ..recipes.quantize import quantize

        original = needed(self.original(), "the model could not be made ready")
        recipe = self.quantize(form)
        if recipe is None:
            return original

        def make() -> dict[str, Any]:
            made = quantize(recipe)
            return {"bits_per_weight": made.bits_per_weight, "commands": [command("quantize", recipe)]}

        return self.kept.get(
            self.out / "models" / f"{form.slug}.json", self._form_settings(form), make, Path(recipe.out)
        )

    def original(self) -> dict[str, Any] | None:
        """The model that all forms start from, rounded to `dtype`."""

        def make() -> dict[str, Any]:
            import torch

            from ..checkpoint.folder import load, save, skeleton

            empty = skeleton(self.recipe.model)
            if self.recipe.dtype is not None:
                kind = getattr(torch, self.recipe.dtype, None)
                if not isinstance(kind, torch.dtype):
                    raise InputError(f"dtype={self.recipe.dtype!r}: bfloat16, float16 or float32 is expected")
                with claim(self._original, overwrite=True, reads=[self.recipe.model]):
                    save(*load(self.recipe.model, dtype=kind), self._original, overwrite=True)
            return {"parameters": sum(p.numel() for p in empty.parameters()), "commands": []}

        settings = {"model": self.recipe.model, "dtype": self.recipe.dtype, "model reads": self._model_content}
        folder = None if self.recipe.dtype is None else Path(self._original)
        return self.kept.get(self.out / "models" / "original.json", settings, make, folder)

    def answer_tokens(self, name: str) -> int | None:
        """How long an answer may get, for tasks that have answers."""
        from ..checkpoint.loading import task_class

        recipe = self.evaluation(name)
        if recipe.harness or not task_class(recipe.task).has_answers:
            return None
        return int(recipe.options.get("max_new_tokens", task_class(recipe.task).max_new_tokens))

    def floor(self, name: str) -> dict[str, Any] | None:
        """What a constant answer scores: the commonest right one, for tasks that have answers."""
        from collections import Counter

        from ..data.tasks import make_task
        from ..data.tasks.base import answer, spread

        recipe = self.evaluation(name)

        def make() -> dict[str, Any]:
            task = make_task(recipe.task, **{"data": recipe.data, **recipe.options})
            rows = spread(task.test(), recipe.num_samples)
            if not rows:
                raise InputError(f"task {recipe.task!r} has no test rows; one without answers says has_answers = False")
            constant = Counter(map(answer, rows)).most_common(1)[0][0].strip()
            shown = constant if len(constant) <= 20 else f"{constant[:19]}…"
            return {"scores": task.score([constant] * len(rows), rows), "answer": shown}

        if self.answer_tokens(name) is None:
            return None
        file = self.out / "before" / f"constant-answer.{name}.json"
        found = self.kept.get(file, {"evaluate": given(recipe), "evaluate reads": contents(recipe)}, make)
        if found is not None and "failed" in found:
            log.warning("%s: no constant answer to compare with: %s", name, found["failed"])
            return None
        return found

    # ------------------------------------------------------------------------------------------------------ recipes

    @property
    def _original(self) -> str:
        return self.recipe.model if self.recipe.dtype is None else str(self.out / "models" / "original")

    def _model(self, form: Form) -> str:
        return self._original if form.quantizer is None else str(self.out / "models" / form.slug)

    def _form_settings(self, form: Form) -> dict[str, Any]:
        recipe = self.quantize(form)
        return {
            "model": self.recipe.model,
            "dtype": self.recipe.dtype,
            "load": form.load,
            "quantize": recipe and given(recipe),
            "model reads": self._model_content,
            "quantize reads": recipe and contents(recipe),
        }

    @cached_property
    def _model_content(self) -> dict[str, str]:
        return content_of_model(self.recipe.model)

    def quantize(self, form: Form) -> Quantize | None:
        from ..recipes.quantize import resolve_quantizer

        if form.quantizer is None:
            return None
        options = dict(form.quantizer)
        ours = {"model": self._original, "out": self._model(form), "quantizer": options.pop("name"), "overwrite": True}
        ours["plugin"] = self.recipe.plugin
        ours |= {key: options.pop(key, None) for key in ("bits", "group_size")} | {"options": options}
        made: Quantize = _built(Quantize, ours, with_current_names("quantize", self.recipe.quantize), "quantize")
        return made if resolve_quantizer(made).needs_hessian else replace(made, calibration=None)

    def finetune(self, cell: Cell) -> Finetune:
        section = self._section(cell.task, "finetune")
        training = {"save_strategy": "no", "eval_strategy": "no", **self.recipe.training, **section.pop("training", {})}
        ours = {
            "model": self._model(cell.form),
            "load": cell.form.load,
            "out": str(self.out / "adapters" / cell.name),
            "lora": replace(self.recipe.lora, r=cell.rank),
            "seed": cell.seed,
            "training": training,
            "plugin": self.recipe.plugin,
            "overwrite": True,
        }
        made: Finetune = _built(Finetune, ours, section, f"tasks.{cell.task}")
        return made

    def evaluate(self, cell: Cell, adapter: bool = False) -> Evaluate:
        """The evaluation of a cell, before finetuning or with its adapter."""
        folder = str(self.out / "adapters" / cell.name) if adapter else None
        return self.evaluation(cell.task, self._model(cell.form), cell.form.load, folder)

    def evaluation(
        self, name: str, model: str | None = None, load: str | None = None, adapter: str | None = None
    ) -> Evaluate:
        """The evaluation of a model on the task `name`, by default of the model that all forms start from."""
        ours = {"model": model or self._original, "load": load, "adapter": adapter, "plugin": self.recipe.plugin}
        section, trained = (self._section(name, verb) for verb in ("evaluate", "finetune"))
        if section.get("task") == trained["task"]:  # in the words of the training, before it, too
            section["options"] = {**without_data(trained.get("options", {})), **section.get("options", {})}
        made: Evaluate = _built(Evaluate, ours, section, f"tasks.{name}")
        return made

    def _section(self, name: str, verb: str) -> dict[str, Any]:
        task = with_current_names("sweep", {"tasks": {name: self.recipe.tasks[name]}})["tasks"][name]
        own = {"finetune": task.pop("finetune", {}), "evaluate": task.pop("evaluate", {})}[verb]
        data = {"data": self.recipe.data[name]} if name in self.recipe.data else {}
        named = {} if own.get("harness") else {"task": name}
        return {**named, **task, **own, **data}


def _free() -> None:
    """Gives back what the last model held, before the next is loaded."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------ settings


def _check(recipe: Sweep) -> None:
    """Raises InputError for what can be seen to be wrong without a model."""
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
                f"--data.{name}: under {' and '.join(own)} this task names data of its own, lest it be judged by what "
                f"it was trained on; change them in the YAML"
            )
        if Path(data).expanduser().is_file():
            raise InputError(
                f"--data.{name} {data}: a file would be trained on and judged by; a folder with a file for each split "
                f"is expected, or a name on the hub"
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
        if empty := [key for key, value in options.items() if value == []]:
            raise InputError(
                f"quantizers: {options['name']} has {empty[0]}: [], of which no cell is made; give a value"
            )


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
    others = [f"{key} {value}" for key, value in quantizer.items() if key not in ("name", "bits")]
    return ", ".join([f"{quantizer['name']}{bits}", *others])


def _built(cls: Any, ours: dict[str, Any], theirs: dict[str, Any], where: str) -> Any:
    """The recipe of what the sweep decides and what the user gave."""
    known = [each.name for each in fields(cls) if each.name not in ours]
    for key in theirs:
        if key not in known:
            why = "the sweep decides this" if key in ours else did_you_mean(key, known)
            raise InputError(f"{where}: {key!r} cannot be given for {cls.__name__.lower()}; {why}")
    hints = get_type_hints(cls)
    for key, value in theirs.items():
        if not fits(value, hints[key]):
            raise InputError(f"{where}: {key}={config.shown(value)}; {type_name(hints[key])} is expected")
    for each in fields(cls):
        if each.default is MISSING and each.default_factory is MISSING and each.name not in {*theirs, *ours}:
            raise InputError(f"{where}: {each.name!r} is missing, which {cls.__name__.lower()} needs")
    return cls(**theirs, **ours)


def as_yaml(recipe: Sweep) -> str:
    """The sweep as `llmtools sweep FILE` reads it."""
    return config.as_yaml(given(replace(recipe, report=None, report_only=False)))
