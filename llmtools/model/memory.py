"""Estimate the memory of a finetuning step without weights: a few blocks of the network run on fake tensors.

Fake tensors have shapes, types and lifetimes but no values, so a step of the real code (the model's own, PEFT's
adapters, our layers, checkpointing, the loss) runs in a second for any size, and a ledger of allocations gives its
peak. Two depths are run; since blocks repeat, the difference is what one more block keeps, and the full depth follows.
The sizes of the model's tensors need no run: they are read from the model on the meta device, to the byte.

Not counted, because they are not tensors: temporary buffers within one kernel, the allocator's rounding and cache, the
CUDA context (some 0.5 GB), libraries and the program itself.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..nn.adapters import inputs_uncast, plain_lora
from ..nn.embedding import TiedLinear
from ..nn.experts import is_fused
from ..nn.loss import _ChunkedLoss, fits
from ..nn.packed import PackedWeight
from ..quant.materialize import DEVICE_GEMV_TOKENS, DEVICE_MATERIALIZE_BYTES, gemv_tokens, materialize_budget
from .blocks import find_blocks, main_stack

ATTENTION = "llmtools_plan"
"""Name of the attention implementation: transformers' own SDPA, without a mask in memory."""
_DEPTHS = (2, 3)
"""Numbers of blocks of the two runs, one apart."""


class Tensors(NamedTuple):
    """Sizes, in bytes, of the tensors that stay in memory during a step."""

    packed: int
    """Size of the packed tensors of quantized weights, in bytes."""
    quantized_weights: int
    """Number of quantized weights."""
    linears: int
    """Size of dense linears in the blocks, in bytes."""
    embeddings: int
    """Size of embeddings and output head, in bytes; counted once where they are tied."""
    others: int
    """Size of norms, biases and buffers, in bytes."""
    adapters: int
    """Size of the trainable parameters, in bytes; their gradients take as much."""
    trainable: int
    """Number of trainable parameters."""

    @property
    def frozen(self) -> int:
        return self.packed + self.linears + self.embeddings + self.others


class Peak(NamedTuple):
    """Sizes, in bytes, of temporary tensors at the peak of a step, without the gradients of adapters."""

    activations: int
    """Size of activations saved for the backward, in bytes."""
    loss: int
    """Size of logits and tensors computed from them, in bytes."""
    work: int
    """Size of the current block's recomputed activations, their gradients and decoded rows of weights, in bytes."""

    @property
    def total(self) -> int:
        return sum(self)


def tensors(model: nn.Module) -> Tensors:
    """The sizes of a model's tensors, on any device; adapters are the parameters that require a gradient."""
    sizes = dict.fromkeys(Tensors._fields, 0)
    kinds: dict[int, str] = {}
    blocks = tuple(f"{_bare(block.path)}." for block in find_blocks(model))
    for path, module in model.named_modules():
        if isinstance(module, PackedWeight):
            sizes["quantized_weights"] += 0 if isinstance(module, TiedLinear) else math.prod(module.shape)
            kinds |= {id(tensor): "packed" for tensor in module.stored.values()}
        elif isinstance(module, nn.Embedding):
            kinds.setdefault(id(module.weight), "embeddings")
        elif isinstance(module, nn.Linear):
            inside = _bare(path).startswith(blocks)
            kinds.setdefault(id(module.weight), "linears" if inside else "embeddings")
        elif is_fused(module):
            kinds |= {id(tensor): "linears" for tensor in module.parameters(recurse=False)}
    for tensor in [*model.parameters(), *model.buffers()]:
        kind = "adapters" if tensor.requires_grad else kinds.get(id(tensor), "others")
        sizes[kind] += tensor.nbytes
        sizes["trainable"] += tensor.numel() * tensor.requires_grad
    return Tensors(**sizes)


def peak(
    model: Any,
    batch: int,
    length: int,
    *,
    device: str = "cpu",
    autocast: bool = False,
    chunked_loss: bool = True,
    training: bool = True,
) -> Peak:
    """The peak of a training step (forward and backward), or of validation, on token ids [batch, length].

    model: on the meta device, with adapters, and with gradient checkpointing if it is used. device: "cpu" or "cuda",
    which determines how many rows of a weight are decoded at a time. autocast: to bfloat16. chunked_loss: as in
    `llmtools finetune`, where the output head allows; else the model computes all logits. training: False for
    validation, a forward alone.
    """
    depth = len(main_stack(model).blocks)
    fewer, more = _DEPTHS

    def at(blocks: int) -> Peak:
        return _peak(_first_blocks(model, blocks), batch, length, device, autocast, chunked_loss, training)

    if depth <= more:
        return at(depth)
    low, high = at(fewer), at(more)
    if (low.loss, low.work) != (high.loss, high.work):  # peaks at different moments cannot be extrapolated
        return at(depth)
    return high._replace(activations=high.activations + (high.activations - low.activations) * (depth - more))


