"""PEFT's configuration of the LoRA adapters, and what quantized layers require of it."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean
from .options import Finetune, Lora

log = logging.getLogger(__name__)

DROPOUT = 0.05
"""Probability of dropping an input of the update, by default."""


def lora_config(lora: Lora, merge: str | None = None) -> Any:
    """The options as a peft.LoraConfig; merge: as in `Finetune`.

    Raises InputError for values and arguments that it does not take.
    """
    from peft import LoraConfig

    own = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
    known = {each.name for each in fields(LoraConfig) if each.init}
    for key in lora.options:
        if key in own:
            raise InputError(f"lora.options.{key}: this is --lora.{own[key]}")
        if key not in known:
            raise InputError(f"lora.options: no argument {key!r} in peft.LoraConfig; {did_you_mean(key, known)}")
    dropout = (0.0 if merge == "exact" else DROPOUT) if lora.dropout is None else lora.dropout
    if lora.r < 1 or not 0 <= dropout < 1 or lora.alpha <= 0:
        raise InputError(
            f"lora: r={lora.r}, alpha={lora.alpha}, dropout={dropout}; r at least 1, alpha above 0, dropout from "
            f"0 to below 1 are expected"
        )
    if lora.init not in ("zero", "error"):
        raise InputError(f"lora.init={lora.init!r}; {did_you_mean(lora.init, ('zero', 'error'))}")
    try:
        config = LoraConfig(
            r=lora.r,
            lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
            lora_dropout=dropout,
            target_modules=lora.target_modules,
            **{"task_type": "CAUSAL_LM", **lora.options},
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {error}") from error
    if merge is not None:
        from ..model.exact_lora import check_plain, register

        check_plain(config, merge)
        if merge == "exact":
            register(config)
    return config


def check_merge(recipe: Finetune) -> None:
    """Raises InputError for an unknown way of merging, and options that do not go with it."""
    from ..checkpoint.loading import is_quantized
    from ..model.adapter_files import EXACT, WAYS, ZEROS

    if not 0 <= recipe.merge_warmup < 1:
        raise InputError(f"merge_warmup={recipe.merge_warmup}: a share of the steps from 0 to below 1 is expected")
    if recipe.merge is not None and recipe.merge not in WAYS:
        raise InputError(f"--merge {recipe.merge}: {did_you_mean(recipe.merge, WAYS)}")
    if recipe.merge != EXACT and recipe.merge_warmup:
        raise InputError("merge_warmup goes with --merge exact")
    if recipe.merge is None:
        return
    if recipe.merge == ZEROS and recipe.lora.init == "error":
        raise InputError(
            f"lora.init={recipe.lora.init}: --merge zeros keeps A constant in each group, and those matrices are not; "
            "leave it out"
        )
    if recipe.lora.dropout and recipe.merge == EXACT:
        raise InputError(
            f"lora.dropout={recipe.lora.dropout}: --merge {recipe.merge} trains the merged weight, which knows no "
            "dropout; leave it out"
        )
    if recipe.load or not is_quantized(recipe.model):
        what = f"is loaded with --load {recipe.load}" if recipe.load else "is not quantized"
        raise InputError(
            f"--merge {recipe.merge} needs a base that llmtools opens quantized, and {recipe.model} {what}; quantize "
            "it first (llmtools quantize)"
        )


_PREPARED = {"corda": "preprocess_corda", "eva": "initialize_lora_eva_weights", "lora_ga": "preprocess_loraga"}
"""Values of init_lora_weights → PEFT's function that must be called first, with data of its own."""


def check_initialisation(lora: Lora, model: str, load: str | None) -> None:
    """Raises InputError for LoRA initialisations of PEFT that change the base weights where these are quantized, or
    that need a preparation which finetune does not make.

    model: folder or hub name of the base. load: as in `Finetune`.
    """
    from ..checkpoint.loading import is_quantized

    method = lora.options.get("init_lora_weights")
    kind = method.lower().split("_niter")[0] if isinstance(method, str) else ""
    why = ""
    if kind in ("pissa", "olora", "corda", "loftq") and (load or is_quantized(model)):
        why = "changes the base weights, and quantized weights are read-only"
    elif kind.startswith(tuple(_PREPARED)):
        name = next(name for name in _PREPARED if kind.startswith(name))
        why = f"needs peft's {_PREPARED[name]} with data of its own, which finetune does not call"
    elif kind == "loftq":
        why = "quantizes the base itself, which finetune does not do"
    if why:
        raise InputError(
            f"lora.options.init_lora_weights={method!r} {why}; to initialise adapters from the "
            "quantization error: llmtools quantize --adapter_rank R, then finetune --lora.init error"
        )


FEW_BITS = 3.75
"""Stored bits per weight up to which adapters gain from the quantization error; 3 bits and their scales are fewer."""


