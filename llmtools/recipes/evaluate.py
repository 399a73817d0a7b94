"""Judge a model, with or without an adapter, by a task."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on a task: perplexity of a text, or answers against the right ones."""

    model: str | None = None
    """folder or hub name, quantized or not; by default what the adapter was trained on"""
    adapter: str | None = None
    """folder of an adapter"""
    load: str | None = None
    """nf4 or int8: quantize a plain model with bitsandbytes while it loads; by default as the adapter was trained"""
    task: str = "perplexity"
    """what to measure; `llmtools list` shows the tasks"""
    harness: str | list[str] | None = None
    """tasks of EleutherAI's lm_eval instead: arc_easy,hellaswag or a task's .yaml; --options are lm_eval's, such as
    --options.num_fewshot 5"""
    data: str | None = None
    """the task's data: for perplexity a .txt or .jsonl file (.gz, .xz too), or wikitext2 | c4 from the hub; for a task
    that knows its data set: a file, a folder (of which the test split is taken), or the task's name (from the hub)"""
    limit: int | None = None
    """judge by so many examples only, spread over the data; for perplexity the first so many windows"""
    batch_size: int = 1
    """prompts at a time; more is faster, and equal up to rounding"""
    context: int | None = None
    """perplexity: tokens in a window; by default the model's positions, at most 2048; a result belongs to it"""
    options: dict[str, Any] = field(default_factory=dict)
    """other options of the task, such as --options.seed 1; `llmtools list TASK` shows them; by default those that the
    adapter was trained with, if it was on this task"""
    plugin: str | list[str] | None = None
    """module:Class of your own quantizer, if the checkpoint was made with it"""
    allow_other_base: bool = False
    """permission to open the adapter on another base than the one it was trained on, with a warning"""
    verify: bool = False
    """comparison of every byte of the model's (and adapter's) files with their checksums before they are used"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""


@dataclass(frozen=True)
class Evaluation:
    """A measure with what it belongs to."""

    task: str
    measure: str
    value: float
    details: dict[str, Any]
    """all measures of the task, and what they were taken on"""
    model: str
    adapter: str | None
    data: str | None
    """what the task was given to measure on; None for tasks of lm_eval, which name their own"""
    bits_per_weight: float
    """stored bits for each weight of the model's linear layers, scales included"""
    weight_bytes: int
    """stored bytes of these weights"""
    seconds: float

    def __str__(self) -> str:
        details = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.details.items()
            if key != self.measure and "/" not in key
        )
        parts = [f"  {key:<56} {value:.4f}" for key, value in self.details.items() if "/" in key]
        on = f"{self.model} + {self.adapter}" if self.adapter else self.model
        return (
            "\n".join([f"{self.measure} {self.value:.4f}  ({details})", *parts])
            + f"\n{on}: {self.bits_per_weight:.2f} bits a weight, {self.weight_bytes / 2**20:.2f} MiB of linear weights"
        )


def evaluate(recipe: Evaluate) -> Evaluation:
    """Measures a model on a task."""
    from ..checkpoint.loading import import_plugins, loaded_as, model_and_adapter, open_model, quiet_libraries

    began = time.monotonic()
    if (recipe.limit is not None and recipe.limit < 1) or recipe.batch_size < 1:
        raise InputError(f"limit={recipe.limit}, batch_size={recipe.batch_size}: at least 1 is expected")
    judge = judge_of(recipe)
    name, adapter = model_and_adapter(recipe.model, recipe.adapter)
    quiet_libraries()
    import_plugins(recipe.plugin)
    load = loaded_as(recipe.load, name, adapter)
    model, tokenizer = open_model(
        name,
        adapter=adapter,
        load=load,
        trust_remote_code=recipe.trust_remote_code,
        verify=recipe.verify,
        allow_other_base=recipe.allow_other_base,
    )
    details = judge(model, tokenizer)
    measure = next(iter(details))
    bits, size = linear_weights(model)
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


Judge = Callable[[Any, Any], dict[str, Any]]
"""(model, tokenizer) -> measures, the one that counts first."""


