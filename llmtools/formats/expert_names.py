"""Where the linears of unfused experts are in files that have one matrix per expert: ``experts.3.gate_proj``.

The names differ from family to family (``mlp.experts.3.gate_proj``, ``block_sparse_moe.experts.3.w1``), and
transformers has them all, as rules by which it merges such files into its fused Parameters and splits these again when
it saves. So its own splitting (`revert_weight_conversion`) is asked: small tensors whose entries are numbers go in
under the fused names, and each number comes out under the name of one expert's matrix. Families whose own files are
fused have no such names; for them it is ``experts.3.gate_proj``, ``.up_proj``, ``.down_proj``, as the programs that
quantize them write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.experts import DOWN, GATE, UP, unfused_experts

USUAL = {GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"}
"""Name of a linear of ours → its usual name in files."""


def stored_paths(model: nn.Module) -> dict[str, str]:
    """Path of each linear in the model, and of each other module with a matrix → its path in files; {} for a model
    without unfused experts."""
    mixtures: dict[str, Any] = unfused_experts(model)
    if not mixtures:
        return {}
    paths: list[str] = []
    given: dict[str, Tensor] = {}

    def numbered(names: list[str]) -> Tensor:
        paths.extend(names)
        return torch.arange(len(paths) - len(names), len(paths))

    for path, module in mixtures.items():
        experts = range(module.num_experts)
        first = [GATE, UP] if module.has_gate else [UP]
        numbers = numbered([f"{path}.{each}.{name}" for each in experts for name in first]).view(len(experts), -1, 1)
        fused = f"{path}.{'gate_up_proj' if module.has_gate else 'up_proj'}"
        given[fused] = numbers.mT if module.is_transposed else numbers
        given[f"{path}.down_proj"] = numbered([f"{path}.{each}.{DOWN}" for each in experts]).view(-1, 1, 1)
    inside = tuple(f"{path}." for path in mixtures)
    for path, module in model.named_modules():
        if "weight" in module._parameters and not path.startswith(inside):
            given[f"{path}.weight"] = numbered([path]).view(1, 1)
    found = {path: _usual(path, inside) for path in paths}
    for name, numbers in split(model, given).items():
        if numbers.numel() == 1 and name.endswith(".weight"):
            found[paths[int(numbers)]] = name.removesuffix(".weight")
    return found


def _usual(path: str, inside: tuple[str, ...]) -> str:
    parent, _, name = path.rpartition(".")
    return f"{parent}.{USUAL[name]}" if path.startswith(inside) else path


def split(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name → tensor in files, of names and tensors of the model (of any shapes), as transformers would save them."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, tensors))
