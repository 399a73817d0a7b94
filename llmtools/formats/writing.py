"""Quantized models in the formats of others, for servers and other programs; exact, or not at all.

| format               | what becomes of a layer                                | read by                            |
|----------------------|--------------------------------------------------------|------------------------------------|
| `compressed-tensors` | a uniform grid, relabelled                             | vLLM, transformers, llm-compressor |
| `gptq`, `gptq_v2`    | a uniform grid, transposed                             | GPTQModel, vLLM, SGLang            |
| `gguf`               | the first of Q4_0, Q4_1, Q5_0 and Q8_0 that is exact   | llama.cpp, transformers            |
| `dense`              | decoded, with an adapter merged if there is one        | everything                         |

A layer that a format cannot hold to the bit is refused, with the reason. With `lossy` it is rounded again, and the
relative error is reported. Adapters have their own exporter in `adapter.py`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError, did_you_mean
from ..files import check_free, writing
from ..nn.swap import quantized_linears
from . import compressed_tensors, gguf, gptq
from .lora import export_adapter
from .readers import READERS, readers_of
from .uniform import Rounded, Uniform, uniform_layers

__all__ = ["FORMATS", "Exported", "export", "export_adapter"]

FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "gguf", "dense")


class Exported(NamedTuple):
    """Where the model lies, and what was rounded again, if anything."""

    folder: Path
    format: str
    modules: int
    rounded: list[Rounded]
    readers: tuple[str, ...] = ()
    """programs that are known to read this one, of `readers.READERS`"""


def export(
    model: nn.Module,
    tokenizer: Any,
    folder: str | PathLike[str],
    form: str,
    *,
    lossy: bool = False,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype | None = None,
    reader: str | None = None,
) -> Exported:
    """Writes a model of quantized layers in the format `form`, whole or not at all. `dense` uses the model up.

    dtype: of a dense model; by default the model's own.
    reader: the program that is going to read it, one of `readers.READERS`; what it does not take is refused.

    Raises InputError for a layer that the format cannot hold exactly, unless `lossy`.
    """
    if form not in FORMATS:
        raise InputError(f"no format {form!r}; {did_you_mean(form, FORMATS)}")
    if reader is not None and reader not in READERS:
        raise InputError(f"no reader {reader!r}; {did_you_mean(reader, READERS)}")
    check_free(folder, overwrite=overwrite)
    layers = quantized_linears(model)
    if form in ("dense", "gguf"):
        readers = readers_of(form, [], [], reader)
    if form == "dense":
        from ..checkpoint.folder import save
        from ..nn.adapters import dequantize

        wanted = dtype or getattr(model, "dtype", torch.float32)
        dense = dequantize(model, wanted).to(wanted)
        return Exported(save(dense, tokenizer, folder, overwrite=overwrite), form, len(layers), [], readers)
    if not layers:
        raise InputError("the model has no quantized layers; quantize it first, or export it as dense")
    if getattr(model, "_weight_conversions", None):
        raise InputError(
            f"{type(model).__name__} has other tensors in memory than on the disk (mixture-of-experts and the like); "
            "only --format dense can write it"
        )
    if form == "gguf":
        done = gguf.export(model, tokenizer, folder, lossy=lossy, overwrite=overwrite)
        return done._replace(readers=readers)
    limits, describe = _KINDS[form]
    uniform, rounded = uniform_layers(layers, limits, lossy=lossy)
    tensors = _others(model)
    for path, layer in uniform.items():
        tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in describe.tensors(layer).items()}
    dense_linears = [
        path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in layers
    ]
    inside = [path for path in dense_linears if path.rpartition(".")[2] != "lm_head"]
    readers = readers_of(form, list(uniform.values()), inside, reader)
    told: Any = model
    config = copy.deepcopy(told.config)
    config.quantization_config = describe.config(uniform, dense_linears)
    with writing(folder, overwrite=overwrite) as partial:
        config.save_pretrained(partial)
        if told.can_generate():
            told.generation_config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _write_shards(partial, tensors, max_shard_size)
        describe.finish(partial, config.quantization_config)
    return Exported(Path(folder), form, len(uniform), rounded, readers)


class _Kind(NamedTuple):
    """How a format of the Hugging Face kind describes a layer, a model, and what else it wants in the folder."""

    tensors: Callable[[Uniform], dict[str, Tensor]]
    config: Callable[[Mapping[str, Uniform], list[str]], dict[str, Any]]
    finish: Callable[[Path, dict[str, Any]], None]


def _gptq(version: str) -> _Kind:
    return _Kind(
        lambda layer: gptq.tensors(layer, version),
        lambda layers, dense: gptq.config(layers, dense, version),
        lambda folder, config: _write_json(folder / "quantize_config.json", config),
    )


_KINDS = {
    "gptq": (gptq.LIMITS["gptq"], _gptq("gptq")),
    "gptq_v2": (gptq.LIMITS["gptq_v2"], _gptq("gptq_v2")),
    "compressed-tensors": (
        compressed_tensors.LIMITS,
        _Kind(compressed_tensors.tensors, compressed_tensors.config, lambda folder, config: None),
    ),
}


def _others(model: nn.Module) -> dict[str, Tensor]:
    """Everything that is not packed, each tensor once: of tied ones the first name stays."""
    packed = {f"{path}.{name}" for path, layer in quantized_linears(model).items() for name in layer.packed}
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name in packed or (tensor.numel() and tensor.data_ptr() in seen):
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.contiguous()
    return kept


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: str | int) -> None:
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
