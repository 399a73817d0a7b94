"""Checkpoints as folders: a model, its tokenizer, and metadata.

The folder is what transformers writes (``config.json``, ``model*.safetensors``, the tokenizer's files), so every
program that opens Hugging Face folders opens it after ``import llmtools`` (see `model.transformers_integration`).
``llmtools.json`` beside them is metadata: versions, quantizers, the base model, the report of the quantization. It is
not needed to load the model. The model card (`model_card.py`), README.md, says the same. A LoRA initialisation from the
quantization error, if requested, is in ``lora_start.safetensors``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError, InputError, first_line, opening
from ..files import METADATA, files_of, sort_metadata, writing
from ..formats.gguf_header import read_header
from ..formats.gguf_reading import GGUFModel, find, gguf_config, joined, open_gguf, open_tokenizer
from ..formats.gguf_reading import skeleton as gguf_skeleton
from ..formats.reading import detect, left_to_transformers, naming_method, open_model
from ..formats.rewriting import Rewriter
from ..limits import TEMPLATE_SECONDS, bounded
from ..model.adapter_files import check_adapter, open_adapter
from ..model.architectures import auto_class
from ..model.fingerprint import FINGERPRINT, as_text, fingerprint
from ..model.float8 import Float8, is_scale
from ..model.integrity import (
    check_checksums,
    check_config,
    check_generation,
    check_surplus,
    check_values,
    config_of,
    read_headers,
    record_checksums,
    refuse_pickles,
    shards_of,
)
from ..model.offload import Keep, Spill, Watch, check_offload, keep_in_files, stream
from ..model.quantize import INCOMPLETE
from ..model.report import Report
from ..model.transfer import keep_on_host, this_device
from ..model.transformers_integration import METHOD, attach
from ..nn.adapters import dequantize
from ..nn.lora_init import LoraInit, initialize_lora
from ..nn.swap import packed_layers, stored_bits
from .gguf_base import is_verified
from .model_card import CARD, write_card
from .run_info import versions, write_json

LORA_INIT = "lora_start.safetensors"
ADAPTER = "adapter"
"""Folder, in that of a checkpoint, of an adapter that was trained with its recovery."""


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

    report: what `llmtools.quantize` returned, or any mapping; written to ``llmtools.json``, and its LoRA
    initialisation, if any, to ``lora_start.safetensors``. A dense model (after `llmtools.merge`) is written as an
    ordinary folder.

    Raises InputError where the folder exists (unless `overwrite`, and then where llmtools did not write it, or not all
    of it), another run writes there, the model has adapters or is half quantized, or the disk refuses; nothing is left
    behind then.
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
    """Writes a model with its quantized layers dequantized, as an ordinary Hugging Face folder; modifies the model.

    dtype: type of all weights; by default the model's own.
    """
    wanted = dtype if dtype is not None else getattr(model, "dtype", torch.float32)
    return save(dequantize(model, wanted).to(wanted), tokenizer, folder, overwrite=overwrite)


def write(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    report: Any = None,
    run: Mapping[str, Any] | None = None,
    lora_init: Mapping[str, LoraInit] | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Writes the files of `save` without the card into an existing folder; for callers that write further files.

    run: a record of `run_info.record`, for ``llmtools.json``. lora_init: by default the report's.

    Raises InputError where the model has adapters or is half quantized.
    """
    _check_savable(model)
    if getattr(model, "hf_quantizer", None) is None:
        attach(model)
    saved: Any = model
    saved.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if lora_init is None and isinstance(report, Report):
        lora_init = report.lora_init
    _write_lora_init(lora_init, folder)
    sort_metadata(folder)
    _write_metadata(model, folder, report, run or {})


def _write_metadata(model: nn.Module, folder: Path, report: Any, run: Mapping[str, Any]) -> None:
    info = {"versions": versions(), **run, **_about(model, report), "files": files_of(folder, "README.md")}
    write_json(folder / METADATA, {**info, "checksums": record_checksums(folder, info)})


def _write_lora_init(lora_init: Mapping[str, LoraInit] | None, folder: Path) -> None:
    if not lora_init:
        return
    tensors = {
        f"{path}.lora_{side.upper()}": tensor.contiguous()
        for path, start in lora_init.items()
        for side, tensor in start._asdict().items()
    }
    save_file(tensors, folder / LORA_INIT, metadata={"format": "pt"})