def blueprint(model: Any) -> Any:
    """A copy of a model in memory on the meta device, for `peak`; of adapters of --merge exact, as plain LoRA."""
    held = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    memo: dict[int, Any] = {
        key: nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for key, tensor in held.items()
    }
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        if hasattr(module, "rounds"):
            module.rounds = False
    with planning_attention() as attention:
        _base(made).set_attn_implementation(attention)
    return made


@contextmanager
def planning_attention() -> Iterator[str]:
    """The name of an attention implementation (`attn_implementation`), registered with transformers.

    On fake tensors transformers would materialise masks that it omits on real ones.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, None, **options)

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **options: None)
    yield ATTENTION


# ------------------------------------------------------------------------------------------------------------- running


def _peak(model: Any, batch: int, length: int, device: str, autocast: bool, chunked_loss: bool, training: bool) -> Peak:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with ExitStack() as stack:
        if device != "cpu":
            stack.enter_context(materialize_budget(DEVICE_MATERIALIZE_BYTES))
        stack.enter_context(gemv_tokens(DEVICE_GEMV_TOKENS))  # more go by blocks, whose scratch is seen
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.set_grad_enabled(training))
        chunked_loss = chunked_loss and fits(_base(model).get_output_embeddings())  # fake parameters are no Parameters
        _fake(model)
        model.train(training)
        stack.enter_context(inputs_uncast(plain_lora(model) if autocast and training else []))
        ids = torch.zeros(batch, length, dtype=torch.long)
        ledger = stack.enter_context(Ledger([*model.parameters(), *model.buffers(), ids]))
        loss = _loss(model, ids, ledger, autocast, chunked_loss)
        ledger.phase = "work"
        if training:
            loss.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found = ledger.peak(without=grads)
    return Peak(**{name: found.get(name, 0) for name in Peak._fields})


def _loss(model: Any, ids: Tensor, ledger: Ledger, autocast: bool, chunked_loss: bool) -> Tensor:
    base = _base(model)
    head = base.get_output_embeddings()
    decoder = getattr(base, base.base_model_prefix, None)
    ledger.phase = "activations"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if chunked_loss and decoder is not None and head is not None:
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            ledger.phase = "loss"
            # chunked_loss itself first selects the labelled rows, and fake labels have no values
            loss, _ = _ChunkedLoss.apply(hidden.flatten(0, 1), head.weight, head.bias, ids.flatten())
            mean: Tensor = loss / ids.numel()
            return mean
        handle = head.register_forward_pre_hook(lambda *_: setattr(ledger, "phase", "loss")) if head else None
        result: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        if handle:
            handle.remove()
        return result


def _base(model: Any) -> Any:
    """The model without its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Ledger(TorchDispatchMode):
    """Records what operations allocate and when it is freed, by the phase of the allocation.

    Storages are counted, of tensors of any shape [...].
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.phase = ""
        self._entries: list[tuple[int, int]] = []
        """Pairs (index of a storage, its size in bytes when it is allocated, minus its size when it is freed)."""
        self._phases: list[str] = []
        self._numbers: dict[int, int] = {id(tensor.untyped_storage()): -1 for tensor in known}
        self._known = known  # keeps them alive: the id of a freed one could be reused

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._record(value.untyped_storage())
        return result

    def _record(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._numbers:
            return
        number, size = len(self._phases), storage.nbytes()
        self._numbers[id(storage)] = number
        self._phases.append(self.phase)
        self._entries.append((number, size))
        weakref.finalize(storage, self._freed, id(storage), number, size)

    def _freed(self, key: int, number: int, size: int) -> None:
        self._numbers.pop(key, None)
        self._entries.append((number, -size))

    def peak(self, without: list[Tensor]) -> dict[str, int]:
        """Bytes by phase at the peak, some live tensors [...] excluded."""
        excluded = {self._numbers.get(id(tensor.untyped_storage())) for tensor in without}
        live: dict[str, int] = {}
        total, best, most = 0, {}, 0
        for number, size in list(self._entries):
            if number in excluded:
                continue
            phase = self._phases[number]
            live[phase] = live.get(phase, 0) + size
            total += size
            if total > most:
                best, most = dict(live), total
        return best


def _first_blocks(model: Any, count: int) -> Any:
    """A copy with so many blocks. Copies of meta tensors cost nothing."""
    model = copy.deepcopy(model)
    path = main_stack(model).path
    parent, _, name = path.rpartition(".")
    blocks = model.get_submodule(path)
    setattr(model.get_submodule(parent), name, nn.ModuleList(list(blocks)[:count]))
    return model


def _fake(model: nn.Module) -> None:
    """Replaces the model's tensors by fake ones on the CPU, in place; tied ones stay tied. Within a FakeTensorMode."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = (
                        nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else fake
                    )
                held[name] = made[id(tensor)]  # type: ignore[assignment]


def _bare(path: str) -> str:
    """The path in the model without adapters."""
    return path.removeprefix("base_model.model.")
