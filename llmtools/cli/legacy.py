"""Options of the published releases (LLMTools), and those of transformers' and TRL's scripts, as today's options.

One table per verb; an option may be written with dashes or underscores. Translations are logged; an option without a
successor is an error that names a remedy. (Former names of today's own options: `options.FORMER_NAMES`.)
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import InputError

log = logging.getLogger(__name__)

OLD: dict[str, dict[str, str]] = {
    "quantize": {
        "save": "out",
        "dataset": "calibration",
        "nsamples": "num_samples",
        "percdamp": "options.damping",
        "groupsize": "group_size",
        "wbits": "bits",
        "act_order": "options.act_order",
        "nearest": "quantizer=rtn",
        "weights": "model",
    },
    "finetune": {
        "dataset_name": "data",
        "max_seq_length": "training.max_length",
        "lora_target_modules": "lora.target_modules",
        "load_in_4bit": "load=nf4",
        "load_in_8bit": "load=int8",
        "overwrite_output_dir": "overwrite",
        "dataset": "data",
        "data_type": "task",
        "ds_type": "task",
        "adapter": "out",
        "lora_out_dir": "out",
        "mbatch_size": "training.per_device_train_batch_size",
        "batch_size": "training.gradient_accumulation_steps",
        "epochs": "training.num_train_epochs",
        "lr": "training.learning_rate",
        "cutoff_len": "training.max_length",
        "lora_r": "lora.r",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "val_set_size": "validation",
        "warmup_steps": "training.warmup_steps",
        "save_steps": "training.save_steps",
        "save_total_limit": "training.save_total_limit",
        "logging_steps": "training.logging_steps",
        "resume_checkpoint": "resume",
        "groupsize": "",
        "weights": "model",
    },
    "export": {"for": "reader"},
    "generate": {
        "instruction": "prompt",
        "max_length": "max_new_tokens",
        "groupsize": "",
        "weights": "model",
    },
}
"""Verb → published option → today's; with ``=``, a flag that stands for a value; empty: not needed."""

EVERYWHERE = {"model_name_or_path": "model", "output_dir": "out", "adapter_name_or_path": "adapter"}
"""Options of transformers' and TRL's scripts → today's, for every verb that has the option."""

ALIASES = (
    *EVERYWHERE,
    *("dataset_name", "max_seq_length", "lora_target_modules", "load_in_4bit", "load_in_8bit", "overwrite_output_dir"),
    "for",
)
"""Options that are translated without a line in the log."""

ALONE = ("act_order", "nearest", "resume_checkpoint", "load_in_4bit", "load_in_8bit", "overwrite_output_dir")
"""Options that may stand without a value."""

GONE = {
    "tokenizer": "the tokenizer is the one in the model's folder; copy its files there",
    "min_length": "a minimum length is not supported any more",
    "top_k": "sampling is restricted by --top_p",
}
"""Options without a successor → the remedy."""


def translated(verb: str, args: list[str], known: list[str]) -> list[str]:
    """A command's arguments with published options replaced. known: today's options, which win over published ones.

    >>> translated("quantize", ["--groupsize", "64", "--act-order"], ["bits", "group_size"])
    ['--group_size', '64', '--options.act_order', 'true']
    """
    everywhere = {name: today for name, today in EVERYWHERE.items() if today in known}
    table = {old: new for old, new in {**everywhere, **OLD.get(verb, {})}.items() if old not in known}
    if not table:
        return args
    found: dict[str, str] = {}
    rest: list[str] = []
    for word, value, given in _split(args, table):
        name = word.lstrip("-").replace("-", "_")
        if word.startswith("--") and name in GONE and name not in known:
            raise InputError(f"{word}: {GONE[name]}")
        if word.startswith("--") and name in table:
            if name in found:
                raise InputError(f"{word} is given twice")
            found[name] = value
        else:
            rest += given
    new = _replaced(verb, found, table)
    has_task = {"data_type", "ds_type"} & set(found) or {"--task", "--config"} & {arg.partition("=")[0] for arg in rest}
    if verb == "finetune" and "dataset" in found and not has_task:
        new += ["--task", "alpaca"]  # the published default
    if verb == "generate" and "instruction" in found:
        new += ["--raw", "true"]
    if older := [name for name in found if name not in ALIASES]:
        log.info(
            "published options: %s; today: %s", " ".join(f"--{name}" for name in older), " ".join(new) or "not needed"
        )
    if "weights" in found:  # the folder of the quantized layers, so it wins over the name of the architecture
        rest = _without(rest, "--model")
    return rest + new


