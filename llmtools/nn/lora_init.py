"""LoRA initialisation from the quantization error.

LoRA (arXiv:2106.09685) initialises B = 0, so that the quantized model is unchanged. But what the adapter has to learn
first is known: the error E = W − Ŵ. The best initialisation of rank r in terms of the layer's outputs is

    min over rank(Δ) ≤ r of tr((E − Δ) H (E − Δ)ᵀ) = ‖(E − Δ) H^½‖²,

so Δ H^½ is the truncated singular value decomposition of E H^½ = U Σ Vᵀ (Eckart and Young), and the remaining loss is
the sum of the other σ². With U_r the leading left vectors Δ = U_r U_rᵀ E: no root of H is needed, nor an inverse, and H
may be singular. U_r are the leading eigenvectors of E H Eᵀ. With H = 1 this is LoftQ's (arXiv:2310.08659, its first
step); with the Hessian it is like LQER's and QERA's (arXiv:2402.02446, arXiv:2410.06040). It uses nothing of the
quantizer but Ŵ, hence works for any.

Components are sorted by the loss that they remove, largest first, so the first r of them are the initialisation of
rank r.

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
"""Largest number of output features for which all eigenvectors are computed; above it, only the leading ones, by
iteration."""
_EXTRA, _ITERATIONS = 16, 12
"""Oversampling (vectors beyond the rank) and number of iterations of the subspace iteration."""


class LoraInit(NamedTuple):
    """LoRA matrices with W ≈ Ŵ + b @ a, before division by PEFT's scaling."""

    a: Tensor
    """LoRA's A, [r, in] float32."""
    b: Tensor
    """LoRA's B, [out, r] float32."""

    def cpu(self) -> LoraInit:
        return LoraInit(self.a.cpu(), self.b.cpu())


def lora_init_from_error(error: Tensor, hessian: Tensor | None, rank: int) -> LoraInit:
    """The best approximation of that rank to the error W − Ŵ [out, in] in the norm of the Hessian [in, in].

    hessian: None without calibration data: the identity. The rank is at most min(out, in). Each component's norm is
    split evenly between `a` and `b`, so that both train at the same pace.
    """
    error = error.detach().double()
    rank = min(rank, *error.shape)
    weighted = error if hessian is None else error @ hessian.to(error)  # E H  [out, in]
    left = _leading(weighted, error, rank)  # U_r  [out, r]
    right = left.T @ error  # [r, in]
    share = right.norm(dim=1).sqrt()
    share = torch.where(share > 0, share, 1.0)
    return LoraInit((right / share[:, None]).float(), (left * share).float())


def _leading(weighted: Tensor, error: Tensor, rank: int) -> Tensor:
    """The eigenvectors of E H Eᵀ with the `rank` largest eigenvalues, those first. [out, rank]

    For many output features by subspace iteration from a fixed random basis (Halko, Martinsson and Tropp,
    arXiv:0909.4061, section 4.5); E H Eᵀ is not formed then.
    """
    out_features = error.shape[0]
    if out_features <= _EXACT or rank + _EXTRA >= out_features:
        product = weighted @ error.T
        return _eigenvectors((product + product.T) / 2)[:, :rank]
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(out_features, rank + _EXTRA, generator=generator, dtype=torch.float64).to(error.device)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(weighted @ (error.T @ basis)).Q
    small = (basis.T @ weighted) @ (error.T @ basis)
    return basis @ _eigenvectors((small + small.T) / 2)[:, :rank]


def _eigenvectors(symmetric: Tensor) -> Tensor:
    """Eigenvectors [n, n] of a symmetric matrix [n, n], sorted by falling eigenvalue."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors.flip(1)


@torch.no_grad()
def initialize_lora(model: nn.Module, inits: Mapping[str, LoraInit], adapter: str = "default") -> int:
    """Copies the initialisation into a PEFT model's LoRA adapters, in place; returns the number of adapters.

    inits: by module path, as in `Report.lora_init`. PEFT multiplies B A by its `scaling` (alpha / r): B is divided by
    it. An adapter of lower rank takes the leading components; one of higher rank keeps PEFT's values (zero in B) for
    the others. The adapter remains an ordinary one: its files need nothing of ours.

    Raises InputError where an adapted quantized layer has no initialisation, and for DoRA, whose magnitudes would not
    fit.
    """
    count = 0
    for path, layer in _adapted(model, adapter):
        if path not in inits:
            raise InputError(
                f"{path} has an adapter but no LoRA initialisation; quantize it with adapter_rank, or "
                f"leave it out of the adapter's target_modules"
            )
        if getattr(layer, "use_dora", {}).get(adapter, False):
            raise InputError("DoRA adapters cannot be initialised from the quantization error; choose one of the two")
        init, a, b = inits[path], layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if (init.a.shape[1], init.b.shape[0]) != (a.shape[1], b.shape[0]):
            raise InputError(
                f"{path}: LoRA initialisation for a layer [{init.b.shape[0]}, {init.a.shape[1]}], the adapter is for "
                f"[{b.shape[0]}, {a.shape[1]}]; it belongs to another model"
            )
        rank = min(a.shape[0], init.a.shape[0])
        scaling = layer.scaling[adapter]
        share = abs(scaling) ** 0.5
        a[:rank] = init.a[:rank] / share
        b[:, :rank] = init.b[:, :rank] * (share / scaling)
        b[:, rank:] = 0
        count += 1
    return count


def _adapted(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers around quantized ones, by the path of these in the model without adapters."""
    network: Any = model
    base = network.get_base_model() if hasattr(model, "get_base_model") else model
    for path, module in base.named_modules():
        if isinstance(getattr(module, "base_layer", None), QuantizedLinear) and adapter in getattr(
            module, "lora_A", {}
        ):
            yield path, module
