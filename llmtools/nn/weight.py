"""The `weight` that other libraries read: a guarded, lazy view of a quantized layer's weight.

PEFT, transformers and many model files ask a linear layer for ``weight.shape``, ``weight.dtype`` and ``weight.device``,
and some multiply with it. The view answers the first three for free and materialises for anything else, so everything
that reads works. What writes is refused: a plain property would hand out a copy, and `merge_and_unload` would add the
adapter to that copy and lose it without a word.

The hot path never comes here: it is `quant/materialize.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import InputError

if TYPE_CHECKING:
    from .linear import QuantizedLinear

_READ_ONLY = (
    "this weight is quantized and read-only, so nothing can be merged or written into it. "
    "llmtools.merge(peft_model) returns a dense model with the adapter merged; "
    "llmtools.dequantize(model) returns the dense base; or keep the adapter beside the quantized model."
)


class LazyWeight(Tensor):
    """[out, in] (or its transpose) of a `QuantizedLinear`, materialised when an operation needs the values."""

    _layer: QuantizedLinear
    _transposed: bool

    @staticmethod
    def __new__(cls, layer: QuantizedLinear, dtype: torch.dtype, transposed: bool = False) -> LazyWeight:
        rows, columns = layer.out_features, layer.in_features
        shape, strides = ((columns, rows), (1, columns)) if transposed else ((rows, columns), (columns, 1))
        make: Any = torch.Tensor._make_wrapper_subclass
        view: LazyWeight = make(cls, shape, strides=strides, dtype=dtype, device=layer.device, requires_grad=False)
        view._layer, view._transposed = layer, transposed
        view._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' _init_weights passes it by
        return view

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def dense(self) -> Tensor:
        """The values, as a plain tensor."""
        weight = self._layer.dequantize(dtype=self.dtype)
        return weight.t() if self._transposed else weight

    @property
    def data(self) -> Tensor:
        return LazyWeight(self._layer, self.dtype, self._transposed)  # not dense(): writing into a copy would be silent

    @data.setter
    def data(self, value: Tensor) -> None:
        raise InputError(_READ_ONLY)

    def __setitem__(self, *_: Any) -> None:
        raise InputError(_READ_ONLY)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, of={self._layer.quantizer})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        view = args[0] if args and isinstance(args[0], LazyWeight) else None
        if view is not None:
            if func in (aten.detach.default, aten.alias.default):
                return LazyWeight(view._layer, view.dtype, view._transposed)
            if func is aten.t.default or (func is aten.transpose.int and {args[1] % 2, args[2] % 2} == {0, 1}):
                return LazyWeight(view._layer, view.dtype, not view._transposed)
            if func is aten._to_copy.default and set(kwargs) <= {"dtype"}:
                return LazyWeight(view._layer, kwargs.get("dtype", view.dtype), view._transposed)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, LazyWeight) and argument.alias_info is not None and argument.alias_info.is_write:
                raise InputError(_READ_ONLY)
        args, kwargs = tree_map(lambda v: v.dense() if isinstance(v, LazyWeight) else v, (args, kwargs))
        return func(*args, **kwargs)