def _split(args: list[str], table: Mapping[str, str]) -> Iterator[tuple[str, str, list[str]]]:
    """(option, value, the arguments that give it) of published options; others as (argument, "", [argument])."""
    index = 0
    while index < len(args):
        word, equals, value = args[index].partition("=")
        name = word.lstrip("-").replace("-", "_")
        if not word.startswith("--") or (name not in table and name not in GONE):
            yield args[index], "", [args[index]]
            index += 1
            continue
        following = args[index + 1] if index + 1 < len(args) else None
        if equals:
            yield word, value, [args[index]]
            index += 1
        elif name in ALONE and (following is None or following.lower() not in ("true", "false")):
            yield word, "true", [word]
            index += 1
        elif following is None or following.startswith("--"):
            raise InputError(f"{word}: a value is expected")
        else:
            yield word, following, [word, following]
            index += 2


def _replaced(verb: str, found: Mapping[str, str], table: Mapping[str, str]) -> list[str]:
    new: list[str] = []
    for name, value in found.items():
        today, _, stands_for = table[name].partition("=")
        if not today:
            continue
        if stands_for:
            new += [f"--{today}", stands_for] if value.lower() == "true" else []
            continue
        new += [f"--{today}", _value(verb, name, value, found)]
    if verb == "finetune" and "batch_size" in found and "mbatch_size" not in found:
        new += ["--training.per_device_train_batch_size", "1"]
    return new


def _value(verb: str, name: str, value: str, found: Mapping[str, str]) -> str:
    if name == "weights":
        return _folder_of(value)
    if name == "instruction":
        from ..data.tasks.alpaca import ALONE  # Stanford's prompt template, which the task alpaca trains with

        return ALONE.prompt.format(instruction=value)
    if name == "batch_size":
        sizes = (value, found.get("mbatch_size", "1"))
        if not all(re.fullmatch("[0-9]{1,18}", size) for size in sizes):
            raise InputError(f"--batch_size {sizes[0]} --mbatch_size {sizes[1]}: whole numbers are expected")
        return str(accumulation(int(sizes[0]), int(sizes[1]), world_size()))
    if name == "val_set_size" and re.fullmatch(r"[0-9]+\.?[0-9]*", value) and float(value) > 1:
        raise InputError(f"--val_set_size {value}: the fraction of the rows is expected (--validation 0.1), or a file")
    return value


def _folder_of(weights: str) -> str:
    """The checkpoint's folder, of a path of published ``--weights``."""
    path = Path(weights).expanduser()
    if path.suffix in (".pt", ".pth", ".bin", ".pkl"):
        raise InputError(
            f"--weights {weights}: pickled weights are not opened, since reading them can run code; give the folder of "
            "a checkpoint with safetensors: --model FOLDER"
        )
    return str(path.parent) if path.suffix == ".safetensors" else weights


def accumulation(batch_size: int, mbatch_size: int, processes: int = 1) -> int:
    """Gradient accumulation steps of `mbatch_size` examples on each of `processes` for a batch of `batch_size`.

    >>> accumulation(128, 4, 2)
    16
    """
    at_once = mbatch_size * processes
    if mbatch_size < 1 or batch_size < at_once:
        raise InputError(
            f"batch_size={batch_size} is smaller than one step: mbatch_size={mbatch_size} on {processes} process(es); "
            f"use a batch_size of at least {max(at_once, 1)}"
        )
    steps = batch_size // at_once
    if batch_size % at_once:
        log.warning("batch_size=%d is no multiple of %d; batches have %d", batch_size, at_once, steps * at_once)
    return steps


def world_size() -> int:
    """Number of processes that train together, as ``accelerate launch`` and ``torchrun`` set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _without(args: list[str], option: str) -> list[str]:
    kept = list(args)
    while option in kept:
        at = kept.index(option)
        del kept[at : at + 2]
    return [arg for arg in kept if not arg.startswith(f"{option}=")]