def write_adapter(model: Any, lora_init: Mapping[str, LoraInit], folder: Path, base: str) -> None:
    """Writes a PEFT adapter with those matrices, and the fingerprint of its base, into a new folder.

    model: the quantized model. base: the name that the adapter's configuration has for it.
    """
    from peft import LoraConfig, get_peft_model

    rank = max(len(each.a) for each in lora_init.values())
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(lora_init), task_type="CAUSAL_LM")
    known = as_text(fingerprint(model))
    adapted: Any = get_peft_model(model, config)
    try:
        initialize_lora(adapted, lora_init)
        adapted.peft_config["default"].base_model_name_or_path = base
        adapted.save_pretrained(folder, save_embedding_layers=False)
    finally:
        adapted.unload()
    (folder / CARD).unlink(missing_ok=True)  # PEFT's empty template
    (folder / FINGERPRINT).write_text(known, encoding="utf-8")


def write_again(
    rewriter: Rewriter,
    model: nn.Module,
    folder: Path,
    *,
    run: Mapping[str, Any],
    lora_init: Mapping[str, LoraInit] | None = None,
    changed: Collection[str] | None = None,
) -> None:
    """Writes a third-party checkpoint with the model's scales or codes into an existing folder, in its own format, and
    ``llmtools.json``, as `write` does. changed: paths of the layers that differ; None for all."""
    rewriter.write(model, folder, changed)
    _write_lora_init(lora_init, folder)
    _write_metadata(model, folder, None, run)


