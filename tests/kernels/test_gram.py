"""The sum of a Hessian from bfloat16 activations: exact products, any sizes, any number of threads."""

from __future__ import annotations

import pytest
import torch

from llmtools.kernels.gram import add_gram, has_gram

SIZES = [(1, 1), (2, 48), (7, 49), (255, 96), (257, 50), (600, 145)]


@pytest.fixture(autouse=True)
def _there() -> None:
    if not has_gram(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bfloat16)):
        pytest.skip("this processor has no products of bfloat16 pairs, or there is no compiler")


@pytest.mark.parametrize(("tokens", "features"), SIZES)
def test_the_upper_triangle_is_the_sum_of_products(tokens: int, features: int) -> None:
    x = torch.randn(tokens, features).bfloat16()
    before = torch.randn(features, features)
    total = before.clone()
    assert add_gram(total, x)
    truth = before.double() + x.double().T @ x.double()
    sizes = before.abs().double() + x.double().abs().T @ x.double().abs()  # what sums in float32 may err by
    error = (total - truth).abs().triu()
    assert (error <= 2**-20 * sizes).all()


def test_small_whole_numbers_are_summed_exactly() -> None:
    x = torch.randint(-8, 9, (300, 70)).bfloat16()
    total = torch.zeros(70, 70)
    add_gram(total, x)
    assert torch.equal(total.triu(), (x.float().T @ x.float()).triu())


def test_the_number_of_threads_does_not_show() -> None:
    x = torch.randn(520, 200).bfloat16()
    totals = [torch.zeros(200, 200) for _ in range(2)]
    threads = torch.get_num_threads()
    try:
        for count, total in zip((1, 3), totals, strict=True):
            torch.set_num_threads(count)
            add_gram(total, x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(totals[0].triu(), totals[1].triu())


def test_rows_that_are_not_contiguous_are_summed_as_they_are() -> None:
    x = torch.randn(64, 30).bfloat16().T[:, ::2]
    total = torch.zeros(32, 32)
    add_gram(total, x)
    assert torch.allclose(total.triu(), (x.float().T @ x.float()).triu(), atol=1e-4)


def test_what_is_no_number_shows_on_the_diagonal() -> None:
    x = torch.ones(5, 60).bfloat16()
    x[3, 17], x[4, 55] = torch.inf, torch.nan
    total = torch.zeros(60, 60)
    add_gram(total, x)
    assert torch.nonzero(~torch.isfinite(total.diagonal())).flatten().tolist() == [17, 55]


def test_other_types_are_left_to_torch() -> None:
    assert not has_gram(torch.zeros(4, 4), torch.zeros(2, 4))
    assert not has_gram(torch.zeros(4, 4), torch.zeros(2, 4, dtype=torch.float16))
