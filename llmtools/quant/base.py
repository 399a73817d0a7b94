"""The interface of a quantizer.

A quantizer is a black box of three functions: which tensors it stores (`layout`), how it makes them from a weight and,
if it needs one, a Hessian (`quantize`), and how it decodes rows of the weight (`dequantize`). Modules, checkpoints,
training and the command line know nothing else about it. The idea is ModuLoRA's (arXiv:2309.16119, section 3).

Shapes: out, in — features of the linear layer; t — tokens.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, where
from ..options import built
from ..registry import Registry
from .materialize import materialized_linear
from .update import updated

Packed = dict[str, Tensor]
"""Stored tensors of one weight. The names become parameters of the module and keys of the checkpoint."""

ALL = slice(None)


class TensorSpec(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    """Shape of the tensor."""
    dtype: torch.dtype
    """Dtype of the tensor."""


def layout_bytes(layout: Mapping[str, TensorSpec]) -> int:
    """Size of the tensors of a layout, in bytes."""
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layout.values())


class Rows(ABC):
    """A weight [out, in] that decodes row by row and, perhaps, multiplies: a quantizer, or a grid in its basis.

    It is the interface that `materialized_linear` needs. One method is abstract; the others have defaults.
    """

    multiply_tokens: ClassVar[int] = 32
    """Largest number of tokens that `multiply` is worth calling for on a CPU."""

    @abstractmethod
    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of the weight, [rows, in] of `dtype`, bit-equal to the same rows of the whole; any slice of them."""

    def out_features(self, packed: Packed) -> int:
        """Rows of the weight. By convention the first tensor of the layout is [out, …], a row per output feature."""
        return next(iter(packed.values())).shape[0]

    def scratch_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        """Peak memory of `dequantize` in bytes per weight, its result included: bounds a block of rows."""
        return 16

    def dither(self, packed: Packed, rows: slice) -> Tensor | None:
        """Offsets of the weights of rows start … stop, [rows, in] float32, uniform in the cells of their codes: the
        values that round to these (`dither.py`).

        With them an update that is smaller than a step is not lost when it is encoded. Optional: with None codes are
        the nearest.
        """
        return None

    def multiply(self, x: Tensor, packed: Packed, transposed: bool = False) -> Tensor | None:
        """x [t, in] @ W.T -> [t, out], or x [t, out] @ W -> [t, in], in one pass over the packed tensors, of x's dtype.

        For decoding, where t is small and reading the weight takes the time (GEMV). None: there is no such kernel.
        """
        return None

    def multiply_each(self, x: Tensor, sizes: Sequence[int], packed: Sequence[Packed]) -> Tensor | None:
        """`multiply` of several weights of one shape at once: x [Σ t, in], rows that belong to one weight after the
        other, as many as `sizes` says -> [Σ t, out]. None: there is no such kernel."""
        return None


