"""Judge a model, with or without an adapter, by a task."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on a task: perplexity of a text, or answers against the right ones."""

    model: str | None = None
    """folder or hub name, quantized or not; by default what the adapter was trained on"""
    adapter: str | None = None
    """folder of an adapter"""
    task: str = "perplexity"
    """what to measure; `llmtools list` shows the tasks"""
    data: str | None = None
    """the task's data: for perplexity a .txt or .jsonl file (.gz too), or wikitext2 | c4 from the hub"""
    context: int | None = None
    """perplexity: tokens in a window; by default the model's positions, at most 2048; a result belongs to it"""
    options: dict[str, Any] = field(default_factory=dict)
    """other options of the task, such as --options.seed 1; `llmtools list TASK` shows them"""
    plugin: str | list[str] | None = None
    """module:Class of your own quantizer, if the checkpoint was made with it"""
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
    bits_per_weight: float
    """stored bits for each weight of the model's linear layers, scales included"""
    weight_bytes: int
    """stored bytes of these weights"""
    seconds: float

    def __str__(self) -> str:
        details = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.details.items()
            if key != self.measure
        )
        on = f"{self.model} + {self.adapter}" if self.adapter else self.model
        return (
            f"{self.measure} {self.value:.4f}  ({details})\n{on}: {self.bits_per_weight:.2f} bits a weight, "
            f"{self.weight_bytes / 2**20:.2f} MiB of linear weights"
        )


def evaluate(recipe: Evaluate) -> Evaluation:
    """Measures a model on a task."""
    from ..data.tasks import make_task
    from ..progress import progress
    from .loading import import_plugins, model_and_adapter, open_model, quiet_libraries, with_current_folder

    began = time.monotonic()
    if ":" in recipe.task:
        with_current_folder()
    given: dict[str, Any] = {"data": recipe.data, "context": recipe.context}
    if recipe.task == "text" and "validation_data" not in recipe.options:
        given["validation_data"] = recipe.data
    for key in recipe.options:
        if given.get(key) is not None:
            raise InputError(f"{key!r} is given twice: as --{key} and among the options")
    task = make_task(recipe.task, **{**{k: v for k, v in given.items() if v is not None}, **recipe.options})
    _check_data(recipe)
    name, adapter = model_and_adapter(recipe.model, recipe.adapter)
    quiet_libraries()
    import_plugins(recipe.plugin)
    model, tokenizer = open_model(name, adapter=adapter, trust_remote_code=recipe.trust_remote_code)
    with progress(recipe.task, unit="steps") as step:
        details = task.evaluate(model, tokenizer, on_step=step)
    measure = next(iter(details))
    bits, size = linear_weights(model)
    return Evaluation(
        task=recipe.task,
        measure=measure,
        value=float(details[measure]),
        details=details,
        model=name,
        adapter=adapter,
        bits_per_weight=bits,
        weight_bytes=size,
        seconds=time.monotonic() - began,
    )


def _check_data(recipe: Evaluate) -> None:
    """Finds a missing file before minutes of loading, for the tasks that read one."""
    from ..data.calibration import HUB
    from ..data.reading import existing_file

    if recipe.task in ("perplexity", "text") and recipe.data is not None and recipe.data not in HUB:
        existing_file(recipe.data)


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
            tensors = [module.weight]
        else:
            continue
        weights += module.in_features * module.out_features
        stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return 8 * stored / max(weights, 1), stored
