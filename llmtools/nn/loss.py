"""Chunked cross entropy: the logits are computed, used and dropped a few hundred tokens at a time.

For 2048 tokens and a vocabulary of 32 000 the logits are 262 MB in float32, and cross entropy keeps two or three
tensors of that size until backward, more than anything else in a step with a small model. But the gradient in the
hidden states, softmax minus target, times the head's weight, can be computed while a chunk's logits are in memory. So
it is, in forward, and backward only scales it: two products with the head, where recomputing the logits in backward
would take three.

On a processor that multiplies float32 faster than half precision, the head's rows are cast to float32 a block at a time
and the products are in float32, as in `quant/materialize.py`.

Shapes: b — batch; t — tokens; c — tokens in a chunk; d — hidden size; v — vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quant import ALL, Packed, Rows
from ..quant.materialize import gradient, product, product_type

LOGIT_BYTES = 32 * 2**20
"""Size of one chunk's float32 logits, in bytes. There are two such tensors at a time, the logits and their softmax."""
IGNORED = -100
"""Label of a token without loss, PyTorch's `ignore_index`."""


class Loss(NamedTuple):
    """The cross entropy, summed over the labelled tokens."""

    sum: Tensor
    """Loss −Σ log p(label), a float32 scalar, differentiable in the hidden states."""
    correct: Tensor
    """Number of labels that are the argmax token."""
    tokens: Tensor
    """Number of labels that are not ignored."""


def fits(head: nn.Module | None) -> bool:
    """Whether `chunked_loss` supports this output head: a frozen, dense, unsharded `nn.Linear`."""
    return type(head) is nn.Linear and all(type(p) is nn.Parameter and not p.requires_grad for p in head.parameters())


class CausalLoss:
    """The next-token loss of a language model by `chunked_loss`; the model is called through its wrappers.

    A hook on the backbone (transformers' `base_model`) records the hidden states, and the model is called with
    `logits_to_keep` for no token at all. That is correct where logits are the head's product with these states and
    nothing more (Gemma caps them, Granite scales them). The first call checks this on one token's logits; where it does
    not hold, where the head is trained, sharded or no plain linear, or where the model has no `logits_to_keep`, the
    result is None.
    """

    _hidden: Tensor | None

    def __init__(self, model: nn.Module) -> None:
        network: Any = model
        if hasattr(model, "get_base_model"):
            network = network.get_base_model()
        self._head: Any = None
        if hasattr(network, "get_output_embeddings"):
            self._head = network.get_output_embeddings()
        backbone: Any = getattr(network, "base_model", network)
        selects = "logits_to_keep" in inspect.signature(network.forward).parameters
        self._matches = None if selects and fits(self._head) and backbone is not network else False
        self._recording, self._hidden = False, None
        if self._matches is None:
            backbone.register_forward_hook(self._record)

    def _record(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._recording:
            self._hidden = getattr(output, "last_hidden_state", None)

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Loss | None:
        """The loss; model: the one given before, or its wrapper; inputs: its arguments, with `labels` [b, t], not
        shifted."""
        if self._matches is False or "labels" not in inputs or "shift_labels" in inputs or not fits(self._head):
            return None
        labels = inputs["labels"]
        arguments = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
        positions = torch.arange(1 if self._matches is None else 0, device=labels.device)
        self._recording = True
        try:
            logits = model(**arguments, use_cache=False, logits_to_keep=positions).logits
        finally:
            hidden, self._hidden, self._recording = self._hidden, None, False
        if self._matches is None:
            self._matches = (
                hidden is not None and hidden.shape[:2] == labels.shape and self._same_logits(logits, hidden)
            )
        if hidden is None or not self._matches:
            return None
        return chunked_loss(hidden[:, :-1], self._head, labels[:, 1:].to(hidden.device))

    def _same_logits(self, logits: Tensor, hidden: Tensor) -> bool:
        """Whether the model's logits [b, 1, v] of the first token are the head's of hidden [b, t, d]."""
        with torch.no_grad():
            first = hidden[:, :1].contiguous()  # of a strided input torch would copy the weight for each sequence
            expected = self._head(first.to(self._head.weight.dtype)).float()
        close = (logits.to(expected) - expected).abs().amax() <= 2**-6 * expected.abs().amax()
        return logits.shape == expected.shape and bool(close)


def chunked_loss(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Loss:
    """The cross entropy of ``head(hidden)`` against `labels`, hidden [..., d], labels [...] of the same positions."""
    kept = labels != IGNORED
    if hidden.is_cpu:  # on other devices the number of rows would need a synchronisation
        rows, targets = hidden[kept], labels[kept]
    else:
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    total, correct = _ChunkedLoss.apply(rows, head.weight, head.bias, targets)
    return Loss(total, correct, kept.sum())


def loss_of_logits(logits: Tensor, labels: Tensor) -> Loss:
    """The same from logits [..., v] and labels [...], for a head that is no plain linear."""
    logits, labels = logits.float().flatten(0, -2), labels.flatten().to(logits.device)
    kept = labels != IGNORED
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return Loss(total, ((logits.argmax(-1) == labels) & kept).sum(), kept.sum())


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        correct = labels.new_zeros(())
        grad = torch.empty_like(hidden) if wanted else None
        step = max(1, LOGIT_BYTES // (4 * weight.shape[0]))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), step):
                chunk, label = hidden[start : start + step], labels[start : start + step, None]
                kept, target = label != IGNORED, label.clamp_min(0)
                logits = _logits(chunk, weight, bias)
                at_label, most = logits.gather(1, target), logits.amax(1, keepdim=True)
                probabilities = torch.softmax(logits, 1)
                del logits
                # p(argmax token) = 1 / Σ exp(logit − most), so that log Σ exp(logit) = most − log p(argmax token).
                total += torch.where(kept, most - at_label - probabilities.amax(1, keepdim=True).log(), 0).sum()
                correct += ((at_label == most) & kept).sum()
                if grad is not None:
                    probabilities.scatter_add_(1, target, probabilities.new_full((), -1.0).expand_as(target))
                    grad[start : start + step] = torch.where(kept, _gradient(probabilities, hidden.dtype, weight), 0)
        ctx.save_for_backward(*(() if grad is None else (grad,)))
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (grad,) = ctx.saved_tensors
        return (grad * grads[0]).to(grad.dtype), None, None, None


class _Dense(Rows):
    """A dense weight [out, in] as `Rows`: rows of it in the requested dtype."""

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        return packed["weight"][rows].to(dtype)

    def scratch_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        return dtype.itemsize


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [c, d] -> logits [c, v] float32, by the head's arithmetic, or with less rounding."""
    wide = product_type(hidden)
    if weight.dtype == wide:
        return F.linear(hidden.to(wide), weight, bias).float()
    logits = product(hidden.to(wide), _Dense(), {"weight": weight})
    return (logits if bias is None else logits + bias).float()


def _gradient(grad: Tensor, dtype: torch.dtype, weight: Tensor) -> Tensor:
    """grad [c, v] float32 -> [c, d], in the `product_type` of `dtype`."""
    wide = product_type(grad.new_empty(0, dtype=dtype))
    if weight.dtype == wide:
        return grad.to(wide) @ weight
    return gradient(grad.to(wide), _Dense(), {"weight": weight}, weight.shape[1])
