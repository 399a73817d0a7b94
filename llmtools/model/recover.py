"""End-to-end recovery: train a quantized model's floating tensors on the distributions of the original.

Quantizing sees one layer or one block; the errors of all blocks add up, and nothing looks at the whole. Here the whole
is trained, after the codes are fixed: scales, zero points, sign vectors, norms and biases, a hundredth of the weights
and less, towards the next-token distributions of the original model. EfficientQAT (arXiv:2407.11062, section 3.3)
trains step sizes end to end on text; QuIP# (arXiv:2402.04396, section 5) sign vectors and norms on the original's
logits. The packed weights are materialised row block by row block, forward and backward, and so is the gradient of
their scales (`quant/materialize.py`), so it takes the memory of a LoRA step, not that of a dense one.

The two models are never in memory together: the original's distributions over the calibration text are computed
once, and of each its `top_k` most probable tokens are kept on disk. The divergence counts all other tokens as one.

Shapes: t — tokens of a sequence; k — tokens kept of a distribution; v — vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError, InputError, within
from ..files import whole_file
from ..nn.linear import QuantizedLinear
from ..nn.lora_init import LoraInit
from ..nn.swap import own_linears, packed_layers
from ..nn.tuning import AdaptedLinear, TuningLinear
from ..nn.wide import computed_in
from .options import Recovery
from .reconstruct import divided, relative_to, replaced, shuffled
from .walk import evaluating, logits_of, run_network

OnStep = Callable[[int, int, str], None]

_LEAST = 1e-9
"""Smallest probability of the tokens that are counted as one."""


class Target(NamedTuple):
    """The original's next-token distribution at each position of a sequence."""

    ids: Tensor
    """Most probable tokens, int64 [t, k]."""
    log_probabilities: Tensor
    """Natural logarithms of their probabilities, float32 [t, k]."""


