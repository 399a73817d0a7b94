"""The `weight` that other libraries read: a read-only, lazy view of a quantized layer's weight.

PEFT, transformers and many model files ask a linear layer for ``weight.shape``, ``weight.dtype`` and ``weight.device``,
and some multiply with it. The view answers the first three for free and materialises for anything else, so everything
that reads works. Writing raises an error: a plain property would return a copy, and `merge_and_unload` would add the
adapter to that copy and lose it silently.

Views of the view (``weight[0]``, ``weight.data.reshape(-1)``) hold values that were materialised for them, and are
read-only in the same way. Results that are no views, such as a clone or a sum, are ordinary tensors.

The hot path never comes here: it is `quant/materialize.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InputError

if TYPE_CHECKING:
    from .packed import PackedWeight

_READ_ONLY = (
    "this weight is quantized and read-only, so nothing can be merged or written into it. "
    "llmtools.merge(peft_model) returns a dense model with the adapter merged; "
    "llmtools.dequantize(model) returns the dense base; or keep the adapter beside the quantized model. "
    "Adapters whose initialisation changes it (PiSSA, OLoRA, CorDA) can use the quantization error instead: "
    "llmtools quantize --adapter_rank R, then finetune --lora.init error."
)


class ReadOnly(Tensor):
    """A tensor whose operations use `dense()`: writing ones raise InputError, views are `ReadOnly` again."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The values, as a plain tensor."""

    @property
    def data(self) -> Tensor:
        return self.detach()  # not dense(): a write into that copy would be lost silently

    @data.setter
    def data(self, value: Tensor) -> None:
        raise InputError(_READ_ONLY)

    def __setitem__(self, *_: Any) -> None:
        raise InputError(_READ_ONLY)

    def tolist(self) -> Any:
        return self.dense().tolist()

    def numpy(self, **options: Any) -> Any:
        array = self.dense().numpy(**options)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy() if dtype is None else self.numpy().astype(dtype, copy=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        written = [given.get(each.name) for each in schema.arguments if each.alias_info and each.alias_info.is_write]
        if any(isinstance(leaf, ReadOnly) for leaf in tree_leaves(written)):
            raise InputError(_READ_ONLY)
        if args and isinstance(args[0], LazyWeight) and (lazy := args[0].viewed(func, args[1:])) is not None:
            return lazy
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], LazyWeight) and set(kwargs) <= {"dtype"}:
            return args[0].dense(kwargs.get("dtype"))
        args, kwargs = tree_map(lambda v: v.dense() if isinstance(v, ReadOnly) else v, (args, kwargs))
        result = func(*args, **kwargs)
        if any(each.alias_info is not None for each in schema.returns):
            return tree_map(lambda v: WeightView.of(v) if isinstance(v, Tensor) else v, result)
        return result


class LazyWeight(ReadOnly):
    """[out, in] (or its transpose) of a `PackedWeight`, materialised when an operation needs the values."""

    _layer: PackedWeight
    _transposed: bool

    @staticmethod
    def __new__(cls, layer: PackedWeight, dtype: torch.dtype, transposed: bool = False) -> LazyWeight:
        rows, columns = layer.shape
        shape, strides = ((columns, rows), (1, columns)) if transposed else ((rows, columns), (columns, 1))
        make: Any = torch.Tensor._make_wrapper_subclass
        view: LazyWeight = make(cls, shape, strides=strides, dtype=dtype, device=layer.device, requires_grad=False)
        view._layer, view._transposed = layer, transposed
        view._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' _init_weights skips it
        return view

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = self._layer.dequantize(dtype=dtype or self.dtype)
        return weight.t() if self._transposed else weight

    def viewed(self, func: Any, rest: Any) -> LazyWeight | None:
        """The result of a view operation that needs no values; None where values are needed."""
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return LazyWeight(self._layer, self.dtype, self._transposed)
        if func is aten.t.default or (func is aten.transpose.int and {each % 2 for each in rest} == {0, 1}):
            return LazyWeight(self._layer, self.dtype, not self._transposed)
        return None

    def is_weight_of(self, layer: object) -> bool:
        """Whether it is ``layer.weight``."""
        return self._layer is layer and not self._transposed

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, of={self._layer.quantizer})"


class WeightView(ReadOnly):
    """A view of a materialised weight, of any shape."""

    _plain: Tensor

    @staticmethod
    def of(values: Tensor) -> WeightView:
        view: WeightView = Tensor._make_subclass(WeightView, values)
        view._plain = values
        return view

    def dense(self) -> Tensor:
        return self._plain

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WeightView({self._plain!r})"