def judge_of(recipe: Evaluate) -> Judge:
    """What measures a model by this recipe. Raises InputError for what is wrong with task, options or data."""
    return _harness(recipe) if recipe.harness else _task(recipe)


def _task(recipe: Evaluate) -> Judge:
    """One of our tasks. What is wrong with its options or data is said here, before minutes of loading."""
    from ..checkpoint.loading import options_of, prompt_format_of, task_class, template_of
    from ..data.tasks import make_task
    from ..data.tasks.base import check_data
    from ..progress import progress

    cls = task_class(recipe.task)
    given: dict[str, Any] = {"data": recipe.data, "context": recipe.context}
    if cls.validates_on_data and "validation_data" not in recipe.options:
        given["validation_data"] = recipe.data
    for key in recipe.options:
        if given.get(key) is not None:
            raise InputError(f"{key!r} is given twice: as --{key} and among the options")
    trained = options_of(recipe.adapter, recipe.task)
    if taken := [f"{key} {value!r}" for key, value in trained.items() if key not in recipe.options]:
        log.info("options of the task as the adapter was trained: %s", ", ".join(taken))
    options = {**trained, **{k: v for k, v in given.items() if v is not None}, **recipe.options}
    task = make_task(recipe.task, **options)
    check_data(cls, recipe.data)
    former, template = prompt_format_of(recipe.adapter).get("template"), template_of(task)
    if former and template and former != template:
        log.warning("the adapter was trained in another prompt template: %r; this is %r", former, template)

    def judge(model: Any, tokenizer: Any) -> dict[str, Any]:
        with progress(recipe.task, unit="steps") as step:
            return task.evaluate(model, tokenizer, limit=recipe.limit, batch_size=recipe.batch_size, on_step=step)

    return judge


def _harness(recipe: Evaluate) -> Judge:
    """Tasks of lm_eval, which shows progress of its own."""
    from .harness import harness, import_harness

    import_harness()
    for key in ("data", "context"):
        if getattr(recipe, key) is not None:
            raise InputError(f"--{key} does not go with --harness: tasks of lm_eval name their own data")
    if recipe.task != Evaluate.task:
        raise InputError(f"--task {recipe.task} does not go with --harness {recipe.harness}: give one of the two")

    def judge(model: Any, tokenizer: Any) -> dict[str, Any]:
        return harness(
            model,
            tokenizer,
            _names(recipe.harness),
            limit=recipe.limit,
            batch_size=recipe.batch_size,
            options=recipe.options,
        )

    return judge


def _names(harness: str | list[str] | None) -> list[str]:
    given = harness.split(",") if isinstance(harness, str) else harness or []
    return [name.strip() for name in given if name.strip()]


def _data(recipe: Evaluate) -> str | None:
    """What is measured on, in the user's words."""
    from ..checkpoint.loading import task_class

    own = recipe.options.get("validation_data") if task_class(recipe.task).validates_on_data else None
    return own if isinstance(own, str) else recipe.data or recipe.options.get("data")


def linear_weights(model: Any) -> tuple[float, int]:
    """(bits a weight, bytes) over the linear layers of the blocks: adapters and a dense output head left out."""
    from torch import nn

    from ..nn.linear import QuantizedLinear

    head = getattr(model, "get_output_embeddings", lambda: None)()
    weights = stored = 0
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            tensors = list(module.packed.values())
        elif isinstance(module, nn.Linear) and module is not head and "lora_" not in path:
            tensors = [module.weight, *scales_of(module)]
        else:
            continue
        weights += module.in_features * module.out_features
        stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return 8 * stored / max(weights, 1), stored


def scales_of(linear: Any) -> list[Any]:
    """What bitsandbytes keeps beside the codes of a linear: scales, for NF4 in two stages."""
    nf4 = getattr(linear.weight, "quant_state", None)
    stages = [] if nf4 is None else [nf4.absmax, nf4.offset, getattr(nf4.state2, "absmax", None)]
    int8 = getattr(linear.weight, "SCB", None)
    if int8 is None:  # it moves there with the first product
        int8 = getattr(getattr(linear, "state", None), "SCB", None)
    return [tensor for tensor in (*stages, int8) if tensor is not None]
