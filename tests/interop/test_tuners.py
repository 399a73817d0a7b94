"""Every kind of adapter that the installed PEFT has: on quantized layers it does what it does on the dense ones.

The dense model has the quantized one's values. Each step of an adapter's life is taken on both, and either gives the
same numbers or stops with the same error; where the two must differ, `OTHERWISE` says why. A few kinds run with every
suite, all of them with ``make test-interop``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

import llmtools
from llmtools.nn.swap import quantized_linears
from tests.models import tiny_ids, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what is experimental

IDS = tiny_ids()
TWO = {"target_modules": ["q_proj", "v_proj"]}
PROMPT: dict[str, Any] = {"num_virtual_tokens": 4}

OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {**TWO, "total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": "self_attn"},
    "BOFT": {**TWO, "boft_block_size": 4},
    "C3A": {**TWO, "block_size": 8},
    "CARTRIDGE": PROMPT,
    "CPT": {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "FOURIERFT": {**TWO, "n_frequency": 32},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": PROMPT,
    "OFT": {**TWO, "oft_block_size": 4},
    "POLY": {**TWO, "n_tasks": 2},
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": {**PROMPT, "encoder_hidden_size": 32},
    "SHIRA": {**TWO, "r": 2},
    "TRAINABLE_TOKENS": {"token_indices": IDS[0, :3].tolist()},
    "VBLORA": {**TWO, "vector_length": 16, "num_vectors": 8, "topk": 2},
    "WAVEFT": {**TWO, "n_frequency": 32},
}
"""What a kind needs; the others take `TWO`."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LORA-dora": ("LORA", {**TWO, "use_dora": True}),
    "LORA-rslora": ("LORA", {**TWO, "use_rslora": True}),
    "LORA-bias": ("LORA", {**TWO, "lora_bias": True}),
    "LORA-gaussian": ("LORA", {**TWO, "init_lora_weights": "gaussian"}),
    "LORA-orthogonal": ("LORA", {**TWO, "init_lora_weights": "orthogonal"}),
    "LORA-pissa": ("LORA", {**TWO, "init_lora_weights": "pissa"}),
    "LORA-loftq": ("LORA", {**TWO, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}),
    "LORA-olora": ("LORA", {**TWO, "init_lora_weights": "olora"}),
    "LORA-alora": ("LORA", {**TWO, "alora_invocation_tokens": IDS[0, 4:6].tolist()}),
    "LORA-tokens": ("LORA", {**TWO, "trainable_token_indices": IDS[0, :3].tolist()}),
    "LORA-norms": ("LORA", {**TWO, "modules_to_save": ["input_layernorm"]}),
    "LORA-everywhere": ("LORA", {"target_modules": "all-linear"}),
    "LORA-mlp": ("LORA", {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1]}),
    "ADALORA-everywhere": ("ADALORA", {"target_modules": "all-linear", "total_step": 10}),
    "IA3-everywhere": ("IA3", {"target_modules": "all-linear", "feedforward_modules": []}),
    "LOHA-everywhere": ("LOHA", {"target_modules": "all-linear"}),
    "LOKR-both": ("LOKR", {**TWO, "decompose_both": True, "decompose_factor": 4}),
    "OFT-coft": ("OFT", {**TWO, "oft_block_size": 4, "coft": True, "eps": 1e-2}),
    "MISS-bat": ("MISS", {**TWO, "init_weights": "bat"}),
    "ROAD-4": ("ROAD", {**TWO, "variant": "road_4"}),
    "VERA-everywhere": ("VERA", {"target_modules": ["q_proj", "up_proj", "down_proj"]}),
    "GRALORA-hybrid": ("GRALORA", {**TWO, "hybrid_r": 4}),
}
QUICK = ("LORA-dora", "ADALORA", "IA3", "SHIRA", "SUPERTUNING", "PROMPT_TUNING")
"""With every suite; `tests/nn/test_peft.py` has more of LoRA."""

NEEDS = {
    "ADAMSS": "needs scikit-learn",
    "SHADOW": "runs a small model of its own beside the base, and fails on a dense Llama of this transformers as well",
    "XLORA": "mixes LoRA adapters that lie on the disk already; its layers are LoRA's",
}
"""Kinds that cannot be tried here, and why."""

OTHERWISE = {
    "GLORA": "PEFT takes plain nn.Linear for it, and no subclass",
    "LORA-loftq": "starts by writing into the base weight; llmtools' start from the error is the same and more",
    "LORA-olora": "starts by taking the adapter off the base weight, which would have to be quantized anew",
    "LORA-pissa": "starts by taking the adapter off the base weight, which would have to be quantized anew",
}
"""Kinds that are refused on quantized layers, and why."""


