"""Rounding that is learned: SignRound (arXiv:2309.05516) on the uniform grid.

Round-to-nearest minimises the error of each weight, OPTQ that of a layer's outputs. Here the error of the *outputs* of
a whole block is minimised. Each weight has an offset V, each group two multipliers α and β of its range, and all are
trained through

    ŵ = s · (clamp(round(w/s + V) + z, 0, 2^bits − 1) − z),  s = (β·high − α·low) / (2^bits − 1),  z = round(−α·low/s)

with gradients passed straight through `round` (section 3 of the paper). A step is signed gradient descent: all offsets
move by the same amount, a learning rate that falls to zero linearly. With 1 / iterations at the start an offset can
travel ½ in all, from one neighbour of w/s to the other. The best iterate is kept.

Three things differ from the paper. Ranges start at those of a search for the best clipping, not at the extremes. The
scale is rounded to the stored float16 *within* training, so what is packed is what was measured. And a single weight,
outside of any block, is trained on its proxy loss tr(E H Eᵀ), from OPTQ's solution (arXiv:2210.17323),
row by row: it ends no worse. On blocks that initialisation gained nothing over round-to-nearest, so they begin from
that.

Shapes: out, in — features; g — group size; G — groups in a row, the last may be shorter and is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, where
from .base import BlockLearner, Learner, Packed, later, quantizers
from .composed import Composed
from .grids.affine import Affine
from .grids.base import Grid
from .hessian import clear_dead, feedback
from .presets import _check
from .rounding import Nearest, Rounding, Sequential


@quantizers.register("signround")
@dataclass(frozen=True)
class SignRound(Composed, BlockLearner):
    """SignRound (arXiv:2309.05516): rounding and ranges trained on whole blocks' outputs; slow, best at 2 bits."""

    needs_hessian: ClassVar[bool] = True

    bits: int = 4
    """Bits per weight, 2, 3, 4 or 8."""
    group_size: int = 64
    """Consecutive inputs of a row that share a scale and a zero point; -1 for the whole row."""
    symmetric: bool = False
    """Whether the grid is centred on zero and stores no zero points."""
    iterations: int = 200
    """Number of training steps per block; the paper's best is 1000, its light version 50."""
    learning_rate: float | None = None
    """Learning rate of the first step, in steps of the grid; by default 1 / iterations."""
    batch: int = 8
    """Number of calibration sequences per step."""
    damping: float = 0.01
    """Damping of OPTQ's solution, the initial one for weights outside of blocks, as a fraction of the mean diagonal."""
    scale_type: str = later("float16")
    """Type of the scales: float16, bfloat16 or float32; float32 anyway where float16 is too narrow."""

    def __post_init__(self) -> None:
        _check(self.name, self.bits, self.group_size, self.scale_type)
        if self.batch < 1:
            raise InputError(f"{self.name}: batch={self.batch}; give at least 1 sequence a step")
        self.rounding  # checks the other options  # noqa: B018

    @cached_property
    def grid(self) -> Affine:
        return Affine(self.bits, self.group_size, self.symmetric, clip=True, scale_type=self.scale_type)

    @property
    def rounding(self) -> Learned:
        return Learned(self.iterations, self.learning_rate, self.damping)

    @property
    def block_batch(self) -> int:
        return self.batch

    def learner(self, weight: Tensor, hessian: Tensor) -> AffineLearner:
        weight = weight.detach().float()
        _, params = Nearest()(weight, None, self.grid)
        return AffineLearner(weight, params, self.grid, self.rounding)


