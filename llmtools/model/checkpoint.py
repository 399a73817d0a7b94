"""Checkpoints as folders: a model, its tokenizer, and a note of how they came to be.

The folder is what transformers writes (``config.json``, ``model*.safetensors``, the tokenizer's files), so every
program that opens Hugging Face folders opens it after ``import llmtools``; `hub.py` says what is special about it.
Beside it lies ``llmtools.json``: versions, quantizers, the base model, the report of the quantization. Nothing reads
that file in order to load the model; it is for people, and for the next step's record. A model card (`card.py`) says
the same in a README.md. Where the quantization was asked for start values of adapters, they lie in
``lora_start.safetensors``.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError, InputError
from ..files import MARK, files_of, sort_metadata, writing
from ..nn.start import Start
from ..nn.swap import packed_bytes, quantized_linears
from .card import write_card
from .foreign import open_model, recognise
from .hub import attach
from .quantize import INCOMPLETE, Report

NOTE = MARK
STARTS = "lora_start.safetensors"
_PACKAGES = ("llmtools", "torch", "transformers", "safetensors", "peft")


def save(
    model: nn.Module,
    tokenizer: Any,
    folder: str | PathLike[str],
    *,
    overwrite: bool = False,
    report: Any = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Writes model and tokenizer as a Hugging Face folder, whole or not at all; returns the folder.

    report: what `llmtools.quantize` returned, or any mapping; kept in ``llmtools.json``, and the start values of
    adapters that it may hold in ``lora_start.safetensors``. A dense model (after
    `llmtools.merge`) is written as an ordinary folder.

    Raises InputError where the folder exists (unless `overwrite`, and then where it is none of ours or holds what we
    did not write), another run writes there, the model carries adapters or is half quantized, or the disk refuses;
    nothing is left behind then.
    """
    _check_savable(model)
    with writing(folder, overwrite=overwrite) as partial:
        write(model, tokenizer, partial, report=report, max_shard_size=max_shard_size)
        write_card(partial, name=Path(folder).name, former=Path(folder).expanduser())
    return Path(folder)


def write(
    model: nn.Module, tokenizer: Any, folder: Path, *, report: Any = None, max_shard_size: str | int = "5GB"
) -> None:
    """Writes the files of `save` but for the card into a folder that is there; for what writes more beside them.

    Raises InputError where the model carries adapters or is half quantized.
    """
    told: Any = model
    _check_savable(model)
    if getattr(model, "hf_quantizer", None) is None:
        attach(model)
    told.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if isinstance(report, Report) and report.starts:
        save_file(
            {
                f"{path}.lora_{side.upper()}": tensor.contiguous()
                for path, start in report.starts.items()
                for side, tensor in start._asdict().items()
            },
            folder / STARTS,
            metadata={"format": "pt"},
        )
    sort_metadata(folder)
    note = {**_note(model, report), "files": files_of(folder, "README.md", "run.json")}
    (folder / NOTE).write_text(json.dumps(note, indent=2, default=str) + "\n")


def load(folder: str | PathLike[str], **options: Any) -> tuple[Any, Any]:
    """Opens a folder that `save` wrote, any Hugging Face model, or a quantized checkpoint of others (`foreign`).

    Returns (model in eval mode, tokenizer).

    options go to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map``, …). Stricter than that: a
    tensor that is missing in the files is an error here, not a warning. ``trust_remote_code`` is off unless it is
    among the options.

    Raises CheckpointError, saying what is wrong with the folder.
    """
    from transformers import AutoTokenizer

    model = load_model(folder, **options)
    name = _name_of(folder)
    passed_on = {key: options[key] for key in ("revision", "token", "cache_dir", "trust_remote_code") if key in options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **passed_on)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{name} has no tokenizer that can be opened ({_first_line(error)}); copy tokenizer.json and "
            "tokenizer_config.json from the base model into it"
        ) from error
    return model, tokenizer


def load_model(folder: str | PathLike[str], **options: Any) -> Any:
    """The model alone, as `load` opens it: for a folder without a tokenizer."""
    from transformers import AutoModelForCausalLM

    name = _name_of(folder)
    _check_loadable(name)
    options = {"use_safetensors": True, **options}
    options.pop("output_loading_info", None)
    try:
        foreign = recognise(name, options)
        if foreign is not None:
            model, info = open_model(foreign, options)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, SafetensorError) as error:
        where = name if Path(name).exists() else f"{name} is no folder here, and from the hub"
        raise CheckpointError(f"{where}: {_first_line(error)}") from error
    lacking = sorted(info["missing_keys"])
    if lacking and not (Path(name) / "adapter_config.json").exists():
        raise CheckpointError(
            f"{name}: the weights of {', '.join(lacking[:4])}{' and more' if len(lacking) > 4 else ''} are missing"
        )
    return model


def load_starts(folder: str | PathLike[str]) -> dict[str, Start]:
    """The start values of adapters in a folder that `save` wrote (or of a model on the hub), by module path.

    Raises CheckpointError where there are none, or the file is damaged.
    """
    from transformers.utils.hub import cached_file

    name = _name_of(folder)
    try:
        file = cached_file(name, STARTS)
    except OSError as error:
        raise CheckpointError(
            f"{name} has no start values for adapters ({STARTS}); quantize the model with --adapter_rank R"
        ) from error
    try:
        tensors = load_file(file)
        paths = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
        return {path: Start(tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]) for path in paths}
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged ({_first_line(error)}); quantize the model again") from error


def _check_savable(model: nn.Module) -> None:
    if not hasattr(model, "save_pretrained"):
        raise InputError(f"{type(model).__name__} is no Hugging Face model; save its state_dict instead")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            "the model carries adapters: save those with model.save_pretrained(folder), or write a dense model with "
            "llmtools.save(llmtools.merge(model), tokenizer, folder)"
        )
    if getattr(model, INCOMPLETE, False):
        raise InputError(
            "the model is half quantized, because quantization was interrupted; load it and quantize again"
        )


def _name_of(folder: str | PathLike[str]) -> str:
    """A folder's path, or the name on the hub as it was given."""
    path = Path(folder).expanduser()
    return str(path) if path.exists() else str(folder)


def _check_loadable(name: str) -> None:
    folder = Path(name)
    if not folder.exists():
        if name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise CheckpointError(f"{name} does not exist; give a folder, or a model's name on the Hugging Face hub")
        return
    if folder.is_file():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json and model.safetensors")
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        held = sorted(path.name for path in folder.iterdir())[:5]
        holds = f"it holds {', '.join(held)}" if held else "it is empty"
        raise CheckpointError(f"{name} is no checkpoint: it has no config.json ({holds})")


def _note(model: nn.Module, report: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    specs: list[dict[str, Any]] = []
    layers = quantized_linears(model).values()
    for layer in layers:
        if (spec := layer.quantizer.spec()) not in specs:
            specs.append(spec)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "base_model": getattr(config, "name_or_path", None) or None,
        "quantizers": specs,
        "bits_per_weight": 8 * packed_bytes(model) / weights if weights else None,
        "report": _as_json(report),
    }


def _as_json(report: Any) -> Any:
    if report is None or isinstance(report, Mapping):
        return report if report is None else dict(report)
    return report.to_json()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        if package != "llmtools":
            return None
        from .. import __version__

        return __version__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
