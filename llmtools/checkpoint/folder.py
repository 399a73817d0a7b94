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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError, InputError, first_line, opening
from ..files import MARK, files_of, sort_metadata, writing
from ..formats.gguf_header import read_header
from ..formats.gguf_reading import GGUFModel, find, gguf_config, joined, open_gguf, open_tokenizer
from ..formats.gguf_reading import skeleton as gguf_skeleton
from ..formats.reading import detect, open_model
from ..limits import TEMPLATE_SECONDS, bounded
from ..model.adapter_files import check_adapter, open_adapter
from ..model.architectures import auto_class
from ..model.integrity import (
    check_checksums,
    check_config,
    check_generation,
    check_surplus,
    check_values,
    config_of,
    note_checksums,
    read_headers,
    refuse_pickles,
    shards_of,
)
from ..model.quantize import INCOMPLETE, Report
from ..model.transformers_integration import METHOD, attach
from ..nn.adapters import dequantize
from ..nn.lora_init import Start
from ..nn.swap import packed_bytes, packed_layers
from .model_card import write_card

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


def save_dense(
    model: nn.Module,
    tokenizer: Any,
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model with its quantized layers decoded, as an ordinary Hugging Face folder; uses the model up.

    dtype: of all weights; by default the model's own.
    """
    wanted = dtype if dtype is not None else getattr(model, "dtype", torch.float32)
    return save(dequantize(model, wanted).to(wanted), tokenizer, folder, overwrite=overwrite)


def write(
    model: nn.Module, tokenizer: Any, folder: Path, *, report: Any = None, max_shard_size: str | int = "5GB"
) -> None:
    """Writes the files of `save` but for the card into a folder that is there; for what writes more beside them.

    Raises InputError where the model carries adapters or is half quantized.
    """
    _check_savable(model)
    if getattr(model, "hf_quantizer", None) is None:
        attach(model)
    saved: Any = model
    saved.save_pretrained(folder, max_shard_size=max_shard_size)
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
    note["checksums"] = note_checksums(folder, note)
    (folder / NOTE).write_text(json.dumps(note, indent=2, default=str) + "\n", encoding="utf-8")


def load(folder: str | PathLike[str], *, verify: bool = False, **options: Any) -> tuple[Any, Any]:
    """Opens a folder that `save` wrote, any Hugging Face model, or a quantized checkpoint of others (`foreign`).

    Returns (model in eval mode, tokenizer).

    verify: compare every byte with the checksums that `save` noted; without it, small files and headers alone.
    The model is of the class that config.json names (`auto_class`): as a rule a decoder with its head.
    options go to ``from_pretrained`` (``dtype``, ``device_map``, …). Stricter than that: a
    tensor that is missing in the files is an error here, not a warning. ``trust_remote_code`` is off unless it is
    among the options: code that comes with a checkpoint is never run, nor asked about.

    Raises CheckpointError, saying what is wrong with the folder.
    """
    from transformers import AutoTokenizer

    model = load_model(folder, verify=verify, **options)
    name = joined(_name_of(folder), options.get("gguf_file"))
    if (found := find(name, options)) is not None:
        tokenizer = open_tokenizer(found)
        check_generation(model, tokenizer, name)
        _check_chat_template(tokenizer, name)
        return model, tokenizer
    passed_on: dict[str, Any] = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
    passed_on["trust_remote_code"] = bool(options.get("trust_remote_code", False))
    remedy = "copy tokenizer.json and tokenizer_config.json from the base model into it"
    with opening(f"{name} has no tokenizer that can be opened", remedy), _named(name):
        tokenizer = AutoTokenizer.from_pretrained(name, **passed_on)
        check_generation(model, tokenizer, name)
        _check_chat_template(tokenizer, name)
    return model, tokenizer


def load_model(folder: str | PathLike[str], *, verify: bool = False, **options: Any) -> Any:
    """The model alone, as `load` opens it: for a folder without a tokenizer.

    The folder of an adapter is opened with the base model that it names.
    """
    name = joined(_name_of(folder), options.pop("gguf_file", None))
    if (found := find(name, options)) is not None:
        return _load_gguf(found, options, verify=verify)
    _check_loadable(name)
    asked = set(options)
    options = {"use_safetensors": True, **options, "trust_remote_code": bool(options.get("trust_remote_code", False))}
    options.pop("output_loading_info", None)
    if (Path(name) / "adapter_config.json").exists() and not (Path(name) / "config.json").exists():
        return _load_with_adapter(Path(name), options)
    config = _check_before(name, options, verify=verify)
    where = name if Path(name).exists() else f"{name} is no folder here, and from the hub"
    lenient = bool(options.setdefault("ignore_mismatched_sizes", True)) and "ignore_mismatched_sizes" in asked
    with opening(where), _named(name):
        model, info, strict = _opened(name, config, options)
    if info.get("mismatched_keys") and not lenient:
        raise CheckpointError(f"{name} does not fit its config.json: {_misshapen(info['mismatched_keys'])}")
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise CheckpointError(
            f"{name}: the weights of {', '.join(lacking[:4])}{' and more' if len(lacking) > 4 else ''} are missing"
        )
    passed = options.keys() - {"dtype", "torch_dtype", "quantization_config"}
    if not passed & model.config.to_dict().keys():  # whoever asks for fewer layers gets them
        check_surplus(model, info["unexpected_keys"], name, strict=strict)
    if getattr(model, "quantization_method", None) != METHOD:  # else they were looked at while they were loaded
        check_values(model, name)
    return model


def _load_gguf(found: GGUFModel, options: Mapping[str, Any], *, verify: bool) -> Any:
    if verify:
        raise CheckpointError(f"{found.name} has no checksums to verify; they come with folders that llmtools writes")
    with _named(found.name):
        model, info = open_gguf(found, options)
    if lacking := sorted(info["missing_keys"]):
        more = " and more" if len(lacking) > 4 else ""
        raise CheckpointError(f"{found.name}: the weights of {', '.join(lacking[:4])}{more} are missing")
    check_values(model, found.name)
    return model


def _opened(name: str, config: Mapping[str, Any], options: dict[str, Any]) -> tuple[Any, dict[str, Any], bool]:
    """(model, transformers' loading info, whether the files are ours and of this very architecture)."""
    foreign = detect(name, options)
    if foreign is not None:
        return (*open_model(foreign, options), False)
    model, info = auto_class(config).from_pretrained(name, output_loading_info=True, **options)
    ours = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False) and model.quantization_method == METHOD
    return model, info, bool(ours) and type(model).__name__ in (model.config.architectures or ())


def _config_of(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a folder, or of a model on the hub; {} where it cannot be had, which is said on opening."""
    if Path(name).exists():
        return config_of(Path(name))
    from transformers import PreTrainedConfig

    where = {key: options[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in options}
    with suppress(OSError, ValueError):
        return dict(PreTrainedConfig.get_config_dict(name, **where)[0])
    return {}


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Messages name the folder; a checkpoint that brings code of its own is one of them, and no question on stdin."""
    try:
        yield
    except CheckpointError as error:
        raise error if name in str(error) else CheckpointError(f"{name}: {error}") from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CheckpointError(
            f"{name} brings code of its own, which is not run; if you trust it, pass --trust_remote_code true "
            "(trust_remote_code=True)"
        ) from error


def _misshapen(mismatched: Iterable[Any]) -> str:
    """transformers' (name, shape in the file, shape in the model), the first of them in words."""
    name, found, expected = sorted(mismatched)[0]
    return f"{name} has shape {list(found)} in the files, expected {list(expected)}"


def _check_before(name: str, options: Mapping[str, Any], *, verify: bool) -> dict[str, Any]:
    """config.json, after all that can be seen to be wrong before anything is built, see `integrity.py`."""
    config = _config_of(name, options)
    folder = Path(name)
    if not folder.exists():
        if verify:
            raise CheckpointError(f"{name}: only folders can be verified; the hub checks what it sends by itself")
        check_config(config, None, name)
        return config
    refuse_pickles(folder)
    check_config(config, read_headers(shards_of(folder)), name)
    check_checksums(folder, NOTE, verify=verify)
    return config


def _load_with_adapter(folder: Path, options: dict[str, Any]) -> Any:
    config = check_adapter(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder} is an adapter that does not say what it was trained on; open that first")
    return open_adapter(load_model(str(base), **options), folder)


def _check_chat_template(tokenizer: Any, name: str) -> None:
    """Raises CheckpointError for a chat template that does not end, or fills the memory: it is a program, too."""
    if not getattr(tokenizer, "chat_template", None):
        return
    try:
        with bounded(TEMPLATE_SECONDS):
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    except (TimeoutError, MemoryError, OverflowError) as error:
        raise CheckpointError(
            f"{name}: the chat template does not come to an end ({first_line(error)}); take it out of the folder "
            "(chat_template.jinja, or chat_template in tokenizer_config.json), or copy the base model's"
        ) from error
    except Exception:  # it may refuse this chat; it is asked again about those that are wanted
        return


def skeleton(folder: str | PathLike[str]) -> Any:
    """A folder's model without weights, on the meta device, its linears dense whatever they are in the files."""
    import torch
    from transformers import AutoConfig

    name = _name_of(folder)
    if (found := find(name, {})) is not None:
        file = read_header(found.path)
        return gguf_skeleton(file, gguf_config(file))
    _check_loadable(name)
    _check_before(name, {}, verify=False)
    with opening(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return auto_class(config.to_dict()).from_config(config, trust_remote_code=False)


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
    except (SafetensorError, KeyError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({first_line(error)}); quantize the model again") from error


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
    layers = packed_layers(model).values()
    for layer in layers:
        if (spec := layer.quantizer.spec()) not in specs:
            specs.append(spec)
    weights = sum(rows * columns for rows, columns in (layer.shape for layer in layers))
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