class Targets:
    """The `Target` of each sequence, a file each in a folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Target:
        stored = load_file(self._file(index))
        return Target(stored["ids"].long(), stored["log_probabilities"])

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:06}.safetensors"

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: nn.Module, sequences: Sequence[Tensor], folder: Path, k: int, on_step: OnStep | None = None
    ) -> Targets:
        """Runs the original model over `sequences`, int64 [1, t] each, and writes what is kept; files that are there
        already stay."""
        targets = cls(folder, len(sequences))
        folder.mkdir(parents=True, exist_ok=True)
        with evaluating(model):
            for index, ids in enumerate(sequences):
                if not targets._file(index).exists():
                    logits = _logits(model, ids)
                    best = logits.topk(min(k, logits.shape[-1]), dim=-1)
                    kept = best.values - logits.logsumexp(-1, keepdim=True)
                    stored = {"ids": best.indices.to(torch.int32).cpu(), "log_probabilities": kept.cpu()}
                    with whole_file(targets._file(index)) as partial:
                        save_file(stored, partial)
                if on_step is not None:
                    on_step(index + 1, len(sequences), "original model")
        return targets


def kl_divergence(logits: Tensor, target: Target) -> Tensor:
    """Σ p log(p/q) in nats, the mean over positions: p the target's, q that of logits [t, v], float32.

    All tokens that the target does not name count as one.
    """
    wanted = target.log_probabilities.to(logits.device)
    found = logits.gather(-1, target.ids.to(logits.device)) - logits.logsumexp(-1, keepdim=True)  # [t, k]
    p = wanted.exp()
    rest_p = (1 - p.sum(-1)).clamp_min(_LEAST)
    rest_q = (1 - found.exp().sum(-1)).clamp_min(_LEAST)
    return ((p * (wanted - found)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())).mean()


@torch.no_grad()
def mean_kl_divergence(
    model: nn.Module, sequences: Sequence[Tensor], targets: Targets, indices: Sequence[int] | None = None
) -> float:
    """The mean `kl_divergence` of a model from `targets`, in nats per token, over all sequences or those `indices`.

    sequences: int64 [1, t] each, those that `targets` were made of.
    """
    chosen = range(len(sequences)) if indices is None else indices
    parts = [float(kl_divergence(_logits(model, sequences[index]), targets[index])) for index in chosen]
    return sum(parts) / len(parts)


class RecoveryReport(NamedTuple):
    """What recovery changed."""

    before: float
    """KL divergence from the original on the held-out sequences before training, in nats per token."""
    after: float
    """The same after training."""
    steps: int
    """Number of training steps that were made."""
    trained: int
    """Number of trained values."""


def recover(
    model: nn.Module,
    sequences: Sequence[Tensor],
    targets: Targets,
    options: Recovery,
    *,
    state: Path | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> RecoveryReport:
    """Trains the floating tensors of a quantized `model` in place; codes, shapes and dtypes do not change.

    sequences: token ids [1, t], those that `targets` were made of; the last ones are held out.
    state: a file for the training state. If it is there, training goes on from it.
    The best iterate on the held-out sequences is kept, the initial one included. If it is interrupted, the model is
    unchanged.

    Raises InputError for a model without quantized layers, with a layer that is not differentiable in its floating
    tensors, or with fewer than two sequences; CheckpointError for a damaged `state`.
    """
    if len(sequences) < 2 or len(targets) != len(sequences):
        raise InputError(f"{len(sequences)} sequences and {len(targets)} targets; at least two are expected")
    check_recoverable(model)
    layers = own_linears(model)
    dense = list(trained_parameters(model).values())
    initial = [each.data for each in dense]
    tuned = {path: TuningLinear(layer, materialize=True) for path, layer in layers.items()}
    text = _Text(model, sequences, targets, options.held_out)
    with evaluating(model), _float32(dense), replaced(model, tuned):
        deltas = [delta for layer in tuned.values() for delta in layer.deltas.values()]
        rates = [options.dense_learning_rate * relative_to(each) for each in dense]
        rates += [options.learning_rate] * len(deltas)
        training = _Training([*dense, *deltas], rates, options, seed)
        before, steps = training.run(text, state, on_step)
    former = {path: dict(layer.packed) for path, layer in layers.items()}
    with torch.no_grad():
        for path, layer in layers.items():
            layer.pack_(tuned[path].packed())
        for each, value in zip(dense, initial, strict=True):
            each.data = each.data.to(value.dtype)
    with evaluating(model):
        after = text.held_out_kl()
    if not after < before:
        after = before
        for path, layer in layers.items():
            layer.pack_(former[path])
        for each, value in zip(dense, initial, strict=True):
            each.data = value
    return RecoveryReport(before, after, steps, sum(each.numel() for each in training.trained))


class AdapterReport(NamedTuple):
    """Adapters that were trained towards the original, and what they are worth."""

    before: float
    """KL divergence from the original on the held-out sequences without adapters, in nats per token."""
    after: float
    """The same with them."""
    steps: int
    """Number of training steps that were made."""
    adapters: dict[str, LoraInit]
    """Module → LoRA matrices with W ≈ Ŵ + b @ a; b is zero where adapters did not help."""


def train_adapters(
    model: nn.Module,
    sequences: Sequence[Tensor],
    targets: Targets,
    options: Recovery,
    rank: int,
    *,
    initial: Mapping[str, LoraInit] | None = None,
    state: Path | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> AdapterReport:
    """Trains low-rank updates of a quantized model's linears as `recover` trains its scales; the model is unchanged.

    initial: LoRA matrices to begin with, such as the quantization error's (`nn/lora_init.py`), of any rank. Without,
    and for further components, a is drawn at random and b zero, as in PEFT.
    """
    text, layers = _Text(model, sequences, targets, options.held_out), own_linears(model)
    with evaluating(model):
        before = text.held_out_kl()
    generator = torch.Generator().manual_seed(seed)
    begun = {path: _begun(layer, rank, (initial or {}).get(path), generator) for path, layer in layers.items()}
    adapted = {path: AdaptedLinear(layer, begun[path]) for path, layer in layers.items()}
    with evaluating(model), replaced(model, adapted):
        matrices = [matrix for each in adapted.values() for matrix in (each.a, each.b)]
        training = _Training(matrices, [options.adapter_learning_rate] * len(matrices), options, seed)
        _, steps = training.run(text, state, on_step)
        after = text.held_out_kl()
    helped = after < before
    found = {path: LoraInit(each.a.cpu(), (each.b if helped else 0 * each.b).cpu()) for path, each in adapted.items()}
    return AdapterReport(before, min(before, after), steps, found)


def _begun(layer: QuantizedLinear, rank: int, initial: LoraInit | None, generator: torch.Generator) -> LoraInit:
    """The matrices that training begins with, [r, in] and [out, r], of rank `rank`, or less for a small layer."""
    rank = min(rank, layer.in_features, layer.out_features)
    a = (2 * torch.rand(rank, layer.in_features, generator=generator) - 1) / layer.in_features**0.5
    b = torch.zeros(layer.out_features, rank)
    if initial is not None:
        known = min(rank, len(initial.a))
        a[:known], b[:, :known] = initial.a[:known], initial.b[:, :known]
    return LoraInit(a.to(layer.device), b.to(layer.device))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The dense parameters that recovery trains, by name: norms and biases, [n] or scalars."""
    packed = {id(tensor) for layer in packed_layers(model).values() for tensor in layer.packed.values()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.dim() <= 1 and id(parameter) not in packed
    }


