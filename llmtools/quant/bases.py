"""Changes of coordinates: on weights while quantizing, on activations while running.

In the basis (R, L) the layer y = x Wᵀ is y = ((x R) W'ᵀ) Lᵀ with W = L W' Rᵀ, so the quantized weight W' is decoded as
it is stored and the activations are rotated instead. The rotated weight W' may have a few columns more than W.

Shapes: out, in — features; in' — columns of the rotated weight.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..kernels.hadamard import hadamard, rotate, rule_for
from ..kernels.ops import constant_result, plain
from .base import Packed, TensorSpec
from .grids.base import Grid
from .grids.scalar import SCALE_TYPES, check_scale_type, scale_range
from .hessian import proxy_loss
from .rounding import Nearest


class Basis(ABC):
    """A change of coordinates that has an inverse. Its state is stored beside the codes, never made again.

    Weights and Hessians are float32 or wider, activations of any float type; results have the argument's type.
    """

    by_rows: ClassVar[bool] = True
    """Whether rows of W depend on the same rows of W' alone (L is the identity)."""
    state: ClassVar[tuple[str, ...]]
    """Names of the tensors of `layout`."""

    def columns(self, in_features: int) -> int:
        """in', the columns of the rotated weight."""
        return in_features

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """The tensors of the state, like `Quantizer.layout`."""

    @abstractmethod
    def init(self, weight: Tensor, hessian: Tensor | None) -> Packed:
        """The state for this weight [out, in] and Hessian [in, in]."""

    def check(self, state: Packed) -> None:  # noqa: B027 (most need no check)
        """Raises InputError for an invalid state from a file, such as a perm [in] with duplicates; values are
        finite."""

    @abstractmethod
    def transform(self, weight: Tensor, hessian: Tensor | None, state: Packed) -> tuple[Tensor, Tensor | None]:
        """W [out, in], H [in, in] -> W' [out, in'], H' [in', in'] in the new coordinates."""

    def transform_update(self, b: Tensor, a: Tensor, state: Packed) -> tuple[Tensor, Tensor]:
        """The factors b [out, r], a [r, in] of a change of W -> those of the change of W', [out, r] and [r, in'];
        float32. The default is for a basis that is `by_rows`."""
        return b.float(), self.transform(a.float(), None, state)[0]

    def output_moment(self, moment: Tensor, state: Packed) -> Tensor:
        """E[g gᵀ] [out, out] of the gradients in the outputs of W -> that of W' in the new coordinates, Lᵀ E[g gᵀ] L.
        The default is for a basis that is `by_rows`."""
        return moment

    @abstractmethod
    def inverse_transform(self, rotated: Tensor, state: Packed) -> Tensor:
        """W' [out, in'] -> W [out, in]. Where `by_rows`, the same of some rows."""

    def rotated(self, packed: Packed) -> Packed:
        """The tensors of the rotated weight alone, without the state."""
        return {name: tensor for name, tensor in packed.items() if name not in self.state}

    @abstractmethod
    def inputs(self, x: Tensor, state: Packed) -> Tensor:
        """x [..., in] -> x R."""

    @abstractmethod
    def outputs(self, y: Tensor, state: Packed) -> Tensor:
        """y [..., out] -> y Lᵀ."""


@dataclass(frozen=True)
class Permutation(Basis):
    """Columns by falling diagonal of H ("act-order", GPTQ's README): the inputs that matter are rounded first.

    Groups are runs of the permuted columns, so their scales fit columns of like importance. State: perm [in] int32, of
    which entry k is the column of W that is column k of W'.
    """

    state = ("perm",)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {"perm": TensorSpec((in_features,), torch.int32)}

    def init(self, weight: Tensor, hessian: Tensor | None) -> Packed:
        if hessian is None:  # no calibration: natural order
            return {"perm": torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device)}
        return {"perm": torch.argsort(hessian.diagonal(), descending=True, stable=True).to(torch.int32)}

    def check(self, state: Packed) -> None:
        perm = state["perm"].long()
        if not torch.equal(perm.sort().values, torch.arange(len(perm), device=perm.device)):
            raise InputError(f"perm is no permutation of {len(perm)} columns")

    def transform(self, weight: Tensor, hessian: Tensor | None, state: Packed) -> tuple[Tensor, Tensor | None]:
        perm = state["perm"].long()
        return weight[:, perm], None if hessian is None else hessian[perm][:, perm]

    def inverse_transform(self, rotated: Tensor, state: Packed) -> Tensor:
        return torch.empty_like(rotated).index_copy_(-1, state["perm"].long(), rotated)

    def inputs(self, x: Tensor, state: Packed) -> Tensor:
        return x.index_select(-1, state["perm"])

    def outputs(self, y: Tensor, state: Packed) -> Tensor:
        return y