class Quantizer(Rows):
    """A storage format of a weight matrix: [out, in] floats to a few named tensors, and rows of it back.

    Three functions are abstract: `layout`, `quantize` and `dequantize`. Subclasses are frozen dataclasses: the
    configuration is the object, and a checkpoint stores the call (`spec`).
    """

    name: ClassVar[str]
    """Registered name; set by the registry."""
    needs_hessian: ClassVar[bool] = False
    """Whether `quantize` needs a Hessian, hence calibration data."""

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """The tensors that a weight [out, in] is stored in; enough to create an empty module."""

    @abstractmethod
    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        """weight [out, in] float; hessian [in, in] float32 = E[x xᵀ], undamped: damping is up to the quantizer.

        Returns the tensors of `layout`, in its order. Raises InputError for a weight that cannot be stored, as one
        with NaN in it.
        """

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        """x [..., in] @ dequantize(packed).T -> [..., out] of x's type, differentiable in x.

        The default materialises blocks of rows. Override it where there is a cheaper way to the same product.
        """
        return materialized_linear(x, self, packed)

    def linear_each(self, x: Tensor, sizes: Sequence[int], packed: Sequence[Packed]) -> Tensor | None:
        """`linear` of several weights of one shape in one call, for decoding, arguments as in `Rows.multiply_each`;
        without gradients. None where each weight is to be called by itself."""
        return None

    def spec(self) -> dict[str, Any]:
        """The call that makes this quantizer, as JSON: ``{"name": "optq", "bits": 3, …}``."""
        options = dataclasses.asdict(self)  # type: ignore[call-overload]
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            if each.metadata.get(_LATER) and options[each.name] == each.default:
                del options[each.name]
        return {"name": self.name, **options}

    # ---- hooks with defaults that suit most quantizers ----

    def check(self, packed: Packed) -> None:
        """Raises InputError for invalid values in tensors from a file: by default NaN and infinities.

        Names, shapes and dtypes are those of `layout` already. Codes need no check: any of them should decode to a
        finite value.
        """
        for name, tensor in packed.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{name} holds NaN or infinite values")

    def suited(self, weight: Tensor) -> Self:
        """The quantizer for this weight [out, in]: itself, or, with a log line, a variant that can represent its
        magnitude.

        A layer is created with the variant, and a checkpoint stores it.
        """
        return self

    def requantize(self, weight: Tensor, packed: Packed, rows: slice = ALL) -> Packed:
        """The codes of other rows of the weight, [rows, in] float: the values nearest to them on the scales of
        `packed`, which are kept.

        Returns these rows of the tensors that hold codes, by name. The slice begins at a multiple of 16, or at one of
        the rows that share a code. A weight on the grid keeps its values. That is how an adapter is trained and merged
        without any other tensor than the codes (`update.py`). Optional: raises InputError where the quantizer has no
        such method.
        """
        raise InputError(
            f"{where()}{self.name} cannot encode a weight on the scales that are there (Quantizer.requantize); merge "
            f"with --how requantize, or dense"
        )

    def requantizes(self) -> bool:
        """Whether `requantize` is there."""
        return type(self).requantize is not Quantizer.requantize

    def quantize_two_sided(self, weight: Tensor, hessian: Tensor, outputs: Tensor) -> Packed:
        """As `quantize`, for the least tr(G E H Eᵀ) instead of tr(E H Eᵀ); E the error of the weight, G = outputs
        [out, out] float32 = E[g gᵀ] the second moment of a loss' gradients in the layer's outputs.

        Optional: raises InputError where the quantizer has no such method.
        """
        raise InputError(
            f"{where()}{self.name} has no two-sided rounding (Quantizer.quantize_two_sided); choose optq, quip, "
            "quip_sharp or qtip"
        )

    def rounds_two_sided(self) -> bool:
        """Whether `quantize_two_sided` is there."""
        return type(self).quantize_two_sided is not Quantizer.quantize_two_sided

    def updated(self, packed: Packed, b: Tensor, a: Tensor) -> Packed:
        """`packed` with the codes of Ŵ + b a on its own scales, block of rows by block of rows.

        b [out, r], a [r, in] float. The default calls `requantize`, of the values moved by `dither`. Raises InputError
        where there is none, and for NaN or infinities.
        """
        return updated(self, packed, b, a)

    def shift_group(self, in_features: int) -> int | None:
        """Number of consecutive columns that share a zero point or minimum which `shift` moves; None: there is none."""
        return None

    def shift(self, packed: Packed, change: Tensor) -> Packed:
        """`packed` with change [out, G] float added to the weight, one value for each row and group of `shift_group`
        columns, of which the last may be shorter.

        Only zero points or minima differ, and are rounded to their dtype. Optional: raises InputError where the
        quantizer has no such method, and for values that the dtype cannot hold.
        """
        raise InputError(
            f"{where()}{self.name} has no floating zero points or minima to move (Quantizer.shift); merge with --how "
            "round or requantize, or dense"
        )

    def tunable(self, packed: Packed) -> list[str]:
        """Names of the tensors that block tuning and recovery may train: by default all floating ones, such as scales.

        packed: as `unpacked` gives it.
        """
        return [name for name, tensor in packed.items() if tensor.is_floating_point()]

    def unpacked(self, packed: Packed) -> Packed:
        """`packed` and, as further tensors, the floating values that lie inside its bytes, of the dtypes there.

        `dequantize` and `linear` decode with these instead, differentiably. By default there are none.
        """
        return packed

    def repacked(self, packed: Packed) -> Packed:
        """The tensors of `layout` again, with the values of the further tensors in their bytes: undoes `unpacked`."""
        return packed

    def tuning_linear(self, x: Tensor, packed: Packed) -> Tensor:
        """`linear`, x [..., in] -> [..., out], also differentiable in the floating tensors of `packed`.

        Those may have a wider dtype than in the layout. Autograd keeps the whole weight in memory; one block of a
        network at a time is trained like this.
        """
        return F.linear(x, self.dequantize(packed, dtype=x.dtype))


