"""The lattice codebooks: tables as published, the short encoder finds what brute force finds, C decides alike."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtools.errors import InputError
from llmtools.kernels import lattice
from llmtools.kernels.lattice import (
    RESIDUAL_SCALE,
    SCALE,
    decode_e8p,
    decode_e81b,
    dequantize_lattice,
    e8p_table,
    e81b_table,
    encode_e8p,
    encode_e81b,
    encode_lattice,
    reference,
)
from llmtools.kernels.lattice.tables import e8p_magnitudes, e8p_parts

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MEAN_SQUARED_ERROR = {2: 0.0913, 3: 0.02945, 4: 0.00957}  # per element on N(0, 1)


def brute_force(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Squared distance of each x [n, 8] to the nearest row of the table, by trying all in float64: [n]."""
    points = table.double() / 4
    rows = torch.cat([2 * points, -points.square().sum(-1, keepdim=True)], -1).T.contiguous()  # [9, points]
    x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], -1)
    return torch.cat([part[:, :8].square().sum(-1) - (part @ rows).amax(-1) for part in x.split(64)])


def distance(x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return (x.double() - points.double()).square().sum(-1)


def assert_nearest(x: torch.Tensor, points: torch.Tensor, table: torch.Tensor) -> None:
    """As near as float32 can tell: the squared distance is the smallest up to the rounding of the scores."""
    excess = distance(x, points) - brute_force(x, table)
    assert excess.min() > -1e-9
    assert (excess <= 4e-6 * (1 + x.double().square().sum(-1))).all()
    assert (excess > 1e-9).float().mean() <= 1e-4


def all_codes() -> torch.Tensor:
    return torch.arange(65536).to(torch.int16)


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_magnitudes_are_counted_by_norm() -> None:
    norms = e8p_magnitudes().float().square().sum(-1) / 4
    assert {int(norm): int((norms == norm).sum()) for norm in norms.unique()} == {
        2: 1,
        4: 8,
        6: 28,
        8: 64,
        10: 126,
        12: 29,
    }
    assert (norms[:227] <= 10).all()


def test_e8p_has_65536_distinct_points_closed_under_negation() -> None:
    table = e8p_table()
    points = {tuple(point) for point in table.tolist()}
    assert len(points) == len(table) == 65536
    assert {tuple(-q for q in point) for point in points} == points
    assert table.abs().max() == 11
    assert (table.float() / 4).square().mean().item() == pytest.approx(1.1963, abs=5e-5)


def test_e8p_points_are_half_integers_with_even_sum_moved_by_a_quarter() -> None:
    table = e8p_table().int()
    shift = torch.tensor([-1 if int(c).bit_count() % 2 else 1 for c in range(256)]).repeat(256)
    unmoved = table - shift[:, None]
    assert (unmoved % 4 == 2).all()
    assert (unmoved.sum(-1) % 8 == 0).all()


def test_e81b_has_256_distinct_points() -> None:
    table = e81b_table()
    assert len({tuple(point) for point in table.tolist()}) == len(table) == 256
    norms = (table.float() / 4).square().sum(-1)
    assert [int((norms == norm).sum()) for norm in (0, 2, 4)] == [1, 240, 15]
    assert (table.int().sum(-1) % 8 == 0).all()
    assert table[112 // 2].abs().sum() == 0  # the origin in the middle of the 113 integer points


# ---- codes to values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_points_are_exact_in_every_type(dtype: torch.dtype) -> None:
    assert torch.equal(decode_e8p(all_codes(), dtype), (e8p_table().float() / 4).to(dtype))
    assert torch.equal(decode_e8p(torch.arange(65536), dtype).float() * 4, e8p_table().float())
    assert torch.equal(decode_e81b(torch.arange(256).to(torch.uint8), dtype).float() * 4, e81b_table().float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(5, 3), (1, 64), (2, 3, 7), (65,), (0, 4), (4, 0)], ids=str)
def test_rows_are_the_formula_rounded_once(bits: int, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    codes = torch.randint(-32768, 32768, shape, dtype=torch.int16)
    residual = {2: None, 3: torch.randint(256, shape, dtype=torch.uint8), 4: codes.roll(1)}[bits]
    expected = decode_e8p(codes)
    if residual is not None:
        fine = decode_e81b(residual) if bits == 3 else decode_e8p(residual)
        expected = expected + fine / torch.tensor(RESIDUAL_SCALE[bits])
    moved = residual.to(device) if residual is not None else None
    values = dequantize_lattice(codes.to(device), moved, RESIDUAL_SCALE[bits], dtype)
    assert torch.equal(values.cpu(), expected.to(dtype).flatten(-2))


def test_rows_are_exact_slices() -> None:
    codes = torch.randint(-32768, 32768, (9, 5), dtype=torch.int16)
    residual = torch.randint(256, (9, 5), dtype=torch.uint8)
    whole = dequantize_lattice(codes, residual, 2.04)
    assert torch.equal(dequantize_lattice(codes[2:7], residual[2:7], 2.04), whole[2:7])


def test_strided_codes_are_read_rightly() -> None:
    codes = torch.randint(-32768, 32768, (6, 10), dtype=torch.int16)
    residual = codes.flip(0)
    expected = dequantize_lattice(codes.T.contiguous(), residual.T.contiguous(), 3.45)
    assert torch.equal(dequantize_lattice(codes.T, residual.T, 3.45), expected)


def test_the_operator_keeps_its_promises_to_torch() -> None:
    codes = torch.randint(-32768, 32768, (3, 4), dtype=torch.int16)
    op = torch.ops.llmtools.dequantize_lattice.default
    torch.library.opcheck(op, (codes, None, 1.0, torch.float32))
    torch.library.opcheck(op, (codes, codes.to(torch.uint8), 2.04, torch.bfloat16))
    compiled = torch.compile(lambda c: dequantize_lattice(c) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(codes), dequantize_lattice(codes) + 1)


def test_meta_codes_give_shapes() -> None:
    values = dequantize_lattice(torch.empty(3, 4, dtype=torch.int16, device="meta"), dtype=torch.bfloat16)
    assert values.shape == (3, 32) and values.dtype == torch.bfloat16


def test_wrong_tensors_are_refused() -> None:
    codes = torch.zeros(2, 3, dtype=torch.int16)
    with pytest.raises(InputError, match="int32"):
        dequantize_lattice(codes.int())
    with pytest.raises(InputError, match="residuals"):
        dequantize_lattice(codes, torch.zeros(3, 2, dtype=torch.uint8))
    with pytest.raises(InputError, match="residual_scale"):
        dequantize_lattice(codes, torch.zeros(2, 3, dtype=torch.uint8), 0.0)
    with pytest.raises(InputError, match="eight"):
        encode_e8p(torch.zeros(3, 7))
    with pytest.raises(InputError, match="2, 3 or 4"):
        encode_lattice(torch.zeros(3, 8), 5)
    with pytest.raises(InputError, match="blocks of eight"):
        encode_lattice(torch.zeros(3, 12), 2)


# ---- values to codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_every_point_is_its_own_nearest(device: str) -> None:
    assert torch.equal(encode_e8p(decode_e8p(all_codes()).to(device)).cpu(), all_codes())
    rows = torch.arange(256).to(torch.uint8)
    assert torch.equal(encode_e81b(decode_e81b(rows).to(device)).cpu(), rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 3.0, 50.0])
def test_the_encoder_of_256_rows_equals_brute_force(scale: float, device: str) -> None:
    x = scale * torch.randn(2000, 8, generator=torch.Generator().manual_seed(3))
    assert_nearest(x, decode_e8p(encode_e8p(x.to(device)).cpu()), e8p_table())
    assert_nearest(x, decode_e81b(encode_e81b(x.to(device)).cpu()), e81b_table())


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.7, 1 / 1.03, 1.0, 1.5])
def test_the_encoder_equals_brute_force_on_25000_vectors_a_scale(scale: float) -> None:
    x = scale * torch.randn(25_000, 8, generator=torch.Generator().manual_seed(4))
    assert_nearest(x, decode_e8p(encode_e8p(x)), e8p_table())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-24, 24), min_size=8, max_size=8))
