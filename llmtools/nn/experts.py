"""Mixtures of experts: fused experts become linears, one per expert and projection, and are called by one function.

transformers keeps the experts of a layer as one module with three-dimensional Parameters: ``gate_up_proj [E, 2I, H]``,
``down_proj [E, H, I]``. `unfuse` gives that module children instead, ``experts.3.w_gate``, ``experts.3.w_up``,
``experts.3.w_down``, which are plain `nn.Linear`; their weights are views, so nothing is copied. From there on an
expert is like any other linear: quantizers, the walk, checkpoints, adapters, merging and offloading need to know
nothing of mixtures. `fuse_dense` is the way back, for a model that is dense again.

The module itself stays, with its class and flags, by which its forward is known: whether it has a gate, biases, a
transposed or interleaved layout, and how it applies the gate. `experts_forward` reads nothing else, so it serves every
family; transformers calls it by its public interface for experts (`transformers.integrations.moe`), under the name
`IMPLEMENTATION`. The tokens are sorted by expert once, an expert without tokens is not touched, and each product is
that of its linear, so a weight exists a block of rows at a time, forward and backward (`quant/materialize.py`).

The names are not ``gate_proj``, ``up_proj`` and ``down_proj``, nor ``w1`` … ``w3``: PEFT (0.21, `_convert_peft_config_
moe`) and transformers' loader take these, below ``experts``, for parts of the fused Parameters.

Shapes: E — experts; H, I — features of the model and within an expert; T — tokens; k — experts of a token; S = T · k.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import InputError
from ..quant.materialize import DEFAULT_MATERIALIZE_BYTES, DEVICE_MATERIALIZE_BYTES
from .linear import QuantizedLinear
from .swap import set_module

IMPLEMENTATION = "llmtools"
"""Name of `experts_forward` in transformers' ``config._experts_implementation``."""

GATE, UP, DOWN = "w_gate", "w_up", "w_down"
"""Names of the linears of an expert."""


class Expert(nn.Module):
    """The linears of one expert, by name; it is the fused module that calls them."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)


class Part(NamedTuple):
    """Where the weight of a linear is in the fused Parameters."""

    parameter: str
    """Name of the Parameter: ``gate_up_proj``, for the bias ``gate_up_proj_bias``."""
    expert: int
    """Index of the expert."""
    rows: slice
    """Rows of the expert's matrix [out, in], or entries of its bias [out]."""
    transposed: bool
    """Whether the Parameter holds matrices [in, out]."""

    def of(self, fused: Tensor) -> Tensor:
        """The view of a fused tensor [E, out, in], or [E, in, out], or [E, out] for biases."""
        return self.within(fused[self.expert])

    def within(self, matrix: Tensor) -> Tensor:
        """The same of the expert's own matrix."""
        return (matrix.mT if self.transposed else matrix)[self.rows]


# ---------------------------------------------------------------------------------------------------------------------
# Fused and unfused


class StandIn(nn.Module):
    """In place of a module with fused experts that transformers' interface does not call, while they are unfused."""

    has_gate, has_bias = True, False

    def __init__(self, former: Any, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.act_fn = num_experts, former.act_fn
        self.__dict__["former"] = former  # without its Parameters, for `fuse_dense`; no child

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.act_fn(gate)  # type: ignore[no-any-return]

    def fused_parameters(self) -> dict[str, nn.Parameter | None]:
        """The Parameters of the former module, once the experts are fused again."""
        return self._parameters


class RoutedExperts(StandIn):
    """For experts some of which compute nothing, as LongCat-Flash's: those from number E on give a token back as it is.

    The former's ``gate_up_proj`` has rows for these, too, which nothing reads; they come back as zeros.
    """

    is_transposed = False

    def __init__(self, former: Any) -> None:
        super().__init__(former, former.num_routed_experts)
        self.total = former.total_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        same = (top_k_weights * (top_k_index >= self.num_experts)).sum(dim=-1, keepdim=True)  # [T, 1]
        routed = experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return routed + (same * hidden_states).to(hidden_states.dtype)

    def fused_parameters(self) -> dict[str, nn.Parameter | None]:
        both: Any = self._parameters["gate_up_proj"]
        rows = both.new_zeros(self.total, *both.shape[1:])
        rows[: self.num_experts] = both.detach()
        return self._parameters | {"gate_up_proj": nn.Parameter(rows, requires_grad=both.requires_grad)}


class BatchedExperts(StandIn):
    """For experts that are given all tokens one after another, x [E · T, H] -> [E · T, H], as Llama 4's are; a row of
    zeros is a token that the router did not send there, and stays one."""

    is_transposed = True

    def __init__(self, former: Any) -> None:
        super().__init__(former, former.num_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])  # [E, T, H]
        if _has_values(rows):
            sent = rows.detach().ne(0).any(dim=-1)  # [E, T]
            counts: list[int] = sent.sum(dim=1).tolist()
            places = sent.reshape(-1).nonzero().squeeze(1)
        else:
            counts = [rows.shape[1]] * self.num_experts
            places = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device)
        flat = rows.reshape(-1, rows.shape[-1])
        hit = [index for index, count in enumerate(counts) if count]
        if not hit:
            return torch.zeros_like(flat)
        experts = [self._modules[str(index)] for index in hit]
        y = _outputs(self, experts, flat[places], [counts[index] for index in hit])
        return torch.zeros_like(flat).index_copy(0, places, y.to(flat.dtype))


