"""The inner loop of a sweep in C: the codes of the loop in torch, and its errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtools.kernels.sweep import sweep_columns, sweeps
from llmtools.quant.grids.affine import Affine

GRIDS = [Affine(3), Affine(8, symmetric=True), Affine(2, float_zeros=True, scale_type="float32")]
SIZES = [(1, 1), (15, 7), (16, 64), (33, 128)]


@pytest.fixture(autouse=True)
def _there() -> None:
    if not sweeps(torch.zeros(1, 1)):
        pytest.skip("there is no compiler")


def problem(out: int, columns: int, grid: Affine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(target, weight, feedback, params) whose weights and targets are parts of larger matrices."""
    weight = torch.randn(out, columns + 5)[:, 2 : 2 + columns]
    target = weight + 0.1 * torch.randn(out, columns)
    update = torch.randn(columns + 3, columns + 3)[1 : 1 + columns, 2 : 2 + columns] * columns**-0.5
    return target, weight, update, grid.fit(target)


def in_turn(target: Tensor, weight: Tensor, update: Tensor, params: Tensor, grid: Affine) -> tuple[Tensor, Tensor]:
    """(codes, errors) column after column, in the precision given."""
    error, codes = weight.clone(), []
    for j in range(target.shape[1]):
        x = target[:, j, None] + error[:, :j] @ update[:j, j, None]
        codes.append(grid.quantize_values(x, params))
        error[:, j, None] -= grid.dequantize_codes(codes[-1], params)
    return torch.cat(codes, 1), error


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("out", "columns"), SIZES)
def test_codes_are_those_of_the_loop(out: int, columns: int, grid: Affine) -> None:
    target, weight, update, params = problem(out, columns, grid)
    truth, _ = in_turn(target.double(), weight.double(), update.double(), params.double(), grid)
    error = weight.clone()
    codes = grid.sweep(target, error, update, params)
    assert codes is not None
    assert torch.equal(error, weight - grid.dequantize_codes(codes, params))
    # Where a value lies halfway between two codes a last bit decides, and later columns of that row differ with it.
    assert (codes == truth).all(1).float().mean() >= 0.9


def test_parts_of_a_matrix_are_changed_and_nothing_beside_them() -> None:
    grid, whole = Affine(4), torch.randn(20, 40)
    before, part = whole.clone(), whole[:, 8:24]
    grid.sweep(part.clone(), part, torch.eye(16), grid.fit(part))
    assert torch.equal(whole[:, :8], before[:, :8]) and torch.equal(whole[:, 24:], before[:, 24:])
    assert not torch.equal(whole[:, 8:24], before[:, 8:24])


def test_the_number_of_threads_does_not_show() -> None:
    grid = Affine(4)
    target, weight, update, params = problem(100, 64, grid)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            error = weight.clone()
            results.append((grid.sweep(target, error, update, params), error))
    finally:
        torch.set_num_threads(threads)
    (one, first), (three, second) = results
    assert one is not None and three is not None
    assert torch.equal(one, three) and torch.equal(first, second)


def test_what_c_does_not_know_is_left_to_torch() -> None:
    assert not sweeps(torch.zeros(4, 129))
    assert not sweeps(torch.zeros(4, 4, dtype=torch.float64))
    codes = sweep_columns(
        torch.tensor([[0.6, 5.0]]),
        torch.ones(1, 2),
        torch.zeros(2, 2),
        torch.ones(1),
        torch.ones(1),
        3,
        whole_zeros=True,
    )
    assert codes.tolist() == [[2.0, 3.0]]
