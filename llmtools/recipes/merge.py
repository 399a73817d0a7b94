"""Merge an adapter into the quantized model that it was trained on, in the model's own format and bits."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.options import AdaptedModelOptions, OffloadOptions
from ..errors import InputError, did_you_mean
from .merge_report import Comparison
from .merge_report import comparing as comparing_by

log = logging.getLogger(__name__)

WAYS = ("exact", "zeros", "round", "requantize", "dense")
ENOUGH = 0.9
"""Recovered share below which a warning names the better way."""


@dataclass(frozen=True)
class Merge(AdaptedModelOptions, OffloadOptions):
    """Merge an adapter into its quantized base model, keeping the base's bits, and say what that lost."""

    out: str
    """Folder to write the merged model to."""
    how: str | None = None
    """Way of merging: exact (the codes that an adapter of finetune --merge exact was trained with, bit for bit), zeros
    (an adapter of finetune --merge zeros into the base's floating zero points or minima), round (any adapter, rounded
    with dither to codes on the base's own scales), requantize (the base's own quantizer on the merged weights, with
    --calibration), or dense (a 16-bit model); by default exact or zeros for adapters that were trained so, else
    round."""
    calibration: str | None = None
    """Calibration text for --how requantize: a .txt or .jsonl file (.gz too), or wikitext2 | c4 from the hub."""
    data: str | None = None
    """Held-out data for the report on base, base with adapter, and merged model: text, for their perplexity, or
    examples of --task; by default none."""
    task: str | None = None
    """Task whose score is reported instead of perplexity, as in evaluate (llmtools list tasks)."""
    examples: int | None = None
    """Number of held-out examples of the task; by default all."""
    batch_size: int = 8
    """Number of examples that are evaluated together."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the task: --options.max_new_tokens 48."""
    num_samples: int = 64
    """Number of calibration sequences."""
    max_length: int = 512
    """Tokens in a calibration sequence, and in a window of held-out text."""
    windows: int = 16
    """Largest number of windows of held-out text."""
    seed: int = 0
    """Seed of the choice of calibration sequences."""
    overwrite: bool = False
    """Permission to replace the output folder."""


@dataclass(frozen=True)
class MergeResult:
    """The merged checkpoint, and what merging lost."""

    out: str
    """Folder of the checkpoint."""
    how: str
    """Way of merging."""
    modules: int
    """Number of quantized linears that an adapter was merged into."""
    rounding_error: float | None
    """Mean over modules of |Ŵ − W| / |ΔW|, the rounding error beside the adapter's own size; for round and zeros."""
    comparison: Comparison | None
    """Base, base with adapter and merged model on the held-out data; None without."""
    seconds: float
    """Duration in seconds."""

    def __str__(self) -> str:
        lines = [f"{self.out}: adapter merged into {self.modules} modules by {self.how}, in {self.seconds:.1f} s"]
        if self.rounding_error is not None:
            lines.append(
                f"rounding error beside the adapter's own size: {self.rounding_error:.2f}, mean of the modules"
            )
        if self.comparison is not None:
            lines.append(str(self.comparison))
        return "\n".join(lines)


def merge(recipe: Merge) -> MergeResult:
    """Merges the adapter and writes the checkpoint.

    Raises InputError for a way that there is not, a base that is not quantized, and a quantizer that cannot do it.
    """
    from ..checkpoint.loading import model_and_adapter
    from ..files import claim
    from ..model.adapter_files import merged_as

    if recipe.how is not None and recipe.how not in WAYS:
        raise InputError(f"--how {recipe.how}: {did_you_mean(recipe.how, WAYS)}")
    if recipe.how == "requantize" and recipe.calibration is None:
        raise InputError("--how requantize needs calibration text: pass --calibration FILE (.txt or .jsonl)")
    if recipe.task is not None and recipe.data is None:
        raise InputError(f"--task {recipe.task} needs held-out examples: pass --data FILE")
    if recipe.how in ("requantize", "dense") and recipe.offload is not None:
        raise InputError(
            f"--offload {recipe.offload} does not go with --how {recipe.how}, which merges dense weights in memory; "
            "omit one of the two"
        )
    if recipe.adapter is None:
        raise InputError("no adapter: pass --adapter, a folder that `llmtools finetune --out` wrote")
    name, adapter = model_and_adapter(recipe.model, recipe.adapter)
    recipe = replace(recipe, how=_way(recipe.how, merged_as(recipe.adapter), recipe.adapter))
    with claim(recipe.out, overwrite=recipe.overwrite, reads=[name, adapter, recipe.calibration, recipe.data]):
        return _merge(recipe, name)


def _way(asked: str | None, trained: str | None, adapter: str) -> str:
    """The way of merging: the one asked for, or that of the adapter's training.

    Raises InputError for an adapter that was not trained to be merged in that way.
    """
    if asked is None:
        return trained or "round"
    if asked in ("exact", "zeros") and trained != asked:
        raise InputError(
            f"--how {asked}: {adapter} was not trained with `finetune --merge {asked}`; merge it with --how round, or "
            "with --how requantize --calibration FILE"
        )
    if trained == "exact" and asked not in ("exact", "dense"):
        raise InputError(
            f"--how {asked}: {adapter} was trained with --merge exact, and another way would change it; leave --how out"
        )
    return asked


