"""Changes of coordinates: on weights while quantizing, on activations while running.

In the basis (R, L) the layer y = x Wᵀ is y = ((x R) W'ᵀ) Lᵀ with W' = Lᵀ W R, so the quantized weight W' is decoded as
it is stored and the activations are rotated instead.

Shapes: out, in — features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Packed, TensorSpec


class Basis(ABC):
    """An orthogonal change of coordinates. Its state is stored beside the codes, never drawn again."""

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]: ...

    @abstractmethod
    def draw(self, weight: Tensor, hessian: Tensor | None) -> Packed:
        """The state for this weight."""

    @abstractmethod
    def rotate(self, weight: Tensor, hessian: Tensor | None, state: Packed) -> tuple[Tensor, Tensor | None]:
        """W, H -> W', H' in the new coordinates."""

    @abstractmethod
    def restore(self, rows: Tensor, state: Packed) -> Tensor:
        """Rows of W' [r, in] -> the same rows of W."""

    @abstractmethod
    def inputs(self, x: Tensor, state: Packed) -> Tensor:
        """x [..., in] -> x R."""

    @abstractmethod
    def outputs(self, y: Tensor, state: Packed) -> Tensor:
        """y [..., out] -> y Lᵀ."""


@dataclass(frozen=True)
class Permutation(Basis):
    """Columns by falling diagonal of H ("act-order", GPTQ's README): the inputs that matter are rounded first.

    Groups are runs of the permuted columns, so their scales fit columns of like importance.
    """

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {"perm": TensorSpec((in_features,), torch.int32)}

    def draw(self, weight: Tensor, hessian: Tensor | None) -> Packed:
        assert hessian is not None
        return {"perm": torch.argsort(hessian.diagonal(), descending=True, stable=True).to(torch.int32)}

    def rotate(self, weight: Tensor, hessian: Tensor | None, state: Packed) -> tuple[Tensor, Tensor | None]:
        perm = state["perm"].long()
        return weight[:, perm], None if hessian is None else hessian[perm][:, perm]

    def restore(self, rows: Tensor, state: Packed) -> Tensor:
        return torch.empty_like(rows).index_copy_(-1, state["perm"].long(), rows)

    def inputs(self, x: Tensor, state: Packed) -> Tensor:
        return x.index_select(-1, state["perm"])

    def outputs(self, y: Tensor, state: Packed) -> Tensor:
        return y
