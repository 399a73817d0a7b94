"""Codebooks: the fast decoder gives the reference's bits, the product for few tokens is as exact as a dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtools.kernels.bits import pack
from llmtools.kernels.codebook import dequantize_codebook, multiply_codebook, multiply_transposed_codebook, reference
from llmtools.quant.grids.codebook import NF4

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (5, 1, 1),
    (5, 7, 3),
    (4, 33, 33),
    (3, 64, 8),
    (3, 129, 31),
    (2, 256, 64),
    (7, 515, 48),
]  # out, in, group_size


def draw(
    out: int, n: int, group_size: int, scales: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    codes, groups = torch.randint(0, 16, (out, n)), -(-n // group_size)
    return pack(codes, 4), torch.randn(out, groups).to(scales), torch.tensor(NF4), group_size, n


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
@pytest.mark.parametrize("scales", TYPES)
@pytest.mark.parametrize("out, n, group_size", SHAPES)
def test_decoding_gives_the_bits_of_the_reference(
    out: int, n: int, group_size: int, scales: torch.dtype, dtype: torch.dtype
) -> None:
    weight = draw(out, n, group_size, scales)
    assert torch.equal(dequantize_codebook(*weight, dtype), reference.dequantize_codebook(*weight, dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1e-45, 1e-39, 2e-38, 2.0**-124, 3.4e38, 0.0, -2.0])
def test_extreme_scales_and_levels_round_alike(scale: float, dtype: torch.dtype) -> None:
    codes, scales, table, *sizes = draw(2, 64, 32)
    for levels in (table, table * 1e-30, table * 1e30, torch.zeros(16)):
        weight = (codes, torch.full_like(scales, scale), levels, *sizes)
        got, expected = dequantize_codebook(*weight, dtype), reference.dequantize_codebook(*weight, dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 17), slice(3, 24, 2), slice(4, 4)], ids=str)
def test_rows_are_exact_slices(rows: slice) -> None:
    codes, scales, *rest = draw(24, 96, 32)
    whole = dequantize_codebook(codes, scales, *rest)
    assert torch.equal(dequantize_codebook(codes[rows], scales[rows], *rest), whole[rows])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("out, n, group_size", SHAPES)
def test_few_tokens_are_multiplied_as_exactly_as_by_a_dense_layer(
    out: int, n: int, group_size: int, dtype: torch.dtype
) -> None:
    weight = draw(out, n, group_size)
    dense = reference.dequantize_codebook(*weight)
    for tokens in (1, 4, 19):
        x, g = torch.randn(tokens, n).to(dtype), torch.randn(tokens, out).to(dtype)
        for got, a, b in (
            (multiply_codebook(x, *weight), x, dense.T),
            (multiply_transposed_codebook(g, *weight), g, dense),
        ):
            truth = a.double() @ b.double()
            slack = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
            assert (got - truth).abs().max() <= 2 * (a @ b.to(dtype) - truth).abs().max() + slack


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
def test_the_ops_are_well_behaved(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("llmtools.kernels.grouped._functions", lambda: None)
    weight = draw(6, 70, 32)
    ops = torch.ops.llmtools
    torch.library.opcheck(ops.dequantize_codebook.default, (*weight, torch.bfloat16))
    torch.library.opcheck(ops.multiply_codebook.default, (torch.randn(2, 70), *weight))
    torch.library.opcheck(ops.multiply_transposed_codebook.default, (torch.randn(2, 6), *weight))


def test_compiled_code_gives_the_same_bits() -> None:
    weight = draw(6, 70, 32)
    torch.compiler.reset()
    compiled = torch.compile(dequantize_codebook, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*weight, torch.bfloat16), dequantize_codebook(*weight, torch.bfloat16))