def test_ties_are_broken_towards_a_nearest_point(eighths: list[int]) -> None:
    x = torch.tensor([eighths]) / 8
    excess = distance(x, decode_e8p(encode_e8p(x))) - brute_force(x, e8p_table())
    assert excess.abs().max() <= 1e-9
    excess = distance(x, decode_e81b(encode_e81b(x))) - brute_force(x, e81b_table())
    assert excess.abs().max() <= 1e-9


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_on_gaussian_weights_is_the_published_one(bits: int) -> None:
    x = torch.randn(1000, 64 * 8, generator=torch.Generator().manual_seed(5))
    codes, residual = encode_lattice(x * SCALE[bits], bits)
    values = dequantize_lattice(codes, residual, RESIDUAL_SCALE[bits]) / SCALE[bits]
    errors = (values - x).square().unflatten(-1, (-1, 8)).mean(-1).flatten()
    sampling = errors.std().item() / len(errors) ** 0.5  # rare vectors beyond the ball weigh much: up to 0.7 % here
    assert errors.mean().item() == pytest.approx(
        MEAN_SQUARED_ERROR[bits], abs=0.01 * MEAN_SQUARED_ERROR[bits] + 2 * sampling
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_have_the_stored_types_and_shapes(bits: int) -> None:
    x = torch.randn(3, 5, 40, dtype=torch.bfloat16, requires_grad=True)
    codes, residual = encode_lattice(x, bits)
    assert codes.dtype == torch.int16 and codes.shape == (3, 5, 5)
    assert bits == 2 or (residual is not None and residual.shape == codes.shape)
    assert {2: None, 3: torch.uint8, 4: torch.int16}[bits] == (None if residual is None else residual.dtype)
    assert encode_lattice(torch.zeros(0, 16), bits)[0].shape == (0, 2)


def test_codes_do_not_depend_on_how_vectors_are_grouped() -> None:
    x = torch.randn(700, 8)
    assert torch.equal(encode_e8p(x), torch.cat([encode_e8p(part) for part in x.split(33)]))


def test_tables_first_built_in_odd_circumstances_serve_later() -> None:
    for table in (
        lattice.tables.e8p_magnitudes,
        lattice.tables.e8p_parts,
        lattice.tables.e8p_table,
        lattice.tables.values,
    ):
        table.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        codes = encode_e8p(torch.ones(1, 8, device="cpu"))
        dequantize_lattice(codes)
    weight = dequantize_lattice(codes)  # [8]
    x = torch.ones(8, requires_grad=True)
    (weight * x).sum().backward()
    assert torch.equal(x.grad, weight)


# ---- the same in C ---------------------------------------------------------------------------------------------------


class Native:
    """native.c, compiled for the test and called with tensors."""

    def __init__(self, folder: Path) -> None:
        source = Path(lattice.__file__).with_name("native.c")
        command = [
            "cc",
            "-std=c11",
            "-O3",
            "-march=native",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            str(source),
        ]
        subprocess.run([*command, "-o", str(folder / "lattice.so"), "-lm"], check=True)
        self.library = ctypes.CDLL(str(folder / "lattice.so"))

    def call(self, name: str, *arguments: torch.Tensor | int | float | None) -> None:
        def convert(value: torch.Tensor | int | float | None) -> object:
            if isinstance(value, torch.Tensor):
                return ctypes.c_void_p(value.data_ptr())
            return {int: ctypes.c_int64, float: ctypes.c_float}.get(type(value), ctypes.c_void_p)(value)

        function = getattr(self.library, name)
        function.restype = None
        function(*map(convert, arguments))

    def encode_e8p(self, x: torch.Tensor, begin: int, end: int, codes: torch.Tensor) -> torch.Tensor:
        self.call("lattice_encode_e8p", x, begin, end, e8p_magnitudes(), codes)
        return codes

    def encode_e81b(self, x: torch.Tensor, begin: int, end: int, codes: torch.Tensor) -> torch.Tensor:
        self.call("lattice_encode_e81b", x, begin, end, e81b_table(), codes)
        return codes


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return Native(tmp_path_factory.mktemp("native"))


@pytest.mark.parametrize("scale", [0.0, 0.01, 0.3, 1.0, 1.03, 2.0, 1e3, 1e30])
def test_c_encoders_give_the_reference_codes(native: Native, scale: float) -> None:
    x = scale * torch.randn(5003, 8, generator=torch.Generator().manual_seed(6))
    codes = native.encode_e8p(x, 0, len(x), torch.zeros(len(x), dtype=torch.int16))
    assert torch.equal(codes, reference.encode_e8p(x))
    codes = native.encode_e81b(x, 0, len(x), torch.zeros(len(x), dtype=torch.uint8))
    assert torch.equal(codes, reference.encode_e81b(x))


def test_c_encoders_break_ties_as_the_reference_does(native: Native) -> None:
    x = torch.randint(-24, 25, (20_000, 8), generator=torch.Generator().manual_seed(7)) / 8
    assert torch.equal(native.encode_e8p(x, 0, len(x), torch.zeros(len(x), dtype=torch.int16)), reference.encode_e8p(x))
    assert torch.equal(
        native.encode_e81b(x, 0, len(x), torch.zeros(len(x), dtype=torch.uint8)), reference.encode_e81b(x)
    )


@pytest.mark.parametrize(("begin", "end"), [(0, 0), (0, 1), (5, 6), (7, 71), (31, 96), (64, 100)])
def test_c_functions_touch_their_range_alone(native: Native, begin: int, end: int) -> None:
    x = torch.randn(100, 8)
    expected = torch.full((100,), 77, dtype=torch.int16)
    expected[begin:end] = reference.encode_e8p(x)[begin:end]
    assert torch.equal(native.encode_e8p(x, begin, end, torch.full((100,), 77, dtype=torch.int16)), expected)

    out = torch.full((100, 8), 77.0)
    native.call("lattice_decode_float32", expected, None, 1.0, begin, end, *e8p_parts(), None, out)
    assert torch.equal(out[begin:end], decode_e8p(expected[begin:end]))
    assert (out[:begin] == 77).all() and (out[end:] == 77).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_c_decoders_give_the_reference_bits(native: Native, bits: int, dtype: torch.dtype) -> None:
    codes = torch.cat([all_codes(), all_codes()[:77]])
    shuffled = codes[torch.randperm(len(codes))]
    residual = {2: None, 3: shuffled.to(torch.uint8), 4: shuffled}[bits]
    out = torch.empty(len(codes), 8, dtype=dtype)
    name = "lattice_decode_" + str(dtype).removeprefix("torch.")
    table = e81b_table() if bits == 3 else None
    for scale in (RESIDUAL_SCALE[bits], 1e5):
        native.call(name, codes, residual, scale, 0, len(codes), *e8p_parts(), table, out)
        assert torch.equal(out.flatten(), reference.dequantize_lattice(codes, residual, scale, dtype))
