"""Grids: what they fit, that storage gives back what rounding saw, and that NF4 is bitsandbytes' NF4."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtools.errors import InputError
from llmtools.quant.grids.affine import Affine
from llmtools.quant.grids.base import Grid
from llmtools.quant.grids.codebook import DYNAMIC, NF4, Codebook
from llmtools.quant.grids.lattice import SCALE, Lattice
from llmtools.quant.grids.mid_rise import MidRise
from llmtools.quant.rounding import Nearest


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """What nearest rounding sees: values in the grid's own arithmetic, [out, in]."""
    codes, params = Nearest()(weight, None, grid)
    span = grid.resolve_group_size(weight.shape[1])
    starts = range(0, weight.shape[1], span)
    return torch.cat([grid.dequantize_codes(codes[:, s : s + span], params[:, i]) for i, s in enumerate(starts)], 1)


def stored(weight: Tensor, grid: Grid) -> Tensor:
    """The same after packing and decoding."""
    return grid.dequantize(grid.pack(*Nearest()(weight, None, grid), weight.shape[1]))


# ---- storage -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    columns=st.integers(1, 70),
    group_size=st.sampled_from([-1, 1, 7, 16, 32, 64]),
    symmetric=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
)
def test_decoding_gives_exactly_the_values_that_rounding_saw(
    bits: int, columns: int, group_size: int, symmetric: bool, scale: float
) -> None:
    """Scales are rounded to their storage type before a code is chosen, at every width and group size."""
    grid = Affine(bits, group_size, symmetric)
    weight = gaussian(3, columns, seed=columns) * scale
    assert torch.equal(stored(weight, grid), rounded(weight, grid))


@pytest.mark.parametrize("group_size", [-1, 16, 24])
def test_codebook_decoding_gives_exactly_the_values_that_rounding_saw(group_size: int) -> None:
    grid = Codebook(group_size=group_size)
    weight = gaussian(5, 50)
    assert torch.equal(stored(weight, grid), rounded(weight, grid))


