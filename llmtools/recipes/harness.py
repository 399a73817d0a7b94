"""Evaluate a model on tasks of EleutherAI's lm-evaluation-harness (`lm_eval`, the extra "harness").

The harness gets the model as it was opened, quantized and with its adapter. A task is a name that lm_eval knows, or the
path of a task's YAML; the data of such a task may be local files, so nothing need come from the network.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import InputError


def harness(
    model: Any, tokenizer: Any, names: list[str], *, num_samples: int | None, batch_size: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Evaluates on each task: ``{"task/metric": value}``, with the standard error where lm_eval gives one.

    Raises InputError for unknown tasks, options that lm_eval does not take, and data that cannot be loaded.
    """
    lm_eval = import_harness()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(name).expanduser().resolve() for name in names if name.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.exists():
            raise InputError(f"there is no file {file}; a task of lm_eval is a name, or its YAML")
    folders = [str(folder) for folder in sorted({file.parent for file in files})]
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(names))
    tasks = [_task_name(file) for file in files] + [name for name in names if not name.endswith((".yaml", ".yml"))]
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise InputError(f"lm_eval {lm_eval.__version__} has no task {', '.join(unknown)} (see `lm-eval ls tasks`)")
    try:
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=tasks,
            limit=num_samples,
            task_manager=manager,
            log_samples=False,
            **options,
        )
    except (TypeError, ValueError, OSError, ConnectionError) as error:  # an option it lacks, data that cannot be loaded
        raise InputError(f"lm_eval: {error}") from error
    return metrics(results["results"])


def import_harness() -> Any:
    """The module `lm_eval`. Raises InputError, with the command to install it, where it is missing."""
    try:
        import lm_eval
    except ImportError as error:
        raise InputError(f"--harness runs lm_eval ({error}): pip install 'llmtools[harness]'") from error
    return lm_eval


def metrics(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """lm_eval's ``{task: {"acc,none": …}}`` as ``{"task/acc": …}``; a filter's name is kept unless it is none."""
    return {
        f"{task}/{key.removesuffix(',none')}": value
        for task, values in results.items()
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key
    }


def _task_name(file: Path) -> str:
    import yaml

    from .plain_yaml import read_text

    try:
        content = yaml.load(read_text(file), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "task" not in content:
        raise InputError(f"{file} is no task of lm_eval: it names no `task`")
    return str(content["task"])