@dataclass(frozen=True)
class Learned(Rounding):
    """Signed gradient descent on the proxy loss of one weight, from OPTQ's solution; each row keeps its best."""

    iterations: int = 200
    """Steps."""
    learning_rate: float | None = None
    """Learning rate of the first step; by default 1 / iterations."""
    damping: float = 0.01
    """As in `Sequential`."""

    def __post_init__(self) -> None:
        Sequential(self.damping)
        if self.iterations < 1:
            raise InputError(f"iterations={self.iterations}; give at least 1, as 200")
        if not self.rate > 0:
            raise InputError(f"learning_rate={self.learning_rate}; give a positive number of grid steps, as 0.005")

    @property
    def rate(self) -> float:
        return 1 / self.iterations if self.learning_rate is None else self.learning_rate

    def __call__(self, weight: Tensor, hessian: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        if hessian is None:
            raise InputError(f"{where()}this rounding needs calibration data: pass a Hessian")
        if not isinstance(grid, Affine) or grid.float_zeros:
            raise InputError(f"{where()}rounding is learned on the uniform grid with integer zero points only")
        weight, hessian = clear_dead(weight.float(), hessian.float().to(weight.device))
        learner = AffineLearner(*self._start(weight, hessian, grid), grid, self)
        least = weight.new_full((weight.shape[0],), torch.inf)
        for step in range(self.iterations + 1):
            with torch.enable_grad():
                error = weight - learner.weight()
                rows = ((error @ hessian) * error).sum(1)  # [out]
                loss = rows.sum()
            learner.keep(rows.detach() < least)
            least = torch.minimum(least, rows.detach())
            if step < self.iterations:
                loss.backward()
                learner.step(step / self.iterations)
        learner.restore()
        return learner.codes()

    def _start(self, weight: Tensor, hessian: Tensor, grid: Affine) -> tuple[Tensor, Tensor]:
        """What OPTQ rounded, [out, in], and the grids that it rounded to, [out, G, 2].

        The weights with the errors of earlier columns, W + E (M − 1): to the nearest, these are OPTQ's codes.
        """
        codes, params = Sequential(self.damping)(weight, hessian, grid)
        update = feedback(hessian, 1, self.damping)
        if update is None:
            return weight, params
        group_size = grid.resolve_group_size(weight.shape[1])
        scale, zero = params.repeat_interleave(group_size, 1)[:, : weight.shape[1]].unbind(-1)
        error = weight - scale * (codes - zero)
        return weight + error @ update.to(weight.dtype).triu(1), params


class AffineLearner(Learner):
    """Offsets and ranges of one weight on the uniform grid, at first those that round `weight` to the nearest.

    weight [out, in] float32; params [out, G, 2] are the scales and zero points to start from.
    """

    def __init__(self, weight: Tensor, params: Tensor, grid: Affine, rounding: Learned) -> None:
        self.grid, self.rounding, self.in_features = grid, rounding, weight.shape[1]
        self.steps = rounding.iterations
        group_size = grid.resolve_group_size(self.in_features)
        padded = F.pad(weight, (0, params.shape[1] * group_size - self.in_features))
        self._weight = padded.unflatten(1, (-1, group_size))  # [out, G, g]
        scale, zero = params.to(weight.dtype).unsqueeze(2).unbind(-1)  # [out, G, 1] each
        self._low, self._high = -scale * zero, scale * (2**grid.bits - 1 - zero)
        offset, low_factor, high_factor = torch.zeros_like(self._weight), torch.ones_like(scale), torch.ones_like(scale)
        self.learned = [offset, low_factor, high_factor]
        """V [out, G, g], α and β [out, G, 1]. The symmetric grid has α alone."""
        self._best = [tensor.clone() for tensor in self.learned]
        for tensor in self.learned:
            tensor.requires_grad_()

    def weight(self) -> Tensor:
        value: Tensor = _FakeQuantize.apply(*self.learned, self._weight, self._low, self._high, self.grid)
        return value.flatten(1)[:, : self.in_features]

    @torch.no_grad()
    def step(self, progress: float) -> None:
        rate = self.rounding.rate * (1 - progress)
        for tensor in self.learned:
            if tensor.grad is not None:
                tensor -= rate * tensor.grad.sign()
                tensor.grad = None
        offset, low_factor, high_factor = self.learned
        offset.clamp_(-0.5, 0.5)
        low_factor.clamp_(min=0)
        high_factor.clamp_(min=0)

    @torch.no_grad()
    def keep(self, rows: Tensor | None = None) -> None:
        for best, tensor in zip(self._best, self.learned, strict=True):
            best.copy_(tensor if rows is None else torch.where(rows[:, None, None], tensor, best))

    @torch.no_grad()
    def restore(self) -> None:
        for best, tensor in zip(self._best, self.learned, strict=True):
            tensor.copy_(best)

    def packed(self) -> Packed:
        return self.grid.pack(*self.codes(), self.in_features)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes [out, in] and params [out, G, 2], as `Rounding` gives them."""
        offset, low_factor, high_factor = self.learned
        scale, zero = _fit(low_factor, high_factor, self._low, self._high, self.grid)
        codes = (torch.round(self._weight / scale + offset) + zero).clamp(0, 2**self.grid.bits - 1)
        return codes.flatten(1)[:, : self.in_features], torch.cat([scale, zero], -1)


class _FakeQuantize(torch.autograd.Function):
    """ŵ of the module's docstring, [out, G, g], and its straight-through gradients in V, α and β.

    By hand, because autograd would keep ten tensors of the weight's size where the inputs are enough.
    """

    @staticmethod
    def forward(
        ctx: Any, offset: Tensor, alpha: Tensor, beta: Tensor, weight: Tensor, low: Tensor, high: Tensor, grid: Affine
    ) -> Tensor:
        ctx.save_for_backward(offset, alpha, beta, weight, low, high)
        ctx.grid = grid
        scale, zero = _fit(alpha, beta, low, high, grid)
        return scale * ((torch.round(weight / scale + offset) + zero).clamp_(0, 2**grid.bits - 1) - zero)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        offset, alpha, beta, weight, low, high = ctx.saved_tensors
        top = 2**ctx.grid.bits - 1
        scale, zero = _fit(alpha, beta, low, high, ctx.grid)
        steps = weight / scale
        free = torch.round(steps + offset) + zero
        codes = free.clamp(0, top)
        inside = codes == free
        grad_offset = grad * inside * scale
        grad_scale = (grad * (codes - zero - inside * steps)).sum(-1, keepdim=True)
        if ctx.grid.symmetric:  # s = α (high − low) / top, z fixed
            return grad_offset, grad_scale * (high - low) / top, None, None, None, None, None
        exact = -alpha * low / scale
        moving = (exact >= 0) & (exact <= top)  # z is not at its limit
        grad_zero = moving * -(grad * ~inside).sum(-1, keepdim=True) * scale
        grad_scale = grad_scale - grad_zero * exact / scale  # z = −α low / s falls with s
        grad_alpha = -low * (grad_scale / top + grad_zero / scale)
        return grad_offset, grad_alpha, grad_scale * high / top, None, None, None, None


def _fit(alpha: Tensor, beta: Tensor, low: Tensor, high: Tensor, grid: Affine) -> tuple[Tensor, Tensor]:
    """The scale, as stored, and the zero point of the range [α low, β high]: [out, G, 1] each."""
    scale, zero = grid._params(alpha * low, (alpha if grid.symmetric else beta) * high).split(1, -1)
    return scale, zero
