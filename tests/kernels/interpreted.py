"""Comparisons of the Triton kernels with the references; `test_triton.py` runs them, interpreted or on a GPU.

Decoding must give the same bits. Products and transforms may be off the float64 truth by twice what plain torch in the
same type is off, since the order of sums differs.
"""

from __future__ import annotations

import os
from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

from llmtools.kernels import bits, ggml, grouped, hadamard, lattice, triton_common
from llmtools.kernels.ggml.native import KINDS
from tests.kernels.cases import TRITON, check
from tests.kernels.test_ggml import blocks

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels.interpreter import patch

    patch()
    DEVICE = torch.device("cpu")
else:
    DEVICE = torch.device("cuda")

HALVES = (torch.bfloat16, torch.float16)
TYPES = (*HALVES, torch.float32)
KERNELS = {package: import_module(f"{package.__name__}.triton") for package in (ggml, grouped, hadamard, lattice)}


def on_device(argument):
    return argument.to(DEVICE) if isinstance(argument, torch.Tensor) else argument


@pytest.mark.parametrize("case", TRITON.values(), ids=list(TRITON))
def test_every_op_agrees_with_its_reference(case):
    arguments = tuple(map(on_device, case.arguments()))
    check(case, case.of("triton")(*arguments), arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_ggml_rows_have_the_bits_of_the_reference(kind):
    """Also of rows that are no whole tile, and of bytes that begin at an odd address."""
    shapes = [(3, 256), (17, 768)] if ggml.TYPES[kind].weights == 256 else [(1, 32), (17, 96), (5, 544)]
    for rows, columns in shapes:
        packed = blocks(kind, rows, columns)
        odd = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].view(packed.shape).copy_(packed)
        for dtype in TYPES:
            expected = ggml.reference.dequantize_ggml(packed, kind, dtype)
            for given in (packed, odd):
                assert torch.equal(KERNELS[ggml].dequantize_ggml(given.to(DEVICE), kind, dtype).cpu(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_ggml_products_are_exact_enough(kind):
    packed = blocks(kind, 20, 512).to(DEVICE)
    dense = ggml.reference.dequantize_ggml(packed, kind)
    for tokens in (1, 3):
        for transposed in (False, True):
            x = torch.randn(tokens, 20 if transposed else 512).bfloat16().to(DEVICE)
            weight = dense if transposed else dense.T
            truth = x.double() @ weight.double()
            allowed = 2 * off(x @ weight.bfloat16(), truth) + 2**-8 * truth.abs().max().item()
            assert off(KERNELS[ggml].multiply_ggml(x, packed, kind, transposed), truth) <= allowed


# Odd on purpose: one column, rows that end within a word or a byte, groups of any size, a short last one.
AFFINE = [
    (1, 1, 2, 1, False),
    (5, 70, 3, 32, False),
    (33, 257, 4, 64, True),
    (17, 96, 2, 20, False),
    (3, 50, 8, 50, False),
    (70, 300, 3, 7, True),
    (4, 40, 5, 16, False),
    (6, 33, 1, 8, False),
]
CODEBOOK = [(5, 70, 32), (9, 45, 9), (66, 136, 64), (7, 90, 20, 3), (4, 50, 16, 8)]
LATTICE = [((3, 5), None), ((2, 3, 33), torch.uint8), ((4, 17), torch.int16)]


def draw_affine(rows, columns, width, group, symmetric):
    groups = -(-columns // group)
    codes, zeros = torch.randint(0, 2**width, (rows, columns)), torch.randint(0, 2**width, (rows, groups))
    scales = (torch.randn(rows, groups) * 0.1).to(torch.float16).to(DEVICE)
    qzeros = None if symmetric else bits.pack(zeros, width, torch.uint8).to(DEVICE)
    return bits.pack(codes, width).to(DEVICE), scales, qzeros, None, width, group, columns


def draw_codebook(rows, columns, group, width=4):
    codes, scales = torch.randint(0, 2**width, (rows, columns)), torch.rand(rows, -(-columns // group))
    table = torch.randn(2**width).to(DEVICE)
    return bits.pack(codes, width).to(DEVICE), scales.to(DEVICE), None, table, width, group, columns


def draw_lattice(shape, kind):
    codes = torch.randint(-(2**15), 2**15, shape).to(torch.int16)
    residual = None if kind is None else torch.randint(0, 2**16, shape).to(kind)
    return codes.to(DEVICE), residual if residual is None else residual.to(DEVICE), 3.45


def off(result, truth):
    return (result.double() - truth).abs().max().item() if truth.numel() else 0.0


def check_products(multiply, transposed, weight, tokens):
    """multiply(x) and transposed(g) against the float64 weight [out, in]."""
    rows, columns = weight.shape
    for dtype in TYPES:
        x, g = torch.randn(tokens, columns, device=DEVICE).to(dtype), torch.randn(tokens, rows, device=DEVICE).to(dtype)
        rounded = weight.to(dtype)
        for result, input, plain, truth in (
            (multiply(x), x, F.linear(x, rounded), F.linear(x.double(), weight)),
            (transposed(g), g, g @ rounded, g.double() @ weight),
        ):
            assert result.dtype == dtype and result.shape == plain.shape
            slack = torch.finfo(dtype).eps * off(truth, torch.zeros_like(truth))
            assert off(result, truth) <= 2 * off(plain, truth) + slack, (dtype, input.shape)


@pytest.mark.parametrize("case", AFFINE, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_affine_rows_have_the_references_bits(case, dtype):
    weight = draw_affine(*case)
    truth = grouped.reference.dequantize_grouped(*weight, dtype)
    assert torch.equal(KERNELS[grouped].dequantize_grouped(*weight, dtype), truth)


def test_affine_rows_of_other_scales_have_the_references_bits():
    qweight, scales, *rest = draw_affine(5, 64, 4, 16, False)
    for kind in (torch.bfloat16, torch.float32):
        weight = (qweight, scales.to(kind), *rest)
        truth = grouped.reference.dequantize_grouped(*weight, torch.bfloat16)
        assert torch.equal(KERNELS[grouped].dequantize_grouped(*weight, torch.bfloat16), truth)


def test_a_slice_of_rows_decodes_like_the_whole():
    qweight, scales, qzeros, *rest = draw_affine(9, 70, 3, 32, False)
    whole = KERNELS[grouped].dequantize_grouped(qweight, scales, qzeros, *rest, torch.bfloat16)
    part = KERNELS[grouped].dequantize_grouped(qweight[2:7], scales[2:7], qzeros[2:7], *rest, torch.bfloat16)
    assert torch.equal(part, whole[2:7])


@pytest.mark.parametrize("case", CODEBOOK, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_codebook_rows_have_the_references_bits(case, dtype):
    weight = draw_codebook(*case)
    truth = grouped.reference.dequantize_grouped(*weight, dtype)
    assert torch.equal(KERNELS[grouped].dequantize_grouped(*weight, dtype), truth)


@pytest.mark.parametrize("case", LATTICE, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_lattice_points_have_the_references_bits(case, dtype):
    weight = draw_lattice(*case)
    truth = lattice.reference.dequantize_lattice(*weight, dtype)
    assert torch.equal(KERNELS[lattice].dequantize_lattice(*weight, dtype), truth)


def test_every_lattice_point_has_the_references_bits():
    codes = torch.arange(2**16, device=DEVICE).to(torch.int16).view(64, -1)
    points = torch.arange(2**8, device=DEVICE).to(torch.uint8).repeat(2**8).view(64, -1)
    for residual in (None, points, codes.flip(0)):
        truth = lattice.reference.dequantize_lattice(codes, residual, 2.04, torch.float32)
        assert torch.equal(KERNELS[lattice].dequantize_lattice(codes, residual, 2.04, torch.float32), truth)


@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
@pytest.mark.parametrize("case", AFFINE[:6], ids=str)
def test_affine_products_are_as_accurate_as_plain_torch(case, tokens):
    weight, kernels = draw_affine(*case), KERNELS[grouped]
    truth = grouped.reference.dequantize_grouped(*weight, torch.float64)
    check_products(
        lambda x: kernels.multiply_grouped(x, *weight, False),
        lambda g: kernels.multiply_grouped(g, *weight, True),
        truth,
        tokens,
    )


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("case", CODEBOOK, ids=str)
def test_codebook_products_are_as_accurate_as_plain_torch(case, tokens):
    weight, kernels = draw_codebook(*case), KERNELS[grouped]
    truth = grouped.reference.dequantize_grouped(*weight, torch.float64)
    check_products(
        lambda x: kernels.multiply_grouped(x, *weight, False),
        lambda g: kernels.multiply_grouped(g, *weight, True),
        truth,
        tokens,
    )


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", [None, torch.uint8, torch.int16], ids=str)
def test_lattice_products_are_as_accurate_as_plain_torch(kind, tokens):
    weight, kernels = draw_lattice((70, 9), kind), KERNELS[lattice]
    truth = lattice.reference.dequantize_lattice(*weight, torch.float64)
    check_products(
        lambda x: kernels.multiply_lattice(x, *weight, False),
        lambda g: kernels.multiply_lattice(g, *weight, True),
        truth,
        tokens,
    )


@pytest.mark.parametrize("shape", [(6, 1100), (140, 40)], ids=str)
def test_a_split_sum_is_the_same_sum_and_the_same_bits_each_time(monkeypatch, shape):
    monkeypatch.setattr(triton_common, "_programs", lambda device: 64)
    weight, kernels = draw_affine(*shape, 4, 64, False), KERNELS[grouped]
    truth = grouped.reference.dequantize_grouped(*weight, torch.float64)
    for tokens in (1, 2):
        check_products(
            lambda x: kernels.multiply_grouped(x, *weight, False),
            lambda g: kernels.multiply_grouped(g, *weight, True),
            truth,
            tokens,
        )
        x = torch.randn(tokens, shape[1], device=DEVICE).to(torch.bfloat16)
        assert torch.equal(kernels.multiply_grouped(x, *weight, False), kernels.multiply_grouped(x, *weight, False))


def test_more_tokens_than_a_launch_takes_and_strided_ones_are_multiplied():
    weight = draw_affine(7, 40, 4, 8, False)
    x = torch.randn(40, triton_common.MOST_TOKENS + 3, device=DEVICE).T
    truth = x.double() @ grouped.reference.dequantize_grouped(*weight, torch.float64).T
    torch.testing.assert_close(
        KERNELS[grouped].multiply_grouped(x, *weight, False).double(), truth, rtol=1e-5, atol=1e-5
    )


def test_wider_types_go_to_the_reference():
    weight = draw_affine(3, 20, 4, 8, False)
    truth = grouped.reference.dequantize_grouped(*weight, torch.float64)
    assert torch.equal(KERNELS[grouped].dequantize_grouped(*weight, torch.float64), truth)
    x = torch.randn(2, 20, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(KERNELS[grouped].multiply_grouped(x, *weight, False), x @ truth.T)


@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("n", [1, 2, 8, 21, 24, 64, 96, 112, 292, 300, 688, 1024])
def test_rotations_are_as_accurate_as_the_reference(n, transpose):
    rule = hadamard.rule_for(n)
    for lead in ((1,), (2, 3)):
        for dtype in TYPES:
            x = torch.randn(*lead, n, device=DEVICE).to(dtype)
            result = KERNELS[hadamard].hadamard(x, rule, transpose)
            truth = hadamard.reference.hadamard(x.double(), rule, transpose)
            plain = hadamard.reference.hadamard(x, rule, transpose)
            assert result.dtype == dtype and result.shape == x.shape
            assert off(result, truth) <= 2 * off(plain, truth) + torch.finfo(dtype).eps / 8, (dtype, rule)


def test_a_rotation_is_the_transform_between_two_products():
    x, before, after = torch.randn(3, 93, device=DEVICE), torch.randn(93, device=DEVICE), torch.randn(90, device=DEVICE)
    arguments = (hadamard.rule_for(96), 96, before, after, 90, 0.5, True)
    expected = hadamard.reference.rotate(x, *arguments)
    torch.testing.assert_close(KERNELS[hadamard].rotate(x, *arguments), expected)


def test_rules_that_the_kernel_does_not_know_go_to_the_reference():
    rule = "paley1:11*paley1:19"
    x = torch.randn(2, 240, device=DEVICE)
    assert torch.equal(KERNELS[hadamard].hadamard(x, rule, False), hadamard.reference.hadamard(x, rule, False))
