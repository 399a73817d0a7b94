"""The loss of a language model without its logits: they are made, used and dropped a few hundred tokens at a time.

For 2048 tokens and 32 000 words the logits are 262 MB in float32, and cross entropy keeps two or three tensors of that
size until backward, more than anything else in a step with a small model. But the gradient in the hidden states,
softmax minus target, times the head's weight, can be had while a chunk's logits are at hand. So it is, in forward, and
backward only scales it: two products with the head, where recomputing the logits in backward would take three.

On a processor that multiplies float32 faster than half precision, the head's rows are widened a block at a time and
the products are float32's, as in `quant/materialize.py`.

Shapes: t — tokens; c — tokens in a chunk; d — width of the hidden states; v — words.
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
"""Float32 logits of one chunk. There are two such tensors at a time, the logits and their softmax."""
IGNORED = -100
"""The label of a token that is not learned, as everywhere in PyTorch."""


class Loss(NamedTuple):
    """What the labels cost, summed over the tokens that have one."""

    sum: Tensor
    """−Σ log p(label), float32, differentiable in the hidden states"""
    correct: Tensor
    """how often the label was the likeliest word"""
    tokens: Tensor
    """labels that are not ignored"""


def fits(head: nn.Module | None) -> bool:
    """Whether `chunked_loss` can stand for this output head and a loss: a frozen linear layer, dense and whole."""
    return type(head) is nn.Linear and all(type(p) is nn.Parameter and not p.requires_grad for p in head.parameters())


class CausalLoss:
    """The next-word loss of a language model, by `chunked_loss`; the model is called as it is, through its wrappers.

    A hook on the backbone (`base_model`, as transformers calls it) notes the hidden states, and the model is asked for
    the logits of no token at all. That is right where logits are the head's product with these states and nothing more
    (Gemma bounds them, Granite scales them). The first call finds out, on one token's logits; where it is not so, where
    the head is trained, sharded or no plain linear, or the model cannot leave logits out, the answer is None.
    """

    _hidden: Tensor | None

    def __init__(self, model: nn.Module) -> None:
        told: Any = model
        if hasattr(model, "get_base_model"):
            told = told.get_base_model()
        self._head: Any = None
        if hasattr(told, "get_output_embeddings"):
            self._head = told.get_output_embeddings()
        backbone: Any = getattr(told, "base_model", told)
        asks = "logits_to_keep" in inspect.signature(told.forward).parameters
        self._right = None if asks and fits(self._head) and backbone is not told else False
        self._watching, self._hidden = False, None
        if self._right is None:
            backbone.register_forward_hook(self._note)

    def _note(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._watching:
            self._hidden = getattr(output, "last_hidden_state", None)

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Loss | None:
        """model: the one given before, or what wraps it; inputs: its arguments, with `labels` [b, t], not shifted."""
        if self._right is False or "labels" not in inputs or "shift_labels" in inputs or not fits(self._head):
            return None
        labels = inputs["labels"]
        others = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
        some = torch.arange(1 if self._right is None else 0, device=labels.device)
        self._watching = True
        try:
            logits = model(**others, use_cache=False, logits_to_keep=some).logits
        finally:
            hidden, self._hidden, self._watching = self._hidden, None, False
        if self._right is None:
            self._right = hidden is not None and hidden.shape[:2] == labels.shape and self._same(logits, hidden)
        if hidden is None or not self._right:
            return None
        return chunked_loss(hidden[:, :-1], self._head, labels[:, 1:].to(hidden.device))

    def _same(self, logits: Tensor, hidden: Tensor) -> bool:
        """Whether the model's logits of the first token are those of the head."""
        with torch.no_grad():
            expected = self._head(hidden[:, :1].to(self._head.weight.dtype)).float()
        near = (logits.to(expected) - expected).abs().amax() <= 2**-6 * expected.abs().amax()
        return logits.shape == expected.shape and bool(near)


def chunked_loss(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Loss:
    """The loss of ``head(hidden)`` against `labels`, hidden [..., d], labels [...] of the same tokens, not shifted."""
    kept = labels != IGNORED
    if hidden.is_cpu:  # elsewhere the host would have to wait for how many they are
        rows, targets = hidden[kept], labels[kept]
    else:
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    total, correct = _ChunkedLoss.apply(rows, head.weight, head.bias, targets)
    return Loss(total, correct, kept.sum())


def loss_of_logits(logits: Tensor, labels: Tensor) -> Loss:
    """The same from logits [..., v], for a head that is no plain linear."""
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
                chances = torch.softmax(logits, 1)
                del logits
                # The likeliest word has the chance 1 / Σ exp(logit − most), so its logarithm is what log Σ exp lacks.
                total += torch.where(kept, most - at_label - chances.amax(1, keepdim=True).log(), 0).sum()
                correct += ((at_label == most) & kept).sum()
                if grad is not None:
                    chances.scatter_add_(1, target, chances.new_full((), -1.0).expand_as(target))
                    grad[start : start + step] = torch.where(kept, _gradient(chances, hidden.dtype, weight), 0)
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
    """A dense weight as something that gives rows in a wanted type."""

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        return packed["weight"][rows].to(dtype)

    def scratch_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        return dtype.itemsize


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [c, d] -> [c, v] float32, as the head computes them, or with less rounding."""
    wide = product_type(hidden)
    if weight.dtype == wide:
        return F.linear(hidden.to(wide), weight, bias).float()
    logits = product(hidden.to(wide), _Dense(), {"weight": weight})
    return (logits if bias is None else logits + bias).float()


def _gradient(grad: Tensor, dtype: torch.dtype, weight: Tensor) -> Tensor:
    """grad [c, v] float32 -> [c, d], in the type that suits products of `dtype`."""
    wide = product_type(grad.new_empty(0, dtype=dtype))
    if weight.dtype == wide:
        return grad.to(wide) @ weight
    return gradient(grad.to(wide), _Dense(), {"weight": weight}, weight.shape[1])