def kinds() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name → configuration class and options, of all that the installed PEFT has."""
    classes = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    plain = {name: (cls, OPTIONS.get(name, TWO)) for name, cls in classes.items() if name not in NEEDS}
    return plain | {name: (classes[kind], options) for name, (kind, options) in VARIANTS.items() if kind in classes}


KINDS = kinds()
ALL = bool(os.environ.get("LLMTOOLS_INTEROP"))
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(not (ALL or name in QUICK), reason="make test-interop"))
    for name in sorted(KINDS)
]


@cache
def _base(quantized: bool) -> Any:
    model = tiny_model(num_key_value_heads=4)
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    return model if quantized else llmtools.dequantize(model)


def base(quantized: bool) -> Any:
    return copy.deepcopy(_base(quantized))


def adapted(name: str, quantized: bool) -> Any:
    """The model with an adapter that does something, the same on both bases."""
    cls, options = KINDS[name]
    torch.manual_seed(0)
    model = peft.get_peft_model(base(quantized), cls(task_type="CAUSAL_LM", **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def run(name: str, model: Any, **options: Any) -> Any:
    tasks = {"task_ids": torch.zeros(len(IDS), dtype=torch.long)}
    more = tasks if name.startswith(("POLY", "MULTITASK")) and isinstance(model, peft.PeftModel) else {}
    return model(input_ids=IDS, **more, **options)


@torch.no_grad()
def logits(name: str, model: Any) -> Tensor:
    return run(name, model.eval()).logits


# ---- the steps of an adapter's life ----------------------------------------------------------------------------------


def forward(name: str, model: Any, folder: Path) -> dict[str, Any]:
    return {"logits": logits(name, model)}


def backward(name: str, model: Any, folder: Path) -> dict[str, Any]:
    """Gradients, of which at least one is not zero and all are finite."""
    run(name, model, labels=IDS).loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert gradients and all(bool(torch.isfinite(grad).all()) for grad in gradients.values())
    assert any(bool(grad.any()) for grad in gradients.values())
    return gradients


def disable(name: str, model: Any, folder: Path) -> dict[str, Any]:
    with model.disable_adapter():
        return {"logits": logits(name, model)}


def reload(name: str, model: Any, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder)
    quantized = bool(quantized_linears(model))
    return {"logits": logits(name, peft.PeftModel.from_pretrained(base(quantized), folder))}


def unload(name: str, model: Any, folder: Path) -> dict[str, Any]:
    return {"logits": logits(name, model.unload())}


def merge(name: str, model: Any, folder: Path) -> dict[str, Any]:
    """PEFT's `merge_and_unload` on the dense model, ours on the quantized one."""
    merged = llmtools.merge(model) if quantized_linears(model) else model.merge_and_unload(safe_merge=True)
    assert not quantized_linears(merged)
    return {"logits": logits(name, merged)}


ERRORS = (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError)


def outcome(step: Callable[..., dict[str, Any]], name: str, quantized: bool, folder: Path) -> dict[str, Any] | str:
    """What a step gives, or the error that it stops with."""
    try:
        return step(name, adapted(name, quantized), folder / str(quantized))
    except ERRORS as error:
        return f"{type(error).__name__}: {error}"


STEPS = [forward, backward, disable, reload, unload, merge]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_a_tuner_does_on_quantized_layers_what_it_does_on_dense_ones(
    name: str, step: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    ours, theirs = (outcome(step, name, quantized, tmp_path) for quantized in (True, False))
    if name in OTHERWISE:
        assert isinstance(ours, str) and "\n" not in ours, f"no longer so: {OTHERWISE[name]}"
        return
    assert isinstance(ours, str) == isinstance(theirs, str), f"quantized: {ours}; dense: {theirs}"
    if isinstance(ours, str) or isinstance(theirs, str):
        return
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", [each for each in NAMES if each.values[0] not in OTHERWISE])
def test_what_peft_merges_into_packed_weights_is_refused_and_nothing_is_lost(name: str) -> None:
    model = adapted(name, True)
    before = logits(name, model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ERRORS:
        merged = model
    torch.testing.assert_close(logits(name, merged), before, rtol=1e-4, atol=1e-4)


def test_every_kind_of_the_installed_peft_is_tried_or_has_a_reason() -> None:
    known = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert known <= KINDS.keys() | NEEDS.keys() and not NEEDS.keys() & KINDS.keys()