def _stand_in(module: Any) -> type[StandIn] | None:
    """The class that computes the same as a module; None where there is none."""
    held = {name: each for name, each in module._parameters.items() if each is not None}
    if held.keys() != {"gate_up_proj", "down_proj"} or any(each.dim() != 3 for each in held.values()):
        return None
    if not hasattr(module, "act_fn") or hasattr(module, "has_gate"):
        return None
    if hasattr(module, "num_routed_experts") and hasattr(module, "total_experts"):
        return RoutedExperts if _is_routed(module) else None
    return BatchedExperts if hasattr(module, "num_experts") and _is_batched(module, held) else None


def _is_routed(module: Any) -> bool:
    """Whether `RoutedExperts` computes the same as a module, tested on a small copy of it with random numbers."""
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = {"gate_up_proj": (3, 12, 8), "down_proj": (2, 8, 6)}
    small = {name: torch.randn(shape, generator=generator, device="cpu") for name, shape in shapes.items()}
    x, weights = (torch.randn(5, width, generator=generator, device="cpu") for width in (8, 2))
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]], device="cpu")
    return _same(RoutedExperts, module, {"num_routed_experts": 2, "total_experts": 3}, small, (x, chosen, weights))


def _is_batched(module: Any, held: Mapping[str, Tensor]) -> bool:
    """The same for `BatchedExperts`."""
    (experts, hidden, _), inner = held["gate_up_proj"].shape, held["down_proj"].shape[1]
    sizes = {experts: 2, hidden: 8, inner: 8 if inner == hidden else 6}
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = {"gate_up_proj": (2, 8, 2 * sizes[inner]), "down_proj": (2, sizes[inner], 8)}
    small = {name: torch.randn(shape, generator=generator, device="cpu") for name, shape in shapes.items()}
    known = {name: sizes[value] for name, value in vars(module).items() if type(value) is int and value in sizes}
    x = torch.randn(6, 8, generator=generator, device="cpu")
    x[1] = 0
    return _same(BatchedExperts, module, known, small, (x,))


def _same(
    kind: Callable[[Any], StandIn],
    module: Any,
    sizes: Mapping[str, int],
    small: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...],
) -> bool:
    """Whether a stand-in computes the same as a copy of a module with these sizes and two experts' Parameters."""
    probe = copy.copy(module)
    probe.__dict__ |= sizes
    probe.__dict__["_parameters"] = {name: nn.Parameter(values) for name, values in small.items()}
    ours = kind(probe)
    for index in range(2):
        linears = {name: _linear(part.of(small[part.parameter]), False) for name, part, _ in _parts(ours, small, index)}
        ours.add_module(str(index), Expert(linears))
    try:
        with torch.no_grad():
            return torch.allclose(probe(*inputs), ours(*inputs), rtol=1e-4, atol=1e-4)
    except Exception:  # it takes other arguments
        return False


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds fused experts that we can compute: transformers' flags say how, or a test of it does."""
    if "gate_up_proj" in module._parameters and not hasattr(module, "has_gate"):
        return _stand_in(module) is not None
    flags = ("num_experts", "has_gate", "has_bias", "is_transposed", "config")
    if not all(hasattr(module, flag) for flag in flags):
        return False
    expected = {first for _, first in _projections(module)} | {DOWN_PARAMETER}
    if module.has_bias:
        expected |= {f"{name}_bias" for name in expected}
    held = {name: each for name, each in module._parameters.items() if each is not None}
    return held.keys() == expected and all(each.dim() == (2 if "bias" in name else 3) for name, each in held.items())


