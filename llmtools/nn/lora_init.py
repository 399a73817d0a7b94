"""Start values for adapters that make up for the quantization error.

LoRA (arXiv:2106.09685) starts from B = 0, which leaves the quantized model as it is. But what the adapter will have to
learn first is known: the error E = W − Ŵ. The best start of rank r in the sense of the layer's outputs is

    min over rank(Δ) ≤ r of tr((E − Δ) H (E − Δ)ᵀ) = ‖(E − Δ) H^½‖²,

so Δ H^½ is the truncated singular value decomposition of E H^½ = U Σ Vᵀ (Eckart and Young), and what is left is the sum
of the other σ². With U_r the leading left vectors Δ = U_r U_rᵀ E: no root of H is needed, nor an inverse, and H may be
singular. U_r are the leading eigenvectors of E H Eᵀ. With H = 1 this is the start of LoftQ (arXiv:2310.08659, its first
step); with the Hessian that of LQER's and QERA's kind (arXiv:2402.02446, arXiv:2410.06040). It needs nothing of the
quantizer, hence works for any.

Components come in falling order of what they remove, so the first r of a start are the start of rank r.

Shapes: out, in — features; r — rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from .linear import QuantizedLinear

_EXACT = 1024
"""Up to so many output features all eigenvectors are computed, beyond only the leading ones, by iteration."""
_EXTRA, _ITERATIONS = 16, 12
"""Of the iteration: vectors beyond the rank, and products."""


class Start(NamedTuple):
    """An adapter's start: W ≈ Ŵ + b @ a."""

    a: Tensor
    """[r, in] float32"""
    b: Tensor
    """[out, r] float32"""

    def cpu(self) -> Start:
        return Start(self.a.cpu(), self.b.cpu())


def start_from_error(error: Tensor, hessian: Tensor | None, rank: int) -> Start:
    """The best approximation of that rank to the error W − Ŵ [out, in] in the norm of the Hessian [in, in].

    hessian: None where nothing is known about the inputs; they are then taken for all alike. The rank is at most
    min(out, in). Each component's norm is shared by `a` and `b` in equal parts, so that both train at the same pace.
    """
    error = error.detach().double()
    rank = min(rank, *error.shape)
    weighed = error if hessian is None else error @ hessian.to(error)  # E H  [out, in]
    left = _leading(weighed, error, rank)  # U_r  [out, r]
    right = left.T @ error  # [r, in]
    share = right.norm(dim=1).sqrt()
    share = torch.where(share > 0, share, 1.0)
    return Start((right / share[:, None]).float(), (left * share).float())


def _leading(weighed: Tensor, error: Tensor, rank: int) -> Tensor:
    """The eigenvectors of E H Eᵀ with the `rank` largest eigenvalues, those first. [out, rank]

    For many output features by subspace iteration from a fixed draw (Halko, Martinsson and Tropp, arXiv:0909.4061,
    section 4.5); E H Eᵀ is not formed then.
    """
    out_features = error.shape[0]
    if out_features <= _EXACT or rank + _EXTRA >= out_features:
        product = weighed @ error.T
        return _falling((product + product.T) / 2)[:, :rank]
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(out_features, rank + _EXTRA, generator=generator, dtype=torch.float64).to(error.device)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(weighed @ (error.T @ basis)).Q
    small = (basis.T @ weighed) @ (error.T @ basis)
    return basis @ _falling((small + small.T) / 2)[:, :rank]


def _falling(symmetric: Tensor) -> Tensor:
    """Eigenvectors, those of the largest eigenvalues first."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors.flip(1)


@torch.no_grad()
def start_adapters(model: nn.Module, starts: Mapping[str, Start], adapter: str = "default") -> int:
    """Puts the start values into a PEFT model's LoRA adapters, in place; returns how many adapters got theirs.

    starts: by module path, as `Report.starts` has them. PEFT multiplies B A by its `scaling` (alpha / r): B is divided
    by it. An adapter of lower rank takes the leading components; one of higher rank keeps PEFT's values (zero in B)
    for the others. The adapter stays an ordinary one: its files need nothing of ours.

    Raises InputError where a quantized, adapted layer has no start, and for DoRA, whose magnitudes would not fit.
    """
    count = 0
    for path, layer in _adapted(model, adapter):
        if path not in starts:
            raise InputError(
                f"{path} has an adapter but no start values; quantize it with adapter_rank, or leave it out of the "
                f"adapter's target_modules"
            )
        if getattr(layer, "use_dora", {}).get(adapter, False):
            raise InputError("adapters cannot start from the quantization error with DoRA; choose one of the two")
        start, a, b = starts[path], layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if (start.a.shape[1], start.b.shape[0]) != (a.shape[1], b.shape[0]):
            raise InputError(
                f"{path}: start values for a layer [{start.b.shape[0]}, {start.a.shape[1]}], the adapter is for one of "
                f"[{b.shape[0]}, {a.shape[1]}]; they belong to another model"
            )
        rank = min(a.shape[0], start.a.shape[0])
        scaling = layer.scaling[adapter]
        share = abs(scaling) ** 0.5
        a[:rank] = start.a[:rank] / share
        b[:, :rank] = start.b[:, :rank] * (share / scaling)
        b[:, rank:] = 0
        count += 1
    return count


def _adapted(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers around quantized ones, by the path that these have in the model without adapters."""
    told: Any = model
    base = told.get_base_model() if hasattr(model, "get_base_model") else model
    for path, module in base.named_modules():
        if isinstance(getattr(module, "base_layer", None), QuantizedLinear) and adapter in getattr(
            module, "lora_A", {}
        ):
            yield path, module