def _merge(recipe: Merge, name: str) -> MergeResult:
    from ..checkpoint.loading import import_plugins, open_model, quiet_libraries
    from ..data.calibration import HUB
    from ..data.text_io import existing_file
    from ..model.zeros_lora import check_mergeable
    from ..nn.adapters import adapted_modules, own_path
    from ..nn.swap import packed_layers

    began = time.monotonic()
    if recipe.calibration is not None and recipe.calibration not in HUB:
        existing_file(recipe.calibration)
    quiet_libraries()
    import_plugins(recipe.plugin)
    with tempfile.TemporaryDirectory(prefix="llmtools-") as folder:
        comparing = comparing_by(recipe, Path(folder))
        model, tokenizer = open_model(
            name,
            adapter=recipe.adapter,
            trust_remote_code=recipe.trust_remote_code,
            verify=recipe.verify,
            allow_other_base=recipe.allow_other_base,
            offload=recipe.offload,
        )
        adapted = [own_path(path) for path in packed_layers(model) if path.endswith(".base_layer")]
        beside = bool(adapted_modules(model) - {*adapted})
        if not adapted:
            raise InputError(f"{name}: no quantized layer carries the adapter; use llmtools export --format dense")
        if recipe.how == "zeros":
            check_mergeable(model)
        if comparing is not None:
            comparing.before(model, tokenizer)
        model, lost = _merged(recipe, model, tokenizer)
        found = None if comparing is None else comparing.after(model.eval())
    error = sum(lost.values()) / len(lost) if lost else None
    result = MergeResult(recipe.out, str(recipe.how), len(adapted), error, found, seconds=time.monotonic() - began)
    recovered = None if found is None else found.recovered
    if recovered is not None and recovered < ENOUGH:
        log.warning(
            "%.2f of the adapter's gain is left (1 is all of it, below 0 is worse than the base); train it with "
            "finetune --merge exact, whose merge loses nothing, serve the adapter beside the model, or merge with "
            "--how dense",
            recovered,
        )
    report = {"adapter": recipe.adapter, "how": recipe.how, "rounding errors": lost, "recovered": recovered}
    _write(recipe, name, model, tokenizer, report, None if beside else adapted)
    return result


def _merged(recipe: Merge, model: Any, tokenizer: Any) -> tuple[Any, dict[str, float]]:
    """(the merged model; path → rounding error beside the adapter's own size, of the ways that round)"""
    from ..model.offload import Spill
    from ..nn.adapters import merge as merge_dense
    from ..nn.adapters import merge_into_packed

    if recipe.how == "requantize":
        return _requantized(recipe, model, tokenizer), {}
    if recipe.how == "dense":
        return merge_dense(model), {}
    return merge_into_packed(model, zeros=recipe.how == "zeros", keep=Spill() if recipe.offload == "disk" else None)


def _write(
    recipe: Merge, name: str, model: Any, tokenizer: Any, report: dict[str, Any], changed: list[str] | None
) -> None:
    """Writes the folder, a third-party base in its own format; changed: the merged linears, None if not they alone."""
    from ..checkpoint.folder import write, write_again
    from ..checkpoint.model_card import write_card
    from ..checkpoint.run_info import record
    from ..files import METADATA, json_or_empty, writing
    from ..formats.rewriting import Part, rewriter_if_any

    out = Path(recipe.out).expanduser()
    with writing(out, overwrite=recipe.overwrite) as target:
        base_model = json_or_empty(Path(name).expanduser() / METADATA).get("base_model")
        if isinstance(base_model, str):
            model.config.name_or_path = base_model
        run = record("merge", recipe, merged=report)
        kept = recipe.how not in ("requantize", "dense") and changed is not None  # scales, and what is not quantized
        part: Part = "zeros" if recipe.how == "zeros" else "codes"
        if kept and (rewriter := rewriter_if_any(name, model, part)) is not None:
            write_again(rewriter, model, target, run=run, changed=changed)
        else:
            write(model, tokenizer, target, run=run)
        write_card(target, name=out.resolve().name, former=out)


def _requantized(recipe: Merge, model: Any, tokenizer: Any) -> Any:
    """The merged weights through the quantizers of the base, module by module, keeping their bits."""
    from ..data.calibration import calibration
    from ..model.blocks import linears
    from ..model.quantize import quantize
    from ..nn.adapters import merge as merge_dense
    from ..nn.adapters import own_path
    from ..nn.swap import quantized_linears
    from ..progress import progress

    quantizers = {own_path(path): layer.quantizer for path, layer in quantized_linears(model).items()}
    dense = merge_dense(model)
    text = calibration(
        str(recipe.calibration), tokenizer, samples=recipe.num_samples, tokens=recipe.max_length, seed=recipe.seed
    )
    overrides: dict[str, Any] = {path: None for path, _ in linears(dense) if path not in quantizers}
    overrides |= {path: each.spec() for path, each in quantizers.items()}
    with progress("requantize", unit="modules") as step:
        quantize(dense, next(iter(quantizers.values())), text, overrides=overrides, skip=(), on_step=step)
    return dense
