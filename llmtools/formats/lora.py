"""Export of adapters for inference servers: plain LoRA.

vLLM and other servers read ``lora_A`` and ``lora_B``, ranks and alphas (rsLoRA and per-module patterns, too), and
reject everything else (vLLM, vllm/lora/peft_helper.py): DoRA's magnitudes, trained biases, modules_to_save. Such
adapters are refused here; the remedy is a merged model.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) initialise (A₀, B₀) from the base weights and subtract B₀ A₀ from
them, so their adapters do not fit the published base model. Relative to that, the adapter adds B A − B₀ A₀, a plain
adapter of twice the rank: A' = [A; A₀], B' = [B, −B₀] (PEFT, src/peft/tuners/lora/model.py, subtract_mutated_init).
"""

from __future__ import annotations

import json
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from ..files import METADATA, files_of, read_info, writing
from ..model.adapter_files import CONFIG, WEIGHTS, check_adapter
from ..model.fingerprint import FINGERPRINT
from ..model.integrity import record_checksums
from .gguf_reading import hub_base

_PLAIN = (None, True, False, "true", "gaussian", "eva", "orthogonal", "mica", "lora_ga", "error")
"""Values of init_lora_weights that do not change the base weights."""
_FROM_BASE = ("pissa", "olora")
"""Values of init_lora_weights that subtract the initial adapter from the base weights."""


def export_adapter(
    adapter: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    base: Any = None,
    base_name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a PEFT adapter as a plain LoRA adapter for servers; returns the folder.

    base: the dense model that a PiSSA or OLoRA adapter was trained on, to recompute its initialisation; used up.
    base_name: name of the base model to write in place of a local path.

    Raises InputError for an adapter that is damaged or not plain LoRA, or a missing or different base.
    """
    source = Path(adapter).expanduser()
    config, tensors = read_adapter(source)
    refuse_more_than_lora(source, config, tensors)
    init = config.get("init_lora_weights")
    if str(init).split("_niter")[0] in _FROM_BASE:
        if base is None:
            raise InputError(
                f"{source} was initialised from the base's weights ({init}); pass --model, the dense base model"
            )
        tensors, config = _relative_to(_initial_adapter(base, source), tensors, config)
    elif init not in _PLAIN:
        raise InputError(f"{source}: init_lora_weights={init!r} changed the base; merge it with --format dense")
    config |= {"init_lora_weights": True, "inference_mode": True}
    if base_name is not None:
        config["base_model_name_or_path"] = hub_base(base_name, config)
    with writing(folder, overwrite=overwrite) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / WEIGHTS)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (source / FINGERPRINT).exists():
            shutil.copy(source / FINGERPRINT, partial / FINGERPRINT)
        if info := _inference_info(source):
            info["files"] = files_of(partial)
            info["checksums"] = record_checksums(partial, info)
            (partial / METADATA).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _inference_info(source: Path) -> dict[str, Any]:
    """The metadata that generate and evaluate need: prompt format, task, quantization of the base while loading."""
    info = read_info(source)
    recipe: Any = info.get("recipe") if isinstance(info.get("recipe"), dict) else {}
    kept = {key: recipe[key] for key in ("task", "options", "load") if recipe.get(key) is not None}
    formats = {key: info[key] for key in ("prompt_format", "words") if info.get(key)}
    return {"command": "export", **formats, "recipe": kept} if formats else {}


def read_adapter(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by name) of a PEFT adapter. Raises InputError for one that is damaged."""
    config = check_adapter(source)
    try:
        return config, load_file(source / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{source / WEIGHTS} cannot be read: {error}") from error


def check_plain(source: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises InputError unless an adapter is plain LoRA whose initialisation did not change the base's weights."""
    refuse_more_than_lora(source, config, tensors)
    if (init := config.get("init_lora_weights")) not in _PLAIN:
        raise InputError(
            f"{source} was initialised from the base's weights ({init}); make it a plain LoRA first: --format lora "
            "--model BASE"
        )


def refuse_more_than_lora(source: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises InputError for anything that an adapter has besides A and B."""
    merge = "servers do not support that; merge the adapter with --format dense --adapter"
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


def _initial_adapter(base: Any, source: Path) -> dict[str, Tensor]:
    """Name in the file → tensor of the adapter before training; the base is used up."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(source))
    config.inference_mode = False
    with torch.no_grad():
        adapted = get_peft_model(base, config)
    return dict(get_peft_model_state_dict(adapted))


def _relative_to(
    initial: dict[str, Tensor], tensors: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, config) of the adapter of twice the rank that adds B A − B₀ A₀, scaled as the original.

    Per linear: lora_A [r, in] -> [2 r, in], lora_B [out, r] -> [out, 2 r].
    """
    if set(initial) != set(tensors):
        raise InputError("the adapter does not fit this base model; was it trained on another one?")
    doubled = {
        name: torch.cat([tensor, initial[name].to(tensor)], 0)
        if name.endswith("lora_A.weight")
        else torch.cat([tensor, -initial[name].to(tensor)], 1)
        for name, tensor in tensors.items()
    }
    # The scaling is alpha / r, or alpha / √r for rsLoRA: at 2 r it is unchanged with alpha scaled by 2, or √2.
    factor = 2**0.5 if config.get("use_rslora") else 2
    changed = config | {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
    }
    return doubled, changed
