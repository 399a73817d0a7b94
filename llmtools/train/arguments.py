"""Arguments of TRL's trainer (trl.SFTConfig): names, checks, and llmtools' defaults.

They are checked here, not by jsonargparse's ``add_class_arguments(SFTConfig)``: recipes made in Python and those of a
sweep need the check, too, and a recipe stores only the arguments that were given, since the defaults depend on the
model.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import json_or_empty
from ..ranks import processes
from .options import NEEDS_TRAIN, Finetune, Row


def training_arguments() -> dict[str, str]:
    """Name of each argument of SFTConfig → its annotation as text. Raises InputError where trl is not installed."""
    from ..checkpoint.loading import quiet_libraries

    quiet_libraries()
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise InputError(NEEDS_TRAIN.format(error=error)) from error
    return {each.name: str(each.type) for each in fields(SFTConfig) if each.init}


def unbooled(key: str, value: Any) -> Any:
    """The value with the string "no" restored: YAML reads ``save_strategy: no`` as false."""
    return "no" if value is False and key.endswith("_strategy") else value


def check_training(training: dict[str, Any]) -> None:
    """Raises InputError for an argument that SFTConfig does not have, or a value of another type."""
    known = training_arguments()
    for key, value in training.items():
        if key not in known:
            raise InputError(f"training: no argument {key!r} in trl.SFTConfig; {_near(key, known)}")
        if key == "output_dir":
            raise InputError("training.output_dir: the output folder is --out")
        kinds = set(re.findall(r"\b(int|float|bool|str|dict|list)\b", known[key]))
        if kinds and value is not None and type(value).__name__ not in kinds | ({"int"} if "float" in kinds else set()):
            raise InputError(f"training.{key}={value!r}: {' or '.join(sorted(kinds))} is expected")
    integrations = training.get("report_to")
    for name in [integrations] if isinstance(integrations, str) else integrations or []:
        _check_integration(str(name))


PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit flytekitplugins-deck-standard"}
"""Name in `report_to` → its package, where the names differ."""


def _check_integration(name: str) -> None:
    """Raises InputError unless transformers can report to `name` with what is installed."""
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    if name in ("none", "all", *get_available_reporting_integrations()):
        return
    try:
        for callback in get_reporting_integration_callbacks([name]):
            callback()
    except ValueError as error:
        raise InputError(f"training.report_to={name!r}: {error}") from error
    except (RuntimeError, ImportError) as error:  # of a callback whose package is missing
        raise InputError(
            f"training.report_to={name!r}: its package is not installed: pip install {PACKAGES.get(name, name)}, or "
            f"omit it: metrics.jsonl has the same metrics"
        ) from error


def check_fsdp(training: dict[str, Any]) -> None:
    """Raises InputError where the arguments, or accelerate's launcher, ask for the first version of FSDP."""
    from ..nn.adapters import refuse_fsdp1

    config: Any = training.get("fsdp_config") or {}
    if isinstance(config, str) and config.lstrip().startswith("{"):
        with suppress(ValueError):
            config = json.loads(config)
    if isinstance(config, str):
        config = json_or_empty(Path(config).expanduser())
    version = config.get("version", config.get("fsdp_version"))
    refuse_fsdp1(None if version is None else str(version))


def check_validation_use(recipe: Finetune, validation: list[Row]) -> None:
    """Raises InputError for arguments that need validation examples where there are none."""
    training = recipe.training
    if recipe.early_stopping is not None:
        if recipe.early_stopping < 1:
            raise InputError(
                f"early_stopping={recipe.early_stopping}: at least 1 validation without an improvement is expected"
            )
        if not validation:
            raise InputError(
                "early_stopping needs validation examples: pass --validation with a file, or a fraction such as 0.1"
            )
    for key in ("load_best_model_at_end", "eval_strategy"):
        if not validation and training.get(key) not in (None, False, "no"):
            raise InputError(
                f"training.{key}={training[key]}: there are no validation examples; pass --validation with a file, or "
                f"the fraction of the data to hold out, such as 0.1"
            )


