"""The search for a group's range in C: the choices of the grid's own arithmetic, and never a dearer one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtools.kernels.ranges import searches
from llmtools.quant.grids import affine
from llmtools.quant.grids.affine import Affine

pytestmark = pytest.mark.skipif(not searches(torch.zeros(1, 1)), reason="no C compiler")


def weights(groups: int, columns: int, seed: int, magnitude: float) -> Tensor:
    return torch.randn(groups, columns, generator=torch.Generator().manual_seed(seed)) * magnitude


def in_torch(grid: Affine, group: Tensor, importance: Tensor | None) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "searches", lambda group: False)
        return grid.fit(group, importance)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["whole", "symmetric", "float zeros"]),
    scale_type=st.sampled_from(["float16", "bfloat16", "float32"]),
    magnitude=st.sampled_from([1e-4, 0.05, 100.0]),
    weighed=st.booleans(),
)
def test_the_range_costs_no_more_than_the_one_found_in_torch(
    bits: int, columns: int, seed: int, kind: str, scale_type: str, magnitude: float, weighed: bool
) -> None:
    """In float64, up to the rounding of the search itself; also for zeros, one sign, an outlier."""
    grid = Affine(bits, -1, kind == "symmetric", clip=True, scale_type=scale_type, float_zeros=kind == "float zeros")
    group = weights(24, columns, seed, magnitude)
    group[0], group[1], group[2, 0] = 0, group[1].abs(), 40 * magnitude
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.01 if weighed else None
    ours, theirs = grid.fit(group, importance), in_torch(grid, group, importance)
    exact = None if importance is None else importance.double()
    cost, least = (grid._cost(group.double(), each.double(), exact) for each in (ours, theirs))
    assert torch.all(cost <= least * (1 + 1e-4) + 1e-30)
    assert (ours == theirs).all(1).float().mean() > 0.8  # the others are ties within rounding


def test_whole_groups_of_a_model_s_size_are_the_same_bits() -> None:
    group = weights(500, 64, 0, 0.05)
    grid = Affine(4, 64, clip=True)
    assert torch.equal(grid.fit(group), in_torch(grid, group, None))


def test_the_result_does_not_depend_on_threads_or_neighbours() -> None:
    group, grid = weights(999, 50, 1, 0.05), Affine(3, -1, clip=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = grid.fit(group)
        torch.set_num_threads(3)
        assert torch.equal(grid.fit(group), alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grid.fit(group[500:501]), alone[500:501])
    assert torch.equal(grid.fit(group.T.contiguous().T), alone)
