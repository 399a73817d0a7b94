"""Bases: orthogonal changes of coordinates that are undone exactly, on weights and on activations alike."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtools.errors import InputError
from llmtools.kernels.hadamard import matrix, rule_for
from llmtools.quant import bases
from llmtools.quant.bases import Basis, Permutation, Rescale, SignedHadamard
from llmtools.quant.grids.affine import Affine

BASES: list[Basis] = [
    Permutation(),
    SignedHadamard(),
    SignedHadamard(seed=3, scale=1.03),
    Rescale(Affine(3, 16)),
]
SHAPES = [(8, 16), (7, 33), (12, 172), (1, 1), (600, 520)]
"""Powers of two, nothing even, a size with a table of its own, the least, and several chunks."""


def problem(out: int, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(out * n)
    x = torch.randn(3 * n, n, generator=g) * torch.rand(n, generator=g)
    return torch.randn(out, n, generator=g), x.T @ x / len(x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("basis", BASES, ids=str)
def test_state_is_what_the_layout_says(basis: Basis, shape: tuple[int, int]) -> None:
    state = basis.init(*problem(*shape))
    layout = basis.layout(*shape)
    assert {k: (tuple(t.shape), t.dtype) for k, t in state.items()} == {
        k: (v.shape, v.dtype) for k, v in layout.items()
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("basis", BASES, ids=str)
def test_restore_undoes_rotate(basis: Basis, shape: tuple[int, int]) -> None:
    weight, hessian = problem(*shape)
    state = basis.init(weight, hessian)
    rotated, _ = basis.transform(weight, hessian, state)
    torch.testing.assert_close(basis.inverse_transform(rotated, state), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("basis", BASES, ids=str)
def test_rotating_activations_is_rotating_the_weight(basis: Basis, shape: tuple[int, int]) -> None:
    weight, hessian = problem(*shape)
    state = basis.init(weight, hessian)
    rotated, _ = basis.transform(weight, hessian, state)
    x = torch.randn(2, 3, shape[1])
    y = basis.outputs(basis.inputs(x, state) @ rotated.T, state)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("basis", BASES, ids=str)
def test_the_proxy_loss_does_not_depend_on_the_coordinates(basis: Basis, shape: tuple[int, int]) -> None:
    weight, hessian = problem(*shape)
    state = basis.init(weight, hessian)
    rotated, turned = basis.transform(weight, hessian, state)
    assert turned is not None
    if "sv" in state:  # the size of each row
        weight = weight / state["sv"].abs()[:, None].float()
    before, after = ((w @ h * w).sum() for w, h in ((weight, hessian), (rotated, turned)))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=0)


@pytest.mark.parametrize("basis", BASES, ids=str)
def test_gradients_pass_through_both_sides(basis: Basis) -> None:
    state = basis.init(*problem(7, 20))
    x = torch.randn(2, 20, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: basis.inputs(x, state), x)
    assert torch.autograd.gradcheck(lambda y: basis.outputs(y, state), y)


def test_the_permutation_is_by_falling_diagonal_with_ties_in_order() -> None:
    hessian = torch.diag(torch.tensor([1.0, 3.0, 1.0, 9.0, 3.0]))
    assert Permutation().init(torch.ones(2, 5), hessian)["perm"].tolist() == [3, 1, 4, 0, 2]


# ---- the signed Hadamard transform ---------------------------------------------------------------------------------


def test_the_layer_is_the_product_of_five_matrices() -> None:
    """W = diag(sv) Q_out W' Q_inᵀ diag(su), spelt out with dense matrices; order 12 is not symmetric."""
    assert rule_for(12) == "paley1:11"
    q = matrix("paley1:11").double() / 12**0.5
    assert not torch.equal(q, q.T)
    weight = torch.randn(12, 24, dtype=torch.float64)
    q_in = torch.kron(q, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5)
    basis = SignedHadamard(scale=1.0)
    state = basis.init(weight, None)
    inner, _ = basis.transform(weight, None, state)
    su, sv = state["su"].double(), state["sv"].double()
    torch.testing.assert_close(sv.diag() @ q @ inner @ q_in.T @ su.diag(), weight)


