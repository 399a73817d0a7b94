"""The lattice codebooks: tables as published, the short encoder finds what brute force finds, C decides alike."""

from __future__ import annotations

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
    multiply_lattice,
    reference,
)
from llmtools.kernels.lattice.tables import e8p_magnitudes

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
    x = torch.randn(800, 64 * 8, generator=torch.Generator().manual_seed(5))
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
    for encode in (encode_e8p, reference.encode_e8p):
        assert torch.equal(encode(x), torch.cat([encode(part) for part in x.split(33)]))


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

native = pytest.mark.skipif(lattice.native._library() is None, reason="no C compiler")


@native
@pytest.mark.parametrize("scale", [0.0, 0.01, 0.3, 1.0, 1.03, 2.0, 1e3, 1e30])
def test_c_encoders_give_the_reference_codes(scale: float) -> None:
    x = scale * torch.randn(5003, 8, generator=torch.Generator().manual_seed(6))
    assert torch.equal(encode_e8p(x), reference.encode_e8p(x))
    assert torch.equal(encode_e81b(x), reference.encode_e81b(x))


@native
def test_c_encoders_break_ties_as_the_reference_does() -> None:
    x = torch.randint(-24, 25, (20_000, 8), generator=torch.Generator().manual_seed(7)) / 8
    assert torch.equal(encode_e8p(x), reference.encode_e8p(x))
    assert torch.equal(encode_e81b(x), reference.encode_e81b(x))


@native
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 63, 64, 65, 1000])
def test_c_functions_take_any_number_of_vectors(n: int) -> None:
    x = torch.randn(n, 8)
    codes = encode_e8p(x)
    assert torch.equal(codes, reference.encode_e8p(x))
    assert torch.equal(dequantize_lattice(codes), reference.dequantize_lattice(codes, None, 1.0, torch.float32))


@native
def test_c_results_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(3000, 8)
    codes = torch.randint(-32768, 32768, (64, 512), dtype=torch.int16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((encode_e8p(x), encode_e81b(x), dequantize_lattice(codes, codes.flip(0), 3.45)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_c_decoders_give_the_reference_bits(bits: int, dtype: torch.dtype) -> None:
    codes = torch.cat([all_codes(), all_codes()[:77]])
    shuffled = codes[torch.randperm(len(codes))]
    residual = {2: None, 3: shuffled.to(torch.uint8), 4: shuffled}[bits]
    for scale in (RESIDUAL_SCALE[bits], 1e5, 1e-3):
        values = dequantize_lattice(codes, residual, scale, dtype)
        assert torch.equal(values, reference.dequantize_lattice(codes, residual, scale, dtype))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_few_tokens_are_multiplied_as_exactly_as_by_a_dense_layer(bits: int, dtype: torch.dtype) -> None:
    for out, blocks in ((5, 1), (3, 63), (9, 64), (4, 65), (2, 200)):
        codes = torch.randint(-(2**15), 2**15, (out, blocks), dtype=torch.int16)
        residual = {
            2: None,
            3: torch.randint(0, 256, (out, blocks), dtype=torch.uint8),
            4: torch.randint(-(2**15), 2**15, (out, blocks), dtype=torch.int16),
        }[bits]
        dense = dequantize_lattice(codes, residual, 2.5).double()
        for tokens in (1, 3, 40):
            for size in (1e-4, 1.0, 100.0):
                x = (torch.randn(tokens, 8 * blocks) * size).to(dtype)
                truth = x.double() @ dense.T
                off = (multiply_lattice(x, codes, residual, 2.5).double() - truth).abs().max()
                dense_off = (x @ dense.T.to(dtype) - truth).abs().max()
                assert off <= 2 * dense_off + 8 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_products_with_what_is_not_finite_are_not_finite() -> None:
    codes = torch.randint(-(2**15), 2**15, (4, 9), dtype=torch.int16)
    for odd in (float("inf"), float("nan")):
        x = torch.randn(2, 72, dtype=torch.bfloat16)
        x[0, 70] = odd
        y = multiply_lattice(x, codes)
        assert not y[0].isfinite().any() and y[1].isfinite().all()
    assert multiply_lattice(torch.empty(0, 72, dtype=torch.bfloat16), codes).shape == (0, 4)


def test_activations_of_another_width_are_refused() -> None:
    codes = torch.zeros(4, 9, dtype=torch.int16)
    for wrong in (torch.randn(2, 64), torch.randn(2, 80)):
        with pytest.raises(InputError, match="72 inputs"):
            multiply_lattice(wrong.bfloat16(), codes)