def load(
    folder: str | PathLike[str],
    *,
    verify: bool = False,
    allow_other_base: bool = False,
    offload: str | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Opens a folder that `save` wrote, any Hugging Face model, or a third-party quantized checkpoint (`formats`).

    Returns (model in eval mode, tokenizer).

    verify: compare every byte with the checksums in ``llmtools.json``; without it, small files and headers alone.
    allow_other_base: accept an adapter whose base model has changed since it was trained.
    offload: for a model that does not fit into memory, where its weights stay, to be read a block ahead of the
    computation: "disk", in the checkpoint's files, on a CPU (see `model.offload`); "cpu", the packed ones in host
    memory, on a GPU (see `model.transfer`).
    The folder of an adapter is opened on the base model that it names, with the base's tokenizer if it has none.
    options: arguments of ``from_pretrained`` (``dtype``, ``device_map``, …).

    The model is of the class that config.json names (`auto_class`), usually a causal language model. Unlike in
    transformers, a missing tensor is an error, not a warning. Unless ``trust_remote_code`` is among the options, code
    of a checkpoint is not run, without a question.

    Raises CheckpointError for a missing, damaged or unsupported checkpoint.
    """
    from transformers import AutoTokenizer

    model = load_model(folder, verify=verify, allow_other_base=allow_other_base, offload=offload, **options)
    name = joined(_name_of(folder), options.get("gguf_file"))
    if _is_adapter(Path(name)) and not (Path(name) / "tokenizer_config.json").exists():
        name = _base_of(Path(name))
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


def load_model(
    folder: str | PathLike[str],
    *,
    verify: bool = False,
    allow_other_base: bool = False,
    offload: str | None = None,
    **options: Any,
) -> Any:
    """The model alone, as `load` opens it: for a folder without a tokenizer.

    The folder of an adapter is opened with the base model that it names.

    Raises CheckpointError for a missing, damaged or unsupported checkpoint.
    """
    check_offload(offload, device_map=options.get("device_map"))
    keep = Spill() if offload == "disk" else None
    name = joined(_name_of(folder), options.pop("gguf_file", None))
    if (found := find(name, options)) is not None:
        watch = Watch([found.path])
        return _placed(_load_gguf(found, options, keep, verify=verify), offload, keep, watch)
    _check_loadable(name)
    given = set(options)
    options = {"use_safetensors": True, **options, "trust_remote_code": bool(options.get("trust_remote_code", False))}
    options.pop("output_loading_info", None)
    if _is_adapter(Path(name)):
        options["offload"] = offload
        return _load_with_adapter(Path(name), options, verify=verify, allow_other_base=allow_other_base)
    config = _check_before(name, options, verify=verify)
    watch = Watch(shards_of(Path(name)) if Path(name).exists() else ())
    with naming_method(config, name), opening(name):
        model = _checked(name, config, options, given, keep)
    return _placed(model, offload, keep, watch)


def _placed(model: Any, offload: str | None, keep: Spill | None, watch: Watch) -> Any:
    """The model with its weights where `offload` says, which come ahead of the computation; `watch` has seen the files
    before."""
    if offload == "cpu":
        return keep_on_host(model, this_device())
    if keep is not None:
        keep_in_files(model, keep)
        watch()
        stream(model, watch)
    return model


def _checked(
    name: str, config: Mapping[str, Any], options: dict[str, Any], given: set[str], keep: Keep | None = None
) -> Any:
    """The model of a folder or hub name, its tensors checked. given: names of the options that the caller gave.

    Raises CheckpointError for missing, misshapen or unexpected tensors.
    """
    where = name if Path(name).exists() else f"{name} is no folder here, and from the hub"
    lenient = bool(options.setdefault("ignore_mismatched_sizes", True)) and "ignore_mismatched_sizes" in given
    with opening(where), _named(name):
        model, info, strict = _opened(name, config, options, keep)
    if info.get("mismatched_keys") and not lenient:
        raise CheckpointError(f"{name} does not fit its config.json: {_misshapen(info['mismatched_keys'])}")
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise CheckpointError(
            f"{name}: the weights of {', '.join(lacking[:4])}{' and more' if len(lacking) > 4 else ''} are missing"
        )
    passed = options.keys() - {"dtype", "torch_dtype", "quantization_config"}
    if not passed & model.config.to_dict().keys():  # options may reduce the config, such as num_hidden_layers
        surplus = info["unexpected_keys"]
        if Float8.of(config) is not None:
            surplus = [key for key in surplus if not is_scale(key)]
        check_surplus(model, surplus, name, strict=strict)
    if getattr(model, "quantization_method", None) != METHOD:  # else the values were checked while loading
        check_values(model, name)
    return model


def check_verifiable(found: GGUFModel, *, verify: bool) -> None:
    """Raises CheckpointError where the bytes of a GGUF file are to be verified, and cannot be."""
    if verify and not is_verified(found.name):
        raise CheckpointError(
            f"{found.name} has no checksums to verify; the SHA-256 of a GGUF file is known from an adapter that "
            "llmtools trained on it, or from the hub's cache"
        )


def _load_gguf(found: GGUFModel, options: Mapping[str, Any], keep: Keep | None, *, verify: bool) -> Any:
    check_verifiable(found, verify=verify)
    with _named(found.name):
        model, info = open_gguf(found, options, keep)
    if lacking := sorted(info["missing_keys"]):
        more = " and more" if len(lacking) > 4 else ""
        raise CheckpointError(f"{found.name}: the weights of {', '.join(lacking[:4])}{more} are missing")
    check_values(model, found.name)
    return model


def _opened(
    name: str, config: Mapping[str, Any], options: dict[str, Any], keep: Keep | None
) -> tuple[Any, dict[str, Any], bool]:
    """(model, transformers' loading info, whether llmtools wrote the files, for this very architecture)."""
    external = detect(name, options)
    if external is not None:
        return (*open_model(external, options, keep), False)
    model, info = auto_class(config).from_pretrained(name, output_loading_info=True, **options)
    own = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False) and model.quantization_method == METHOD
    return model, info, bool(own) and type(model).__name__ in (model.config.architectures or ())


def config_at(name: str | PathLike[str]) -> dict[str, Any]:
    """config.json of a folder, or of a model on the hub; {} where it cannot be read."""
    return _config_of(_name_of(name), {})


def _config_of(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a folder, or of a model on the hub; {} where it cannot be read: opening the model then fails."""
    if Path(name).exists():
        return config_of(Path(name))
    from transformers import PreTrainedConfig

    where = {key: options[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in options}
    with suppress(OSError, ValueError):
        return dict(PreTrainedConfig.get_config_dict(name, **where)[0])
    return {}


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Adds the folder to messages of CheckpointError; turns transformers' question about remote code into one."""
    try:
        yield
    except CheckpointError as error:
        raise error if name in str(error) else CheckpointError(f"{name}: {error}") from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CheckpointError(
            f"{name} comes with custom code, which is not run; if you trust it, pass --trust_remote_code true "
            "(trust_remote_code=True)"
        ) from error


def _misshapen(mismatched: Iterable[Any]) -> str:
    """A message for the first of transformers' (name, shape in the file, shape in the model)."""
    name, found, expected = sorted(mismatched)[0]
    return f"{name} has shape {list(found)} in the files, expected {list(expected)}"


def _check_before(name: str, options: Mapping[str, Any], *, verify: bool) -> dict[str, Any]:
    """config.json, after all checks that need no model, see `model.integrity`."""
    config = _config_of(name, options)
    left_to_transformers(config, name)
    folder = Path(name)
    if not folder.exists():
        if verify:
            raise CheckpointError(f"{name}: only folders can be verified; the hub checks what it sends by itself")
        check_config(config, None, name)
        return config
    refuse_pickles(folder)
    check_config(config, read_headers(shards_of(folder)), name)
    check_checksums(folder, verify=verify)
    return config


def _load_with_adapter(folder: Path, options: dict[str, Any], *, verify: bool, allow_other_base: bool) -> Any:
    base = _base_of(folder)
    model = load_model(base, verify=verify and not is_verified(base, folder), **options)
    return open_adapter(model, folder, verify=verify, allow_other_base=allow_other_base)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()


def _base_of(folder: Path) -> str:
    """The folder or hub name of the model that an adapter was trained on."""
    base = check_adapter(folder).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder} is an adapter that does not name its base model; open the base model first")
    return str(base)


def _check_chat_template(tokenizer: Any, name: str) -> None:
    """Raises CheckpointError for a chat template, which is a program, that does not terminate or fills the memory."""
    if not getattr(tokenizer, "chat_template", None):
        return
    try:
        with bounded(TEMPLATE_SECONDS):
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    except (TimeoutError, MemoryError, OverflowError) as error:
        raise CheckpointError(
            f"{name}: the chat template does not terminate ({first_line(error)}); remove it from the folder "
            "(chat_template.jinja, or chat_template in tokenizer_config.json), or copy the base model's"
        ) from error
    except Exception:  # it may reject this chat; others are checked when they are formatted
        return


def skeleton(folder: str | PathLike[str]) -> Any:
    """The model of a folder or hub name without weights: on the meta device, with dense linears."""
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


def load_lora_init(folder: str | PathLike[str]) -> dict[str, LoraInit]:
    """Module path → LoRA initialisation, from a folder that `save` wrote, or a model on the hub.

    Raises CheckpointError where there is none, or the file is damaged.
    """
    from transformers.utils.hub import cached_file

    name = _name_of(folder)
    try:
        file = cached_file(name, LORA_INIT)
    except OSError as error:
        raise CheckpointError(
            f"{name} has no LoRA initialisation ({LORA_INIT}); quantize the model with --adapter_rank R"
        ) from error
    try:
        tensors = load_file(file)
        paths = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
        return {path: LoraInit(tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]) for path in paths}
    except (SafetensorError, KeyError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({first_line(error)}); quantize the model again") from error


def _check_savable(model: nn.Module) -> None:
    if not hasattr(model, "save_pretrained"):
        raise InputError(f"{type(model).__name__} is not a Hugging Face model; save its state_dict instead")
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
        raise CheckpointError(f"{name} is not a checkpoint: it has no config.json ({holds})")


def _about(model: nn.Module, report: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    specs: list[dict[str, Any]] = []
    for layer in packed_layers(model).values():
        if (spec := layer.quantizer.spec()) not in specs:
            specs.append(spec)
    return {
        "base_model": getattr(config, "name_or_path", None) or None,
        "quantizers": specs,
        "bits_per_weight": stored_bits(model),
        "report": _as_json(report),
    }


def _as_json(report: Any) -> Any:
    if report is None or isinstance(report, Mapping):
        return report if report is None else dict(report)
    return report.to_json()
