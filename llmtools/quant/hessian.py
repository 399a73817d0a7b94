"""The Hessian of a layer: the second moment of its input, the proxy loss, and the factors for feedback.

The proxy loss of an approximation Ŵ = W − E is tr(E H Eᵀ): up to the scale of H = E[x xᵀ], the mean squared error of
the layer's output on the calibration data (GPTQ, arXiv:2210.17323, section 3; QuIP, arXiv:2307.13304, section 3).

Shapes: out, in — features; t — tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, where
from ..kernels.gram import add_gram, has_gram

logger = logging.getLogger(__name__)

STRIP = 1024
"""Columns of activations per product with themselves and the columns after them: half the work of the full product."""

LARGEST = 2.0**100
"""Largest entry of a Hessian, some 1e30: sums over its products with a weight still fit float32."""


class HessianSum:
    """Accumulates Σ x xᵀ over tokens, in float32 whatever the activations' type; `value` is the mean."""

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Adds activations x [..., in] of any float dtype; raises InputError for NaN or infinities."""
        rows = x.detach().reshape(-1, x.shape[-1])  # [t, in]
        if not (has_gram(self._sum, rows) and add_gram(self._sum, rows)):
            rows = rows.float()
            for strip in _strips(len(self._sum)):  # the part left of a strip's own block is its transpose
                self._sum[strip, strip.start :].addmm_(rows[:, strip].T, rows[:, strip.start :])
        # What is no number in x is none in its squares; sums of large ones may be infinite, too, see `value`.
        if not torch.isfinite(self._sum.diagonal()).all() and not torch.isfinite(rows).all():
            raise InputError(
                f"{where()}NaN or inf in the activations of a calibration batch; "
                "look at the model's outputs, or load it in bfloat16 or float32 if it is in float16"
            )
        self.tokens += rows.shape[0]

    @classmethod
    def of_all(cls, sums: Sequence[HessianSum]) -> HessianSum:
        """The sum over the tokens of all these, of which there is at least one."""
        total = cls(len(sums[0]._sum), sums[0]._sum.device)
        for each in sums:
            total._sum += each._sum
            total.tokens += each.tokens
        return total

    def reduce(self, add_up: Callable[[Tensor], None]) -> None:
        """Adds the sums of other processes; add_up(tensor) replaces a tensor by its sum over all of them."""
        tokens = torch.tensor(self.tokens, device=self._sum.device)
        add_up(self._sum)
        add_up(tokens)
        self.tokens = int(tokens)

    @property
    def measured(self) -> bool:
        """Whether there is a value."""
        return self.tokens > 0

    def value(self) -> Tensor:
        """H = E[x xᵀ], [in, in] float32, exactly symmetric, undamped. Raises InputError where it is too large."""
        if not self.tokens:
            raise InputError(f"{where()}no calibration token reached this layer")
        check_hessian(self._sum.diagonal() / self.tokens)
        upper = (self._sum / self.tokens).triu_()
        return upper + upper.triu(1).T


def check_hessian(hessian: Tensor) -> None:
    """Raises InputError for a Hessian [in, in], or a part of one, with entries that are NaN, infinite or too large."""
    largest = float(hessian.abs().amax())  # NaN where an entry is
    if not largest <= LARGEST:
        raise InputError(
            f"{where()}the second moment of the calibration activations reaches {largest:.3g}, more than float32 can "
            f"work with ({LARGEST:.3g}); look at the model's outputs for what lets its activations grow"
        )


def _strips(size: int) -> list[slice]:
    return [slice(start, min(start + STRIP, size)) for start in range(0, size, STRIP)]


def proxy_loss(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ) with E = weight − approximation, both [out, in]."""
    error = weight.float() - approximation.float()
    return float(((error @ hessian.float()) * error).sum(dtype=torch.float64))


def clear_dead(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Columns whose input was always zero: H[j, j] becomes 1 and W[:, j] becomes 0 (GPTQ's rule). Returns copies."""
    dead = hessian.diagonal() == 0
    if not dead.any():
        return weight, hessian
    hessian = hessian.clone()
    hessian.diagonal()[dead] = 1
    return weight.masked_fill(dead, 0), hessian


class Factors(NamedTuple):
    """The result of `factor`: H + λI = M D Mᵀ."""

    update: Tensor
    """Factor M, unit upper (block) triangular [in, in]: column j takes Σ_{i<j} E_i M_ij."""
    cost: Tensor
    """Diagonal of D [in], for blocks of one: the proxy loss of a squared error in each column, fed forward."""
    damping: float
    """Damping λ as a fraction of the mean diagonal of H: the requested one, or more where that was not enough."""


def feedback(hessian: Tensor, width: int, damping: float) -> Tensor | None:
    """M [in, in] alone of `factor`, in float64, for a Hessian [in, in] of any float type, which is kept; or None."""
    factors = factor(lambda: hessian.to(torch.float64, copy=True), width, damping)
    return None if factors is None else factors.update


def factor(
    hessian: Callable[[], Tensor], width: int, damping: float, *, otherwise: str = "this layer is rounded to nearest"
) -> Factors | None:
    """H + λI = M D Mᵀ with M unit upper triangular in blocks of `width`, which divides in, and D block diagonal.

    hessian() [in, in] float32 or float64 -> M [in, in] and the diagonal of D [in] in that type (LDLQ: QuIP,
    arXiv:2307.13304, section 3; in blocks QuIP#, arXiv:2402.04396, section 4.1).

    M is a Cholesky factor of the reversed matrix, in the place and the precision of what `hessian` gives, a new copy at
    each call. Where that fails, the damping λ = damping · mean(diag H) is doubled, up to the mean itself;
    None, with a log line that says what is done `otherwise`, when even that is not positive definite.
    """
    tried = damping
    while True:
        lower = _reverse(hessian().contiguous()).mT  # by columns: factored in place
        lower.diagonal().add_(tried * float(lower.diagonal().double().mean()))
        failed = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed and bool(torch.isfinite(lower.diagonal()).all()):
            break
        if tried >= 1:
            logger.warning(
                "%sthe Hessian is not positive definite even with damping %g; %s. More calibration tokens may help.",
                where(),
                tried,
                otherwise,
            )
            return None
        tried = min(1.0, max(2 * tried, 1e-4))
        del lower
    if tried != damping:
        logger.warning(
            "%sthe Hessian is not positive definite with damping %g; used %g. More calibration tokens may help.",
            where(),
            damping,
            tried,
        )
    cost = lower.diagonal().square().flip(0)
    if width == 1:
        lower /= lower.diagonal().clone()
    else:
        for k in range(0, len(lower), width):  # column blocks times the inverse of their diagonal block
            block = slice(k, k + width)
            diagonal = lower[block, block].clone()
            lower[k:, block] = torch.linalg.solve_triangular(diagonal, lower[k:, block], upper=False, left=False)
    return Factors(_reverse(lower.mT).mT, cost, tried)


def _reverse(matrix: Tensor) -> Tensor:
    """A contiguous matrix with rows and columns in reverse order, in place."""
    flat, length, part = matrix.view(-1), matrix.numel(), 1 << 18
    for start in range(0, length // 2, part):
        stop = min(start + part, length // 2)
        head = flat[start:stop].flip(0)
        flat[start:stop] = flat[length - stop : length - start].flip(0)
        flat[length - stop : length - start] = head
    return matrix
