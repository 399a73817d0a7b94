"""Export of quantized models to external formats, for servers and other programs; exact by default.

| format               | storage of a layer                                     | read by                            |
|----------------------|--------------------------------------------------------|------------------------------------|
| `compressed-tensors` | a uniform grid, renamed                                | vLLM, transformers, llm-compressor |
| `gptq`, `gptq_v2`    | a uniform grid, transposed                             | GPTQModel, vLLM, SGLang            |
| `gguf`               | the first of Q4_0, Q4_1, Q5_0 and Q8_0 that is exact   | llama.cpp, transformers            |
| `exl3`               | a trellis of the quantizer `exl3`, turned              | exllamav3, by its source; untested |

A layer that a format cannot hold exactly is an error, with the reason. With `lossy` it is re-quantized, and the
relative error is reported. Adapters are exported by `lora.py`.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..errors import InputError, did_you_mean
from ..files import check_free, writing
from ..nn.experts import unfused_experts
from ..nn.swap import quantized_linears
from .base import Format, formats
from .readers import READERS
from .uniform import Requantized


class ExportResult(NamedTuple):
    """The result of an export."""

    folder: Path
    """Folder of the files."""
    format: str
    """Name of the format."""
    modules: int
    """Number of quantized linears."""
    requantized: list[Requantized]
    """Linears that the format cannot hold exactly, re-quantized under `lossy`."""
    readers: tuple[str, ...] = ()
    """Programs known to read the files, of `readers.READERS`."""


def writable() -> list[str]:
    """Names of the formats for export, plug-ins included."""
    return [name for name in formats.names() if formats.known(name).writes()]


def export(
    model: nn.Module,
    tokenizer: Any,
    folder: str | PathLike[str],
    format_name: str,
    *,
    lossy: bool = False,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    reader: str | None = None,
) -> ExportResult:
    """Writes a model with quantized layers in a format, atomically.

    reader: the program that will read it, one of `readers.READERS`; an export that it does not support is an error.

    Raises InputError for an unknown format or reader, a model without quantized layers, an existing folder (unless
    `overwrite`), and a layer that the format cannot hold exactly (unless `lossy`).
    """
    kind = writable_format(format_name)
    check_reader(reader)
    check_free(folder, overwrite=overwrite)
    if not quantized_linears(model):
        raise InputError("the model has no quantized layers; quantize it first, or export it as dense")
    mixture = bool(unfused_experts(model))
    if not (mixture and kind.by_expert) and (mixture or getattr(model, "_weight_conversions", None)):
        raise InputError(
            f"{type(model).__name__} has different tensors in memory and in files (such as mixtures of experts); "
            "only --format dense can write it"
        )
    with writing(folder, overwrite=overwrite) as partial:
        done = kind.write_model(model, tokenizer, partial, lossy=lossy, reader=reader, max_shard_size=max_shard_size)
    return ExportResult(Path(folder), format_name, *done)


def writable_format(name: str) -> type[Format]:
    """The export format of that name. Raises InputError, with the nearest name, where there is none."""
    if name not in (known := writable()):
        raise InputError(f"no format {name!r}; {did_you_mean(name, known)}")
    return formats.known(name)


def check_reader(reader: str | None) -> None:
    """Raises InputError, with the nearest name, for an unknown reader."""
    if reader is not None and reader not in READERS:
        raise InputError(f"no reader {reader!r}; {did_you_mean(reader, READERS)}")
