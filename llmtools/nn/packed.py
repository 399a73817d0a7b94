"""The base class of quantized layers: packed tensors, a quantizer that decodes them, and no dense weight.

The packed tensors are frozen Parameters, so every loading route works, DDP does not broadcast packed weights at each
step and FSDP2 shards them. A layer's `weight` is the read-only lazy view of `weight.py`.

Packed tensors are registered Parameters but not attributes: ``layer.packed["qweight"]``. By attributes such as
`qweight` and `W_q` PEFT and other libraries detect the layers of other quantizers, whose codes they then use as the
weight. Only code that handles parameters by name (torch itself, accelerate, the loader of transformers) gets them as
attributes.

Shapes: in, out — features of the layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import InputError, where
from ..quant import ALL, Packed, Quantizer
from .weight import _READ_ONLY, LazyWeight

_PARAMETER_CODE = ("torch", "accelerate", "deepspeed", "transformers.core_model_loading", "transformers.modeling_utils")
"""Names of modules that get and set parameters by the names of `named_parameters`."""


class Fetch:
    """Brings a layer's packed tensors to the device that it computes on, where they are kept in host memory.

    This one copies them whenever they are asked for; `model/transfer.py` has one that is ahead of the computation. A
    copy of the layer is without it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, stored: Packed) -> Packed:
        return {name: tensor.to(self.device) for name, tensor in stored.items()}

    def __deepcopy__(self, memo: Any) -> None:
        return None


class PackedWeight(nn.Module):
    """A weight [out, in] given by `quantizer` from this module's packed tensors; a mixin for layers of torch.

    `dtype` is that of `weight`; the packed tensors keep their own dtypes, whatever the module is cast to. With `fetch`
    they also keep their place, whatever device the module is moved to.
    """

    quantizer: Quantizer
    dtype: torch.dtype
    fetch: Fetch | None = None
    _packed_names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        raise NotImplementedError

    def _allocate(self, quantizer: Quantizer, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        """Registers the packed tensors, uninitialised. Raises InputError for a reserved name."""
        self.quantizer = quantizer
        self.dtype = dtype or torch.get_default_dtype()
        layout = quantizer.layout(*self.shape)
        self._packed_names = tuple(layout)
        for name, spec in layout.items():
            if name in ("weight", "bias") or "." in name:
                raise InputError(f"{where()}{quantizer}: a packed tensor cannot be named {name!r}")
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def pack_(self, packed: Packed) -> None:
        """Replaces the packed tensors, in place. Raises InputError unless names, shapes and dtypes are the layout's."""
        layout = self.quantizer.layout(*self.shape)
        if set(packed) != set(layout):
            raise InputError(f"{where()}packed tensors {sorted(packed)}; the layout has {sorted(layout)}")
        for name, spec in layout.items():
            if (tuple(packed[name].shape), packed[name].dtype) != (tuple(spec.shape), spec.dtype):
                raise InputError(
                    f"{where()}{name} is {list(packed[name].shape)} {packed[name].dtype}; "
                    f"the layout says {list(spec.shape)} {spec.dtype}"
                )
        for name in layout:
            values = packed[name].detach()
            if self.fetch is not None:
                values = values.to("cpu", copy=True)
            self._parameters[name] = nn.Parameter(values, requires_grad=False)
        self.fetch = None if self.fetch is None else Fetch(self.fetch.device)

    @property
    def stored(self) -> Packed:
        """The module's own packed tensors, its Parameters, by name."""
        return {name: self._parameters[name] for name in self._packed_names}  # type: ignore[misc]

    @property
    def packed(self) -> Packed:
        """Packed tensors by name, where the layer computes."""
        return self.stored if self.fetch is None else self.fetch(self.stored)

    def dequantize(self, rows: slice = ALL, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of the weight, [rows, in], in the layer's dtype or the one given."""
        return self.quantizer.dequantize(self.packed, rows, dtype or self.dtype)

    @property
    def weight(self) -> Tensor:
        return LazyWeight(self, self.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif not (
            isinstance(value, LazyWeight) and value.is_weight_of(self)
        ):  # PEFT's `unload` assigns the layer's own view
            raise InputError(_READ_ONLY)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_packed_names", ()) and not _asked_by_parameter_code():
            raise AttributeError(f"{name!r} is a packed tensor, not an attribute; use layer.packed[{name!r}]")
        return super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        """Device that the layer computes on."""
        return next(iter(self.stored.values())).device if self.fetch is None else self.fetch.device

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As `nn.Module`'s, but empty tensors get distinct addresses: of tensors at one address, as all empty ones are
        at 0, accelerate's `save_state` keeps only one."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in () if keep_vars else self._packed_names:
            tensor = destination[prefix + name]
            if type(tensor) is Tensor and not tensor.numel() and not tensor.is_meta:
                destination[prefix + name] = _addressed(tensor)

    def reset_parameters(self) -> None:
        """Does nothing: packed tensors come from a quantizer or a checkpoint."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts and moves like `nn.Module.to`, but packed tensors are only moved: a cast would damage them."""
        packed = {id(parameter) for parameter in self.stored.values()}

        def keep_type(tensor: Tensor) -> Tensor:
            if id(tensor) in packed and self.fetch is not None:
                return tensor
            changed = fn(tensor)
            if id(tensor) in packed and changed.dtype != tensor.dtype:
                return tensor.to(changed.device)
            return changed

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        super()._apply(keep_type, recurse)
        return self


def _addressed(empty: Tensor) -> Tensor:
    """The same empty tensor in host memory, in a storage that has an address: the first 0 bytes of 1."""
    storage = torch.empty(1, dtype=torch.uint8).untyped_storage()[:0]
    return torch.empty(0, dtype=empty.dtype).set_(storage, 0, empty.shape, empty.stride())


def _asked_by_parameter_code() -> bool:
    """Whether the caller two frames above is code of `_PARAMETER_CODE`."""
    if torch.compiler.is_compiling():
        return False
    module = sys._getframe(2).f_globals.get("__name__", "")
    return any(module == name or module.startswith(f"{name}.") for name in _PARAMETER_CODE)
