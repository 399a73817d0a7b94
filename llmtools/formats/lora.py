"""Adapters that servers accept: plain LoRA, and nothing else in the file.

vLLM and its like read ``lora_A`` and ``lora_B``, ranks and alphas (rsLoRA and per-module patterns too), and refuse
what changes the model in other ways: DoRA's magnitudes, trained biases, modules saved whole. Those are refused here
with the way out, a merged model.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) do not start at zero but take their start out of the base, so
their files mean nothing on the base as it was published. Relative to that base the adapter did B A − B₀ A₀, with the
start (A₀, B₀), and that is a plain adapter of twice the rank: A' = [A; A₀], B' = [B, −B₀] (as PEFT's own conversion).
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from ..files import read_json, writing
from ..model.adapter_files import CONFIG, WEIGHTS, check_adapter
from ..model.integrity import note_checksums

_PLAIN = (None, True, False, "true", "gaussian", "eva", "orthogonal", "mica", "lora_ga", "error")
"""Values of init_lora_weights that leave the base alone."""
_FROM_BASE = ("pissa", "olora")


def export_adapter(
    adapter: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    base: Any = None,
    base_name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a PEFT adapter as a plain LoRA that servers read; returns the folder.

    base: the dense model that a PiSSA or OLoRA adapter was trained on, from which its start is worked out again.
    base_name: what to write as the base's name, instead of the path on this machine.
    """
    source = Path(adapter).expanduser()
    config = check_adapter(source)
    try:
        tensors = load_file(source / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{source / WEIGHTS} cannot be read: {error}") from error
    refuse_more_than_lora(source, config, tensors)
    start = config.get("init_lora_weights")
    if str(start).split("_niter")[0] in _FROM_BASE:
        if base is None:
            raise InputError(f"{source} started from the base's weights ({start}); pass --model, the dense base model")
        tensors, config = _relative_to(_start_of(base, source), tensors, config)
    elif start not in _PLAIN:
        raise InputError(f"{source}: init_lora_weights={start!r} changed the base; merge it with --format dense")
    config |= {"init_lora_weights": True, "inference_mode": True}
    if base_name is not None:
        config["base_model_name_or_path"] = base_name
    with writing(folder, overwrite=overwrite) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / WEIGHTS)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if run := _how_it_is_asked(source):
            run["checksums"] = note_checksums(partial, run)
            (partial / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _how_it_is_asked(source: Path) -> dict[str, Any]:
    """Of the adapter's run.json what generating and evaluating need: prompt template, task, how its base is loaded."""
    run = read_json(source / "run.json")
    recipe: Any = run.get("recipe") if isinstance(run.get("recipe"), dict) else {}
    kept = {key: recipe[key] for key in ("task", "options", "load") if recipe.get(key) is not None}
    return {"command": "export", "words": run["words"], "recipe": kept} if run.get("words") else {}


def check_plain(source: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises InputError unless an adapter is plain LoRA that left its base as it was."""
    refuse_more_than_lora(source, config, tensors)
    if (start := config.get("init_lora_weights")) not in _PLAIN:
        raise InputError(
            f"{source} started from the base's weights ({start}); make it a plain one first: --format lora --model BASE"
        )


def refuse_more_than_lora(source: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises InputError for whatever an adapter has beside A and B."""
    merge = "servers do not read that; merge the adapter with --format dense --adapter"
    if config.get("peft_type") != "LORA":
        raise InputError(f"{source} is a {config.get('peft_type')} adapter, not LoRA; {merge}")
    for key in (
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "layer_replication",
        "alora_invocation_tokens",
        "use_qalora",
    ):
        if config.get(key):
            raise InputError(f"{source} has {key}={config[key]!r}; {merge}")
    if config.get("bias", "none") != "none":
        raise InputError(f"{source} trained biases (bias={config['bias']!r}); {merge}")
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        raise InputError(f"{source} holds {others[0]}; {merge}")


def _start_of(base: Any, source: Path) -> dict[str, Tensor]:
    """The adapter as it was before training, by the names in the file; the base is used up."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(source))
    config.inference_mode = False
    with torch.no_grad():
        adapted = get_peft_model(base, config)
    return dict(get_peft_model_state_dict(adapted))


def _relative_to(
    start: dict[str, Tensor], tensors: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter of twice the rank that does B A − B₀ A₀, with the scale of the original."""
    if set(start) != set(tensors):
        raise InputError("the adapter does not fit this base model; was it trained on another one?")
    doubled = {
        name: torch.cat([tensor, start[name].to(tensor)], 0)
        if name.endswith("lora_A.weight")
        else torch.cat([tensor, -start[name].to(tensor)], 1)
        for name, tensor in tensors.items()
    }
    # The scale is alpha / r, or alpha / √r for rsLoRA: with 2 r it stays if alpha grows likewise.
    factor = 2**0.5 if config.get("use_rslora") else 2
    changed = config | {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
    }
    return doubled, changed
