"""Write a model or an adapter in an external format."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoint.options import AdaptedModelOptions
from ..errors import InputError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export(AdaptedModelOptions):
    """Write a quantized model for servers and other programs, exactly; or a merged dense model; or a plain adapter."""

    format: str
    """Format to write: compressed-tensors, gptq, gptq_v2, exl3, gguf (of an adapter: the adapter alone, for llama.cpp),
    dense (dequantized, with the adapter merged), or lora (the adapter alone)."""
    out: str
    """Folder to write to; with --format gguf and --adapter also a file, whose name ends in .gguf."""
    base_name: str | None = None
    """Name of the base model to write into a plain LoRA, instead of its path on this machine."""
    reader: str | None = None
    """Program to write for: vllm, gptqmodel, transformers or llama.cpp (also --for); a model that it does not read is
    refused, with the options of quantize that make one that it does."""
    dtype: str | None = None
    """Type of dense weights: float32, float16 or bfloat16; by default the model's own."""
    lossy: bool = False
    """Re-quantization of weights that the format cannot hold exactly, instead of an error."""
    overwrite: bool = False
    """Permission to replace the output folder."""


@dataclass(frozen=True)
class ExportResult:
    """The folder that was written, and the modules that were re-quantized."""

    out: str
    """Folder that was written."""
    format: str
    """Format of the folder."""
    modules: int
    """Number of quantized linear layers."""
    requantized: list[dict[str, Any]] = field(default_factory=list)
    """Entry per re-quantized module: path, reason, relative error."""
    readers: list[str] = field(default_factory=list)
    """Programs that are known to read it."""

    def __str__(self) -> str:
        lines = [
            f"{one['path']}: {one['reason']}; re-quantized, relative error {one['relative_error']:.2g}"
            for one in self.requantized
        ]
        adapters = {"lora": "the adapter as a plain LoRA", "gguf-lora": "the adapter as a LoRA for llama.cpp"}
        content = adapters.get(self.format, f"{self.modules} modules as {self.format}")
        exact = "" if self.format in ("dense", *adapters) or self.requantized else ", exact"
        read = f"; known to be read by {', '.join(self.readers)}" if self.readers else ""
        return "\n".join([*lines, f"{self.out}: {content}{exact}{read}"])


