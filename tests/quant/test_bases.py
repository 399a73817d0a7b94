"""Bases: orthogonal changes of coordinates that are undone exactly, on weights and on activations alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtools.quant.bases import Basis, Permutation

BASES: list[Basis] = [Permutation()]
SHAPES = [(8, 16), (7, 33), (12, 172)]


def problem(out: int, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(out * n)
    x = torch.randn(3 * n, n, generator=g) * torch.rand(n, generator=g)
    return torch.randn(out, n, generator=g), x.T @ x / len(x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("basis", BASES, ids=str)
def test_state_is_what_the_layout_says(basis: Basis, shape: tuple[int, int]) -> None:
    state = basis.draw(*problem(*shape))
    layout = basis.layout(*shape)
    assert {k: (tuple(t.shape), t.dtype) for k, t in state.items()} == {
        k: (v.shape, v.dtype) for k, v in layout.items()
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("basis", BASES, ids=str)
def test_restore_undoes_rotate(basis: Basis, shape: tuple[int, int]) -> None:
    weight, hessian = problem(*shape)
    state = basis.draw(weight, hessian)
    rotated, _ = basis.rotate(weight, hessian, state)
    torch.testing.assert_close(basis.restore(rotated, state), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("basis", BASES, ids=str)
def test_rotating_activations_is_rotating_the_weight(basis: Basis, shape: tuple[int, int]) -> None:
    weight, hessian = problem(*shape)
    state = basis.draw(weight, hessian)
    rotated, _ = basis.rotate(weight, hessian, state)
    x = torch.randn(2, 3, shape[1])
    y = basis.outputs(basis.inputs(x, state) @ rotated.T, state)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("basis", BASES, ids=str)
def test_the_proxy_loss_does_not_depend_on_the_coordinates(basis: Basis, shape: tuple[int, int]) -> None:
    weight, hessian = problem(*shape)
    state = basis.draw(weight, hessian)
    rotated, turned = basis.rotate(weight, hessian, state)
    assert turned is not None
    before, after = ((w @ h * w).sum() for w, h in ((weight, hessian), (rotated, turned)))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=0)


@pytest.mark.parametrize("basis", BASES, ids=str)
def test_gradients_pass_through_both_sides(basis: Basis) -> None:
    state = basis.draw(*problem(7, 24))
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: basis.inputs(x, state), x)
    assert torch.autograd.gradcheck(lambda y: basis.outputs(y, state), y)


def test_the_permutation_is_by_falling_diagonal_with_ties_in_order() -> None:
    hessian = torch.diag(torch.tensor([1.0, 3.0, 1.0, 9.0, 3.0]))
    assert Permutation().draw(torch.ones(2, 5), hessian)["perm"].tolist() == [3, 1, 4, 0, 2]
