"""ggml's blocks: decoded as the package gguf decodes them, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtools.errors import InputError
from llmtools.kernels.ggml import (
    ENCODINGS,
    NUMBERS,
    TYPES,
    dequantize_ggml,
    encode_ggml,
    multiply_ggml,
    reference,
)
from llmtools.kernels.ggml.native import KINDS


def blocks(kind: str, rows: int, columns: int, *, finite: bool = True) -> Tensor:
    """Random bytes [rows, row_bytes]; with `finite`, all float16 numbers among them are moderate."""
    each = TYPES[kind]
    found = torch.randint(0, 256, (rows * columns // each.weights, each.bytes), dtype=torch.uint8)
    if finite:
        for at in each.halves:
            found[:, at + 1] = found[:, at + 1] & 0x83 | 0x2C
        if not each.halves:
            found[:, 55] = found[:, 55] & 0x8F | 0x20
            found[:, 53] = found[:, 53] & 0x0F | 0xC0
    return found.reshape(rows, columns // each.weights * each.bytes)


@pytest.mark.parametrize("kind", TYPES)
def test_rows_are_those_of_the_package_gguf(kind: str) -> None:
    gguf: Any = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    assert NUMBERS[int(number)] == kind and gguf.GGML_QUANT_SIZES[number] == TYPES[kind][1:3]
    for finite in (True, False):
        packed = blocks(kind, 12, 1024, finite=finite)
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), number))
        got = dequantize_ggml(packed, kind, torch.float32)
        assert not finite or bool(torch.isfinite(got).all())
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit() | got.isnan(), expected.signbit() | expected.isnan())


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("kind", TYPES)
def test_decoding_gives_the_bits_of_the_reference(kind: str) -> None:
    for rows, columns, finite in ((1, 256, True), (7, 768, False), (40, 1024, True), (0, 256, True)):
        packed = blocks(kind, rows, columns, finite=finite)
        for dtype in FLOATS:
            got, expected = dequantize_ggml(packed, kind, dtype), reference.dequantize_ggml(packed, kind, dtype)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_strides_do_not_matter(kind: str) -> None:
    packed = blocks(kind, 24, 512)
    whole = dequantize_ggml(packed, kind, torch.bfloat16)
    for rows in (slice(0, 1), slice(5, 17), slice(3, 24, 2), slice(4, 4)):
        assert torch.equal(dequantize_ggml(packed[rows], kind, torch.bfloat16), whole[rows])
    assert torch.equal(dequantize_ggml(packed.T.contiguous().T, kind, torch.bfloat16), whole)


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_as_exact_as_those_of_a_dense_layer(kind: str, dtype: torch.dtype) -> None:
    """Also where the columns are no multiple of the 256 that are multiplied at a time."""
    for columns in (32, 96, 544, 768) if TYPES[kind].weights == 32 else (256, 768):
        packed = blocks(kind, 37, columns)
        dense = reference.dequantize_ggml(packed, kind).double()
        for tokens in (0, 1, 3, 4, 19, 70):
            x, g = torch.randn(tokens, columns).to(dtype), torch.randn(tokens, 37).to(dtype)
            for got, given, weight in (
                (multiply_ggml(x, packed, kind, False), x, dense.T),
                (multiply_ggml(g, packed, kind, True), g, dense),
            ):
                truth = given.double() @ weight
                assert got.dtype == dtype and got.shape == truth.shape
                if tokens:
                    plain = (given @ weight.to(dtype) - truth).abs().max()
                    assert (got - truth).abs().max() <= 2 * plain + 4 * torch.finfo(
                        torch.float32
                    ).eps * truth.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_each_column_meets_its_own_activation(kind: str) -> None:
    """A product with one activation that is not zero is a column, rounded: 2^-16 for the activation, then bfloat16."""
    packed = blocks(kind, 5, 512)
    dense = reference.dequantize_ggml(packed, kind)
    for column in (0, 15, 16, 31, 32, 100, 255, 256, 300, 511):
        x = torch.zeros(1, 512, dtype=torch.bfloat16)
        x[0, column] = -1.5
        torch.testing.assert_close(
            multiply_ggml(x, packed, kind, False).float()[0], -1.5 * dense[:, column], rtol=2**-8, atol=1e-4
        )


def test_an_outlier_spoils_its_own_columns_alone() -> None:
    packed = blocks("Q4_1", 16, 256)
    dense, x = reference.dequantize_ggml(packed, "Q4_1").double(), torch.randn(2, 256).bfloat16()
    x[0, 70] = 3e4
    for t in range(2):
        truth = dense @ x[t].double()
        lost = 2**-15 * (dense.abs() * x[t].double().abs().unflatten(0, (8, 32)).amax(1).repeat_interleave(32)).sum(1)
        got = multiply_ggml(x, packed, "Q4_1", False)[t].double()
        assert bool(((got - truth).abs() <= lost + 2**-8 * truth.abs()).all())


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_what_is_not_finite_stays_where_it_is(kind: str) -> None:
    packed, x = blocks(kind, 6, 256), torch.randn(3, 256).half()
    x[1, 7] = torch.inf
    got = multiply_ggml(x, packed, kind, False)
    assert not bool(torch.isfinite(got[1]).any())
    assert bool(torch.isfinite(got[[0, 2]]).all())


def test_threads_do_not_matter() -> None:
    packed, threads = blocks("Q4_K", 301, 512), torch.get_num_threads()
    x, g, results = torch.randn(5, 512), torch.randn(5, 301), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            products = multiply_ggml(x, packed, "Q4_K", False), multiply_ggml(g, packed, "Q4_K", True)
            results.append((dequantize_ggml(packed, "Q4_K", torch.float32), *products))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"do not fit a weight; \[t, 512\] is expected"):
        multiply_ggml(torch.randn(2, 511), blocks("Q4_1", 4, 512), "Q4_1", False)


@pytest.mark.parametrize("kind", ENCODINGS)
def test_blocks_encoded_from_their_own_values_keep_their_bytes(kind: str) -> None:
    packed = blocks(kind, 12, 512)
    assert torch.equal(encode_ggml(dequantize_ggml(packed, kind), packed, kind), packed)


@pytest.mark.parametrize("kind", ENCODINGS)
def test_encoding_gives_the_nearest_value_and_leaves_the_scales(kind: str) -> None:
    """Against a search over all codes, each of them written everywhere."""
    packed, size = blocks(kind, 6, 512), TYPES[kind].bytes
    values = dequantize_ggml(packed, kind)
    values = values + 0.2 * values.abs().mean() * torch.randn(values.shape)
    made = encode_ggml(values, packed, kind)
    how = ENCODINGS[kind]

    def with_code(source: Tensor, code: int) -> Tensor:
        flat = source.reshape(-1, size).clone()
        how.write(flat, torch.full((len(flat), TYPES[kind].weights), code, dtype=torch.uint8))
        return flat.view_as(source)

    assert torch.equal(with_code(made, 0), with_code(packed, 0))  # all but the codes
    least = (dequantize_ggml(packed, kind) - values).abs()
    for code in range(how.least, how.top + 1):
        least = torch.minimum(least, (dequantize_ggml(with_code(packed, code), kind) - values).abs())
    error = (dequantize_ggml(made, kind) - values).abs()
    torch.testing.assert_close(error, least, rtol=1e-3, atol=1e-6 * float(values.abs().max()))
    assert not torch.equal(made, packed)
