"""Kernels alone, on one 5632 × 2048 weight (TinyLlama's up_proj): decoding rows, small-batch products (GEMV), Hadamard;
ggml's blocks beside our own 4 bits in groups of 32; products of many tokens by several shapes.

Decoding goes a block of rows at a time into one place, as in a layer, where the result stays in cache, and is held
against writing as many bytes there. The small-batch product (GEMV) is held against reading the packed bytes at the
speed of a copy, or against a product of matrices of that many operations, whichever takes longer.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtools.kernels.bits import pack
from llmtools.kernels.ggml import TYPES, dequantize_ggml, multiply_ggml
from llmtools.kernels.ggml import reference as ggml
from llmtools.kernels.ggml.native import KINDS
from llmtools.kernels.grouped import dequantize_grouped, multiply_grouped
from llmtools.kernels.grouped import reference as grouped
from llmtools.kernels.hadamard import hadamard, rule_for
from llmtools.kernels.hadamard import reference as rotated
from llmtools.kernels.lattice import RESIDUAL_SCALE, dequantize_lattice, multiply_lattice
from llmtools.kernels.lattice import reference as lattice
from llmtools.kernels.trellis import dequantize_trellis, multiply_trellis
from llmtools.kernels.trellis import reference as trellis
from llmtools.quant import RTN, materialize
from llmtools.quant.grids.codebook import NF4

from .run import Machine, Problem, case, main

OUT, IN, GROUP, BLOCK = 5632, 2048, 64, 256
SHAPES = (768, 768), (2048, 768), (768, 2048), (2048, 2048), (5632, 2048), (2048, 5632)  # [out, in], 160M and 1.1B

Weight = tuple[Any, ...]


def uniform_weight(bits: int, group: int = GROUP) -> Weight:
    """Random packed tensors, as the op takes them."""
    codes, zeros = torch.randint(0, 2**bits, (OUT, IN)), torch.randint(0, 2**bits, (OUT, IN // group))
    scales = (torch.rand(OUT, IN // group) * 0.01).half()
    return pack(codes, bits), scales, pack(zeros, bits, torch.uint8), None, bits, group, IN


def codebook_weight() -> Weight:
    codes = torch.randint(0, 16, (OUT, IN))
    return pack(codes, 4), torch.rand(OUT, IN // GROUP) * 0.01, None, torch.tensor(NF4), 4, GROUP, IN


def by_blocks(dequantize: Callable[..., Tensor], weight: Weight, dtype: torch.dtype) -> Callable[[], None]:
    """Decodes the whole weight, BLOCK rows at a time."""
    per_row = [isinstance(part, Tensor) and len(part) == OUT for part in weight]

    def run() -> None:
        for start in range(0, OUT, BLOCK):
            rows = slice(start, start + BLOCK)
            dequantize(*(part[rows] if rowwise else part for part, rowwise in zip(weight, per_row, strict=True)), dtype)

    return run


def lattice_weight(bits: int) -> Weight:
    codes = torch.randint(-(2**15), 2**15, (OUT, IN // 8), dtype=torch.int16)
    residual = {2: None, 3: torch.randint(0, 256, codes.shape, dtype=torch.uint8), 4: codes.flip(0)}[bits]
    return codes, residual, RESIDUAL_SCALE[bits]


def ggml_weight(kind: str) -> Weight:
    """Random blocks whose scales are about 2^-10, as the op takes them."""
    each = TYPES[kind]
    blocks = torch.randint(0, 256, (OUT, IN // each.weights, each.bytes), dtype=torch.uint8)
    for at in each.halves:
        blocks[..., at + 1] = blocks[..., at + 1] & 0x83 | 0x14
    return blocks.flatten(1), kind


def packed_bytes(weight: Weight) -> int:
    return sum(part.nbytes for part in weight if isinstance(part, Tensor))


def kinds() -> Iterator[tuple[str, Weight, Any, Any, Any]]:
    for bits in (4, 3, 2, 8):
        yield f"{bits} bits", uniform_weight(bits), dequantize_grouped, multiply_grouped, grouped.dequantize_grouped
    yield "nf4", codebook_weight(), dequantize_grouped, multiply_grouped, grouped.dequantize_grouped
    for bits in (2, 3, 4):
        yield (
            f"lattice, {bits} bits",
            lattice_weight(bits),
            dequantize_lattice,
            multiply_lattice,
            lattice.dequantize_lattice,
        )
    for bits in (2, 3, 4):
        packed = torch.randint(-(2**15), 2**15, (OUT, IN // 16 * bits), dtype=torch.int16)
        yield f"trellis, {bits} bits", (packed, bits, 12, "3inst"), trellis_rows, multiply_trellis, trellis_reference


def trellis_rows(packed: Tensor, bits: int, state_bits: int, code: str, dtype: torch.dtype) -> Tensor:
    return dequantize_trellis(packed, bits, state_bits, code, dtype=dtype)


def trellis_reference(packed: Tensor, bits: int, state_bits: int, code: str, dtype: torch.dtype) -> Tensor:
    return trellis.dequantize_trellis(packed, bits, state_bits, code, "rows", 0, len(packed), dtype)


@case("decode")
def decode(machine: Machine) -> Iterator[Problem]:
    """Rows of a weight to bfloat16 and float32, beside the reference."""
    for name, weight, dequantize, _, reference in kinds():
        for dtype in (torch.bfloat16, torch.float32):

            def check(
                weight: Weight = weight, dtype: torch.dtype = dtype, ours: Any = dequantize, its: Any = reference
            ) -> None:
                assert torch.equal(ours(*weight, dtype), its(*weight, dtype))

            yield Problem(
                f"{name} to {str(dtype).removeprefix('torch.')}",
                check,
                {"native": by_blocks(dequantize, weight, dtype)},
                {"reference": by_blocks(reference, weight, dtype)},
                OUT * IN * dtype.itemsize / machine.fill_bandwidth,
                "writing the result, in cache",
            )


@case("multiply")
def multiply(machine: Machine) -> Iterator[Problem]:
    """x Wᵀ for a small batch (GEMV) in bfloat16, beside the dense product."""
    for name, weight, dequantize, product, _ in kinds():
        dense = dequantize(*weight, torch.float32)
        half = dense.bfloat16()
        for tokens in (1, 4, 16, 32):
            x = torch.randn(tokens, IN).bfloat16()

            def check(x: Tensor = x, weight: Weight = weight, dense: Tensor = dense, product: Any = product) -> None:
                truth = x.double() @ dense.double().T
                assert (product(x, *weight, False) - truth).abs().max() <= 2**-7 * truth.abs().max()

            memory, products = packed_bytes(weight) / machine.copy_bandwidth, 2 * tokens * OUT * IN
            yield Problem(
                f"{name}, {tokens} tokens",
                check,
                {"GEMV": lambda x=x, weight=weight, product=product: product(x, *weight, False)},
                {"bf16 dense": lambda x=x, half=half: F.linear(x, half)},
                max(memory, products / machine.best_matmul_speed),
                "reading packed bytes, or the product",
            )


@case("products")
def products(machine: Machine) -> Iterator[Problem]:
    """x Wᵀ and g W of many tokens in bfloat16, as this processor was measured to compute them, beside dense weights."""
    for (out, n), bits in itertools.product(SHAPES, (4, 2)):
        quantizer = RTN(bits=bits, clip=False)
        packed = quantizer.quantize(torch.randn(out, n))
        dense = quantizer.dequantize(packed)
        half = dense.bfloat16()
        for tokens in (128, 512, 2048):
            x, grad = torch.randn(tokens, n).bfloat16(), torch.randn(tokens, out).bfloat16()

            def ours(x: Tensor = x, grid: Any = quantizer.grid, packed: Any = packed) -> Tensor:
                return materialize.product(x, grid, packed)

            def transposed(g: Tensor = grad, grid: Any = quantizer.grid, packed: Any = packed, n: int = n) -> Tensor:
                return materialize.gradient(g, grid, packed, n)

            def check(x: Tensor = x, dense: Tensor = dense, ours: Any = ours) -> None:
                truth = x.double() @ dense.double().T
                assert (ours() - truth).abs().max() <= 2**-7 * truth.abs().max()

            def check_transposed(g: Tensor = grad, dense: Tensor = dense, ours: Any = transposed) -> None:
                truth = g.double() @ dense.double()
                assert (ours() - truth).abs().max() <= 2**-7 * truth.abs().max()

            for name, checked, own, bf16, float32 in (
                (
                    "forward",
                    check,
                    ours,
                    lambda x=x, w=half: x @ w.T,
                    lambda x=x, w=dense: (x.float() @ w.T).bfloat16(),
                ),
                (
                    *("transposed", check_transposed, transposed),
                    *(lambda g=grad, w=half: g @ w, lambda g=grad, w=dense: (g.float() @ w).bfloat16()),
                ),
            ):
                yield Problem(
                    f"{name}, {bits} bits, {out} x {n}, {tokens} tokens",
                    checked,
                    {"packed": own},
                    {"bf16 dense": bf16, "float32 dense": float32},
                    2 * tokens * out * n / machine.best_matmul_speed,
                    "the product",
                )


@case("ggml")
def blocks_of_ggml(machine: Machine) -> Iterator[Problem]:
    """x Wᵀ in bfloat16 and rows to bfloat16 on ggml's blocks, beside our own 4 bits in groups of 32."""
    own = uniform_weight(4, 32)
    for kind in KINDS:
        weight = ggml_weight(kind)
        dense = ggml.dequantize_ggml(*weight)
        for tokens in (1, 4, 16):
            x = torch.randn(tokens, IN).bfloat16()

            def check(x: Tensor = x, weight: Weight = weight, dense: Tensor = dense) -> None:
                truth = x.double() @ dense.double().T
                assert (multiply_ggml(x, *weight, False) - truth).abs().max() <= 2**-7 * truth.abs().max()

            yield Problem(
                f"{kind}, {tokens} tokens",
                check,
                {"GEMV": lambda x=x, weight=weight: multiply_ggml(x, *weight, False)},
                {"4 bits in groups of 32": lambda x=x: multiply_grouped(x, *own, False)},
                max(packed_bytes(weight) / machine.copy_bandwidth, 2 * tokens * OUT * IN / machine.best_matmul_speed),
                "reading packed bytes, or the product",
            )

        def check_rows(weight: Weight = weight, dense: Tensor = dense) -> None:
            assert torch.equal(dequantize_ggml(*weight, torch.bfloat16), dense.bfloat16())

        yield Problem(
            f"{kind} to bfloat16",
            check_rows,
            {"native": by_blocks(dequantize_ggml, weight, torch.bfloat16)},
            {"4 bits in groups of 32": by_blocks(dequantize_grouped, own, torch.bfloat16)},
            OUT * IN * 2 / machine.fill_bandwidth,
            "writing the result, in cache",
        )


@case("hadamard")
def rotation(machine: Machine) -> Iterator[Problem]:
    """Rows of activations in float32, rotated, beside plain torch."""
    for n in (2048, 4096, 5632):
        for tokens in (1, 128):
            x, rule = torch.randn(tokens, n), rule_for(n)

            def check(x: Tensor = x, rule: str = rule) -> None:
                torch.testing.assert_close(hadamard(x, rule), rotated.hadamard(x, rule, False), rtol=1e-4, atol=1e-4)

            yield Problem(
                f"{n} features, {tokens} tokens",
                check,
                {"native": lambda x=x, rule=rule: hadamard(x, rule)},
                {"reference": lambda x=x, rule=rule: rotated.hadamard(x, rule, False)},
                x.nbytes / machine.fill_bandwidth,
                "writing the result, in cache",
            )


if __name__ == "__main__":
    sys.exit(main(["decode", "multiply", "products", "ggml", "hadamard"]))