def is_unfused(module: nn.Module) -> bool:
    """Whether the experts of a module are its children."""
    return isinstance(module._modules.get("0"), Expert)


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with fused experts, by path."""
    return {path: module for path, module in model.named_modules() if is_fused(module)}


def unfused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose experts are children, by path."""
    return {path: module for path, module in model.named_modules() if is_unfused(module)}


def unfuse(model: nn.Module, path: str) -> dict[str, tuple[str, Part]]:
    """Replaces the fused Parameters of the module at `path` by an `Expert` per expert, in place, without a copy.

    Biases are copied. Returns name of each new Parameter in the model → name of the fused one, and where in it the
    values are. Raises InputError under expert parallelism.
    """
    module: Any = model.get_submodule(path)
    if not hasattr(module, "has_gate"):
        kind = _stand_in(module)
        assert kind is not None, path
        former, module = module, kind(module)  # type: ignore[call-arg]
        module._parameters |= former._parameters
        former._parameters.clear()
        set_module(model, path, module.train(former.training))
    if getattr(module, "_is_expert_parallel", False):
        raise InputError(f"{path}: expert parallelism does not work with packed experts; load the model without it")
    found: dict[str, tuple[str, Part]] = {}
    fused = {name: module._parameters.pop(name) for name in list(module._parameters)}
    for expert in range(module.num_experts):
        linears = {}
        for name, weight, bias in _parts(module, fused, expert):
            linears[name] = linear = _linear(weight.of(fused[weight.parameter]), fused[weight.parameter].requires_grad)
            found[f"{path}.{expert}.{name}.weight"] = f"{path}.{weight.parameter}", weight
            if bias is not None:
                values = fused[bias.parameter]
                linear.bias = nn.Parameter(bias.of(values.detach()).clone(), requires_grad=values.requires_grad)
                found[f"{path}.{expert}.{name}.bias"] = f"{path}.{bias.parameter}", bias
        module.add_module(str(expert), Expert(linears).train(module.training))
    module._is_hf_initialized = True  # transformers' _init_weights would look for the fused Parameters
    if not isinstance(module, StandIn) and module.config._experts_implementation != IMPLEMENTATION:
        module._implementation_before = module.config._experts_implementation
        module.config._experts_implementation = IMPLEMENTATION
    return found


def unfuse_all(model: nn.Module) -> dict[str, tuple[str, Part]]:
    """`unfuse` of all fused experts of a model."""
    return {name: part for path in fused_experts(model) for name, part in unfuse(model, path).items()}


def fuse_dense(model: nn.Module) -> None:
    """The way back, in place, for modules all of whose experts are dense: their weights are copied into one.

    In other modules a weight that stays dense becomes a copy of its part, and the fused Parameter can be given back.
    """
    for path, module in unfused_experts(model).items():
        linears = [linear for expert in _experts(module) for linear in expert.children()]
        dense = [each for each in linears if type(each) is nn.Linear]
        if len(dense) == len(linears):
            _fuse(module)
            if isinstance(module, StandIn):
                former: nn.Module = module.__dict__["former"]
                former._parameters |= module.fused_parameters()
                set_module(model, path, former.train(module.training))
            continue
        for linear in dense:
            if linear.weight.untyped_storage().nbytes() > linear.weight.nbytes:
                linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=linear.weight.requires_grad)
    left = {id(getattr(module, "config", None)) for module in unfused_experts(model).values()}
    for module in model.modules():
        if "_implementation_before" in vars(module) and id(module.config) not in left:
            before = vars(module).pop("_implementation_before")
            module.config._experts_implementation = before  # type: ignore[union-attr]


@contextmanager
def unfused_within(model: nn.Module) -> Iterator[dict[str, tuple[str, Part]]]:
    """Fused experts are linears within the context; afterwards those that are still dense are fused again."""
    try:
        yield unfuse_all(model)
    finally:
        fuse_dense(model)


DOWN_PARAMETER = "down_proj"


def _projections(module: Any) -> list[tuple[str, str]]:
    """(name of a linear, its Parameter) of the projections before the activation."""
    return [(GATE, "gate_up_proj"), (UP, "gate_up_proj")] if module.has_gate else [(UP, "up_proj")]


def _interleaved(module: Any) -> bool:
    return not getattr(module, "is_concatenated", True)


