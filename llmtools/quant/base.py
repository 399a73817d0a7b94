"""The narrow waist: what a quantizer is.

A quantizer is a black box of three functions: which tensors it stores (`layout`), how it makes them from a weight and,
if it wants one, a Hessian (`quantize`), and how it gives rows of the weight back (`dequantize`). Modules, checkpoints,
training and the command line know nothing else about it. The idea is ModuLoRA's (arXiv:2309.16119, section 3).

Shapes: out, in — features of the linear layer; t — tokens.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, did_you_mean
from ..registry import Registry
from .materialize import materialized_linear

Packed = dict[str, Tensor]
"""What is stored for one weight. The names become parameters of the module and keys of the checkpoint."""

ALL = slice(None)


class TensorSpec(NamedTuple):
    """Shape and type of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Quantizer(ABC):
    """A way of storing a weight matrix: [out, in] floats to a few named tensors, and rows of it back.

    Subclasses are frozen dataclasses: the configuration is the object, and a checkpoint stores the call (`spec`).
    """

    name: ClassVar[str]
    """The registered name; the registry sets it."""
    needs_hessian: ClassVar[bool] = False
    """Whether `quantize` wants the layer's inputs; then calibration data are asked for."""
    scratch_bytes: ClassVar[int] = 16
    """Bytes that `dequantize` has in use per weight at its peak, its result included: bounds a block of rows."""

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """The tensors that a weight [out, in] is stored in; an empty module can be made of it before they arrive."""

    @abstractmethod
    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        """weight [out, in] float; hessian [in, in] float32 = E[x xᵀ], undamped: damping is the quantizer's affair."""

    @abstractmethod
    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of the weight, [rows, in], bit-equal to the same rows of the whole."""

    def out_features(self, packed: Packed) -> int:
        """Rows of the weight. By convention the first tensor of the layout has one row per output feature."""
        return next(iter(packed.values())).shape[0]

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        """x [..., in] @ dequantize(packed).T -> [..., out], differentiable in x.

        The default materialises blocks of rows. Override it where there is a cheaper way to the same product.
        """
        return materialized_linear(x, self, packed)

    def spec(self) -> dict[str, Any]:
        """The call that makes this quantizer, as JSON: ``{"name": "optq", "bits": 3, …}``."""
        return {"name": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]


quantizers: Registry[Quantizer] = Registry("quantizer", "llmtools.quantizers")


def quantizer(name: str, **options: Any) -> Quantizer:
    """The quantizer of that name: built in, a plug-in's (entry point group ``llmtools.quantizers``) or ``module:Class``.

    >>> quantizer("optq", bits=3, group_size=64)
    OPTQ(bits=3, group_size=64, …)

    Raises InputError for an unknown name or option, with the nearest one that exists.
    """
    return _make(quantizers.get(name), name, options)


def from_spec(spec: dict[str, Any]) -> Quantizer:
    """The quantizer that a checkpoint names. Only registered names: reading a file never imports code."""
    options = dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"a quantizer is written as {{'name': …, options}}, not {spec!r}")
    return _make(quantizers.known(name), name, options)


def _make(factory: type[Quantizer], name: str, options: dict[str, Any]) -> Quantizer:
    if not (isinstance(factory, type) and issubclass(factory, Quantizer)):
        raise InputError(f"quantizer {name!r}: {factory!r} is no subclass of llmtools.Quantizer")
    known: list[str] = (
        [field.name for field in dataclasses.fields(factory)] if dataclasses.is_dataclass(factory) else []
    )
    for option in options:
        if option not in known:
            raise InputError(f"{name}: no option {option!r}; {did_you_mean(option, known)}")
    return factory(**options)