@pytest.mark.parametrize("columns", [32, 33, 172])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layout_is_the_stated_number_of_bits(bits: int, columns: int) -> None:
    """bits per weight rounded up to 32-bit words, 16 bits of scale and `bits` of zero point a group."""
    layout = Affine(bits, 16).layout(3, columns)
    groups = -(-columns // 16)
    assert layout["qweight"].shape == (3, -(-columns * bits // 32))
    assert layout["scales"].shape == (3, groups)
    assert layout["qzeros"].shape == (3, -(-groups * bits // 8))
    assert sum(torch.Size(spec.shape).numel() for name, spec in layout.items() if name == "columns") == 0


# ---- the affine grid -----------------------------------------------------------------------------------------------


def test_asymmetric_fit_in_numbers() -> None:
    """Range [−1, 2] in 3 bits: scale 3/7 in float16, zero point round(1 / scale) = 2."""
    (scale, zero), *_ = Affine(3).fit(torch.tensor([[-1.0, 0.5, 2.0]])).tolist()
    assert scale == float(torch.tensor(3 / 7).half())
    assert zero == 2


@pytest.mark.parametrize(("low", "high"), [(0.5, 3.0), (-3.0, -0.5), (0.0, 1.0)])
def test_zero_is_representable_even_in_one_sided_groups(low: float, high: float) -> None:
    grid = Affine(2)
    group = torch.linspace(low, high, 9)[None]
    params = grid.fit(group)
    assert grid.dequantize_codes(grid.quantize_values(torch.zeros(1, 1), params), params).item() == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["centred", "positive"])
def test_no_weight_is_further_than_one_step_from_its_value(bits: int, symmetric: bool, shift: float) -> None:
    """Half a step by rounding, and at the ends up to another half, since the zero point is a whole number.

    In particular the upper half of a group without negative weights is not cut off on a symmetric grid.
    """
    weight = gaussian(16, 40).abs() + shift if shift else gaussian(16, 40)
    grid = Affine(bits, symmetric=symmetric)
    steps = (rounded(weight, grid) - weight).abs() / grid.fit(weight)[:, :1]
    assert steps.max() <= 1.01


def test_symmetric_grid_stores_no_zero_points() -> None:
    assert set(Affine(4, 16, symmetric=True).layout(4, 32)) == {"qweight", "scales"}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_clip_search_never_costs_more_and_helps_at_two_bits(bits: int, symmetric: bool) -> None:
    weight = gaussian(32, 64)
    plain, clipped = (rounded(weight, Affine(bits, 16, symmetric, clip)) for clip in (False, True))
    before, after = ((w - weight).abs().pow(2.4).unflatten(1, (-1, 16)).sum(-1) for w in (plain, clipped))
    assert (after <= before * (1 + 1e-6)).all()
    assert bits > 2 or after.sum() < 0.8 * before.sum()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-9, 1e6, 1e30])
def test_extreme_magnitudes_stay_finite_and_ordered(magnitude: float) -> None:
    """Scales are clamped to what float16 can say."""
    values = stored(gaussian(4, 32) * magnitude, Affine(4, 16))
    assert torch.isfinite(values).all()


def test_an_empty_group_decodes_to_zeros() -> None:
    assert not stored(torch.zeros(2, 40), Affine(2, 16)).any()


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=f"bits={bits}; a uniform grid has 1 to 8 bits"):
        Affine(bits)


@pytest.mark.parametrize("group_size", [0, -2])
def test_impossible_group_sizes_are_refused(group_size: int) -> None:
    with pytest.raises(InputError, match=f"group_size={group_size}; give a positive number of columns, or -1"):
        Affine(4, group_size)


# ---- NF4 -----------------------------------------------------------------------------------------------------------


def test_every_level_is_its_own_code_and_midpoints_go_down() -> None:
    """bitsandbytes' rule: x above the midpoint takes the upper code, x on it the lower."""
    levels = torch.tensor(NF4)
    middle = (levels[1:] + levels[:-1]) / 2
    grid, one = Codebook(), torch.ones(1, 1)
    assert grid.quantize_values(levels[None], one).tolist() == [list(range(16))]
    assert grid.quantize_values(middle[None], one).tolist() == [list(range(15))]
    above = torch.nextafter(middle, torch.tensor(2.0))
    assert grid.quantize_values(above[None], one).tolist() == [list(range(1, 16))]


def test_nf4_equals_bitsandbytes() -> None:
    """What bitsandbytes 0.50.2 makes of this row: bytes (first code high), maximum, and the first values back."""
    row = torch.tensor([((i * 37) % 64 - 31.5) / 40 for i in range(32)])[None]
    codes, params = Nearest()(row, None, Codebook(group_size=32))
    octets = codes[0, ::2] << 4 | codes[0, 1::2]
    assert bytes(octets.tolist()).hex() == "091c3e60a2d4f81b2e5f91c3e60a1d4f"
    assert params.item() == 0.7875000238418579
    back = [-0.7875000238418579, 0.12673254311084747, -0.5482518672943115, 0.3470590114593506]
    assert stored(row, Codebook(group_size=32))[0, :4].tolist() == back


def test_the_dynamic_map_is_signed_sorted_and_has_256_levels() -> None:
    levels = torch.tensor(DYNAMIC)
    assert len(DYNAMIC) == 256 and levels[-1] == 1 and (levels.diff() > 0).all()
    assert set(levels[levels < 0].tolist()) == {-x for x in levels[(levels > 0) & (levels < 1)].tolist()}
    assert levels[0] == pytest.approx(-0.99296875)


def test_double_quantization_costs_an_eighth_of_the_scales_and_little_accuracy() -> None:
    weight = gaussian(64, 512) * torch.rand(64, 1).add(0.5)
    single, double = Codebook(group_size=64), Codebook(group_size=64, double_quantization=True)
    errors = [(stored(weight, grid) - weight).square().mean().item() for grid in (single, double)]
    assert errors[1] < 1.02 * errors[0]
    sizes = [sum(t.nbytes for t in g.pack(*Nearest()(weight, None, g), 512).values()) for g in (single, double)]
    bits = [8 * size / weight.numel() for size in sizes]
    assert bits == pytest.approx([4.5, 4.127], abs=2e-3)


def test_double_quantization_blocks_run_over_rows_of_maxima() -> None:
    """Groups do not divide blocks of 256, so blocks of maxima begin in the middle of a row; row slices still agree."""
    grid = Codebook(group_size=8, double_quantization=True)
    weight = gaussian(30, 200)  # 25 maxima a row, 750 in all
    packed = grid.pack(*Nearest()(weight, None, grid), 200)
    assert packed["nested_scales"].shape == (3,)
    assert torch.equal(grid.dequantize(packed, slice(9, 21)), grid.dequantize(packed)[9:21])


# ---- the lattice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [8, 64, 100])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lattice_decoding_gives_exactly_the_values_that_rounding_saw(bits: int, columns: int) -> None:
    grid = Lattice(bits)
    weight = gaussian(5, columns)
    codes, params = Nearest()(weight, None, grid)
    filled = -(-columns // 8) * 8
    assert codes.shape == (5, filled // 8) and params.shape == (5, 1, 0)
    packed = grid.pack(codes, params, columns)
    layout = grid.layout(5, columns)
    assert {k: (tuple(t.shape), t.dtype) for k, t in packed.items()} == {
        k: (v.shape, v.dtype) for k, v in layout.items()
    }
    assert torch.equal(grid.dequantize(packed), grid.dequantize_codes(codes, params[:, 0]))
    assert sum(8 * t.nbytes for t in packed.values()) == bits * 5 * filled


@pytest.mark.parametrize(("bits", "error"), [(2, 0.0913), (3, 0.02945), (4, 0.00957)])
def test_error_on_gaussian_weights_is_the_published_one(bits: int, error: float) -> None:
    weight = gaussian(128, 512)
    values = stored(weight * SCALE[bits], Lattice(bits)) / SCALE[bits]
    assert (values - weight).square().mean().item() == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("bits", [0, 1, 5, 8, True])
def test_lattices_have_two_to_four_bits(bits: int) -> None:
    with pytest.raises(InputError, match=f"bits={bits}; a lattice grid has 2, 3 or 4 bits"):
        Lattice(bits)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_residual_scales_are_positive_numbers(scale: float) -> None:
    with pytest.raises(InputError, match=r"residual_scale=.*; give a positive number, as 3\.45"):
        Lattice(4, scale)


# ---- levels without a zero -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_mid_rise_levels_are_odd_multiples_of_half_a_scale_and_codes_the_nearest(bits: int) -> None:
    """Nearest of all levels by brute force; and what is packed decodes to the same values."""
    grid, weight = MidRise(bits, 32, clip=True, scale_type="float32"), torch.randn(6, 70)
    codes, params = Nearest()(weight, None, grid)
    packed = grid.pack(codes, params, 70)
    scales = packed["scales"].repeat_interleave(32, 1)[:, :70, None]
    levels = scales * (torch.arange(2**bits) - (2**bits - 1) / 2)
    expected = levels.gather(2, (levels - weight[..., None]).abs().argmin(2, keepdim=True))[..., 0]
    torch.testing.assert_close(grid.dequantize(packed), expected)
    assert (grid.dequantize(packed) != 0).all()


def test_at_two_bits_levels_without_a_zero_suit_gaussian_weights_better() -> None:
    """The best four equally spaced levels for them are ±½ and ±1½ times 0.9957: an error of 0.1188 (Max 1960)."""
    weight, errors = torch.randn(8, 20_000), []
    for grid in (MidRise(2, clip=True), Affine(2, clip=True)):
        codes, params = Nearest()(weight, None, grid)
        errors.append(float((grid.dequantize(grid.pack(codes, params, 20_000)) - weight).square().mean()))
    assert errors[0] == pytest.approx(0.1188, rel=0.03) and errors[0] < 0.9 * errors[1], errors


def test_a_group_of_zeros_is_zeros_without_a_level_for_it() -> None:
    grid, weight = MidRise(2, 16), torch.randn(3, 48)
    weight[1, 16:32] = 0
    codes, params = Nearest()(weight, None, grid)
    assert not grid.dequantize(grid.pack(codes, params, 48))[1, 16:32].any()
