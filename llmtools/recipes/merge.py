"""Merge an adapter into the quantized model that it was trained on, in the model's own format and bits."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.options import AdaptedModelOptions
from ..errors import InputError, did_you_mean

log = logging.getLogger(__name__)

WAYS = ("exact", "zeros", "round", "requantize")
ENOUGH = 0.9
"""Recovered share below which a warning names the better way."""


@dataclass(frozen=True)
class Merge(AdaptedModelOptions):
    """Merge an adapter into its quantized base model, keeping the base's bits, and say what that lost."""

    out: str
    """Folder to write the merged model to."""
    how: str | None = None
    """Way of merging: exact (the codes that an adapter of finetune --merge exact was trained with, bit for bit), zeros
    (an adapter of finetune --merge zeros into the base's floating zero points or minima), round (each merged weight to
    the nearest values on the base's own scales), or requantize (the base's own quantizer on the merged weights, with
    --calibration); by default exact or zeros for adapters that were trained so, else round."""
    calibration: str | None = None
    """Calibration text for --how requantize: a .txt or .jsonl file (.gz too), or wikitext2 | c4 from the hub."""
    data: str | None = None
    """Held-out text for the report: perplexity of base, base with adapter, and merged model; by default none."""
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
    perplexity: dict[str, float] | None
    """Perplexity on the held-out text: of base, adapter (base with adapter), merged; None without text."""
    recovered: float | None
    """Share of the adapter's gain in log-likelihood that the merged model keeps; None without text, or without gain."""
    kl: float | None
    """KL divergence of the merged model from base with adapter, in nats per token; None without text."""
    seconds: float
    """Duration in seconds."""

    def __str__(self) -> str:
        lines = [f"{self.out}: adapter merged into {self.modules} modules by {self.how}, in {self.seconds:.1f} s"]
        if self.rounding_error is not None:
            lines.append(
                f"rounding error beside the adapter's own size: {self.rounding_error:.2f}, mean of the modules"
            )
        if self.perplexity is not None:
            found = ", ".join(f"{name} {value:.2f}" for name, value in self.perplexity.items())
            lines.append(
                f"perplexity on held-out text: {found}; KL from base with adapter {self.kl:.4f} nats per token"
            )
        if self.recovered is not None:
            lines.append(f"recovered share of the adapter's gain: {self.recovered:.2f}")
        return "\n".join(lines)


def merge(recipe: Merge) -> MergeResult:
    """Merges the adapter and writes the checkpoint.

    Raises InputError for a way that there is not, a base that is not quantized, and a quantizer that cannot do it.
    """
    from ..checkpoint.loading import model_and_adapter
    from ..files import claim
    from ..model.adapter_files import merged_as

    if recipe.how is not None and recipe.how not in WAYS:
        raise InputError(
            f"--how {recipe.how}: {did_you_mean(recipe.how, WAYS)}; a dense model is `llmtools export --format dense`"
        )
    if recipe.how == "requantize" and recipe.calibration is None:
        raise InputError("--how requantize needs calibration text: pass --calibration FILE (.txt or .jsonl)")
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
            "with --how requantize --calibration FILE, which keeps more"
        )
    if trained == "exact" and asked != "exact":
        raise InputError(
            f"--how {asked}: {adapter} was trained with --merge exact, and another way would change it; leave --how out"
        )
    return asked