def test_outliers_are_spread_over_the_whole_weight() -> None:
    weight, hessian = problem(64, 192)
    weight[3] *= 20
    weight[:, 7] *= 20
    basis = SignedHadamard(scale=1.0)
    inner, turned = basis.transform(weight, hessian, basis.init(weight, hessian))
    assert turned is not None
    assert inner.square().mean().sqrt() == pytest.approx(1, rel=1e-3)
    assert inner.abs().max() < 6 < (weight / weight.square().mean().sqrt()).abs().max()
    spread = [(h.diagonal().max() / h.diagonal().mean()).item() for h in (hessian, turned)]
    assert spread[1] < 0.6 * spread[0]


def test_signs_depend_on_the_seed_and_nothing_else() -> None:
    weight, _ = problem(8, 16)
    torch.manual_seed(1)
    first = SignedHadamard(seed=4).init(weight, None)
    torch.manual_seed(2)
    again, other = SignedHadamard(seed=4).init(2 * weight, None), SignedHadamard(seed=5).init(weight, None)
    assert torch.equal(first["su"], again["su"]) and torch.equal(first["sv"], again["sv"])
    assert not torch.equal(first["su"], other["su"])
    assert set(first["su"].tolist()) == {-1.0, 1.0}


def siblings(count: int = 3) -> list[tuple[Basis, dict[str, Tensor]]]:
    """Bases of layers that read one input and were quantized with one seed; each has its own copy of the signs."""
    return [(SignedHadamard(scale=1.0), SignedHadamard().init(problem(12, 96)[0], None)) for _ in range(count)]


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inputs' sizes of all rotations that are computed."""
    made: list[int] = []

    def rotate(x: Tensor, *args: Any, **options: Any) -> Tensor:
        made.append(x.shape[-1])
        return real(x, *args, **options)

    real = bases.rotate
    monkeypatch.setattr(bases, "rotate", rotate)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_siblings_rotate_their_input_once_with_the_same_values_and_gradients(
    dtype: torch.dtype, rotations: list[int]
) -> None:
    layers, grads = siblings(), torch.randn(3, 5, 96).to(dtype)
    x = torch.randn(5, 96).to(dtype).requires_grad_() * 1  # a leaf is rotated every time
    shared = [basis.inputs(x, state) for basis, state in layers]
    assert rotations == [96]
    (gradient,) = torch.autograd.grad(shared, x, list(grads))
    apart = [x.detach().clone().requires_grad_() for _ in layers]
    own = [basis.inputs(each, state) for (basis, state), each in zip(layers, apart, strict=True)]
    assert all(torch.equal(*pair) for pair in zip(shared, own, strict=True))
    expected = sum(part.double() for part in torch.autograd.grad(own, apart, list(grads)))
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_a_changed_input_is_rotated_again(rotations: list[int]) -> None:
    (first, state), (second, others), _ = siblings()
    x = torch.randn(5, 96)
    before = first.inputs(x, state)
    assert second.inputs(x, others) is before
    x.mul_(2)
    torch.testing.assert_close(second.inputs(x, others), 2 * before)
    others["su"][3] *= -1
    assert not torch.equal(second.inputs(x, others), first.inputs(x, state))
    state["su"][5] *= -1  # the signs that were used last
    again = first.inputs(x, state)
    torch.testing.assert_close(again, first.inputs(x.clone(), state))
    assert len(rotations) == 6


def test_a_result_without_a_graph_serves_no_training(rotations: list[int]) -> None:
    (basis, state), *_ = siblings()
    x = torch.randn(5, 96, requires_grad=True) * 1
    with torch.no_grad():
        assert not basis.inputs(x, state).requires_grad
    assert basis.inputs(x, state).requires_grad
    with torch.inference_mode():
        assert not basis.inputs(torch.randn(5, 96), state).requires_grad


