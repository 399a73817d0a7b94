"""Write a model or an adapter in an external format."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """Write a quantized model for servers and other programs, exactly; or a merged dense model; or a plain adapter."""

    format: str
    """compressed-tensors, gptq, gptq_v2, gguf, dense (decoded, with the adapter merged), or lora (the adapter alone)"""
    out: str
    """folder to write to; an adapter as gguf may also be a file, whose name ends in .gguf"""
    model: str | None = None
    """folder or hub name of the quantized model; by default what the adapter was trained on"""
    adapter: str | None = None
    """folder of an adapter: merged into a dense model; or written alone, as a plain LoRA with --format lora, as one for
    llama.cpp with --format gguf"""
    base_name: str | None = None
    """the base model's name to write into a plain LoRA, instead of its path on this machine"""
    reader: str | None = None
    """program that is going to read it: vllm, gptqmodel, transformers or llama.cpp (also --for); what that one does not
    take is refused, with the options of quantize that would do"""
    dtype: str | None = None
    """type of dense weights: float32, float16 or bfloat16; by default the model's own"""
    lossy: bool = False
    """re-quantization of what the format cannot hold exactly, instead of refusing it"""
    overwrite: bool = False
    """replace the output folder if there is one"""
    plugin: str | list[str] | None = None
    """module:Class of your own quantizer, if the checkpoint was made with it"""
    verify: bool = False
    """comparison of every byte of the model's (and adapter's) files with their checksums before they are used"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""


@dataclass(frozen=True)
class ExportedModel:
    """Where the result lies, and what was re-quantized, if anything."""

    out: str
    format: str
    modules: int
    requantized: list[dict[str, Any]] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    """programs that are known to read it"""

    def __str__(self) -> str:
        lines = [
            f"{one['path']}: {one['reason']}; re-quantized, relative error {one['relative_error']:.2g}"
            for one in self.requantized
        ]
        adapters = {"lora": "the adapter as a plain LoRA", "gguf-lora": "the adapter as a LoRA for llama.cpp"}
        what = adapters.get(self.format, f"{self.modules} modules as {self.format}")
        exact = "" if self.format in ("dense", *adapters) or self.requantized else ", exact"
        read = f"; known to be read by {', '.join(self.readers)}" if self.readers else ""
        return "\n".join([*lines, f"{self.out}: {what}{exact}{read}"])


def export(recipe: Export) -> ExportedModel:
    """Writes the model or the adapter."""
    from ..files import claim
    from ..model.adapter_files import check_adapter
    from .loading import import_plugins, model_and_adapter, quiet_libraries

    _check_format(recipe)
    if recipe.format == "gguf" and recipe.adapter is not None:
        return _export_gguf_adapter(recipe)
    if recipe.adapter is not None and recipe.format not in ("dense", "lora"):
        raise InputError(
            f"an adapter cannot be merged into packed weights (format {recipe.format}); use --format dense for a "
            "merged model, or serve the adapter beside the quantized model: --format lora (or gguf, for llama.cpp)"
        )
    name: str | None
    adapter: str | None
    if recipe.format == "lora":
        if recipe.adapter is None:
            raise InputError("no adapter: pass --adapter, a folder that `llmtools finetune --out` wrote")
        check_adapter(recipe.adapter)
        name, adapter = recipe.model, recipe.adapter
    else:
        name, adapter = model_and_adapter(recipe.model, recipe.adapter)
    with claim(recipe.out, overwrite=recipe.overwrite, reads=[name, adapter]):
        quiet_libraries()
        import_plugins(recipe.plugin)
        if name is None or recipe.format == "lora":
            return _export_lora(recipe)
        return _export_model(recipe, name, adapter)


def _check_format(recipe: Export) -> None:
    """Raises InputError, with the nearest name, for a format that nothing is written in, and a reader not known."""
    from ..formats.writing import check_reader, writable

    if recipe.format not in (known := [*writable(), "dense", "lora"]):
        raise InputError(f"no format {recipe.format!r}; {did_you_mean(recipe.format, known)}")
    check_reader(recipe.reader)


def _export_model(recipe: Export, name: str, adapter: str | None) -> ExportedModel:
    from ..checkpoint.folder import save, save_dense
    from ..formats.readers import readers_of
    from ..formats.writing import export as export_model
    from ..nn.adapters import merge
    from ..nn.swap import quantized_linears
    from .loading import loaded_as, open_model

    dtype: Any = _dtype(recipe)
    load = loaded_as(None, name, adapter)
    if load is not None:
        return _export_loaded(recipe, name, load)
    model, tokenizer = open_model(
        name, adapter=adapter, trust_remote_code=recipe.trust_remote_code, verify=recipe.verify
    )
    model = model.cpu()
    if adapter is not None:
        modules = len(quantized_linears(model))
        dtype = dtype or getattr(model, "dtype", None)
        merged = merge(model, dtype).to(dtype)
        save(merged, tokenizer, recipe.out, overwrite=recipe.overwrite)
        return ExportedModel(recipe.out, recipe.format, modules)
    if recipe.format == "dense":
        modules, readers = len(quantized_linears(model)), list(readers_of("dense", [], [], recipe.reader))
        save_dense(model, tokenizer, recipe.out, dtype=dtype, overwrite=recipe.overwrite)
        return ExportedModel(recipe.out, recipe.format, modules, readers=readers)
    done = export_model(
        model,
        tokenizer,
        recipe.out,
        recipe.format,
        lossy=recipe.lossy,
        overwrite=recipe.overwrite,
        reader=recipe.reader,
    )
    requantized = [one._asdict() for one in done.requantized]
    return ExportedModel(recipe.out, recipe.format, done.modules, requantized, list(done.readers))


def _export_loaded(recipe: Export, name: str, load: str) -> ExportedModel:
    """An adapter whose base bitsandbytes quantized while it was loaded is merged into that base, not the plain one.

    Its bits are saved, and opened as our layers, which decode them.
    """
    import tempfile

    from .loading import open_model

    if load != "nf4":
        raise InputError(
            f"the adapter was trained on {name} with --load {load}, and such a base cannot be decoded to merge with; "
            "serve the adapter beside it: --format lora"
        )
    with tempfile.TemporaryDirectory() as place:
        base, tokenizer = open_model(name, load=load, trust_remote_code=recipe.trust_remote_code, verify=recipe.verify)
        base.save_pretrained(place)  # type: ignore[operator]
        tokenizer.save_pretrained(place)
        del base
        return _export_model(recipe, place, recipe.adapter)


def _dtype(recipe: Export) -> Any:
    """The torch type of ``--dtype``; None where it is not given."""
    import torch

    if recipe.dtype is None:
        return None
    if recipe.format != "dense":
        raise InputError(f"--dtype goes with --format dense; {recipe.format} has types of its own")
    if recipe.dtype not in ("float32", "float16", "bfloat16"):
        raise InputError(f"dtype={recipe.dtype!r}: float32, float16 or bfloat16 is expected")
    return getattr(torch, recipe.dtype)


def _export_lora(recipe: Export) -> ExportedModel:
    from ..formats.lora import export_adapter
    from .loading import open_model

    assert recipe.adapter is not None
    _check_against_base(recipe.adapter, recipe.model)
    base = None
    if recipe.model is not None:
        base, _ = open_model(recipe.model, trust_remote_code=recipe.trust_remote_code, verify=recipe.verify)
    export_adapter(recipe.adapter, recipe.out, base=base, base_name=recipe.base_name, overwrite=recipe.overwrite)
    return ExportedModel(recipe.out, "lora", 0)


def _export_gguf_adapter(recipe: Export) -> ExportedModel:
    from ..checkpoint.folder import skeleton
    from ..files import claim
    from ..formats.gguf_adapter import check_file_free, export_gguf_adapter
    from ..formats.readers import readers_of
    from .loading import check_model, model_and_adapter, quiet_libraries

    assert recipe.adapter is not None
    _dtype(recipe)
    readers = readers_of("gguf-lora", [], [], recipe.reader)
    name, _ = model_and_adapter(recipe.model, recipe.adapter)
    check_model(name)
    quiet_libraries()
    is_file = recipe.out.endswith(".gguf")
    if is_file:
        check_file_free(recipe.out, overwrite=recipe.overwrite)
    with nullcontext() if is_file else claim(recipe.out, overwrite=recipe.overwrite, reads=[name, recipe.adapter]):
        path = export_gguf_adapter(recipe.adapter, recipe.out, name, skeleton=skeleton, overwrite=recipe.overwrite)
    return ExportedModel(str(path), "gguf-lora", 0, readers=list(readers))


def _check_against_base(adapter: str, model: str | None) -> None:
    """Raises InputError unless the adapter has all tensors for its base model; a base that is not here is said."""
    from ..checkpoint.folder import skeleton
    from ..model.adapter_files import check_adapter, check_fits

    name = model or check_adapter(adapter).get("base_model_name_or_path")
    if name and Path(name).expanduser().exists():
        check_fits(skeleton(name), adapter)
    else:
        log.warning("the base model (%s) is not here, so it is not known whether the adapter is whole", name)
