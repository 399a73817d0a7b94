"""Evaluate a model, with or without an adapter, on a task."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.options import AdaptedModelOptions, OffloadOptions
from ..errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluate(AdaptedModelOptions, OffloadOptions):
    """Evaluate a model on a task: perplexity of a text, or its answers against the references."""

    load: str | None = None
    """Quantization by bitsandbytes while an unquantized model loads: nf4 or int8; by default as the adapter was
    trained."""
    task: str = "perplexity"
    """Task to evaluate on; `llmtools list` shows the tasks."""
    harness: str | list[str] | None = None
    """Tasks of EleutherAI's lm_eval instead: arc_easy,hellaswag or a task's .yaml; --options are lm_eval's, such as
    --options.num_fewshot 5."""
    data: str | None = None
    """Data of the task: for perplexity a .txt or .jsonl file (.gz, .xz too), or wikitext2 | c4 from the hub; for a task
    that knows its data set: a file, a folder (its test split is used), or the task's name (from the hub)."""
    num_samples: int | None = None
    """Number of examples, evenly spaced over the data; for perplexity the number of sequences, from the beginning; by
    default all."""
    batch_size: int = 1
    """Number of prompts per batch; more are faster, and equal up to rounding."""
    max_length: int | None = None
    """Length of a sequence in tokens, for perplexity (which depends on it); by default the model's positions, at most
    2048."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other options of the task, such as --options.seed 1; `llmtools list TASK` shows them; by default those that the
    adapter was trained with, if it was on this task."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one evaluation, with model, data and size."""

    task: str
    """Name of the task, or of lm_eval's tasks, joined by commas."""
    measure: str
    """Name of the main metric."""
    value: float
    """Value of the main metric."""
    details: dict[str, Any]
    """Metric → value, all of the task, and numbers of examples, tokens and the like."""
    model: str
    """Folder or hub name of the model."""
    adapter: str | None
    """Folder of the adapter."""
    data: str | None
    """Data that were evaluated on; None for tasks of lm_eval, which name their own."""
    bits_per_weight: float
    """Stored bits per weight of the model's linear layers, scales included."""
    weight_bytes: int
    """Stored bytes of these weights."""
    seconds: float
    """Duration in seconds."""

    def __str__(self) -> str:
        details = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.details.items()
            if key != self.measure and "/" not in key
        )
        parts = [f"  {key:<56} {value:.4f}" for key, value in self.details.items() if "/" in key]
        on = f"{self.model} + {self.adapter}" if self.adapter else self.model
        mib = self.weight_bytes / 2**20
        return (
            "\n".join([f"{self.measure} {self.value:.4f}  ({details})", *parts])
            + f"\n{on}: {self.bits_per_weight:.2f} bits per weight, {mib:.2f} MiB of linear weights"
        )


def evaluate(recipe: Evaluate) -> Evaluation:
    """Evaluates a model on a task."""
    from ..checkpoint.loading import compute_fast, open_recipe

    began = time.monotonic()
    if (recipe.num_samples is not None and recipe.num_samples < 1) or recipe.batch_size < 1:
        raise InputError(f"num_samples={recipe.num_samples}, batch_size={recipe.batch_size}: at least 1 is expected")
    evaluator = evaluator_of(recipe)
    model, tokenizer, name, adapter = open_recipe(recipe)
    bits, size = linear_weights(model)
    compute_fast(model, recipe.offload)
    details = evaluator(model, tokenizer)
    measure = next(iter(details))
    return Evaluation(
        task=",".join(_names(recipe.harness)) if recipe.harness else recipe.task,
        measure=measure,
        value=float(details[measure]),
        details=details,
        model=name,
        adapter=adapter,
        data=None if recipe.harness else _data(recipe),
        bits_per_weight=bits,
        weight_bytes=size,
        seconds=time.monotonic() - began,
    )


Evaluator = Callable[[Any, Any], dict[str, Any]]
"""(model, tokenizer) -> {metric: value}, the main metric first."""


def evaluator_of(recipe: Evaluate) -> Evaluator:
    """The function that evaluates a model by this recipe. Raises InputError for invalid task, options or data."""
    return _harness(recipe) if recipe.harness else _task(recipe)