@dataclass(frozen=True)
class SignedHadamard(Basis):
    """Incoherence: random signs and a Hadamard matrix on either side (QuIP#, arXiv:2402.04396, section 3).

    W = diag(sv) Q_out W' Q_inᵀ diag(su), Q the orthogonal matrices of `kernels.hadamard`. Outliers are spread over
    whole rows and columns, W' looks Gaussian, and a matrix-wide grid suits it. sv carries the size of each row, beside
    its sign: mixed with rows of other sizes, as published, the small ones would drown in the error of the large. The
    entries of W' have mean square scale²; without `scale`, for grids that fit their own, about that of W.

    On the side of the inputs the transform's size is the next multiple of `block`, so that blocks of at least that
    order can be mixed: x is padded with zeros. On the side of the outputs nothing is padded; an odd number of
    them just is not mixed. Signs are sampled from a seed and stored; after block tuning su and sv may be any numbers.

    With `mixed`, as in EXL3's files, features are mixed in runs of that many; both sides are padded to whole runs, and
    W' has more rows than W, too.

    State: su [in] float16; sv [out] of `scale_type`.
    """

    seed: int = 0
    scale: float | None = None
    block: int = 8
    rules: int = 1
    """Version of the table that says which Hadamard matrix belongs to a size, `kernels.hadamard.rule_for`."""
    scale_type: str = "float16"
    """The type of sv: float16, bfloat16 or float32."""
    mixed: int | None = None
    """Order of the Hadamard matrices, of runs of features; by default one matrix mixes a whole side."""

    by_rows: ClassVar[bool] = False
    state = ("su", "sv")

    def __post_init__(self) -> None:
        if self.rules != 1:
            raise InputError(f"hadamard={self.rules}; this version of llmtools knows the Hadamard rules 1; update it")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise InputError(f"scale={self.scale}; give a positive number, as 1.03")
        check_scale_type(self.scale_type)

    def stored(self, rows: Tensor) -> Tensor:
        """Factors of the rows, [out], in the type of sv."""
        dtype = SCALE_TYPES[self.scale_type]
        largest = torch.finfo(dtype).max
        return rows.clamp(-largest, largest).to(dtype)

    def columns(self, in_features: int) -> int:
        return in_features + -in_features % (self.mixed or self.block)

    def rows(self, out_features: int) -> int:
        """The rows of the rotated weight."""
        return out_features + -out_features % (self.mixed or 1)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {
            "su": TensorSpec((in_features,), torch.float16),
            "sv": TensorSpec((out_features,), SCALE_TYPES[self.scale_type]),
        }

    def init(self, weight: Tensor, hessian: Tensor | None) -> Packed:
        out_features, in_features = weight.shape
        generator = torch.Generator("cpu").manual_seed(self.seed)
        su, sv = (
            torch.randint(0, 2, (n,), generator=generator, device="cpu").mul(2).sub(1).to(weight.device, torch.float16)
            for n in (in_features, out_features)
        )
        unit = 2.0 ** float(weight.abs().max().frexp().exponent)  # a power of two: exact, and squares do not vanish
        sizes = (weight / unit).square_().mean(1).sqrt()  # [out]
        sizes = sizes.clamp_min(1e-3 * sizes.max())
        if self.scale is None:
            scales = sizes / (sizes.square().mean().sqrt() if sizes.any() else 1)
        else:
            padding = self.columns(in_features) / in_features * (self.rows(out_features) / out_features)
            scales = sizes * (unit / (self.scale * padding**0.5))
        dtype = SCALE_TYPES[self.scale_type]
        return {"su": su, "sv": sv * torch.where(sizes > 0, scales.clamp(*scale_range(dtype)), 0).to(dtype)}

    def transform(self, weight: Tensor, hessian: Tensor | None, state: Packed) -> tuple[Tensor, Tensor | None]:
        su, sv = state["su"].to(weight.dtype), state["sv"].to(weight.dtype)
        left = torch.where(sv == 0, 1, sv).reciprocal()
        rotated = weight.new_zeros(self.rows(len(weight)), self.columns(weight.shape[1]))
        for rows in _chunks(len(weight)):
            rotated[rows] = self._spread(weight[rows] * left[rows, None] / su)
        for columns in _chunks(rotated.shape[1]):
            rotated[:, columns] = self._mix(rotated[:, columns].mT).mT
        return rotated, None if hessian is None else self.second_moment(hessian, state)

    def transform_update(self, b: Tensor, a: Tensor, state: Packed) -> tuple[Tensor, Tensor]:
        su, sv = state["su"].float(), state["sv"].float()
        left = torch.where(
            sv == 0, 0, sv.reciprocal()
        )  # rows of zeros stay: they show nothing, and would disturb others
        right = torch.where(su == 0, 0, su.reciprocal())
        padded = F.pad((b.float() * left[:, None]).mT, (0, self.rows(len(b)) - len(b)))
        return self._mix(padded).mT.contiguous(), self._spread(a.float() * right)

    def second_moment(self, hessian: Tensor, state: Packed) -> Tensor:
        """H [in, in] of x -> that of x R [in', in'], a new tensor; the identity for a layer without input."""
        su, size = state["su"].to(hessian), self.columns(len(hessian))
        if not hessian.any():
            return torch.eye(size, dtype=hessian.dtype, device=hessian.device)
        moment = hessian.new_empty(size, size)
        for rows in _chunks(len(hessian)):
            moment[rows] = self._spread(hessian[rows] * su[rows, None] * su)
        for columns in _chunks(size):
            moment[:, columns] = self._spread(moment[: len(hessian), columns].mT).mT
        return moment

    def output_moment(self, moment: Tensor, state: Packed) -> Tensor:
        sv = state["sv"].to(moment)
        extra = self.rows(len(moment)) - len(moment)
        rotated = F.pad(moment * sv[:, None] * sv, (0, extra, 0, extra))
        for _ in range(2):  # Qᵀ (sv G sv) Q, a side at a time
            for rows in _chunks(len(rotated)):
                rotated[rows] = self._mix(rotated[rows])
            rotated = rotated.mT.contiguous()
        return rotated

    def _spread(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., in'], Q_inᵀ of the padded vectors."""
        return self._mix(F.pad(x, (0, self.columns(x.shape[-1]) - x.shape[-1])))

    def _mix(self, x: Tensor) -> Tensor:
        return hadamard(x, self._rule(x.shape[-1]), transpose=True)

    def _rule(self, size: int) -> str:
        return _rule(size) if self.mixed is None else f"blocks:{self.mixed}"

    def inverse_transform(self, rotated: Tensor, state: Packed) -> Tensor:
        su, sv = state["su"].to(rotated.dtype), state["sv"].to(rotated.dtype)
        weight = torch.empty_like(rotated)
        for columns in _chunks(rotated.shape[1]):
            weight[:, columns] = hadamard(rotated[:, columns].mT, self._rule(len(rotated))).mT  # Q_out W'
        for rows in _chunks(len(sv)):
            weight[rows] = hadamard(weight[rows], self._rule(rotated.shape[1])) * sv[rows, None]
            weight[rows, : len(su)] *= su
        return weight[: len(sv), : len(su)].contiguous()

    def inputs(self, x: Tensor, state: Packed) -> Tensor:
        """x [..., in] -> x R; of siblings such as q, k and v, whose R is the same, the first computes it for all."""
        size, su = self.columns(x.shape[-1]), state["su"]
        rule = self._rule(size)

        def rotated() -> Tensor:
            return rotate(x, rule, size, before=su, factor=1 / _guard(x), transpose=True)

        if su.requires_grad or not (plain(x) and plain(su)) or x.is_inference() or su.is_inference():
            return rotated()
        if x.is_leaf and x.requires_grad:  # such as gradcheck changes behind autograd's back
            return rotated()
        return _last.result(x, su, rule, rotated)

    def outputs(self, y: Tensor, state: Packed) -> Tensor:
        size, sv = y.shape[-1], state["sv"]
        return rotate(y, self._rule(size), size, after=sv, length=sv.shape[0], factor=_guard(y))


class _LastInput(threading.local):
    """The input that this thread rotated last, and the result, until the input is gone or another is rotated.

    Layers that read one input, as q, k and v or gate and up do, have the same signs where they were quantized with one
    seed. The gradients in their rotated inputs are then summed by autograd, and go through the rotation once.
    """

    source: Callable[[], Tensor | None] = staticmethod(lambda: None)
    """Weak reference to the input, which is not kept alive here."""
    key: tuple[Any, ...] = ()
    kept: list[Tensor]
    """Result and signs; empty once the input is gone."""

    def result(self, x: Tensor, su: Tensor, rule: str, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, or what it gave for this very x, unchanged since, and equal signs."""
        key = (rule, x._version, x.requires_grad, torch.is_grad_enabled(), su.dtype)
        if self.source() is x and self.key == (*key, self.kept[1]._version) and torch.equal(self.kept[1], su):
            return self.kept[0]
        kept = [compute(), su]
        self.source, self.kept, self.key = weakref.ref(x, lambda _: kept.clear()), kept, (*key, su._version)
        return kept[0]


_last = _LastInput()


@constant_result
def _rule(size: int) -> str:
    """The Hadamard matrix of that size, a constant to torch.compile, which does not trace caches."""
    return rule_for(size)


def _chunks(length: int) -> list[slice]:
    """Slices that are transformed at a time, so that a matrix is in memory once and not three times."""
    return [slice(start, min(start + 64, length)) for start in range(0, length, 64)]


def _guard(x: Tensor) -> float:
    """Divisor against overflow of float16 between the two transforms, where the weight has entries of about one."""
    return 32.0 if x.dtype == torch.float16 else 1.0


@dataclass(frozen=True)
class Rescale(Basis):
    """Inputs divided by s, columns of the weight multiplied by it (AWQ, arXiv:2306.00978, section 3.2).

    s_j = (the size of input j)^r: columns that meet large activations take up more of their group's grid and are
    rounded more finely. r = i/20, i = 0 … 19, is searched for each layer, with `grid` and nearest rounding.

    What differs from AWQ: the size of an input is its root mean square, √H_jj, in place of its mean magnitude, and a
    trial is scored by tr(E H Eᵀ), the mean squared error of this layer's output, in place of the attention's or MLP's;
    both need only the Hessian. And nothing is folded into the layer before: the division stays, so that every layer
    has its own s, whatever precedes it. State: input_scales [in] float16, 1/s.
    """

    grid: Grid

    state = ("input_scales",)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {"input_scales": TensorSpec((in_features,), torch.float16)}

    def init(self, weight: Tensor, hessian: Tensor | None) -> Packed:
        assert hessian is not None
        size = hessian.to(weight).diagonal().sqrt()
        size = size.clamp_min(1e-4 * size.max())
        if not size.any():
            size = torch.ones_like(size)
        best, least = torch.empty(0), float("inf")
        for i in range(20):
            inverse = size.pow(-i / 20)
            inverse = (inverse / (inverse.max() * inverse.min()).sqrt()).to(torch.float16)
            state = {"input_scales": inverse}
            rotated, _ = self.transform(weight, None, state)
            packed = self.grid.pack(*Nearest()(rotated, None, self.grid), weight.shape[1])
            loss = proxy_loss(weight, self.inverse_transform(self.grid.dequantize(packed), state), hessian)
            if loss < least:
                best, least = inverse, loss
        return {"input_scales": best}

    def transform(self, weight: Tensor, hessian: Tensor | None, state: Packed) -> tuple[Tensor, Tensor | None]:
        inverse = state["input_scales"].to(weight.dtype)
        if hessian is not None:
            hessian = hessian * inverse.to(hessian) * inverse.to(hessian)[:, None]
        return weight / inverse, hessian

    def inverse_transform(self, rotated: Tensor, state: Packed) -> Tensor:
        return rotated * state["input_scales"].to(rotated.dtype)

    def inputs(self, x: Tensor, state: Packed) -> Tensor:
        return (x * state["input_scales"]).to(x.dtype)

    def outputs(self, y: Tensor, state: Packed) -> Tensor:
        return y