def test_a_rotated_input_is_dropped_with_the_input() -> None:
    (basis, state), *_ = siblings()
    x = torch.randn(5, 96)
    result = weakref.ref(basis.inputs(x, state))
    assert result() is not None
    del x
    assert result() is None


def test_trained_signs_are_any_numbers_and_get_gradients() -> None:
    basis = SignedHadamard(scale=1.0)
    weight, hessian = problem(12, 20)
    state = {name: t.double().requires_grad_() for name, t in basis.init(weight, hessian).items()}
    inner = torch.randn(12, 24, dtype=torch.float64)
    x = torch.randn(3, 20, dtype=torch.float64)

    def layer(su: Tensor, sv: Tensor) -> Tensor:
        return basis.outputs(basis.inputs(x, {"su": su}) @ inner.T, {"sv": sv})

    assert torch.autograd.gradcheck(layer, (state["su"], state["sv"]))
    with torch.no_grad():
        state = {name: t * torch.rand_like(t).add(0.5) for name, t in state.items()}
        y = basis.outputs(basis.inputs(x, state) @ inner.T, state)
        torch.testing.assert_close(y, x @ basis.inverse_transform(inner, state).T)


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6])
def test_scales_of_any_size_are_rounded_before_the_weight_is_divided(size: float) -> None:
    basis = SignedHadamard(scale=1.0)
    weight = problem(8, 16)[0] * size
    state = basis.init(weight, None)
    inner, _ = basis.transform(weight, None, state)
    torch.testing.assert_close(basis.inverse_transform(inner, state), weight, rtol=1e-4, atol=1e-5 * size)


def test_half_precision_does_not_overflow_between_the_transforms() -> None:
    """Activations as massive as in some layers of real models, times inner weights of size one."""
    basis = SignedHadamard(scale=1.0)
    weight = torch.randn(64, 512) * 0.01
    state = basis.init(weight, None)
    inner, _ = basis.transform(weight, None, state)
    x = torch.randn(4, 512)
    x[:, 5] = 20000
    y = basis.outputs(basis.inputs(x.half(), state) @ inner.half().T, state)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), x @ weight.T, rtol=2e-2, atol=2)


def test_a_layer_without_inputs_is_rounded_as_if_they_were_independent() -> None:
    _, turned = SignedHadamard().transform(
        *problem(8, 16)[:1], torch.zeros(16, 16), SignedHadamard().init(problem(8, 16)[0], None)
    )
    assert turned is not None and torch.equal(turned, torch.eye(16))


@pytest.mark.parametrize("options", [{"rules": 2}, {"scale": 0.0}, {"scale": float("nan")}], ids=str)
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        SignedHadamard(**options)  # type: ignore[arg-type]


# ---- rescaled inputs -----------------------------------------------------------------------------------------------


def test_large_inputs_get_large_columns() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=g)
    x[:, 5] *= 30
    weight, hessian = torch.randn(32, 64, generator=g), x.T @ x / 500
    state = Rescale(Affine(3, 16)).init(weight, hessian)
    assert state["input_scales"].argmin() == 5 and state["input_scales"].max() > 2 * state["input_scales"][5]


def test_even_inputs_are_left_alone_and_dead_ones_do_no_harm() -> None:
    weight = torch.randn(32, 64)
    scales = Rescale(Affine(3, 16)).init(weight, torch.eye(64))["input_scales"]
    assert torch.equal(scales, torch.ones_like(scales))
    for hessian in (torch.zeros(64, 64), torch.diag((torch.arange(64) > 9).float() * torch.rand(64).add(0.1))):
        scales = Rescale(Affine(3, 16)).init(weight, hessian)["input_scales"]
        assert torch.isfinite(scales).all() and (scales > 0).all()
