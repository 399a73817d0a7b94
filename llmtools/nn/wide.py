"""Half-precision models in float32, on processors without products of half-precision matrices.

Packed weights are multiplied in the type that is fast, whatever that of their inputs is (`quant/materialize.py`). The
rest of a model, and a model that is not quantized, is torch's; on a CPU with AVX2 alone, as many laptops have, a
product of bfloat16 matrices takes it 7 times as long as one in float32, and the product of its gradient 40 times as
long (torch 2.13, 128 tokens; `python -m benchmarks.layers`). There a model is computed in float32, which has every
value of the half types: only roundings between the operations are left out. `widen` does that for good, for twice the
memory of what is not packed, `run_wide` for one call, with copies that end with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import build
from ..pages import free_memory
from .packed import PackedWeight

log = logging.getLogger(__name__)


def computed_in(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The type in which a model of `dtype` is computed: its own, or float32 on a CPU without products of that type."""
    slow = (dtype == torch.bfloat16 and not build.has_bfloat16()) or (
        dtype == torch.float16 and not build.has_float16()
    )
    return torch.float32 if slow and torch.device(device).type == "cpu" else dtype


def widen(model: nn.Module, device: str | None = None) -> None:
    """Casts a model in place, but for its packed tensors, to the type that it is computed in, on its device or, on the
    meta device, on this one. Where there is no memory for that it stays as it is."""
    narrow = _narrow(model, device)
    if narrow and (device is not None or _fits(sum(tensor.nbytes for tensor in narrow.values()))):
        nn.Module.float(model)  # transformers' own refuses quantized models, whose packed tensors do not change


def run_wide(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cast: Callable[[Any], Any] = lambda value: value
) -> Any:
    """``module(*args, **kwargs)``, with float32 copies of its half-precision tensors where it is computed in that.

    cast: what is then done to `args` and `kwargs`. The result is float32, too. Where there is no memory for the copies,
    it is as if it were not.
    """
    narrow = _narrow(module)
    if not narrow or not _fits(2 * sum(tensor.nbytes for tensor in narrow.values())):
        return module(*args, **kwargs)
    wide = {name: tensor.float() for name, tensor in narrow.items()}
    return torch.func.functional_call(module, wide, cast(args), cast(kwargs))


def _fits(size: int) -> bool:
    """Whether so many bytes are free; otherwise says what that means."""
    free = free_memory()
    if free is None or size <= free:
        return True
    log.warning(
        "the model is computed in half precision, in which this processor is many times slower than in float32: that "
        "would take %.1f GB more memory, and %.1f GB are free", size / 1e9, free / 1e9,
    )  # fmt: skip
    return False


def _narrow(module: nn.Module, device: str | None = None) -> dict[str, Tensor]:
    """Name → tensor, of those that are not packed and not computed in their own type."""
    packed = {
        f"{path}.{name}" if path else name
        for path, each in module.named_modules()
        if isinstance(each, PackedWeight)
        for name in each.stored
    }
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: tensor
        for name, tensor in found.items()
        if name not in packed and computed_in(tensor.dtype, device or tensor.device) != tensor.dtype
    }