class BlockLearner(Quantizer):
    """A quantizer whose codes are learned on the outputs of a whole block of the network: `signround`.

    `quantize` is still there, for a single weight without its block.
    """

    @property
    @abstractmethod
    def block_batch(self) -> int:
        """Number of calibration sequences per step."""

    @abstractmethod
    def learner(self, weight: Tensor, hessian: Tensor) -> Learner:
        """The `Learner` of a weight [out, in] float, with hessian [in, in] float32, as for `quantize`."""


_LATER = "llmtools.later"


def later(default: Any) -> Any:
    """Default of an option that checkpoints of earlier versions lack.

    At its default `Quantizer.spec` leaves it out, so that earlier versions open new checkpoints.
    """
    return dataclasses.field(default=default, metadata={_LATER: True})


class Learner(ABC):
    """A weight whose codes are being learned: `weight` is differentiable, `step` updates, `packed` gives the result.

    The training loop (`model/reconstruct.py`, on a block's outputs) calls `weight`, runs backward, and calls `step`,
    `steps` times in all.

    Shapes: out, in — features of the linear layer.
    """

    steps: int
    """Number of training steps."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The fake-quantized weight [out, in] float32, differentiable in the learned tensors."""

    @abstractmethod
    def step(self, progress: float) -> None:
        """One optimizer step, which clears the gradients; progress is 0 at the first step and nears 1 at the last."""

    @abstractmethod
    def keep(self, rows: Tensor | None = None) -> None:
        """Stores this iterate as the best; with rows, [out] bool, only those output features of it."""

    @abstractmethod
    def restore(self) -> None:
        """Restores the kept iterate."""

    @abstractmethod
    def packed(self) -> Packed:
        """The tensors of the quantizer's layout for this iterate, as `Quantizer.quantize` gives them."""


quantizers: Registry[Quantizer] = Registry("quantizer", "llmtools.quantizers")


def quantizer(name: str, **options: Any) -> Quantizer:
    """The quantizer of that name: built in, a plug-in's (entry point ``llmtools.quantizers``) or ``module:Class``.

    >>> quantizer("optq", bits=3, group_size=64)
    OPTQ(bits=3, group_size=64, …)

    Raises InputError for an unknown name or option, with the nearest one that exists.
    """
    return _make(quantizers.get(name), name, options)


def from_spec(spec: dict[str, Any]) -> Quantizer:
    """The quantizer of a checkpoint's spec. Only registered names: reading a file never imports code."""
    options = dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"a quantizer is specified as {{'name': …, options}}, not {spec!r}")
    return _make(quantizers.known(name), name, options)


def _make(factory: type[Quantizer], name: str, options: dict[str, Any]) -> Quantizer:
    if not (isinstance(factory, type) and issubclass(factory, Quantizer)):
        raise InputError(f"quantizer {name!r}: {factory!r} is no subclass of llmtools.Quantizer")
    return built(name, factory, options)