def _aligned(training: dict[str, Any]) -> dict[str, Any]:
    """When to save, or to validate, where only the other is given: the best of several needs both at the same steps."""
    found: dict[str, Any] = {}
    for kind in ("strategy", "steps"):
        for given, other in ((f"eval_{kind}", f"save_{kind}"), (f"save_{kind}", f"eval_{kind}")):
            if given in training and other not in training and training[given] != "best":
                found[other] = training[given]
    return found


def shared_accumulation(steps: int) -> int:
    """A process's gradient_accumulation_steps, so that the effective batch is that of one process.

    It is not where `steps` is 1: then every process adds a batch. Raises InputError where they cannot share the steps
    equally.
    """
    count = processes()
    if count == 1 or steps == 1:
        return steps
    if steps % count:
        raise InputError(
            f"training.gradient_accumulation_steps={steps} cannot be shared by {count} processes; choose a multiple of "
            f"{count}, or 1"
        )
    return steps // count


def _near(key: str, known: dict[str, str]) -> str:
    """The nearest names of the about 150."""
    import difflib

    near = difflib.get_close_matches(key, known, n=4, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else "see the documentation of trl.SFTConfig"


def autocasts_on_cpu(model: Any) -> bool:
    """Whether a step is autocast to bfloat16 on a CPU: the model has that type, and the processor products of it."""
    import torch

    from ..kernels.build import has_bfloat16

    return bool(model.get_input_embeddings().weight.dtype == torch.bfloat16) and has_bfloat16()


def arguments_of(
    recipe: Finetune, work: Path, model: Any, record_format: str, validates: bool, length: int | None = None
) -> dict[str, Any]:
    """The arguments of SFTConfig: the recipe's, and llmtools' defaults for the others.

    work: the run folder. record_format: text, prompt or messages. length: the task's max_length, if it has one.
    Adapters are float32. "bf16" computes with them in bfloat16 (autocast) on a GPU that supports it, and on a CPU only
    for a bfloat16 model, where no precision is lost and PEFT keeps no float32 copy of each layer's input. A processor
    without products of bfloat16 takes many times longer for them than for float32's, so there adapters stay in float32.
    Checkpointing recomputes activations to save memory, which on a CPU is worth less than its time.
    Raises InputError for sequences longer than the model's positions, and for gradient accumulation that the processes
    cannot share.
    """
    import torch

    from ..data.metrics import model_positions

    gpu = torch.cuda.is_available()
    positions = model_positions(model)
    cpu = not gpu and not torch.accelerator.is_available()
    defaults: dict[str, Any] = {
        "learning_rate": 2e-4,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": torch.cuda.is_bf16_supported() if gpu else cpu and autocasts_on_cpu(model),
        "use_cpu": cpu,
        "gradient_checkpointing": gpu,
        "max_length": min(length or 1024, positions or length or 1024),
        "packing": record_format == "text",
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "report_to": "none",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
    }
    if validates:
        defaults |= {"eval_strategy": "steps", "eval_steps": 0.1}
    if "per_device_train_batch_size" in recipe.training:  # a batch that fits in training fits in validation
        defaults["per_device_eval_batch_size"] = recipe.training["per_device_train_batch_size"]
    if recipe.early_stopping is not None:
        defaults |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    if (defaults | recipe.training).get("load_best_model_at_end"):
        defaults |= _aligned(recipe.training)
    if 0 < recipe.training.get("max_steps", 0) < 100:
        defaults["logging_steps"] = max(1, recipe.training["max_steps"] // 10)
    arguments = defaults | recipe.training
    arguments["gradient_accumulation_steps"] = shared_accumulation(arguments.get("gradient_accumulation_steps", 1))
    if record_format == "text" and arguments["packing"]:
        arguments.setdefault("packing_strategy", "wrapped")  # cuts anywhere; no token is lost
    elif arguments["packing"]:
        arguments.setdefault("packing_strategy", "bfd")
    for former in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):  # renamed in transformers 5.23
        current = former.replace("gradient", "activation")
        if former in arguments and current in training_arguments():
            arguments.setdefault(current, arguments.pop(former))
    length = arguments["max_length"]
    if length is not None and positions is not None and length > positions:
        raise InputError(
            f"training.max_length={length} is longer than the model's {positions} positions; use at most {positions}"
        )
    return {**arguments, "output_dir": str(work / "checkpoints")}