def recommend_initialisation(lora: Lora, name: str, model: Any) -> None:
    """Says in a line that a base of 2 or 3 bits has LoRA matrices to begin with, where they are not used.

    name: folder of the base `model`.
    """
    from ..checkpoint.folder import LORA_INIT
    from ..nn.swap import stored_bits

    bits = stored_bits(model)
    if lora.init == "zero" and bits is not None and bits <= FEW_BITS and (Path(name).expanduser() / LORA_INIT).exists():
        log.info(
            "%s has adapters that make up for part of its quantization error, at %.2f bits per weight; "
            "--lora.init error begins with them",
            name,
            bits,
        )


def fit_config(config: Any, model: Any, lora: Lora, merge: str | None = None) -> None:
    """Puts the names of linears in place of "all-linear" and other words, where PEFT cannot, and excludes what it
    cannot adapt; no dropout where experts are fused. In place.

    merge: as in `Finetune`; with it linears that are not quantized are left out, too. Raises InputError for a word that
    no linear of the model answers to, or that PEFT cannot adapt.
    """
    from ..nn.adapters import has_fused_experts, linears_but_head, not_adaptable
    from ..nn.experts import unfused_experts

    every = config.target_modules == "all-linear" and not config.exclude_modules
    excluded = _not_merged(model, merge, every) if merge else []
    if every:
        config.exclude_modules = list(dict.fromkeys([*not_adaptable(model), *excluded])) or None
    if isinstance(config.target_modules, str) and set(config.target_modules.split("+")) <= WORDS.keys():
        config.target_modules = _named(config, model, config.target_modules)
    elif config.target_modules == "all-linear" and unfused_experts(model):
        names = {path.rpartition(".")[2] for path in linears_but_head(model)}
        config.target_modules = sorted(names - _taken_for_fused(config, model, names))
    if lora.dropout is None and has_fused_experts(model):
        config.lora_dropout = 0.0


WORDS = {
    "attention": r"(^|\.)[^.]*(attn|attention)[^.]*\.",
    "shared_experts": r"(^|\.)shared_experts?\.|(^|\.)shared_mlp\.",
    "experts": r"\.\d+\.w_(gate|up|down)$",
}
"""Words for --lora.target_modules, joined by +, → what the path of a linear has in it."""


def _named(config: Any, model: Any, words: str) -> list[str]:
    """The names, as PEFT takes them, of the linears that words such as ``attention+shared_experts`` stand for.

    Raises InputError where a word stands for none, or for some that PEFT takes for fused experts.
    """
    from ..nn.adapters import linears_but_head

    linears, found = linears_but_head(model), []
    for word in words.split("+"):
        paths = [path for path in linears if re.search(WORDS[word], path)]
        if not paths:
            hint = "its experts are not packed one by one" if word == "experts" else "name them"
            raise InputError(f"--lora.target_modules {words}: {type(model).__name__} has no {word}; {hint}")
        own = word == "experts"
        found += [path.rpartition(".")[2] if own else ".".join(path.split(".")[-2:]) for path in paths]
    names = set(found)
    if taken := _taken_for_fused(config, model, names):
        raise InputError(
            f"--lora.target_modules {words}: PEFT takes {', '.join(sorted(taken))} of {model.config.model_type} models "
            "for names of fused experts, and adapts none of them; leave out the word that stands for them"
        )
    return sorted(names)


def _taken_for_fused(config: Any, model: Any, names: Collection[str]) -> set[str]:
    """Those names that PEFT takes for those of fused experts, in families whose experts are fused since transformers 5:
    it looks for parameters instead, and linears of that name get no adapter."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a PEFT without that conversion
        return set()
    probe = copy.deepcopy(config)
    probe.target_modules = set(names)
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # only some of the names of a fused parameter are there
        return {name for name in names if name.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj")}
    return set(names) - set(probe.target_modules)


def _not_merged(model: Any, merge: str, every: bool) -> list[str]:
    """Paths of the linears that --merge does not train, named in the log: dense ones, and a tied head.

    every: whether adapters go on all the others.
    """
    from ..model.exact_lora import check_base
    from ..model.zeros_lora import check_zeros_base

    left = check_zeros_base(model, every=every) if merge == "zeros" else check_base(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if named := [path for path in left if model.get_submodule(path) is not head]:
        log.warning("%d linears are not quantized and get no adapter (--merge): %s", len(named), ", ".join(named[:4]))
    return left


def warn_without_adapter(adapted: Any, lora: Lora) -> None:
    """Names in a warning the linears of "all-linear" that PEFT passed over.

    For families whose experts are fused since transformers 5, PEFT takes names such as ``gate_proj`` for those of the
    experts, so that linears of that name (shared experts, dense layers) get no adapter.
    """
    from ..model.targets import any_index
    from ..nn.adapters import without_adapter
    from ..nn.experts import unfused_experts

    fused = any(getattr(config, "target_parameters", None) for config in adapted.peft_config.values())
    if (
        not (fused or unfused_experts(adapted))
        or lora.target_modules != "all-linear"
        or lora.options.keys() & {"exclude_modules", "layers_to_transform"}
    ):
        return
    if not (found := without_adapter(adapted)):
        return
    names = dict.fromkeys(any_index(path) for path in found)
    log.warning(
        "%d linears get no adapter, because PEFT takes their names for those of fused experts: %s",
        len(found),
        ", ".join(names),
    )