def export(recipe: Export) -> ExportResult:
    """Writes the model or the adapter."""
    from ..checkpoint.loading import import_plugins, model_and_adapter, quiet_libraries
    from ..files import claim
    from ..model.adapter_files import check_adapter
    from ..model.integrity import check_checksums

    _check_format(recipe)
    if recipe.verify and recipe.adapter is not None:
        check_adapter(recipe.adapter)
        check_checksums(Path(recipe.adapter).expanduser(), verify=True)
    if recipe.adapter is not None and recipe.format in ("gguf", "lora"):
        _warn_of_merge(recipe.adapter)
    if recipe.format == "gguf" and recipe.adapter is not None:
        return _export_gguf_adapter(recipe)
    if recipe.adapter is not None and recipe.format not in ("dense", "lora"):
        raise InputError(
            f"an adapter is not merged into packed weights by export (format {recipe.format}); merge it first "
            "(llmtools merge), use --format dense for a merged model, or serve it beside the quantized model: --format "
            "lora (or gguf, for llama.cpp)"
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
        return _export_model(recipe, name, adapter, recipe.allow_other_base)


def _warn_of_merge(adapter: str) -> None:
    """Says that a plain LoRA computes something else than an adapter that was trained through rounding."""
    from ..model.adapter_files import EXACT, merged_as

    if merged_as(adapter) == EXACT:
        log.warning(
            "%s was trained with --merge exact; as a plain LoRA beside the base it is not rounded, as it was in "
            "training; llmtools merge --adapter %s writes what was trained",
            adapter,
            adapter,
        )


def _check_format(recipe: Export) -> None:
    """Raises InputError, with the nearest name, for a format that cannot be written, and for an unknown reader."""
    from ..formats.writing import check_reader, writable

    if recipe.format not in (known := [*writable(), "dense", "lora"]):
        raise InputError(f"no format {recipe.format!r}; {did_you_mean(recipe.format, known)}")
    check_reader(recipe.reader)


def _export_model(
    recipe: Export, name: str, adapter: str | None, allow_other_base: bool | None = False
) -> ExportResult:
    from ..checkpoint.folder import save, save_dense
    from ..checkpoint.loading import loaded_as, open_model
    from ..formats.readers import readers_of
    from ..formats.writing import export as export_model
    from ..nn.adapters import merge
    from ..nn.swap import quantized_linears

    dtype: Any = _dtype(recipe)
    load = loaded_as(None, name, adapter)
    if load is not None:
        return _export_loaded(recipe, name, load)
    model, tokenizer = open_model(
        name,
        adapter=adapter,
        trust_remote_code=recipe.trust_remote_code,
        verify=recipe.verify,
        allow_other_base=allow_other_base,
    )
    model = model.cpu()
    if adapter is not None:
        modules = len(quantized_linears(model))
        dtype = dtype or getattr(model, "dtype", None)
        merged = merge(model, dtype).to(dtype)
        save(merged, tokenizer, recipe.out, overwrite=recipe.overwrite)
        return ExportResult(recipe.out, recipe.format, modules)
    if recipe.format == "dense":
        modules, readers = len(quantized_linears(model)), list(readers_of("dense", [], [], recipe.reader))
        save_dense(model, tokenizer, recipe.out, dtype=dtype, overwrite=recipe.overwrite)
        return ExportResult(recipe.out, recipe.format, modules, readers=readers)
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
    return ExportResult(recipe.out, recipe.format, done.modules, requantized, list(done.readers))


def _export_loaded(recipe: Export, name: str, load: str) -> ExportResult:
    """Merges an adapter whose base bitsandbytes quantized while it was loaded into that base, not the unquantized one.

    The base is saved with bitsandbytes' codes and opened as QuantizedLinears, which dequantize them.
    """
    import tempfile

    from ..checkpoint.loading import open_model
    from ..model.fingerprint import check_base

    if load != "nf4":
        raise InputError(
            f"the adapter was trained on {name} with --load {load}, and such a base cannot be dequantized for merging; "
            "serve the adapter beside it: --format lora"
        )
    with tempfile.TemporaryDirectory() as folder:
        base, tokenizer = open_model(name, load=load, trust_remote_code=recipe.trust_remote_code, verify=recipe.verify)
        assert recipe.adapter is not None
        check_base(base, recipe.adapter, allow_other_base=recipe.allow_other_base)
        base.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
        del base
        return _export_model(recipe, folder, recipe.adapter, None)


def _dtype(recipe: Export) -> Any:
    """The torch type of ``--dtype``; None where it is not given."""
    import torch

    if recipe.dtype is None:
        return None
    if recipe.format != "dense":
        raise InputError(f"--dtype goes with --format dense; {recipe.format} has its own types")
    if recipe.dtype not in ("float32", "float16", "bfloat16"):
        raise InputError(f"dtype={recipe.dtype!r}: float32, float16 or bfloat16 is expected")
    return getattr(torch, recipe.dtype)


def _export_lora(recipe: Export) -> ExportResult:
    from ..formats.lora import export_adapter

    assert recipe.adapter is not None
    base = _checked_base(recipe, recipe.adapter)
    export_adapter(recipe.adapter, recipe.out, base=base, base_name=recipe.base_name, overwrite=recipe.overwrite)
    return ExportResult(recipe.out, "lora", 0)


def _export_gguf_adapter(recipe: Export) -> ExportResult:
    """Writes the adapter for llama.cpp. Raises InputError for what llama.cpp cannot apply, and for another base."""
    from ..checkpoint.folder import skeleton
    from ..checkpoint.loading import check_model, import_plugins, model_and_adapter, quiet_libraries
    from ..files import claim
    from ..formats.gguf_adapter import check_file_free, export_gguf_adapter
    from ..formats.readers import readers_of

    assert recipe.adapter is not None
    _dtype(recipe)
    readers = readers_of("gguf-lora", [], [], recipe.reader)
    name, _ = model_and_adapter(recipe.model, recipe.adapter)
    check_model(name)
    quiet_libraries()
    import_plugins(recipe.plugin)
    is_file = recipe.out.endswith(".gguf")
    if is_file:
        check_file_free(recipe.out, overwrite=recipe.overwrite)
    with nullcontext() if is_file else claim(recipe.out, overwrite=recipe.overwrite, reads=[name, recipe.adapter]):
        _compare_base(recipe, name, recipe.adapter)
        path = export_gguf_adapter(recipe.adapter, recipe.out, name, skeleton=skeleton, overwrite=recipe.overwrite)
    return ExportResult(str(path), "gguf-lora", 0, readers=list(readers))


def _checked_base(recipe: Export, adapter: str) -> Any:
    """The base model, where it is on this machine, compared with the adapter's; None where it is not.

    Raises InputError unless the adapter has all tensors for it, and was trained on it (or `allow_other_base`).
    """
    from ..checkpoint.folder import skeleton
    from ..model.adapter_files import check_adapter, check_fits
    from ..model.fingerprint import read_fingerprint

    name = recipe.model or check_adapter(adapter).get("base_model_name_or_path")
    is_local = name is not None and Path(name).expanduser().exists()
    if name is None or not (is_local or recipe.model):
        log.warning(
            "the base model (%s) is not on this machine, so it was not checked whether the adapter is complete", name
        )
        return None
    if is_local:
        check_fits(skeleton(name), adapter)
    if recipe.model is None and read_fingerprint(Path(adapter).expanduser()) is None:
        return None
    base = _open_base(recipe, name, adapter)
    return base if recipe.model is not None else None


def _compare_base(recipe: Export, name: str, adapter: str) -> None:
    """Raises CheckpointError unless the adapter has no fingerprint, or that of this base (or `allow_other_base`).

    With `verify` every byte of the base is compared, too.
    """
    from ..model.fingerprint import read_fingerprint

    if recipe.verify or read_fingerprint(Path(adapter).expanduser()) is not None:
        _open_base(recipe, name, adapter)


def _open_base(recipe: Export, name: str, adapter: str) -> Any:
    """The base model, compared with the adapter's fingerprint; None where bitsandbytes is needed and missing."""
    from ..checkpoint.gguf_base import is_verified
    from ..checkpoint.loading import loaded_as, open_model
    from ..model.fingerprint import check_base

    load = loaded_as(None, name, adapter)
    if load is not None and find_spec("bitsandbytes") is None:
        log.warning("bitsandbytes is not installed, so it was not checked whether %s is the adapter's base", name)
        return None
    verify = recipe.verify and not is_verified(name, adapter)
    base, _ = open_model(name, load=load, trust_remote_code=recipe.trust_remote_code, verify=verify)
    check_base(base, adapter, allow_other_base=recipe.allow_other_base)
    return base
