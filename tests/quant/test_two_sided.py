"""Two-sided rounding: feedback between rows by the second moment of the outputs' gradients, beside that of columns."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtools.errors import InputError, within
from llmtools.quant import Quantizer, quantizer, rounding
from llmtools.quant.bases import Permutation, SignedHadamard
from llmtools.quant.grids.affine import Affine
from llmtools.quant.grids.base import Grid
from llmtools.quant.grids.codebook import Codebook
from llmtools.quant.grids.lattice import Lattice
from llmtools.quant.grids.trellis import Trellis
from llmtools.quant.hessian import feedback
from llmtools.quant.quip_sharp import row_corrections
from llmtools.quant.rounding import Sequential
from tests.quant.test_rounding import problem

GRIDS = [Affine(2), Affine(3, 16, clip=True), Codebook(group_size=16), Lattice(2), Lattice(3), Trellis(2, 8)]


def moment(out: int, seed: int = 0, decay: float = 0.7) -> Tensor:
    """E[g gᵀ] of gradients some directions of which are much larger than others, [out, out] float64."""
    g = torch.Generator().manual_seed(seed + 100)
    mix = torch.linalg.qr(torch.randn(out, out, generator=g, dtype=torch.float64)).Q
    sizes = torch.arange(1, out + 1, dtype=torch.float64) ** -decay
    gradients = torch.randn(4 * out, out, generator=g, dtype=torch.float64) * sizes @ mix
    return gradients.T @ gradients / len(gradients)


def loss(error: Tensor, hessian: Tensor, outputs: Tensor) -> float:
    return float(((outputs.double() @ error.double() @ hessian.double()) * error.double()).sum())


def values_of(grid: Grid, codes: Tensor, params: Tensor, n: int) -> Tensor:
    return grid.dequantize(grid.pack(codes, params, n), dtype=torch.float64)[:, :n]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("optq", {"bits": 2, "group_size": 32}),
        ("optq", {"bits": 3, "group_size": 32, "act_order": True, "passes": 2}),
        ("optq", {"bits": 3, "group_size": 32, "act_order": True, "static_groups": True}),
        ("quip", {"bits": 2, "passes": 2}),
        ("quip_sharp", {"bits": 2}),
        ("quip_sharp", {"bits": 3, "passes": 0}),
        ("qtip", {"bits": 2, "state_bits": 8}),
        ("qtip", {"bits": 2, "state_bits": 8, "code": "hyb"}),
    ],
    ids=str,
)
def test_the_loss_of_the_network_is_less_than_one_sided(name: str, options: dict[str, Any]) -> None:
    """tr(G E H Eᵀ) on each of some problems, and far less on average; also where tiles and strips do not fit the
    rows."""
    made, ratios = quantizer(name, **options), []
    for seed, out in enumerate((96, 120, 83)):
        weight, hessian = (each.float() for each in problem(out, 64, seed, dead=seed))
        outputs = moment(out, seed).float()
        one, two = made.quantize(weight, hessian), made.quantize_two_sided(weight, hessian, outputs)
        assert {key: each.shape for key, each in one.items()} == {key: each.shape for key, each in two.items()}
        ratios.append(
            loss(weight - made.dequantize(two), hessian, outputs)
            / loss(weight - made.dequantize(one), hessian, outputs)
        )
    assert max(ratios) < 1 and sum(ratios) / len(ratios) < 0.8, ratios


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_outputs_that_have_nothing_to_do_with_one_another_change_no_bit(grid: Grid, passes: int) -> None:
    """The identity, and any diagonal moment: the rows are rounded as they are without it."""
    weight, hessian = problem(80, 64)
    codes, params = Sequential(passes=passes)(weight, hessian, grid)
    for diagonal in (torch.ones(80), 3 * torch.ones(80), torch.rand(80) + 0.1):
        same, fitted = Sequential(passes=passes)(weight, hessian, grid, diagonal.diag())
        assert torch.equal(same, codes) and torch.equal(fitted, params)


@pytest.mark.parametrize(("grid", "strips"), [(Affine(3), 24), (Lattice(2), 6), (Affine(2), 5), (Trellis(2, 8), 2)],
                         ids=str)  # fmt: skip
def test_the_strips_take_the_feedback_of_both_sides(grid: Grid, strips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spelt out: each code is that of W + Nᵀ E M − E at its place, E being the errors made before it, of earlier strips
    and of earlier columns in its own."""
    monkeypatch.setattr(rounding, "STRIPS", strips)
    monkeypatch.setattr(rounding, "LEAST_ROWS", 1)
    weight, hessian = problem(24, 48)
    outputs = moment(24)
    codes, params = Sequential()(weight, hessian, grid, outputs)
    width, height = grid.width, max(grid.height, -(-24 // strips))
    m = feedback(hessian, width, 0.01)
    padded = torch.block_diag(outputs, outputs.diagonal().mean() * torch.eye(-24 % height, dtype=torch.float64))
    n = feedback(padded, height, rounding.ROW_DAMPING)
    assert m is not None and n is not None
    n, error = n[:24, :24], torch.zeros_like(weight)
    for top in range(0, 24, height):
        rows = slice(top, min(top + height, 24))
        for left in range(0, 48, width):
            columns = slice(left, left + width)
            target = (weight + n.T @ error @ m - error)[rows, columns]
            code = grid.quantize_values(target, params[rows, 0])
            assert torch.equal(code[:, 0], codes[rows, left // width])
            error[rows, columns] = weight[rows, columns] - grid.dequantize_codes(code, params[rows, 0])


def test_more_strips_than_there_are_help_little_and_fewer_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(256, 32)
    outputs, losses = moment(256), []
    monkeypatch.setattr(rounding, "LEAST_ROWS", 1)
    for strips in (2, 32, 256):
        monkeypatch.setattr(rounding, "STRIPS", strips)
        codes, params = Sequential()(weight, hessian, Lattice(3), outputs)
        losses.append(loss(weight - values_of(Lattice(3), codes, params, 32), hessian, outputs))
    assert losses[1] < 0.8 * losses[0] and losses[1] < 1.2 * losses[2], losses


@pytest.mark.parametrize(
    ("basis", "sizes"),
    [(SignedHadamard(), (24, 20)), (SignedHadamard(scale=1.0), (17, 33)), (SignedHadamard(mixed=16), (24, 20)),
     (Permutation(), (5, 8))],
    ids=str,
)  # fmt: skip
def test_the_loss_is_the_same_in_other_coordinates(basis: Any, sizes: tuple[int, int]) -> None:
    weight, hessian = problem(*sizes)
    outputs, error = moment(sizes[0]), torch.randn(sizes, dtype=torch.float64)
    state = basis.init(weight, hessian)
    turned, seen = basis.transform(error, hessian, state)
    assert loss(turned, seen, basis.output_moment(outputs, state)) == pytest.approx(loss(error, hessian, outputs))


def test_factors_of_rows_are_the_best_for_all_rows_together() -> None:
    """Any other factor of one row, and the best ones of each row by itself, cost more."""
    weight, hessian = (each.float() for each in problem(24, 32))
    outputs = moment(24).float()
    approximation = weight * (1 + 0.1 * torch.randn(24, 1)) + 0.05 * weight.abs() * torch.randn_like(weight)
    factors = row_corrections(weight, approximation, hessian, outputs)

    def cost(factors: Tensor) -> float:
        return loss(weight - factors[:, None] * approximation, hessian, outputs)

    assert cost(factors) < 0.95 * cost(row_corrections(weight, approximation, hessian)) < cost(torch.ones(24))
    best = cost(factors)
    for row in range(24):
        for step in (-0.05, 0.05):
            other = factors.clone()
            other[row] += step
            assert cost(other) > best


def test_a_moment_of_one_direction_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    weight, hessian = (each.float() for each in problem(40, 32))
    direction = torch.randn(40, 1)
    with caplog.at_level(logging.WARNING):
        made = quantizer("quip_sharp", bits=2)
        values = made.dequantize(made.quantize_two_sided(weight, hessian, direction @ direction.T))
    assert torch.isfinite(values).all() and not caplog.records


def test_a_moment_that_is_none_leaves_the_rows_alone_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    weight, hessian = problem(40, 32)
    outputs = moment(40) - 5 * torch.eye(40, dtype=torch.float64)
    with caplog.at_level(logging.WARNING), within("layers.1.up_proj"):
        codes, _ = Sequential()(weight, hessian, Affine(3), outputs)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("layers.1.up_proj: ") and "rounded without regard to one another" in message
    assert torch.equal(codes, Sequential()(weight, hessian, Affine(3))[0])


@pytest.mark.parametrize("name", ["rtn", "nf4", "hqq", "awq", "signround"])
def test_a_rounding_that_is_no_sweep_is_refused(name: str) -> None:
    made: Quantizer = quantizer(name)
    assert not made.rounds_two_sided()
    with pytest.raises(InputError, match=f"{name} has no two-sided rounding"):
        made.quantize_two_sided(torch.randn(4, 8), torch.eye(8), torch.eye(4))


@pytest.mark.parametrize("name", ["optq", "quip", "quip_sharp", "qtip"])
def test_a_damaged_moment_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="reaches nan"):
        quantizer(name).quantize_two_sided(torch.randn(32, 16), torch.eye(16), torch.full((32, 32), torch.nan))
