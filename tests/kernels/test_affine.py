"""Uniform grids: the fast decoders give the reference's bits, the products are as exact as those of a dense layer."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtools.errors import InputError
from llmtools.kernels import affine
from llmtools.kernels.affine import dequantize_affine, multiply_affine, multiply_transposed_affine, reference
from llmtools.kernels.bits import pack

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # out, in, group_size
    (5, 1, 1), (5, 7, 3), (4, 33, 33), (3, 64, 8), (6, 100, 32), (3, 129, 31), (2, 256, 64), (7, 515, 48),
    (3, 4200, 128), (4, 230, 96), (2, 2240, 32),
]  # fmt: skip


class Weight(NamedTuple):
    """The arguments of the op, between x and dtype."""

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    bits: int
    group_size: int
    in_features: int


def draw(
    out: int, n: int, group_size: int, bits: int, symmetric: bool = False, scales: torch.dtype = torch.float16
) -> Weight:
    groups = -(-n // group_size)
    zeros = None if symmetric else pack(torch.randint(0, 2**bits, (out, groups)), bits, torch.uint8)
    scale = (torch.randn(out, groups) * 0.1).to(scales)
    return Weight(pack(torch.randint(0, 2**bits, (out, n)), bits), scale, zeros, bits, group_size, n)


def assert_as_exact_as_dense(got: Tensor, x: Tensor, weight: Tensor) -> None:
    """Off by at most twice what x @ weight is off by, both in x's type, from the product in float64."""
    truth = x.double() @ weight.double()
    allowed = 2 * (x @ weight.to(x.dtype) - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert got.dtype == x.dtype and got.shape == truth.shape
    assert (got - truth).abs().max() <= allowed


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("out, n, group_size", SHAPES)
def test_decoding_gives_the_bits_of_the_reference(out: int, n: int, group_size: int, bits: int) -> None:
    for symmetric in (False, True):
        for scales in TYPES:
            weight = draw(out, n, group_size, bits, symmetric, scales)
            for dtype in (*TYPES, torch.float64):
                got = dequantize_affine(*weight, dtype)
                assert got.dtype == dtype and torch.equal(got, reference.dequantize_affine(*weight, dtype))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_decodes_alike(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 300))
    group_size, bits = data.draw(st.integers(1, n)), data.draw(st.sampled_from([2, 3, 4, 8]))
    weight = draw(data.draw(st.integers(0, 4)), n, group_size, bits, data.draw(st.booleans()))
    dtype = data.draw(st.sampled_from(TYPES))
    assert torch.equal(dequantize_affine(*weight, dtype), reference.dequantize_affine(*weight, dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1e-45, 1e-39, 2.0**-126, 3.1e38, 0.0, -0.5, float("inf"), float("nan")])
