"""Teach a block, while it is being quantized, to give the outputs of the original block.

A quantizer sees one weight; what counts is what comes out of the network. Between the two lies the block: small enough
to be trained with a few sequences of calibration text, large enough for its weights to make up for one another's
errors. Two things are taught here, by the same means.

* *Learned rounding* (`learn`; SignRound, arXiv:2309.05516): the choices of a `BlockLearner`, all linears
  of the block together, by each one's own `Learner`.
* *Block tuning* (`tune`; QuIP#, arXiv:2402.04396, section 5): what is still in floating point — weights that are not
  quantized yet, norms, biases, and the floating tensors of packed layers (scales, sign vectors) — by Adam. Codes stay.

The *inputs* are those of the network as it is quantized so far. The *targets* are the outputs of the original block on
what the original network would have fed to it, so each block also learns to make up for the errors of those before it
(QuIP# takes original inputs as well, and so trains blocks independently). To have the targets a second set of hidden
states is carried along: `Teacher`. On a 2-layer model at 2 bits, targets on the quantized inputs gave a perplexity of
63.7 where these gave 57.4.

Some sequences are held out, and the iterate that does best on those is kept, the one at the start included.

Shapes: b — sequences in a batch; t — tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.linear import QuantizedLinear
from ..nn.swap import quantized_linears, set_module
from ..quant.base import Learner, Packed
from .options import BlockTuning
from .walk import Batch, Calls, Stream, copied

__all__ = ["BlockTuning", "Lesson", "Taught", "Teacher", "learn", "learning", "stacked", "tune"]

log = logging.getLogger(__name__)

HELD_OUT = 0.125
"""The share of the calibration text that is held out where nothing else is said."""
CHECKS = 20
"""How often learned rounding looks at the held-out sequences."""


class Taught(NamedTuple):
    """What teaching did to a block's outputs on the held-out sequences: relative squared errors before and after."""

    before: float
    after: float


def stacked(batches: Sequence[Batch], sequences: int) -> list[Batch]:
    """Batches [b, t] cut and joined anew, to at most `sequences` of one length in each; the order stays.

    A batch with other arguments than ids stays as it is.
    """
    made: list[Batch] = []
    rows: list[Tensor] = []
    for row in (row for batch in batches for row in (batch if isinstance(batch, Tensor) else [batch])):
        if rows and (not isinstance(row, Tensor) or len(rows) == sequences or rows[-1].shape != row.shape):
            made.append(torch.stack(rows))
            rows = []
        if isinstance(row, Tensor):
            rows.append(row)
        else:
            made.append(row)
    return [*made, torch.stack(rows)] if rows else made


class Lesson:
    """A block's calls, and what its outputs should be."""

    def __init__(self, calls: Calls, targets: Sequence[Tensor], held_out: float = HELD_OUT) -> None:
        self.calls, self.targets = calls, targets
        kept = min(len(targets) - 1, math.ceil(held_out * len(targets)))
        self.train = range(len(targets) - kept)
        self.held_out = range(len(targets) - kept, len(targets)) if kept else self.train
        power = sum(float(target.float().square().sum(dtype=torch.float64)) for target in targets)
        self._power = power / sum(target.numel() for target in targets) or 1.0

    def loss(self, index: int) -> Tensor:
        """|y − target|² / |target|² on one batch, differentiable; the block is in float32."""
        output = self.calls.output(index, dtype=torch.float32)
        return F.mse_loss(output, self.targets[index].float()) / self._power

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean over the batches that are held out."""
        return sum(float(self.loss(index)) for index in self.held_out) / len(self.held_out)

    def shuffled(self, seed: int) -> Iterator[int]:
        """The batches to train on, epoch after epoch, each in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(self.train), generator=generator).tolist()


class Teacher:
    """Follows the original network from block to block. One call of `lesson` a block, before the block is changed."""

    def __init__(self, held_out: float = HELD_OUT) -> None:
        self._share = held_out
        self._stream: Stream = []  # what the original network feeds to the next block
        self._segment: object = None

    def lesson(self, calls: Calls) -> Lesson:
        """What this block should learn: the calls of the quantized network, the outputs of the original.

        Where a network computes something between blocks, the blocks behind it are taught on what the quantized ones
        before it give.
        """
        if self._segment is not calls.segment:
            self._segment, self._stream = calls.segment, copied(calls.stream)
        return Lesson(calls, list(calls.advance(self._stream)), self._share)


# ---------------------------------------------------------------------------------------------------------------------
# Learned rounding


def learning(linear: nn.Linear, learner: Learner) -> nn.Module:
    """Stands in for `linear` with the weight as `learner` has it at the moment."""
    return _LearningLinear(linear.bias, learner)


