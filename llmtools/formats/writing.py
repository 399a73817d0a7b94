"""Quantized models in external formats, for servers and other programs; exact, or not at all.

| format               | how a layer is stored                                  | read by                            |
|----------------------|--------------------------------------------------------|------------------------------------|
| `compressed-tensors` | a uniform grid, relabelled                             | vLLM, transformers, llm-compressor |
| `gptq`, `gptq_v2`    | a uniform grid, transposed                             | GPTQModel, vLLM, SGLang            |
| `gguf`               | the first of Q4_0, Q4_1, Q5_0 and Q8_0 that is exact   | llama.cpp, transformers            |

A layer that a format cannot hold to the bit is refused, with the reason. With `lossy` it is re-quantized, and the
relative error is reported. Adapters have their own exporter in `lora.py`.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..errors import InputError, did_you_mean
from ..files import check_free, writing
from ..nn.swap import quantized_linears
from .base import Format, formats
from .readers import READERS
from .uniform import Requantized


class Exported(NamedTuple):
    """Where the model lies, and what was re-quantized, if anything."""

    folder: Path
    format: str
    modules: int
    requantized: list[Requantized]
    readers: tuple[str, ...] = ()
    """Programs that are known to read this one, of `readers.READERS`."""


def writable() -> list[str]:
    """Names of the formats that models can be written in, plug-ins included."""
    return [name for name in formats.names() if formats.known(name).writes()]


def export(
    model: nn.Module,
    tokenizer: Any,
    folder: str | PathLike[str],
    form: str,
    *,
    lossy: bool = False,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    reader: str | None = None,
) -> Exported:
    """Writes a model of quantized layers in the format `form`, whole or not at all.

    reader: the program that is going to read it, one of `readers.READERS`; what it does not take is refused.

    Raises InputError for a layer that the format cannot hold exactly, unless `lossy`.
    """
    kind = writable_format(form)
    check_reader(reader)
    check_free(folder, overwrite=overwrite)
    if not quantized_linears(model):
        raise InputError("the model has no quantized layers; quantize it first, or export it as dense")
    if getattr(model, "_weight_conversions", None):
        raise InputError(
            f"{type(model).__name__} has other tensors in memory than on the disk (mixture-of-experts and the like); "
            "only --format dense can write it"
        )
    with writing(folder, overwrite=overwrite) as partial:
        done = kind.write_model(model, tokenizer, partial, lossy=lossy, reader=reader, max_shard_size=max_shard_size)
    return Exported(Path(folder), form, *done)


def writable_format(name: str) -> type[Format]:
    """The format of that name. Raises InputError, with the nearest name, unless models are written in it."""
    if name not in (known := writable()):
        raise InputError(f"no format {name!r}; {did_you_mean(name, known)}")
    return formats.known(name)


def check_reader(reader: str | None) -> None:
    """Raises InputError, with the nearest name, for a program that the table of readers does not have."""
    if reader is not None and reader not in READERS:
        raise InputError(f"no reader {reader!r}; {did_you_mean(reader, READERS)}")
