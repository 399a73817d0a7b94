"""Teach a block, while it is being quantized, to give the outputs of the original."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.linear import QuantizedLinear
from ..nn.swap import quantized_linears, set_module
from ..quant.base import Learner
from .walk import Calls


@dataclass(frozen=True)
class BlockTuning:
    epochs: int = 5
    learning_rate: float = 5e-5
    packed_learning_rate: float = 5e-4
    batch: int = 8
    patience: int = 3
    held_out: float = 0.125


class Lesson:
    def __init__(self, calls: Calls, targets: list[Tensor], held_out: float) -> None:
        self.calls, self.targets = calls, targets
        kept = min(len(calls) - 1, math.ceil(held_out * len(calls)))
        self.train = list(range(len(calls) - kept))
        self.held_out = list(range(len(calls) - kept, len(calls))) or self.train
        self.power = sum(float(t.float().square().mean()) for t in targets) / len(targets)

    def loss(self, index: int) -> Tensor:
        output = self.calls.output(index, dtype=torch.float32)
        return (output - self.targets[index].float()).square().mean() / self.power

    @torch.no_grad()
    def held_out_loss(self) -> float:
        return sum(float(self.loss(i)) for i in self.held_out) / len(self.held_out)

    def shuffled(self, generator: torch.Generator) -> Iterator[int]:
        while True:
            for i in torch.randperm(len(self.train), generator=generator).tolist():
                yield self.train[i]


class Teacher:
    def __init__(self, held_out: float = 0.125) -> None:
        self.share = held_out
        self.hidden: list[Tensor] | None = None

    def lesson(self, calls: Calls) -> Lesson:
        mode = os.environ.get("SR_TARGET", "original")
        if mode == "own":
            return Lesson(calls, list(calls.outputs()), self.share)
        hidden = self.hidden if self.hidden is not None else list(calls.hidden)
        self.hidden = [calls.output(i, h) for i, h in enumerate(hidden)]
        return Lesson(calls, self.hidden, self.share)


class LearningLinear(nn.Module):
    def __init__(self, linear: nn.Linear, learner: Learner) -> None:
        super().__init__()
        self.linear, self.learner = linear, learner
    def forward(self, x):
        w = self.learner.weight()
        b = self.linear.bias
        return F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))


def learn(module: nn.Module, learners: Sequence[Learner], lesson: Lesson, seed: int = 0) -> tuple[float, float]:
    steps = max(l.steps for l in learners)
    order = lesson.shuffled(torch.Generator().manual_seed(seed))
    best = math.inf
    every = max(1, steps // 20)
    with training_in_float32(module), torch.enable_grad():
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                value = lesson.held_out_loss()
                if step == 0: first = value
                if value < best:
                    best = value
                    for l in learners: l.keep()
            if step < steps:
                lesson.loss(next(order)).backward()
                for l in learners: l.step(step / steps)
    for l in learners: l.restore()
    return first, best


class TuningLinear(nn.Module):
    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.quantizer = layer.quantizer
        self.fixed = dict(layer.packed)
        self.bias = layer.bias
        self.start = {n: layer.packed[n].detach().float() for n in layer.quantizer.tunable(layer.packed)}
        self.delta = nn.ParameterDict({n: nn.Parameter(torch.zeros_like(t)) for n, t in self.start.items()})
    def floats(self):
        out = {}
        for n, s in self.start.items():
            unit = torch.where(s == 0, s.abs().mean(), s.abs())
            out[n] = s + unit * self.delta[n]
        return out
    def forward(self, x):
        y = self.quantizer.tuning_linear(x, self.fixed | self.floats())
        return y if self.bias is None else y + self.bias.to(y.dtype)


def tune(module: nn.Module, lesson: Lesson, tuning: BlockTuning, seed: int = 0) -> tuple[float, float]:
    layers = quantized_linears(module)
    dense = [p for n, p in module.named_parameters() if p.is_floating_point() and not any(n.rpartition('.')[0] == l for l in layers)]
    inside = {path: TuningLinear(layer) for path, layer in layers.items()}
    for path, t in inside.items(): set_module(module, path, t)
    deltas = [p for t in inside.values() for p in t.delta.parameters()]
    opt = torch.optim.Adam([{"params": dense, "lr": tuning.learning_rate}, {"params": deltas, "lr": tuning.packed_learning_rate}], betas=(0.9,0.95))
    generator = torch.Generator().manual_seed(seed)
    for p in dense: p.requires_grad_(True)
    best = first = lesson.held_out_loss(); kept = [p.detach().clone() for p in dense + deltas]; since = 0
    with torch.enable_grad():
        order = lesson.shuffled(generator)
        for epoch in range(tuning.epochs):
            for _ in lesson.train:
                opt.zero_grad()
                lesson.loss(next(order)).backward()
                opt.step()
            v = lesson.held_out_loss()
            if v < best:
                best, since = v, 0
                kept = [p.detach().clone() for p in dense + deltas]
            else:
                since += 1
                if since >= tuning.patience: break
    with torch.no_grad():
        for p, k in zip(dense + deltas, kept): p.copy_(k)
        for path, t in inside.items():
            layer = layers[path]
            fl = t.floats()
            layer.pack_({n: fl[n].to(v.dtype) if n in fl else v for n, v in layer.packed.items()})
            set_module(module, path, layer)
    for p in dense: p.requires_grad_(False)
    return first, best


@contextmanager
def training_in_float32(module: nn.Module) -> Iterator[None]:
    flags = {p: p.requires_grad for p in module.parameters()}
    for p in flags: p.requires_grad_(False)
    yield
    for p, f in flags.items(): p.requires_grad_(f)