def learn(block: nn.Module, learners: Sequence[Learner], lesson: Lesson, *, seed: int = 0) -> Taught:
    """Trains all learners together on the outputs of the block that their `learning` modules are in.

    Each step is on one batch. The best of the iterates that were looked at is what the learners have in the end.
    """
    steps = max(learner.steps for learner in learners)
    every = max(1, steps // CHECKS)
    order = lesson.shuffled(seed)
    before = best = math.inf
    with _training(block), torch.enable_grad():
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                loss = lesson.held_out_loss()
                before = loss if step == 0 else before
                if loss < best:
                    best = loss
                    for learner in learners:
                        learner.keep()
            if step < steps:
                lesson.loss(next(order)).backward()
                for learner in learners:
                    learner.step(step / steps)
    for learner in learners:
        learner.restore()
    return Taught(before, best)


class _LearningLinear(nn.Module):
    def __init__(self, bias: nn.Parameter | None, learner: Learner) -> None:
        super().__init__()
        self.bias, self.learner = bias, learner

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.learner.weight().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Block tuning


def tune(block: nn.Module, lesson: Lesson, tuning: BlockTuning, *, seed: int = 0) -> Taught:
    """Trains what is in floating point in the block, in place; codes, shapes and types stay.

    Training is in float32. What is kept is then rounded to the types that are stored, and measured again: where that
    is no better than the beginning everything is put back as it was.
    """
    layers = quantized_linears(block)
    packed = {id(tensor) for layer in layers.values() for tensor in layer.packed.values()}
    dense = [each for each in block.parameters() if each.is_floating_point() and id(each) not in packed]
    at_first = [each.detach().clone() for each in dense]
    tuned = {path: _TuningLinear(layer) for path, layer in layers.items()}
    with _training(block), torch.enable_grad():
        before = lesson.held_out_loss()
        with _in_place_of(block, tuned):
            _descend(
                dense, [delta for layer in tuned.values() for delta in layer.deltas.values()], lesson, tuning, seed
            )
    former = {path: dict(layer.packed) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.pack_(tuned[path].packed())
    with _training(block):
        after = lesson.held_out_loss()
    if not after < before:
        for path, layer in layers.items():
            layer.pack_(former[path])
        with torch.no_grad():
            for each, original in zip(dense, at_first, strict=True):
                each.copy_(original)
        after = before
    return Taught(before, after)


def _descend(dense: list[nn.Parameter], deltas: list[Tensor], lesson: Lesson, tuning: BlockTuning, seed: int) -> None:
    """Adam over the epochs; leaves in place the values that did best on the held-out batches."""
    trained = [*dense, *deltas]
    for each in trained:
        each.requires_grad_(True)
    groups = [{"params": [each], "lr": tuning.learning_rate * _size(each)} for each in dense]
    groups += [{"params": [each], "lr": tuning.packed_learning_rate} for each in deltas]
    if not groups:
        return
    optimizer = torch.optim.Adam(groups)
    order = lesson.shuffled(seed)
    best, kept, without_gain = lesson.held_out_loss(), [each.detach().clone() for each in trained], 0
    for _ in range(tuning.epochs):
        for _ in lesson.train:
            optimizer.zero_grad()
            lesson.loss(next(order)).backward()
            optimizer.step()
        loss = lesson.held_out_loss()
        if loss < best:
            best, kept, without_gain = loss, [each.detach().clone() for each in trained], 0
        else:
            without_gain += 1
            if without_gain == tuning.patience:
                break
    with torch.no_grad():
        for each, value in zip(trained, kept, strict=True):
            each.copy_(value)


def _size(tensor: Tensor) -> float:
    """Root mean square, so that one rate fits tensors of any size."""
    return max(1e-3, float(tensor.detach().square().mean().sqrt()))


class _TuningLinear(nn.Module):
    """A quantized layer whose floating tensors f are trained as f · (1 + δ), so that one rate fits scales of any size.

    Where f is zero, δ counts in units of the tensor's mean magnitude.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.quantizer, self.bias, self._packed = layer.quantizer, layer.bias, layer.packed
        names = layer.quantizer.tunable(layer.packed)
        self._start = {name: layer.packed[name].detach().float() for name in names}
        self.deltas = {name: torch.zeros_like(start) for name, start in self._start.items()}

    def floats(self) -> Packed:
        """The floating tensors as they are now, in float32, differentiable in δ."""
        return {name: start + _unit(start) * self.deltas[name] for name, start in self._start.items()}

    @torch.no_grad()
    def packed(self) -> Packed:
        """All tensors, in the types of the layout."""
        floats = self.floats()
        return {name: floats.get(name, tensor).to(tensor.dtype) for name, tensor in self._packed.items()}

    def forward(self, x: Tensor) -> Tensor:
        y = self.quantizer.tuning_linear(x, {**self._packed, **self.floats()})
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _unit(start: Tensor) -> Tensor:
    size = start.abs()
    return torch.where(size > 0, size, size.mean())


# ---------------------------------------------------------------------------------------------------------------------
# What both need


@contextmanager
def _training(block: nn.Module) -> Iterator[None]:
    """The block's own floating parameters in float32 and frozen; then in their types and as trainable as before."""
    packed = {id(tensor) for layer in quantized_linears(block).values() for tensor in layer.packed.values()}
    own = [each for each in block.parameters() if id(each) not in packed]
    before = [(each.dtype, each.requires_grad) for each in own]
    for each in own:
        each.requires_grad_(False)
        each.data = each.data.float() if each.is_floating_point() else each.data
    try:
        yield
    finally:
        for each, (dtype, trainable) in zip(own, before, strict=True):
            each.data = each.data.to(dtype)
            each.requires_grad_(trainable)
            each.grad = None


@contextmanager
def _in_place_of(block: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """These modules at their paths in the block, as long as the context lasts."""
    former = {path: block.get_submodule(path) for path in modules}
    for path, module in modules.items():
        set_module(block, path, module)
    try:
        yield
    finally:
        for path, module in former.items():
            set_module(block, path, module)
