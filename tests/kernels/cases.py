"""Examples of every op, once: what is checked of all ops alike runs over them.

`test_ops.py` holds the CPU's route to the reference and asks torch whether the op is well behaved, `interpreted.py`
holds the Triton kernel to the reference, `compiled.py` compiles it for GPUs. A new op adds its lines here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmtools.kernels.bits import pack
from llmtools.kernels.ggml import TYPES
from llmtools.kernels.hadamard import rule_for
from llmtools.kernels.trellis import PAIRS

OUT, IN, TOKENS = 64, 2048, 16
"""Sizes that a kernel likes, rows as long as a layer's; what it must bear besides is in the op's own test."""


class Case(NamedTuple):
    """A call: ``llmtools.kernels.<package>.<module>.<function>(*arguments())``, of any of the op's modules."""

    package: str
    function: str
    arguments: Callable[[], tuple[Any, ...]]

    def of(self, module: str) -> Callable[..., Tensor]:
        """The function in "reference", "native" or "triton"."""
        return getattr(import_module(f"llmtools.kernels.{self.package}.{module}"), self.function)


def check(case: Case, got: Tensor, arguments: tuple[Any, ...]) -> None:
    """Packed tensors must give the reference's bits; of activations at most twice the reference's error, by float64.

    A sum of some hundred float32 products is rounded more than its result tells: 8 units of the largest.
    """
    first, *rest = arguments
    plain = case.of("reference")(*arguments)
    assert got.dtype == plain.dtype and got.shape == plain.shape
    if not first.is_floating_point():
        assert torch.equal(got, plain)
        return
    truth = case.of("reference")(first.double(), *rest)
    units = 8 if first.dtype == torch.float32 else 1
    allowed = 2 * (plain - truth).abs().max() + units * torch.finfo(first.dtype).eps * truth.abs().max()
    assert (got - truth).abs().max() <= allowed


def x(columns: int, tokens: int = TOKENS) -> Tensor:
    """Activations [tokens, columns] bfloat16."""
    return torch.randn(tokens, columns).bfloat16()


def signs(count: int) -> Tensor:
    """Random signs [count], float16."""
    return torch.randint(0, 2, (count,)).mul(2).sub(1).half()


def sizes(count: int) -> Tensor:
    """Factors [count] bfloat16."""
    return torch.randn(count).bfloat16()