def _task(recipe: Evaluate) -> Evaluator:
    """One of llmtools' tasks. Its options and data are checked here, before minutes of loading."""
    from ..checkpoint.loading import options_of, prompt_format_of, task_class, template_of
    from ..data.tasks import make_task
    from ..data.tasks.base import check_data
    from ..progress import progress

    cls = task_class(recipe.task)
    given: dict[str, Any] = {"data": recipe.data, "context": recipe.max_length}
    if cls.validates_on_data and "validation_data" not in recipe.options:
        given["validation_data"] = recipe.data
    if recipe.max_length is not None and "context" not in getattr(cls, "__dataclass_fields__", {}):
        raise InputError(f"--max_length does not go with --task {recipe.task}, which has no sequences of one length")
    flags = {"data": "data", "context": "max_length"}
    for key in recipe.options:
        if given.get(key) is not None:
            raise InputError(f"{key!r} is given twice: as --{flags.get(key, key)} and among the options")
    trained = options_of(recipe.adapter, recipe.task)
    if taken := [f"{key} {value!r}" for key, value in trained.items() if key not in recipe.options]:
        log.info("options of the task as the adapter was trained: %s", ", ".join(taken))
    options = {**trained, **{k: v for k, v in given.items() if v is not None}, **recipe.options}
    task = make_task(recipe.task, **options)
    check_data(cls, recipe.data)
    former, template = prompt_format_of(recipe.adapter).get("template"), template_of(task)
    if former and template and former != template:
        log.warning("the adapter was trained with another prompt template: %r; this is %r", former, template)

    def evaluator(model: Any, tokenizer: Any) -> dict[str, Any]:
        with progress(recipe.task, unit="steps") as step:
            return task.evaluate(model, tokenizer, limit=recipe.num_samples, batch_size=recipe.batch_size, on_step=step)

    return evaluator


def _harness(recipe: Evaluate) -> Evaluator:
    """Tasks of lm_eval, which shows its own progress."""
    from .harness import harness, import_harness

    import_harness()
    for key in ("data", "max_length"):
        if getattr(recipe, key) is not None:
            raise InputError(f"--{key} does not go with --harness: tasks of lm_eval name their own data")
    if recipe.task != Evaluate.task:
        raise InputError(f"--task {recipe.task} does not go with --harness {recipe.harness}: give one of the two")

    def evaluator(model: Any, tokenizer: Any) -> dict[str, Any]:
        return harness(
            model,
            tokenizer,
            _names(recipe.harness),
            num_samples=recipe.num_samples,
            batch_size=recipe.batch_size,
            options=recipe.options,
        )

    return evaluator


def _names(harness: str | list[str] | None) -> list[str]:
    given = harness.split(",") if isinstance(harness, str) else harness or []
    return [name.strip() for name in given if name.strip()]


def _data(recipe: Evaluate) -> str | None:
    """The data of the evaluation, as the user named them."""
    from ..checkpoint.loading import task_class

    own = recipe.options.get("validation_data") if task_class(recipe.task).validates_on_data else None
    return own if isinstance(own, str) else recipe.data or recipe.options.get("data")


def linear_weights(model: Any) -> tuple[float, int]:
    """(bits per weight, bytes) of the linear layers of the blocks, without adapters and a dense output head."""
    from torch import nn

    from ..nn.linear import QuantizedLinear

    head = getattr(model, "get_output_embeddings", lambda: None)()
    weights = stored = 0
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            tensors = list(module.stored.values())
        elif isinstance(module, nn.Linear) and module is not head and "lora_" not in path:
            tensors = [module.weight, *scales_of(module)]
        else:
            continue
        weights += module.in_features * module.out_features
        stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return 8 * stored / max(weights, 1), stored


def scales_of(linear: Any) -> list[Any]:
    """The scales that bitsandbytes keeps beside the codes of a linear, for NF4 in two stages."""
    nf4 = getattr(linear.weight, "quant_state", None)
    stages = [] if nf4 is None else [nf4.absmax, nf4.offset, getattr(nf4.state2, "absmax", None)]
    int8 = getattr(linear.weight, "SCB", None)
    if int8 is None:  # it moves there with the first matmul
        int8 = getattr(getattr(linear, "state", None), "SCB", None)
    return [tensor for tensor in (*stages, int8) if tensor is not None]