def test_extreme_scales_round_alike(scale: float, dtype: torch.dtype) -> None:
    weight = draw(2, 64, 32, 4)._replace(scales=torch.full((2, 2), scale))
    got, expected = dequantize_affine(*weight, dtype), reference.dequantize_affine(*weight, dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_and_strides_do_not_matter(bits: int) -> None:
    weight = draw(24, 96, 32, bits)
    whole = dequantize_affine(*weight, torch.bfloat16)
    assert weight.qzeros is not None
    for rows in (slice(0, 1), slice(5, 17), slice(3, 24, 2), slice(23, 24), slice(4, 4)):
        part = weight._replace(qweight=weight.qweight[rows], scales=weight.scales[rows], qzeros=weight.qzeros[rows])
        assert torch.equal(dequantize_affine(*part, torch.bfloat16), whole[rows])
    turned = weight._replace(qweight=weight.qweight.T.contiguous().T, scales=weight.scales.T.contiguous().T)
    assert torch.equal(dequantize_affine(*turned, torch.bfloat16), whole)


def test_threads_do_not_matter() -> None:
    weight, x, threads = draw(301, 520, 64, 3), torch.randn(5, 520), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((dequantize_affine(*weight), multiply_affine(x, *weight)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("out, n, group_size", SHAPES)
def test_few_tokens_are_multiplied_as_exactly_as_by_a_dense_layer(
    out: int, n: int, group_size: int, bits: int, dtype: torch.dtype
) -> None:
    weight = draw(out, n, group_size, bits)
    dense = reference.dequantize_affine(*weight)
    for tokens in (0, 1, 2, 3, 5, 16, 67):
        if tokens:
            x, g = torch.randn(tokens, n).to(dtype), torch.randn(tokens, out).to(dtype)
            assert_as_exact_as_dense(multiply_affine(x, *weight), x, dense.T)
            assert_as_exact_as_dense(multiply_transposed_affine(g, *weight), g, dense)
        else:
            assert multiply_affine(torch.empty(0, n, dtype=dtype), *weight).shape == (0, out)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_activations_of_any_size_are_multiplied(bits: int, dtype: torch.dtype) -> None:
    weight = draw(6, 192, 64, bits)
    dense = reference.dequantize_affine(*weight)
    for tokens in (1, 5):
        x = torch.randn(tokens, 192).to(dtype)
        for change in (x * 1e-4, x * 1e4, torch.where(torch.rand_like(x) < 0.01, x * 1000, x), x * 0):
            assert_as_exact_as_dense(multiply_affine(change, *weight), change, dense.T)
        for odd in (float("inf"), float("nan")):
            spoiled = x.clone()
            spoiled[0, 70] = odd
            got = multiply_affine(spoiled, *weight)
            assert not torch.isfinite(got[0]).any()
            assert tokens == 1 or torch.isfinite(got[1:]).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_an_outlier_in_a_long_row_does_not_drown_the_rest(dtype: torch.dtype) -> None:
    weight = draw(16, 11008, 11008, 4)
    x = (torch.randn(2, 11008) * 0.05).to(dtype)
    x[:, 4321] = 100
    assert_as_exact_as_dense(multiply_affine(x, *weight), x, reference.dequantize_affine(*weight).T)


def test_activations_of_another_width_are_refused() -> None:
    weight = draw(8, 64, 32, 4)
    for wrong in (torch.randn(2, 32), torch.randn(2, 128), torch.randn(64)):
        with pytest.raises(InputError, match="64 to sum"):
            multiply_affine(wrong, *weight)


def test_function_transforms_go_through_the_dispatcher() -> None:
    weight = draw(8, 64, 32, 4)
    x = torch.randn(3, 2, 64)
    each = torch.stack([multiply_affine(part, *weight) for part in x])
    assert torch.equal(torch.vmap(lambda part: multiply_affine(part, *weight))(x), each)


def test_inputs_of_the_product_may_be_strided() -> None:
    weight = draw(8, 64, 32, 4)
    x = torch.randn(64, 3)
    assert torch.equal(multiply_affine(x.T, *weight), multiply_affine(x.T.contiguous(), *weight))


def test_no_row_and_no_group_reads_its_neighbour() -> None:
    """Rows and groups of infinite scale stay where they are."""
    weight = draw(3, 100, 20, 3)
    scales = weight.scales.clone()
    scales[1] = float("inf")
    scales[:, 2] = float("inf")
    value = dequantize_affine(*weight._replace(scales=scales))
    finite = torch.isfinite(value)
    assert finite[0, :40].all() and finite[2, 60:].all() and not finite[1].any() and not finite[:, 40:60].any()


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_ops_are_well_behaved(bits: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("llmtools.kernels.grouped._functions", lambda: None)
    weight = draw(6, 70, 32, bits)
    ops = torch.ops.llmtools
    torch.library.opcheck(ops.dequantize_affine.default, (*weight, torch.bfloat16))
    torch.library.opcheck(ops.multiply_affine.default, (torch.randn(2, 70), *weight))
    torch.library.opcheck(ops.multiply_transposed_affine.default, (torch.randn(2, 6), *weight))


@pytest.mark.parametrize("function", [dequantize_affine, multiply_affine, multiply_transposed_affine])
def test_compiled_code_gives_the_same_bits(function: object) -> None:
    weight = draw(6, 70, 32, 3)
    first = {multiply_affine: (torch.randn(2, 70),), multiply_transposed_affine: (torch.randn(2, 6),)}.get(function, ())
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*first, *weight), function(*first, *weight))


def test_the_shortcut_past_the_dispatcher_is_for_plain_tensors_only() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = draw(6, 70, 32, 3)
    with FakeTensorMode() as mode:
        fake = weight._replace(**{k: mode.from_tensor(getattr(weight, k)) for k in ("qweight", "scales", "qzeros")})
        assert dequantize_affine(*fake, torch.float16).shape == (6, 70)
    meta = weight._replace(**{k: getattr(weight, k).to("meta") for k in ("qweight", "scales", "qzeros")})
    assert dequantize_affine(*meta).device.type == "meta"
    frozen, trained = (torch.nn.Parameter(torch.empty(1), requires_grad=wanted) for wanted in (False, True))
    assert affine.direct(dequantize_affine, frozen) is dequantize_affine
    assert affine.direct(dequantize_affine, trained) is None
    with torch.no_grad():
        assert affine.direct(dequantize_affine, trained) is dequantize_affine
