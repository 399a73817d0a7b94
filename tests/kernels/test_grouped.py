"""Codes in groups: the fast decoders give the reference's bits, the products are as exact as those of a dense layer."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtools.errors import InputError
from llmtools.kernels import ops
from llmtools.kernels.bits import pack
from llmtools.kernels.grouped import dequantize_grouped, encode_grouped, multiply_grouped, reference
from llmtools.quant.grids.codebook import NF4

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
    table: Tensor | None
    bits: int
    group_size: int
    in_features: int


def draw(
    out: int, n: int, group_size: int, bits: int, symmetric: bool = False, scales: torch.dtype = torch.float16
) -> Weight:
    groups = -(-n // group_size)
    zeros = None if symmetric else pack(torch.randint(0, 2**bits, (out, groups)), bits, torch.uint8)
    scale = (torch.randn(out, groups) * 0.1).to(scales)
    return Weight(pack(torch.randint(0, 2**bits, (out, n)), bits), scale, zeros, None, bits, group_size, n)


def draw_codebook(
    out: int, n: int, group_size: int, bits: int = 4, scales: torch.dtype = torch.float32, table: Tensor | None = None
) -> Weight:
    codes, groups = torch.randint(0, 2**bits, (out, n)), -(-n // group_size)
    levels = table if table is not None else torch.tensor(NF4) if bits == 4 else torch.randn(2**bits).sort().values
    return Weight(pack(codes, bits), torch.randn(out, groups).to(scales), None, levels, bits, group_size, n)


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
                got = dequantize_grouped(*weight, dtype)
                assert got.dtype == dtype and torch.equal(got, reference.dequantize_grouped(*weight, dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("out, n, group_size", SHAPES[:8])
def test_codebooks_decode_to_the_bits_of_the_reference(out: int, n: int, group_size: int, bits: int) -> None:
    for scales in TYPES:
        weight = draw_codebook(out, n, group_size, bits, scales)
        for dtype in (*TYPES, torch.float64):
            assert torch.equal(dequantize_grouped(*weight, dtype), reference.dequantize_grouped(*weight, dtype))


def test_a_uniform_grid_is_the_codebook_of_its_codes() -> None:
    """Of a table that counts from the zero point on, by either way."""
    for bits in (2, 3, 4):
        weight = draw(6, 100, 32, bits, symmetric=True)
        table = torch.arange(2**bits, dtype=torch.float32) - 2 ** (bits - 1)
        assert torch.equal(dequantize_grouped(*weight), dequantize_grouped(*weight._replace(table=table)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_decodes_alike(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 300))
    group_size, bits = data.draw(st.integers(1, n)), data.draw(st.sampled_from([2, 3, 4, 8]))
    weight = draw(data.draw(st.integers(0, 4)), n, group_size, bits, data.draw(st.booleans()))
    dtype = data.draw(st.sampled_from(TYPES))
    assert torch.equal(dequantize_grouped(*weight, dtype), reference.dequantize_grouped(*weight, dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1e-45, 1e-39, 2.0**-126, 3.1e38, 0.0, -0.5, float("inf"), float("nan")])
def test_extreme_scales_round_alike(scale: float, dtype: torch.dtype) -> None:
    weight = draw(2, 64, 32, 4)._replace(scales=torch.full((2, 2), scale))
    got, expected = dequantize_grouped(*weight, dtype), reference.dequantize_grouped(*weight, dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1e-45, 1e-39, 2e-38, 2.0**-124, 3.4e38, 0.0, -2.0])
def test_extreme_scales_and_levels_round_alike(scale: float, dtype: torch.dtype) -> None:
    table = torch.tensor(NF4)
    for levels in (table, table * 1e-30, table * 1e30, torch.zeros(16)):
        weight = draw_codebook(2, 64, 32, table=levels)._replace(scales=torch.full((2, 2), scale))
        got, expected = dequantize_grouped(*weight, dtype), reference.dequantize_grouped(*weight, dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 17), slice(3, 24, 2), slice(4, 4)], ids=str)
def test_rows_of_codebooks_are_exact_slices(rows: slice) -> None:
    weight = draw_codebook(24, 96, 32)
    part = weight._replace(qweight=weight.qweight[rows], scales=weight.scales[rows])
    assert torch.equal(dequantize_grouped(*part), dequantize_grouped(*weight)[rows])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_and_strides_do_not_matter(bits: int) -> None:
    weight = draw(24, 96, 32, bits)
    whole = dequantize_grouped(*weight, torch.bfloat16)
    assert weight.qzeros is not None
    for rows in (slice(0, 1), slice(5, 17), slice(3, 24, 2), slice(23, 24), slice(4, 4)):
        part = weight._replace(qweight=weight.qweight[rows], scales=weight.scales[rows], qzeros=weight.qzeros[rows])
        assert torch.equal(dequantize_grouped(*part, torch.bfloat16), whole[rows])
    turned = weight._replace(qweight=weight.qweight.T.contiguous().T, scales=weight.scales.T.contiguous().T)
    assert torch.equal(dequantize_grouped(*turned, torch.bfloat16), whole)


def test_threads_do_not_matter() -> None:
    weight, x, threads = draw(301, 520, 64, 3), torch.randn(5, 520), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((dequantize_grouped(*weight), multiply_grouped(x, *weight, False)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("out, n, group_size", SHAPES)
def test_products_are_as_exact_as_those_of_a_dense_layer(
    out: int, n: int, group_size: int, bits: int, dtype: torch.dtype
) -> None:
    weight = draw(out, n, group_size, bits)
    dense = reference.dequantize_grouped(*weight)
    for tokens in (0, 1, 2, 3, 5, 16, 67):
        if tokens:
            x, g = torch.randn(tokens, n).to(dtype), torch.randn(tokens, out).to(dtype)
            assert_as_exact_as_dense(multiply_grouped(x, *weight, False), x, dense.T)
            assert_as_exact_as_dense(multiply_grouped(g, *weight, True), g, dense)
        else:
            assert multiply_grouped(torch.empty(0, n, dtype=dtype), *weight, False).shape == (0, out)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("out, n, group_size", SHAPES[:8])
def test_products_with_codebooks_are_as_exact_as_those_of_a_dense_layer(
    out: int, n: int, group_size: int, bits: int, dtype: torch.dtype
) -> None:
    weight = draw_codebook(out, n, group_size, bits)
    dense = reference.dequantize_grouped(*weight)
    for tokens in (1, 4, 19):
        x, g = torch.randn(tokens, n).to(dtype), torch.randn(tokens, out).to(dtype)
        assert_as_exact_as_dense(multiply_grouped(x, *weight, False), x, dense.T)
        assert_as_exact_as_dense(multiply_grouped(g, *weight, True), g, dense)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_activations_of_any_size_are_multiplied(bits: int, dtype: torch.dtype) -> None:
    weight = draw(6, 192, 64, bits)
    dense = reference.dequantize_grouped(*weight)
    for tokens in (1, 5):
        x = torch.randn(tokens, 192).to(dtype)
        for change in (x * 1e-4, x * 1e4, torch.where(torch.rand_like(x) < 0.01, x * 1000, x), x * 0):
            assert_as_exact_as_dense(multiply_grouped(change, *weight, False), change, dense.T)
        for odd in (float("inf"), float("nan")):
            spoiled = x.clone()
            spoiled[0, 70] = odd
            got = multiply_grouped(spoiled, *weight, False)
            assert not torch.isfinite(got[0]).any()
            assert tokens == 1 or torch.isfinite(got[1:]).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_an_outlier_in_a_long_row_does_not_drown_the_rest(dtype: torch.dtype) -> None:
    weight = draw(16, 11008, 11008, 4)
    x = (torch.randn(2, 11008) * 0.05).to(dtype)
    x[:, 4321] = 100
    assert_as_exact_as_dense(multiply_grouped(x, *weight, False), x, reference.dequantize_grouped(*weight).T)


def test_activations_of_another_width_are_refused() -> None:
    weight = draw(8, 64, 32, 4)
    for wrong in (torch.randn(2, 32), torch.randn(2, 128), torch.randn(64)):
        with pytest.raises(InputError, match="64 to sum"):
            multiply_grouped(wrong, *weight, False)


def test_function_transforms_go_through_the_dispatcher() -> None:
    weight = draw(8, 64, 32, 4)
    x = torch.randn(3, 2, 64)
    each = torch.stack([multiply_grouped(part, *weight, False) for part in x])
    assert torch.equal(torch.vmap(lambda part: multiply_grouped(part, *weight, False))(x), each)


def test_inputs_of_the_product_may_be_strided() -> None:
    weight = draw(8, 64, 32, 4)
    x = torch.randn(64, 3)
    assert torch.equal(multiply_grouped(x.T, *weight, False), multiply_grouped(x.T.contiguous(), *weight, False))


def test_no_row_and_no_group_reads_its_neighbour() -> None:
    """Rows and groups of infinite scale stay where they are."""
    weight = draw(3, 100, 20, 3)
    scales = weight.scales.clone()
    scales[1] = float("inf")
    scales[:, 2] = float("inf")
    value = dequantize_grouped(*weight._replace(scales=scales))
    finite = torch.isfinite(value)
    assert finite[0, :40].all() and finite[2, 60:].all() and not finite[1].any() and not finite[:, 40:60].any()


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("weight", [*(draw(6, 70, 32, bits) for bits in (2, 3, 4, 8)), draw_codebook(6, 70, 32)])
def test_the_ops_are_well_behaved(weight: Weight, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("llmtools.kernels.grouped.native.library", lambda: None)
    ops = torch.ops.llmtools
    torch.library.opcheck(ops.dequantize_grouped.default, (*weight, torch.bfloat16))
    torch.library.opcheck(ops.multiply_grouped.default, (torch.randn(2, 70), *weight, False))
    torch.library.opcheck(ops.multiply_grouped.default, (torch.randn(2, 6), *weight, True))


@pytest.mark.parametrize("weight", [draw(6, 70, 32, 3), draw_codebook(6, 70, 32)], ids=["uniform", "codebook"])
def test_compiled_code_gives_the_same_bits(weight: Weight) -> None:
    for function, arguments in (
        (dequantize_grouped, (*weight, torch.bfloat16)),
        (multiply_grouped, (torch.randn(2, 70), *weight, False)),
        (multiply_grouped, (torch.randn(2, 6), *weight, True)),
    ):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), function(*arguments))


def test_the_shortcut_past_the_dispatcher_is_for_plain_tensors_only() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = draw(6, 70, 32, 3)
    with FakeTensorMode() as mode:
        fake = weight._replace(**{k: mode.from_tensor(getattr(weight, k)) for k in ("qweight", "scales", "qzeros")})
        assert dequantize_grouped(*fake, torch.float16).shape == (6, 70)
    meta = weight._replace(**{k: getattr(weight, k).to("meta") for k in ("qweight", "scales", "qzeros")})
    assert dequantize_grouped(*meta).device.type == "meta"
    frozen, trained = (torch.nn.Parameter(torch.empty(1), requires_grad=wanted) for wanted in (False, True))
    assert ops.direct(frozen) and not ops.direct(trained)
    with torch.no_grad():
        assert ops.direct(trained)


@pytest.mark.parametrize("kind", ["uniform", "shifted", "codebook"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("out, n, group_size", SHAPES)
def test_encoding_gives_the_bits_of_the_reference(kind: str, bits: int, out: int, n: int, group_size: int) -> None:
    if kind == "codebook" and bits > 4:
        pytest.skip("codebooks have 16 levels at most")
    groups = -(-n // group_size)
    values, scales = 3 * torch.randn(out, n), torch.randn(out, groups) * 0.2
    values[:, ::5] = (values[:, ::5] * 8).round() / 16  # half-way between two codes, for some scales
    scales[:, ::3] = 0.125
    values[0, 0] = 1e30
    if kind != "codebook":
        values[-1, -1] = float("nan")
    table = torch.randn(2**bits).sort().values if kind == "codebook" else None
    zeros = None if table is not None else torch.rand(out, groups) * 2**bits
    if zeros is not None and kind == "uniform":
        zeros = zeros.floor()
    given = (values, scales, zeros, table, bits, group_size, kind == "shifted")
    got = encode_grouped(*given)
    assert torch.equal(got, reference.encode_grouped(*given))
    if table is not None:
        scales.abs_()  # with a negative scale levels fall
    packed = (encode_grouped(*given), scales, None, table, bits, group_size, n)
    if table is not None:  # the nearest of all levels
        decoded = reference.dequantize_grouped(*packed)
        spread = scales.repeat_interleave(group_size, 1)[:, :n]
        least = (spread[..., None] * table - values[..., None]).abs().amin(-1)
        torch.testing.assert_close((decoded - values).abs(), least)
