"""PEFT's LoRA layer on a quantized linear, rounded: adapters of ``finetune --merge exact``.

It is registered by PEFT's hook for custom layers (``LoraConfig._register_custom_module``; developer guide, "Custom
models"), so the files are plain PEFT files. That an adapter was trained so is in its ``llmtools.json``, and
`adapter_files.open_adapter` opens it with the same layer. PEFT by itself opens it as a plain LoRA, which computes
something else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.adapters import own_path
from ..nn.embedding import TiedLinear
from ..nn.exact import active_adapters, is_low_rank, straight_through, updated_packed
from ..nn.linear import QuantizedLinear
from ..quant import Packed

REFUSED = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "use_qalora")
"""Options of LoraConfig with which an adapter is more than an update B A of quantized linears."""


@functools.cache
def exact_linear() -> type[Any]:
    """The class of the layer, a subclass of PEFT's."""
    from peft.tuners.lora import Linear

    class ExactLinear(Linear):
        """y = x Q(Ŵ + s B A)ᵀ + bias, on a quantized linear; without an active adapter the quantized linear itself.

        In training x, A and B get their gradients straight through the rounding (`nn/exact.py`); dropout is not
        applied. In inference the codes are kept until an adapter changes.
        """

        rounds: bool = True
        """Whether training rounds; a warm-up begins as plain LoRA. Evaluation always rounds."""

        def __init__(self, base_layer: QuantizedLinear, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(base_layer, adapter_name, *args, **kwargs)
            self._kept: tuple[tuple[Any, ...], Packed] | None = None

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            names = active_adapters(self)
            if self.disable_adapters or self.merged or not names:
                return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
            if self.training and not self.rounds:
                return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
            if len(names) > 1 or kwargs.get("adapter_names") is not None:
                raise InputError(
                    f"adapters of --merge exact are rounded one at a time, and {', '.join(names)} are active; activate "
                    "one (model.set_adapter)"
                )
            a, b = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
            y: Tensor = self.base_layer.product(x, self.codes())
            if not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
                return y
            return straight_through(y, x, a, b, self.scaling[names[0]])

        def codes(self) -> Packed:
            """The packed tensors of Q(Ŵ + s B A); in inference those of the last call, if nothing changed since."""
            if not is_low_rank(self):
                raise InputError("--merge exact is for plain LoRA adapters: no DoRA, no other variant, no bias")
            factors = [each[name].weight for name in active_adapters(self) for each in (self.lora_A, self.lora_B)]
            learns = torch.is_grad_enabled() and any(each.requires_grad for each in factors)
            if self.training or learns or self.base_layer.fetch is not None:  # not kept on the device, nor its codes
                self._kept = None
                return updated_packed(self)
            tensors = [*factors, *self.base_layer.packed.values()]
            key = (
                *((each.data_ptr(), each._version) for each in tensors),
                *self.scaling.values(),
                *active_adapters(self),
            )
            if self._kept is None or self._kept[0] != key:
                self._kept = key, updated_packed(self)
            return self._kept[1]

        def train(self, mode: bool = True) -> ExactLinear:
            self._kept = None
            return super().train(mode)  # type: ignore[no-any-return]

    return ExactLinear


def register(config: Any) -> Any:
    """A peft.LoraConfig, changed: its adapters on quantized linears will be rounded. Returns it.

    Raises InputError for options with which an adapter is no plain LoRA.
    """
    check_plain(config, "exact")
    config._register_custom_module({QuantizedLinear: exact_linear()})
    return config


def check_plain(config: Any, how: str) -> None:
    """Raises InputError for a PEFT configuration of more than updates B A; how: the value of --merge."""
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise InputError(f"--merge {how} is for LoRA adapters, not {getattr(config, 'peft_type', config)}")
    for key in REFUSED:
        if getattr(config, key, None):
            raise InputError(f"--merge {how} is for plain LoRA adapters on quantized linears; leave out {key}")
    if getattr(config, "bias", "none") != "none":
        raise InputError(f"--merge {how} does not train biases (bias={config.bias!r}); leave out bias")


def check_base(model: nn.Module) -> list[str]:
    """Paths of linears that are not quantized or tied to the embedding, to be left out of "all-linear".

    Raises InputError where no linear is quantized, or one by a quantizer that cannot encode on its own scales.
    """
    linears = {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear)}
    quantized = {path: each for path, each in linears.items() if isinstance(each, QuantizedLinear)}
    if not quantized:
        raise InputError("--merge exact needs a quantized model; quantize it first (llmtools quantize)")
    for path, layer in quantized.items():
        if not layer.quantizer.requantizes():
            raise InputError(
                f"--merge exact: {path} is quantized by {layer.quantizer}, which cannot encode a weight on the scales "
                "that are there (Quantizer.requantize); finetune without --merge, and merge with --how requantize"
            )
    return [path for path, each in linears.items() if path not in quantized or isinstance(each, TiedLinear)]


def exact_layers(model: nn.Module) -> Mapping[str, Any]:
    """The rounded layers of a PEFT model, by path.

    Raises InputError where an adapter is on anything else.
    """
    return layers_on_linears(model, exact_linear(), "exact")


def layers_on_linears(model: nn.Module, kind: type[Any], how: str) -> Mapping[str, Any]:
    """PEFT's layers of this kind on quantized linears, by path; how: the value of --merge.

    Raises InputError where an adapter is on anything else.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        base = getattr(module, "base_layer", module)
        if isinstance(module, kind) and isinstance(base, QuantizedLinear) and not isinstance(base, TiedLinear):
            found[path] = module
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise InputError(
                f"{own_path(path)}: --merge {how} trains quantized linears only, and this is a "
                f"{type(base).__name__}; leave it out of lora.target_modules (or name it in "
                "lora.options.exclude_modules)"
            )
    return found