def check_recoverable(model: nn.Module) -> None:
    """Raises InputError for a model without quantized layers, or with one that has no floating tensors to train."""
    layers = own_linears(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no quantized layers; quantize it first")
    for path, layer in layers.items():
        if not layer.quantizer.tunable(layer.quantizer.unpacked(layer.packed)):
            raise InputError(
                f"{path} ({layer.quantizer}) has no scales or other floating tensors that could be trained"
            )


@contextmanager
def _float32(dense: list[nn.Parameter]) -> Iterator[None]:
    """These parameters in float32; restored only after an error, since the caller casts what was trained."""
    before = [each.data for each in dense]
    for each in dense:
        each.data = each.data.to(torch.float32, copy=True)
    try:
        yield
    except BaseException:
        for each, data in zip(dense, before, strict=True):
            each.data, each.grad = data, None
            each.requires_grad_(False)
        raise
    for each in dense:
        each.grad = None
        each.requires_grad_(False)


class _Text:
    """Sequences with their targets: those to train on, and the held-out ones."""

    def __init__(self, model: nn.Module, sequences: Sequence[Tensor], targets: Targets, held_out: float) -> None:
        self.model, self.sequences, self.targets = model, sequences, targets
        self.train, self.held_out = divided(len(sequences), held_out)

    def kl_divergence(self, index: int) -> Tensor:
        return kl_divergence(_logits(self.model, self.sequences[index]), self.targets[index])

    def held_out_kl(self) -> float:
        return mean_kl_divergence(self.model, self.sequences, self.targets, self.held_out)


class _Training:
    """Adam with a warm-up and a cosine schedule; the iterate with the lowest held-out divergence is kept."""

    def __init__(self, trained: list[Any], rates: list[float], options: Recovery, seed: int) -> None:
        self.trained, self.options, self.seed = trained, options, seed
        self.total = options.steps or 0
        for each in trained:
            each.requires_grad_(True)
        groups = [{"params": [each], "peak": rate} for each, rate in zip(trained, rates, strict=True)]
        self.optimizer = torch.optim.Adam(groups)
        self.kept = [each.detach().clone() for each in trained]
        self.before = self.best = math.inf
        self.step = self.without_gain = 0

    def _share(self) -> float:
        """The share of its peak that a learning rate has at this step."""
        warmup = max(1, self.total // 20)
        return min((self.step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * self.step / self.total))

    def run(self, text: _Text, state: Path | None, on_step: OnStep | None) -> tuple[float, int]:
        """Trains; the best iterate is in place afterwards. Returns the divergence before, and the number of steps."""
        if state is not None and state.exists():
            self._load(state)
        else:
            self.before = self.best = text.held_out_kl()
        order, every = shuffled(len(text.train), self.seed), max(1, self.total // self.options.evaluations)
        for _ in range(self.step * self.options.batch):
            next(order)
        while self.step < self.total and self.without_gain < self.options.patience:
            for _ in range(self.options.batch):
                (text.kl_divergence(next(order)) / self.options.batch).backward()
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * self._share()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if self.step % every == 0 or self.step == self.total:
                self._evaluate(text)
                if state is not None:
                    self._save(state)
            if on_step is not None:
                on_step(self.step, self.total, f"KL {self.before:.4f} → {self.best:.4f}")
        with torch.no_grad():
            for each, value in zip(self.trained, self.kept, strict=True):
                each.copy_(value)
                each.requires_grad_(False)
        return self.before, self.step

    def _evaluate(self, text: _Text) -> None:
        found = text.held_out_kl()
        if found < self.best:
            self.best, self.without_gain = found, 0
            self.kept = [each.detach().clone() for each in self.trained]
        else:
            self.without_gain += 1

    def _tensors(self) -> dict[str, Tensor]:
        """All that changes, by name; views, so that a file can be read into them."""
        found = {}
        for index, (each, kept) in enumerate(zip(self.trained, self.kept, strict=True)):
            adam = self.optimizer.state[each]
            found[f"{index}.value"], found[f"{index}.kept"] = each.detach(), kept
            found[f"{index}.exp_avg"], found[f"{index}.exp_avg_sq"] = adam["exp_avg"], adam["exp_avg_sq"]
        return found

    def _save(self, file: Path) -> None:
        figures = {
            "step": self.step, "before": self.before, "best": self.best, "without_gain": self.without_gain,
        }  # fmt: skip
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self._tensors().items()}
        with whole_file(file) as partial:
            save_file(tensors, partial, metadata={"figures": json.dumps(figures)})

    def _load(self, file: Path) -> None:
        for each in self.trained:
            moments = {"exp_avg": torch.zeros_like(each), "exp_avg_sq": torch.zeros_like(each)}
            self.optimizer.state[each] = {"step": torch.zeros(()), **moments}
        try:
            with safe_open(file, "pt") as opened, torch.no_grad():
                figures = json.loads((opened.metadata() or {})["figures"])
                for name, tensor in self._tensors().items():
                    with within(name):
                        tensor.copy_(opened.get_tensor(name))
            self.step, self.without_gain = int(figures["step"]), int(figures["without_gain"])
            self.before, self.best = float(figures["before"]), float(figures["best"])
        except Exception as error:
            raise CheckpointError(
                f"{file}: not the state of this recovery ({error}); start without --resume"
            ) from error
        for adam in self.optimizer.state.values():
            adam["step"].fill_(self.step)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """ids [1, t] -> [t, v] float32, computed in the dtype of the model's linears where that is half precision, and fast
    on the device."""
    linear = next(each for each in model.modules() if isinstance(each, TuningLinear | nn.Linear))
    dtype = linear.weight.dtype if isinstance(linear, nn.Linear) else linear.dtype
    home = next(model.parameters()).device
    half = dtype if dtype in (torch.bfloat16, torch.float16) and computed_in(dtype, home) == dtype else None
    with torch.autocast(home.type, dtype=half, enabled=half is not None):
        return logits_of(run_network(model, ids), model)[0].float()