def uniform(bits: int) -> tuple[Any, ...]:
    """A weight [OUT, IN] on a uniform grid, as `kernels/grouped` takes it."""
    codes, zeros = torch.randint(0, 2**bits, (OUT, IN)), torch.randint(0, 2**bits, (OUT, IN // 64))
    scales = torch.rand(OUT, IN // 64).half() * 0.1
    return pack(codes, bits), scales, pack(zeros, bits, torch.uint8), None, bits, 64, IN


def codebook() -> tuple[Any, ...]:
    """The same on sixteen levels."""
    return pack(torch.randint(0, 16, (OUT, IN)), 4), torch.rand(OUT, IN // 64), None, torch.randn(16), 4, 64, IN


def lattice() -> tuple[Any, ...]:
    """A weight [OUT, IN] on E8P with a residual on E8P."""
    codes = torch.randint(-(2**15), 2**15, (OUT, IN // 8)).to(torch.int16)
    return codes, codes.flip(0), 3.45


def trellis(code: str, bits: int = 3, order: str = "rows") -> tuple[Any, ...]:
    """A weight [OUT, IN] on a trellis, whose states lie across words."""
    packed = torch.randint(-(2**15), 2**15, (OUT, IN // 16 * bits)).to(torch.int16)
    return packed, torch.randn(PAIRS, 2).half() if code == "hyb" else None, bits, 12, code, order


def ggml(kind: str) -> tuple[Any, ...]:
    """A weight [OUT, IN] in ggml's blocks of a type, every scale a small number."""
    each = TYPES[kind]
    blocks = torch.randint(0, 255, (OUT, IN // each.weights, each.bytes), dtype=torch.uint8)
    for at in each.halves:  # float16 from 2^-7 on
        blocks[..., at + 1] = 0x20 + blocks[..., at + 1] % 8
    return blocks.flatten(1), kind


CASES = {
    "ggml-dequantize": Case("ggml", "dequantize_ggml", lambda: (*ggml("Q8_0"), torch.bfloat16)),
    "ggml-multiply": Case("ggml", "multiply_ggml", lambda: (x(IN), *ggml("Q8_0"), False)),
    "ggml-multiply-transposed": Case("ggml", "multiply_ggml", lambda: (x(OUT), *ggml("Q8_0"), True)),
    "ggml-groups-within-groups": Case("ggml", "dequantize_ggml", lambda: (*ggml("Q5_K"), torch.float16)),
    "ggml-multiply-groups-within-groups": Case("ggml", "multiply_ggml", lambda: (x(IN), *ggml("Q4_K"), False)),
    "ggml-multiply-levels": Case("ggml", "multiply_ggml", lambda: (x(IN, 1), *ggml("IQ4_XS"), False)),
    "uniform grid": Case("grouped", "dequantize_grouped", lambda: (*uniform(3), torch.bfloat16)),
    "uniform grid, product": Case("grouped", "multiply_grouped", lambda: (x(IN), *uniform(4), False)),
    "uniform grid, one token": Case("grouped", "multiply_grouped", lambda: (x(IN, 1), *uniform(3), False)),
    "uniform grid, transposed": Case("grouped", "multiply_grouped", lambda: (x(OUT), *uniform(2), True)),
    "codebook": Case("grouped", "dequantize_grouped", lambda: (*codebook(), torch.float16)),
    "codebook, product": Case("grouped", "multiply_grouped", lambda: (x(IN), *codebook(), False)),
    "codebook, transposed": Case("grouped", "multiply_grouped", lambda: (x(OUT), *codebook(), True)),
    "lattice": Case("lattice", "dequantize_lattice", lambda: (*lattice(), torch.bfloat16)),
    "lattice, product": Case("lattice", "multiply_lattice", lambda: (x(IN), *lattice(), False)),
    "lattice, transposed": Case("lattice", "multiply_lattice", lambda: (x(OUT), *lattice(), True)),
    "trellis": Case("trellis", "dequantize_trellis", lambda: (*trellis("3inst"), 3, OUT - 7, torch.bfloat16)),
    "trellis, bytes": Case("trellis", "dequantize_trellis", lambda: (*trellis("1mad"), 0, OUT, torch.float32)),
    "trellis, product": Case("trellis", "multiply_trellis", lambda: (x(IN), *trellis("3inst"), False)),
    "trellis, six bits": Case("trellis", "multiply_trellis", lambda: (x(IN), *trellis("3inst", 6), False)),
    "trellis, transposed": Case("trellis", "multiply_trellis", lambda: (x(OUT), *trellis("3inst"), True)),
    "trellis, EXL3": Case("trellis", "dequantize_trellis", lambda: (*trellis("mul1", 5, "exl3"), 3, 29, torch.float32)),
    "trellis, EXL3's product": Case("trellis", "multiply_trellis", lambda: (x(IN), *trellis("mcg", 4, "exl3"), False)),
    "trellis, pairs": Case("trellis", "dequantize_trellis", lambda: (*trellis("hyb"), 3, OUT - 7, torch.bfloat16)),
    "trellis, pairs, QTIP's": Case(
        "trellis", "dequantize_trellis", lambda: (*trellis("hyb", 2, "fragments"), 3, 29, torch.float32)
    ),
    "trellis, product of pairs": Case("trellis", "multiply_trellis", lambda: (x(IN), *trellis("hyb"), False)),
    "trellis, pairs of a table being trained": Case(
        "trellis",
        "dequantize_trellis",
        lambda: (trellis("hyb")[0], torch.randn(PAIRS, 2), *trellis("hyb")[2:], 0, 40, torch.float32),
    ),
    "trellis, pairs transposed": Case("trellis", "multiply_trellis", lambda: (x(OUT), *trellis("hyb", 4), True)),
    "hadamard": Case("hadamard", "hadamard", lambda: (x(11008), rule_for(11008), False)),
    "hadamard, power of two": Case("hadamard", "hadamard", lambda: (x(4096), rule_for(4096), True)),
    "rotation": Case("hadamard", "rotate", lambda: (x(765), rule_for(768), 768, signs(765), None, 768, 0.5, True)),
    "rotation back": Case("hadamard", "rotate", lambda: (x(96), rule_for(96), 96, None, sizes(90), 90, 2.0, False)),
}

TRITON = {
    name: case for name, case in CASES.items() if find_spec(f"llmtools.kernels.{case.package}.triton") is not None
}
"""Those whose op has a kernel for GPUs."""