def _parts(module: Any, fused: Mapping[str, Tensor], expert: int) -> Iterator[tuple[str, Part, Part | None]]:
    """(name of a linear, where its weight is, where its bias is) for one expert."""
    for name, parameter in [*_projections(module), (DOWN, DOWN_PARAMETER)]:
        shape = fused[parameter].shape
        out = shape[2] if module.is_transposed else shape[1]
        rows = slice(0, out)
        if parameter == "gate_up_proj":
            second = name == UP
            rows = slice(int(second), out, 2) if _interleaved(module) else slice(second * out // 2, out // (2 - second))
        bias = Part(f"{parameter}_bias", expert, rows, False) if module.has_bias else None
        yield name, Part(parameter, expert, rows, module.is_transposed), bias


def _linear(weight: Tensor, trainable: bool) -> nn.Linear:
    """A linear without a bias around a weight [out, in]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=trainable)
    return linear


def _experts(module: nn.Module) -> list[nn.Module]:
    return [module._modules[str(index)] for index in range(module.num_experts)]  # type: ignore[arg-type, misc]


def _fuse(module: Any) -> None:
    experts: list[Any] = _experts(module)
    for number in range(len(experts)):
        del module._modules[str(number)]

    def gathered(kind: str, names: Sequence[str], transposed: bool) -> nn.Parameter:
        one = [[getattr(getattr(expert, name), kind).detach() for name in names] for expert in experts]
        rows = [_joined(module, each, 0) for each in one]
        stacked = torch.stack([each.mT if transposed else each for each in rows])
        return nn.Parameter(stacked, requires_grad=getattr(experts[0], names[0]).weight.requires_grad)

    for parameter, names in ((_projections(module)[0][1], [name for name, _ in _projections(module)]),
                             (DOWN_PARAMETER, [DOWN])):  # fmt: skip
        module.register_parameter(parameter, gathered("weight", names, module.is_transposed))
        if module.has_bias:
            module.register_parameter(f"{parameter}_bias", gathered("bias", names, False))


def _joined(module: Any, parts: Sequence[Tensor], dim: int) -> Tensor:
    """Gate and up, [out, …] or […, out], in one tensor as the family's own layout has them; dim 0 or -1."""
    if len(parts) == 1:
        return parts[0]
    if not _interleaved(module):
        return torch.cat(list(parts), dim)
    between = 1 if dim == 0 else -1
    return torch.stack(list(parts), between).flatten(*((0, 1) if dim == 0 else (-2, -1)))


# ---------------------------------------------------------------------------------------------------------------------
# Forward


_all_routed = False


@contextmanager
def route_all(active: bool = True) -> Iterator[None]:
    """Within this context every expert is run on every token, for hooks on its linears; outputs are those of the
    router's choice all the same."""
    global _all_routed
    before, _all_routed = _all_routed, active
    try:
        yield
    finally:
        _all_routed = before


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The output of a module with unfused experts: Σ over a token's experts of weight · expert(token).

    hidden_states [T, H]; top_k_index [T, k] int64, E for none; top_k_weights [T, k] of any float dtype. Returns
    [T, H] of `hidden_states`' dtype. Rows are summed in a fixed order, so results do not depend on the run.
    """
    tokens, k = top_k_index.shape
    ids = top_k_index.reshape(-1)  # [S]
    order = ids.argsort(stable=True)
    counts = _counts(ids, self.num_experts)
    sources = order[: sum(counts)] // k
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    place = place.view(tokens, k)
    if _all_routed:
        y = _rows_of_all(self, hidden_states, sources, counts)
    else:
        hit = [index for index, count in enumerate(counts) if count]
        if not hit:
            return torch.zeros_like(hidden_states)
        experts, sizes = [self._modules[str(index)] for index in hit], [counts[index] for index in hit]
        y = _outputs(self, experts, _Dispatch.apply(hidden_states, sources, place), sizes)
    result: Tensor = _Combine.apply(_filled(y, len(ids)), place, top_k_weights)
    return result.to(hidden_states.dtype)


class _Dispatch(torch.autograd.Function):
    """x [T, H], sources [S'], place [T, k] -> x[sources] [S', H]; the gradient is a sum in a fixed order, a block
    of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x[sources]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return _combined(_filled(grad, place.numel()), place, None), None, None


class _Combine(torch.autograd.Function):
    """y [S, H], place [T, k], weights [T, k] -> Σ_k weights · y[place] [T, H], of the wider of both types.

    What autograd would keep, y in the order of the tokens and y times weights, is never there as a whole.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, place: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(y, place, weights)
        return _combined(y, place, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        y, place, weights = ctx.saved_tensors
        of_y = torch.empty_like(y) if ctx.needs_input_grad[0] else None
        of_weights = torch.empty_like(weights) if ctx.needs_input_grad[2] else None
        for some in _few_tokens(y, place):
            rows, upper = place[some], grad[some].unsqueeze(1)  # [t, k], [t, 1, H]
            if of_y is not None:
                of_y[rows] = (upper * weights[some].unsqueeze(-1)).to(y.dtype)
            if of_weights is not None:
                of_weights[some] = (upper * y[rows]).sum(dim=-1).to(weights.dtype)
        return of_y, None, of_weights


def _combined(y: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_k y[place] · weights, [T, H]; without weights the sum alone."""
    out = y.new_empty(len(place), y.shape[1], dtype=y.dtype if weights is None else _wider(y, weights))
    for some in _few_tokens(y, place):
        rows = y[place[some]]  # [t, k, H]
        out[some] = (rows if weights is None else rows * weights[some].unsqueeze(-1)).sum(dim=1)
    return out


def _wider(y: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, weights.dtype)


def _filled(y: Tensor, rows: int) -> Tensor:
    """y [n, H] with rows of zeros up to so many: those of the choices of no expert."""
    return y if len(y) == rows else torch.cat([y, y.new_zeros(rows - len(y), y.shape[1])])


def _few_tokens(y: Tensor, place: Tensor) -> Iterator[slice]:
    """Tokens whose rows of y [S, H], place [T, k], take as much scratch memory as a block of weights."""
    budget = DEFAULT_MATERIALIZE_BYTES if y.is_cpu else DEVICE_MATERIALIZE_BYTES
    count = max(1, budget // (4 * place.shape[1] * y.shape[1]))
    for start in range(0, len(place), count):
        yield slice(start, start + count)


def _outputs(self: Any, experts: Sequence[Any], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The experts' outputs one after another, [Σ t, H], each of its own rows of x [Σ t, H], as many as `sizes` says."""
    up = _products([expert.w_up for expert in experts], x, sizes)
    if self.has_gate:
        gate = _products([expert.w_gate for expert in experts], x, sizes)
        inner = self._apply_gate(_joined(self, [gate, up], -1))
    else:
        inner = self.act_fn(up)  # [Σ t, I]
    y = _products([expert.w_down for expert in experts], inner, sizes)
    return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y


def _products(linears: Sequence[Any], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """[Σ t, out] of x [Σ t, in], each of these rows by its own linear; at once where the quantizer can and nothing but
    the weights is to be called."""
    if not torch.is_grad_enabled() and all(map(_is_bare, linears)):
        quantizer = linears[0].quantizer
        if all(linear.quantizer is quantizer for linear in linears):
            y: Tensor | None = quantizer.linear_each(x, sizes, [linear.stored for linear in linears])
            if y is not None:
                return y
    return torch.cat([linear(rows) for linear, rows in zip(linears, x.split(list(sizes)), strict=True)])


def _is_bare(linear: Any) -> bool:
    """Whether a linear is its packed weight alone: without a bias, hooks, or adapters around it."""
    if type(linear) is not QuantizedLinear or linear._parameters["bias"] is not None:
        return False
    return not (linear._forward_hooks or linear._forward_pre_hooks or linear.fetch or "forward" in vars(linear))


def _rows_of_all(self: Any, hidden_states: Tensor, sources: Tensor, counts: Sequence[int]) -> Tensor:
    """The same rows, of experts that are each run on all tokens."""
    rows = zip(_experts(self), sources.split(list(counts)), strict=True)
    tokens = [len(hidden_states)]
    return torch.cat([_outputs(self, [expert], hidden_states, tokens)[chosen] for expert, chosen in rows])


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and type(tensor).__name__ != "FakeTensor"


def _counts(ids: Tensor, experts: int) -> list[int]:
    """Tokens of each expert. Of tensors without values (meta, fake) a few experts get all, which needs the same memory
    as if they were spread."""
    if not _has_values(ids):
        few = min(experts, 8)
        each, rest = divmod(len(ids), few)
        return [each + (index < rest) if index < few else 0 for index in range(experts)]
    counted: list[int] = torch.bincount(ids, minlength=experts)[:experts].tolist()
    return counted