def _merge(recipe: Merge, name: str) -> MergeResult:
    from ..checkpoint.folder import write, write_again
    from ..checkpoint.loading import import_plugins, open_model, quiet_libraries
    from ..checkpoint.model_card import write_card
    from ..checkpoint.run_info import record
    from ..data.calibration import HUB
    from ..data.text_io import existing_file
    from ..files import METADATA, json_or_empty, writing
    from ..formats.rewriting import Part, rewriter_if_any
    from ..model.zeros_lora import check_mergeable
    from ..nn.adapters import adapted_modules, merge_into_packed, own_path
    from ..nn.swap import packed_layers

    began = time.monotonic()
    for file in (recipe.calibration, recipe.data):
        if file is not None and file not in HUB:
            existing_file(file)
    quiet_libraries()
    import_plugins(recipe.plugin)
    model, tokenizer = open_model(
        name,
        adapter=recipe.adapter,
        trust_remote_code=recipe.trust_remote_code,
        verify=recipe.verify,
        allow_other_base=recipe.allow_other_base,
    )
    adapted = [own_path(path) for path in packed_layers(model) if path.endswith(".base_layer")]
    others = adapted_modules(model) - {*adapted}
    if not adapted:
        raise InputError(f"{name}: no quantized layer carries the adapter; use llmtools export --format dense")
    if recipe.how == "zeros":
        check_mergeable(model)
    with tempfile.TemporaryDirectory(prefix="llmtools-") as folder:
        before = _measured(recipe, model, tokenizer, Path(folder))
        lost: dict[str, float] = {}
        if recipe.how == "requantize":
            model = _requantized(recipe, model, tokenizer)
        else:
            model, lost = merge_into_packed(model, zeros=recipe.how == "zeros")
        after = _compared(model, before, recipe.max_length)
    out = Path(recipe.out).expanduser()
    error = sum(lost.values()) / len(lost) if lost else None
    result = MergeResult(recipe.out, str(recipe.how), len(adapted), error, *after, seconds=time.monotonic() - began)
    if result.recovered is not None and result.recovered < ENOUGH:
        better = "--how requantize --calibration FILE keeps more; " if recipe.how == "round" else ""
        log.warning(
            "%.2f of the adapter's gain is left (1 is all of it, below 0 is worse than the base); %sserve the adapter "
            "beside the model, or export a dense one",
            result.recovered,
            better,
        )
    with writing(out, overwrite=recipe.overwrite) as target:
        base_model = json_or_empty(Path(name).expanduser() / METADATA).get("base_model")
        if isinstance(base_model, str):
            model.config.name_or_path = base_model  # type: ignore[union-attr]
        merged = {"adapter": recipe.adapter, "how": recipe.how, "rounding errors": lost, "recovered": result.recovered}
        run = record("merge", recipe, merged=merged)
        kept = recipe.how != "requantize" and not others  # scales, and all that is not quantized
        part: Part = "zeros" if recipe.how == "zeros" else "codes"
        if kept and (rewriter := rewriter_if_any(name, model, part)) is not None:
            write_again(rewriter, model, target, run=run, changed=adapted)
        else:
            write(model, tokenizer, target, run=run)
        write_card(target, name=out.resolve().name, former=out)
    return result


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


class _Before(NamedTuple):
    """The model before it is merged, on the held-out text."""

    ids: Any
    """Tokens of the windows, int64 [1, windows · max_length]."""
    targets: Any
    """Distributions of base with adapter, `model.recover.Targets`."""
    nll: dict[str, float]
    """Mean negative log-likelihood of base and adapter (base with adapter), in nats per token."""


def _measured(recipe: Merge, model: Any, tokenizer: Any, folder: Path) -> _Before | None:
    """The losses of base and base with adapter, and the latter's distributions; None without held-out text."""
    from ..data.calibration import text_ids
    from ..data.metrics import perplexity
    from ..model.recover import Targets
    from ..progress import progress

    if recipe.data is None:
        return None
    context = recipe.max_length
    ids = text_ids(recipe.data, tokenizer)
    if ids.shape[1] < context:
        raise InputError(f"{recipe.data} has {ids.shape[1]} tokens, fewer than one window of {context}")
    ids = ids[:, : min(recipe.windows, ids.shape[1] // context) * context]
    nll = {"adapter": perplexity(model, ids, context=context).nll}
    with model.disable_adapter():
        nll = {"base": perplexity(model, ids, context=context).nll, **nll}
    with progress("base with adapter", unit="windows") as step:
        targets = Targets.of(model, ids.split(context, dim=1), folder, 64, on_step=step)
    return _Before(ids, targets, nll)


def _compared(
    model: Any, before: _Before | None, context: int
) -> tuple[dict[str, float] | None, float | None, float | None]:
    """(perplexities, recovered share, KL divergence) of the merged model; context: tokens in a window."""
    from ..data.metrics import perplexity
    from ..model.recover import mean_kl_divergence

    if before is None:
        return None, None, None
    model.eval()
    nll = {**before.nll, "merged": perplexity(model, before.ids, context=context).nll}
    kl = mean_kl_divergence(model, before.ids.split(context, dim=1), before.targets)
    gain = nll["base"] - nll["adapter"]
    recovered = (nll["base"] - nll["merged"]) / gain if gain > 0 else None
    return {name: math.exp(value) for name, value in nll.items()}, recovered, kl
