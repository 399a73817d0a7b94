"""The product with a weight that exists only while it is used: exact, differentiable, and within its budget."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from llmtools.nn.linear import QuantizedLinear
from llmtools.quant import (
    NF4,
    OPTQ,
    RTN,
    Packed,
    Quantizer,
    QuIPSharp,
    materialize,
    materialize_budget,
    materialized_linear,
)
from llmtools.quant.materialize import (
    LARGEST_BLOCK_BYTES,
    MULTIPLE,
    _forward,
    _gradient,
    _in_few_shapes,
    _rows_per_block,
    _ways,
    gemv_tokens,
)
from llmtools.quant.products import Way

QUANTIZERS = [RTN(bits=3, group_size=32), NF4(), OPTQ(bits=2, group_size=16, act_order=True)]


def packed_weight(quantizer: Quantizer, out: int = 48, n: int = 64) -> tuple[Packed, Tensor]:
    packed = quantizer.quantize(torch.randn(out, n), torch.diag(torch.rand(n) + 0.1))
    return packed, quantizer.dequantize(packed)


# ---- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 64 * 16 * 20, 2**30], ids=["one-row", "16-rows", "all"])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda quantizer: quantizer.name)
def test_blocks_of_rows_change_nothing(quantizer: Quantizer, budget: int) -> None:
    packed, weight = packed_weight(quantizer)
    x = torch.randn(2, 5, 64, requires_grad=True)
    with materialize_budget(budget):
        y = quantizer.linear(x, packed)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    dense = x.detach().requires_grad_()
    expected = dense @ weight.T
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), dense)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 2**30], ids=["one-row", "all"])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda quantizer: quantizer.name)
def test_gradcheck(quantizer: Quantizer, budget: int) -> None:
    """In float64: the weight is what it is in float32, the product and its gradient are exact."""
    packed, _ = packed_weight(quantizer, out=5, n=16)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    with materialize_budget(budget):
        assert torch.autograd.gradcheck(lambda x: quantizer.linear(x, packed), x)


@pytest.mark.parametrize("limit", [0, 64], ids=["blocks", "few-tokens"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda quantizer: quantizer.name)
def test_half_precision_is_as_near_the_truth_as_the_dense_layer(
    quantizer: Quantizer, dtype: torch.dtype, limit: int
) -> None:
    packed, weight = packed_weight(quantizer)
    x = torch.randn(7, 64).to(dtype).requires_grad_()
    with gemv_tokens(limit):
        y = quantizer.linear(x, packed)
        grad = torch.randn_like(y)
        (grad_x,) = torch.autograd.grad(y, x, grad)
    assert y.dtype == grad_x.dtype == dtype
    rounded = weight.to(dtype)
    for got, dense, truth in (
        (y, x.detach() @ rounded.T, x.detach().double() @ weight.double().T),
        (grad_x, grad @ rounded, grad.double() @ weight.double()),
    ):
        assert (got.double() - truth).abs().max() <= 2 * (dense.double() - truth).abs().max()


def test_blocks_add_their_gradients_in_float32() -> None:
    """The number of blocks does not show in bf16 gradients: 48 blocks are as near the truth as one."""
    quantizer = RTN(bits=4)
    packed, weight = packed_weight(quantizer)
    x = torch.randn(9, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(9, 48).bfloat16()
    errors = []
    for budget in (1, 2**30):
        with materialize_budget(budget):
            (got,) = torch.autograd.grad(quantizer.linear(x, packed), x, grad)
        errors.append((got.double() - grad.double() @ weight.bfloat16().double()).abs().max())
    assert errors[0] <= 2 * errors[1]


def test_autocast_decides_the_type() -> None:
    quantizer = RTN(bits=4)
    packed, weight = packed_weight(quantizer)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantizer.linear(x, packed)
    assert y.dtype == torch.bfloat16
    expected = x.detach().bfloat16().double() @ weight.double().T
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=0.02 * float(expected.abs().max()))
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 4, 64)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    quantizer = RTN(bits=4)
    packed, weight = packed_weight(quantizer)
    x = torch.randn(shape, requires_grad=True)
    for budget in (1, 2**30):
        with materialize_budget(budget):
            y = quantizer.linear(x, packed)
        assert y.shape == (*shape[:-1], 48)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.shape == x.shape
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-5)


# ---- its place in a program ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(reentrant: bool) -> None:
    layers = nn.Sequential(
        QuantizedLinear.from_linear(nn.Linear(32, 48), RTN(bits=4)),
        nn.Linear(48, 48),
        nn.GELU(),
        QuantizedLinear.from_linear(nn.Linear(48, 32, bias=False), NF4()),
    )
    grads = []
    for run in (layers, lambda x: checkpoint(layers, x, use_reentrant=reentrant)):
        x = torch.linspace(-1, 1, 96).view(3, 32).requires_grad_()
        layers.zero_grad()
        run(x).square().sum().backward()
        assert x.grad is not None and layers[1].weight.grad is not None
        grads.append((x.grad, layers[1].weight.grad))
    assert all(torch.equal(plain, again) for plain, again in zip(*grads, strict=True))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("budget", [64 * 16 * 16, 2**30], ids=["blocks", "all"])
@pytest.mark.parametrize("quantizer", [*QUANTIZERS, QuIPSharp(bits=3, passes=0)], ids=lambda quantizer: quantizer.name)
def test_compiles_into_one_graph(quantizer: Quantizer, budget: int) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(64, 48), quantizer, torch.eye(64))
    x = torch.randn(3, 64, requires_grad=True)
    torch.compiler.reset()
    with materialize_budget(budget):
        expected = layer(x)
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_no_gradient_is_computed_for_inputs_that_want_none() -> None:
    quantizer = RTN(bits=4)
    packed, _ = packed_weight(quantizer)
    assert not quantizer.linear(torch.randn(2, 64), packed).requires_grad
    x = torch.randn(2, 64, requires_grad=True)
    with torch.no_grad():
        assert not quantizer.linear(x, packed).requires_grad


def test_no_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="materialize_budget is 0 bytes; give at least 1"), materialize_budget(0):
        pass


def test_the_budget_is_given_back_after_an_error() -> None:
    packed, _ = packed_weight(RTN(bits=4))
    calls = []

    class Counting(RTN):
        def dequantize(self, packed: Packed, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
            calls.append(rows)
            return super().dequantize(packed, rows, dtype)

    with pytest.raises(KeyError), materialize_budget(1):
        raise KeyError
    materialized_linear(torch.randn(2, 64), Counting(bits=4), packed)
    assert len(calls) == 1


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [RTN(bits=3), NF4(double_quantization=True), OPTQ(bits=2)], ids=lambda q: q.name)
def test_backward_keeps_the_packed_tensors_and_nothing_else(quantizer: Quantizer) -> None:
    packed, _ = packed_weight(quantizer)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        quantizer.linear(torch.randn(9, 64, requires_grad=True), packed).sum()
    assert {t.data_ptr() for t in kept if t.numel()} <= {t.data_ptr() for t in packed.values()}
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in packed.values())


class Tracer(TorchDispatchMode):
    """Counts the bytes of every storage that operations allocate, while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage(t) for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if is_tensor(tensor) and storage(tensor) not in given | self._seen:
                self._allocated(tensor.untyped_storage())
        return result

    def _allocated(self, memory: torch.UntypedStorage) -> None:
        key, size = memory._cdata, memory.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(memory, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_growth(step: Callable[[], object]) -> int:
    gc.collect()
    with Tracer() as tracer:
        step()
    return tracer.peak


def test_the_tracer_sees_a_dense_weight() -> None:
    weight, x = torch.randn(512, 512), torch.randn(4, 512)
    assert 2 * weight.nbytes > peak_growth(lambda: x @ (weight * 2).T) >= weight.nbytes


@pytest.mark.parametrize(
    "quantizer", [RTN(bits=2), RTN(bits=3), RTN(bits=4), NF4(), QuIPSharp(), QuIPSharp(bits=4)], ids=str
)
def test_a_training_step_stays_within_activations_and_budget(quantizer: Quantizer) -> None:
    """4096 × 4096 with 8 MB: never 64 MB of dense float32 weight, nor 32 MB in bf16."""
    layer = QuantizedLinear(4096, 4096, quantizer, dtype=torch.bfloat16)
    layout = quantizer.layout(4096, 4096)
    layer.pack_({name: torch.ones(spec.shape).to(spec.dtype) for name, spec in layout.items()})
    x = torch.randn(8, 4096, dtype=torch.bfloat16, requires_grad=True)
    activations = 16 * x.nbytes  # x, y, their rotations and gradients, some of them in float32: 1 MB

    def step() -> None:
        with materialize_budget(8 * 2**20):
            layer(x).sum().backward()

    assert peak_growth(step) <= 8 * 2**20 + activations


def test_rows_of_a_block_follow_from_the_budget() -> None:
    """Equal blocks, in multiples of 16 where there are that many, at least one row, and never more scratch than asked
    for."""
    source, x = RTN(), torch.empty(0)
    assert _rows_per_block(source, 4096, 4096, 8 * 2**20, x) == 128
    assert _rows_per_block(source, 4096, 4096, 1, x) == 1
    assert _rows_per_block(source, 4096, 1000, 16 * 1000 * 37, x) == 32
    assert _rows_per_block(source, 3072, 768, 16 * 768 * 2730, x) == 1536  # not 2720 and 352
    assert _rows_per_block(source, 100, 768, 16 * 768 * 64, x) == 64
    assert _rows_per_block(source, 100, 768, 16 * 768 * 2730, x) >= 100


def test_blocks_are_as_large_as_what_many_tokens_read_and_write() -> None:
    """Fewer sums in backward, and no more memory than the inputs and outputs in float32, or 31 MiB, or what is asked
    for."""
    layer = QuantizedLinear.from_linear(torch.nn.Linear(1024, 3072, bias=False), RTN(bits=4, clip=False))
    source = layer.quantizer.grid  # type: ignore[attr-defined]

    def blocks(tokens: int) -> list[int]:
        return [way.block_bytes for way in _ways(torch.empty(tokens, 1024), source, layer.packed)]

    base = blocks(1)
    assert blocks(8) == base
    assert blocks(1000) == [max(each, 4 * 1000 * 4096) for each in base]
    assert blocks(100_000) == [max(each, LARGEST_BLOCK_BYTES) for each in base]
    with materialize_budget(12345):
        assert blocks(1000) == [12345, 12345]


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_few_tokens_take_the_kernel_for_few(tokens: int) -> None:
    calls = []

    class Counting(RTN):
        def multiply(self, x: Tensor, packed: Packed, transposed: bool = False) -> Tensor | None:
            calls.append((len(x), transposed))
            return self.grid.multiply(x, packed, transposed)

    quantizer = Counting(bits=4)
    packed, weight = packed_weight(quantizer)
    x = torch.randn(tokens, 64, requires_grad=True)
    with gemv_tokens(16):
        y = materialized_linear(x, quantizer, packed)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert calls == ([(tokens, False), (tokens, True)] if tokens <= 16 else [])


def test_numbers_of_tokens_in_half_precision_are_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = RTN(bits=4)
    packed, weight = packed_weight(quantizer)
    way, seen = Way(torch.bfloat16, 2**20, 0), []
    linear = materialize.F.linear
    monkeypatch.setattr(materialize.F, "linear", lambda x, w: seen.append(len(x)) or linear(x, w))
    for tokens in range(1, 2 * MULTIPLE + 1):
        x, g = torch.randn(tokens, 64).bfloat16(), torch.randn(tokens, len(weight)).bfloat16()
        for transposed, given, factor in ((False, x, weight.T), (True, g, weight)):
            found = _gradient(g, quantizer, packed, 64, way) if transposed else _forward(x, quantizer, packed, way)
            torch.testing.assert_close(found.float(), given.float() @ factor, rtol=2e-2, atol=5e-2)
    assert set(seen) == {MULTIPLE, 2 * MULTIPLE}
    assert len(_in_few_shapes(torch.randn(3, 4))) == 3  # float32
