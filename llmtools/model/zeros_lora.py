"""Plain LoRA whose A is constant in each quantization group of its base: adapters of ``finetune --merge zeros``.

QA-LoRA (arXiv:2309.14717) pools the inputs of A over the groups. Here A itself is kept pooled instead: its columns are
averaged over each group at the start, and its gradient in every step, so equal entries stay equal. What results is a
plain PEFT adapter, which PEFT alone opens and evaluates as it was trained, and whose update s B A fits into zero
points or minima (`nn/zeros.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import InputError, within
from ..nn.adapters import own_path
from ..nn.embedding import TiedLinear
from ..nn.exact import active_adapters
from ..nn.linear import QuantizedLinear
from ..nn.zeros import CAN, check_constant
from ..quant.shift import pooled
from .exact_lora import layers_on_linears


def check_zeros_base(model: nn.Module, *, every: bool) -> list[str]:
    """Paths of linears to be left out of "all-linear": those that are not quantized, and a head.

    every: whether adapters go on all other linears. Raises InputError where no linear has floating zero points, or,
    with `every`, one of them has none.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear)}
    quantized = {
        path: each
        for path, each in linears.items()
        if isinstance(each, QuantizedLinear) and not isinstance(each, TiedLinear) and each is not head
    }
    if not quantized:
        raise InputError(f"--merge zeros needs a quantized model: {CAN}; quantize it first (llmtools quantize)")
    refused = [path for path, each in quantized.items() if _size(each) is None]
    if refused and (every or len(refused) == len(quantized)):
        raise _refusal(refused[0], quantized[refused[0]])
    return [path for path in linears if path not in quantized]


def zeros_layers(model: nn.Module) -> Mapping[str, Any]:
    """The LoRA layers of a PEFT model, by path.

    Raises InputError where an adapter is on anything but a quantized linear with floating zero points.
    """
    from peft.tuners.lora import Linear

    layers = layers_on_linears(model, Linear, "zeros")
    for path, layer in layers.items():
        if _size(layer.base_layer) is None:
            raise _refusal(own_path(path), layer.base_layer)
    return layers


def check_mergeable(model: nn.Module) -> None:
    """Raises InputError unless the adapters of a PEFT model fit into the zero points of its base."""
    for path, layer in zeros_layers(model).items():
        with within(own_path(path)):
            check_constant(layer)


def keep_pooled(model: nn.Module) -> Any:
    """Makes A constant in the groups of the base, in place, and its gradients from now on.

    Returns the TrainerCallback that averages A again after each step, for optimizers that do not treat equal entries
    equally (of 8 bits, for one). Raises InputError as `zeros_layers`.
    """
    from transformers import TrainerCallback

    factors = [
        (layer.lora_A[name].weight, size)
        for layer in zeros_layers(model).values()
        if (size := _size(layer.base_layer)) is not None
        for name in active_adapters(layer)
    ]

    def average() -> None:
        with torch.no_grad():
            for weight, size in factors:
                weight.copy_(pooled(weight, size))

    average()
    for weight, size in factors:
        weight.register_hook(partial(pooled, size=size))

    class Pooled(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            average()

    return Pooled()


def _size(layer: QuantizedLinear) -> int | None:
    return layer.quantizer.shift_group(layer.in_features)


def _refusal(path: str, layer: QuantizedLinear) -> InputError:
    return InputError(
        f"--merge zeros: {path} is quantized by {layer.quantizer}, which has no floating zero points or minima "
        f"(Quantizer.shift); {CAN} have. Name other linears in lora.target_modules, or finetune with --merge exact"
    )
