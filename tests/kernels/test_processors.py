"""The C files as compiled for other processors, where this machine can run them: every op's examples, and odd sizes.

`python -m tests.kernels.processors` runs all tests of the kernels, for more processors, optimized as they are used.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil

import pytest
import torch

from llmtools.kernels import build, grouped, lattice, sweep, trellis
from llmtools.kernels.bits import pack
from llmtools.kernels.ggml.native import KINDS
from llmtools.quant.grids.affine import Affine
from tests.kernels.cases import CASES, TYPES, Case, check, ggml
from tests.kernels.processors import LIBRARIES, PROCESSORS, libraries_for, uncalled

QUICK = ["x86-64", "haswell", "skylake-avx512", "armv8"]
"""One of each way in the C files; on ARM, the first three need x86_64-linux-gnu-gcc and QEMU."""
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_other_processors_compute_the_same(name: str) -> None:
    if reason := PROCESSORS[name].hindrance():
        pytest.skip(reason)
    group, grid = torch.randn(50, 37), Affine(3, -1, clip=True)
    here = grid.fit(group)
    with libraries_for(PROCESSORS[name], "-O1") as libraries:
        for case in CASES.values():
            arguments = case.arguments()
            check(case, case.of("native")(*arguments), arguments)
        odd_sizes()
        encoders()
        assert torch.equal(grid.fit(group), here)
        assert not uncalled(libraries), "an example is missing in cases.py, or here"


def odd_sizes() -> None:
    """Groups, rows and columns that fill no register."""
    for bits, (n, size) in itertools.product((2, 3, 4, 8), ((1, 1), (33, 33), (100, 31), (300, 96))):
        codes, scales = torch.randint(0, 2**bits, (5, n)), torch.randn(5, -(-n // size)).half()
        zeros = pack(torch.randint(0, 2**bits, scales.shape), bits, torch.uint8)
        weight = pack(codes, bits), scales, zeros, None, bits, size, n
        for dtype in FLOATS:
            few, many = torch.randn(6, n, dtype=dtype), torch.randn(35, n, dtype=dtype)
            for function, arguments in (
                ("dequantize_grouped", (*weight, dtype)),
                ("multiply_grouped", (few, *weight, False)),
                ("multiply_grouped", (many, *weight, False)),
                ("multiply_grouped", (torch.randn(3, 5, dtype=dtype), *weight, True)),
                ("multiply_grouped", (torch.randn(17, 5, dtype=dtype), *weight, True)),
            ):
                case = Case("grouped", function, lambda: ())
                check(case, case.of("native")(*arguments), arguments)
    for kind in KINDS:
        blocks = ggml(kind)[0][:3, : 3 * TYPES[kind].bytes]
        for case, arguments in (
            (Case("ggml", "dequantize_ggml", lambda: ()), (blocks, kind, torch.float32)),
            (Case("ggml", "multiply_ggml", lambda: ()), (torch.randn(5, 3 * TYPES[kind].weights), blocks, kind, False)),
        ):
            check(case, case.of("native")(*arguments), arguments)


def encoders() -> None:
    """What gives codes: the reference's. A sweep without feedback rounds to the nearest."""
    weight, scale, zero = torch.randn(37, 21), torch.rand(37) + 0.1, torch.full((37,), 3.0)
    error = weight.clone()
    found = sweep.sweep_columns(weight, error, torch.zeros(21, 21), scale, zero, 7, whole_zeros=True)
    expected = ((weight / scale[:, None]).round() + 3).clamp(0, 7)
    assert torch.equal(found, expected)
    torch.testing.assert_close(error, weight - scale[:, None] * (expected - 3))
    x = torch.randn(65, 8)
    assert torch.equal(lattice.native.encode_e8p(x), lattice.reference.encode_e8p(x))
    assert torch.equal(lattice.native.encode_e81b(x), lattice.reference.encode_e81b(x))
    for bits in (1, 2, 3, 4, 6):
        given = torch.randn(18, 32), None, bits, 10, "3inst"
        assert torch.equal(trellis.native.encode_trellis(*given), trellis.reference.encode_trellis(*given))
    for bits, state_bits in ((1, 8), (2, 9), (3, 9), (4, 10), (4, 12)):
        given = torch.randn(18, 32), torch.randn(trellis.PAIRS, 2), bits, state_bits, "hyb"
        assert torch.equal(trellis.native.encode_trellis(*given), trellis.reference.encode_trellis(*given))
    for bits, table in ((3, None), (8, None), (4, torch.randn(16).sort().values)):
        scales, zeros = torch.rand(5, 4) + 0.1, None if table is not None else torch.full((5, 4), 3.0)
        grid = torch.randn(5, 100), scales, zeros, table, bits, 31, False
        assert torch.equal(grouped.native.encode_grouped(*grid), grouped.reference.encode_grouped(*grid))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_reading_beyond_a_tensor_ends_the_call() -> None:
    """And a function that the caller has not declared, or declared with other arguments, does not compile."""
    own = next(each for each in PROCESSORS.values() if not each.foreign)
    with libraries_for(own, "-O1") as libraries:
        x, y, scratch = torch.ones(4, 64), torch.zeros(5, 64), torch.zeros(256)

        def rotate(place: int, rows: int) -> None:
            given = place, rows, 64, 64, build.TYPES[torch.float32], None, 0, None, 0, None, None, 0, 64, 64, 64
            libraries["hadamard"].hadamard_rotate(*given, 1.0, scratch.data_ptr(), y.data_ptr(), 1)

        with pytest.raises(AssertionError, match="SIGSEGV; it read or wrote beyond"):
            rotate(x.data_ptr(), 5)
        assert torch.equal(y, torch.zeros(5, 64))
        with pytest.raises(AssertionError, match="in no tensor"):
            rotate(ctypes.addressof(ctypes.c_int(0)), 4)
    with libraries_for(own, "-O1") as libraries:
        libraries["hadamard"].hadamard_rotate.argtypes = [ctypes.c_void_p]
        with pytest.raises(AssertionError, match="too few arguments"):
            libraries["hadamard"].compile()


def test_every_library_is_there() -> None:
    with libraries_for(PROCESSORS["x86-64"]) as libraries:
        assert set(libraries) == set(LIBRARIES) >= {"grouped", "ggml", "lattice", "trellis"}
        assert all(each.functions() for each in libraries.values())
