"""The named quantizers: what each stores, what it costs and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtools.errors import InputError
from llmtools.quant import Packed, proxy_loss, quantizer
from llmtools.quant.laws import problems


def bits_per_weight(packed: Packed, out: int, n: int) -> float:
    return sum(8 * tensor.nbytes for tensor in packed.values()) / (out * n)


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("rtn", {"bits": 4, "group_size": 128}, 4 + (16 + 4) / 128),
        ("rtn", {"bits": 4, "group_size": 128, "symmetric": True}, 4 + 16 / 128),
        ("rtn", {"bits": 3, "group_size": 64}, 3 + (16 + 3) / 64),
        ("rtn", {"bits": 2, "group_size": 32}, 2 + (16 + 2) / 32),
        ("nf4", {}, 4.5),
        ("optq", {"bits": 2, "group_size": 64}, 2 + (16 + 2) / 64),
        ("hqq", {"bits": 4}, 4 + 32 / 64),
        ("awq", {"bits": 4}, 4 + (16 + 4) / 64 + 16 / 8),
        ("quip", {"bits": 2, "passes": 0}, 2 + (16 + 2) / 1024 + 16 / 8 + 16 / 1024),
        ("quip_sharp", {"bits": 2, "passes": 0}, 2 + 16 / 8 + 16 / 1024),
        ("quip_sharp", {"bits": 3, "passes": 0}, 3 + 16 / 8 + 16 / 1024),
        ("quip_sharp", {"bits": 4, "passes": 0}, 4 + 16 / 8 + 16 / 1024),
        ("qtip", {"bits": 1, "state_bits": 8}, 1 + 16 / 8 + 16 / 1024),
        ("qtip", {"bits": 3, "state_bits": 8}, 3 + 16 / 8 + 16 / 1024),
        ("qtip", {"bits": 6, "state_bits": 10}, 6 + 16 / 8 + 16 / 1024),
        ("qtip", {"bits": 2, "state_bits": 8, "code": "hyb"}, 2 + 16 / 8 + 16 / 1024 + 512 * 2 * 16 / (8 * 1024)),
    ],
    ids=lambda value: str(value),
)
def test_size_is_as_promised(name: str, options: dict[str, Any], bits: float) -> None:
    """With 8 rows, so that what is stored once a column counts."""
    made = quantizer(name, **options)
    packed = made.quantize(torch.randn(8, 1024), torch.eye(1024))
    assert bits_per_weight(packed, 8, 1024) == pytest.approx(bits, rel=0.002)


@pytest.mark.parametrize("name", ["rtn", "optq", "hqq", "awq", "quip"])
@pytest.mark.parametrize("bits", [0, 1, 5, 16, "4", True], ids=repr)
def test_other_widths_are_refused(name: str, bits: Any) -> None:
    with pytest.raises(InputError, match=f"{name}: bits={bits!r}; choose 2, 3, 4 or 8"):
        quantizer(name, bits=bits)


@pytest.mark.parametrize("bits", [0, 1, 8, "2", True], ids=repr)
def test_quip_sharp_has_two_to_four_bits(bits: Any) -> None:
    with pytest.raises(InputError, match=f"quip_sharp: bits={bits!r}; choose 2, 3 or 4"):
        quantizer("quip_sharp", bits=bits)


@pytest.mark.parametrize(("bits", "code"), [(1, "3inst"), (2, "3inst"), (3, "1mad"), (4, "1mad"), (8, "1mad")])
def test_qtip_takes_the_code_with_less_error_at_its_bits_and_stores_which(bits: int, code: str) -> None:
    assert quantizer("qtip", bits=bits).spec()["code"] == code
    assert quantizer("qtip", bits=bits, code="mcg").spec()["code"] == "mcg"


@pytest.mark.parametrize(
    "options",
    [{"bits": 0}, {"bits": 9}, {"bits": True}, {"passes": -1}, {"damping": 0.0}, {"scale": -1.0}, {"hadamard": 2},
     {"state_bits": 7}, {"state_bits": 9, "bits": 6}, {"state_bits": 17}, {"state_bits": 12.0}, {"code": "2inst"},
     {"bits": 5, "code": "hyb"}, {"state_bits": 8, "bits": 4, "code": "hyb"}],
    ids=str,
)  # fmt: skip
def test_impossible_options_of_qtip_are_refused_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        quantizer("qtip", **options)


@pytest.mark.parametrize(
    "options",
    [{"passes": -1}, {"damping": 0.0}, {"scale": -1.0}, {"hadamard": 2}, {"residual_scale": 0.0}],
    ids=str,
)
def test_impossible_options_of_quip_sharp_are_refused_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        quantizer("quip_sharp", **options)


@pytest.mark.parametrize("name", ["rtn", "nf4", "optq", "hqq", "awq", "quip"])
@pytest.mark.parametrize("group_size", [0, -2])
def test_impossible_group_sizes_are_refused(name: str, group_size: int) -> None:
    with pytest.raises(InputError, match=f"{name}: group_size={group_size}; give a positive number of columns, or -1"):
        quantizer(name, group_size=group_size)


@pytest.mark.parametrize("name", ["rtn", "optq"])
def test_a_group_larger_than_the_row_is_the_row(name: str) -> None:
    _, (_, weight, hessian), *_ = problems()
    whole, large = (quantizer(name, bits=3, group_size=size) for size in (-1, 1024))
    values = [made.dequantize(made.quantize(weight, hessian)) for made in (whole, large)]
    assert torch.equal(*values)


@pytest.mark.parametrize("name", ["rtn", "optq"])
def test_clip_search_is_worth_most_at_two_bits(name: str) -> None:
    gains = {}
    for bits in (2, 4):
        losses = []
        for clip in (False, True):
            made = quantizer(name, bits=bits, clip=clip)
            losses.append(sum(proxy_loss(w, made.dequantize(made.quantize(w, h)), h) for _, w, h in some_problems()))
        gains[bits] = losses[1] / losses[0]
    assert gains[2] < 0.8 and gains[2] < gains[4]


def some_problems() -> list[Any]:
    return [problem for problem in problems() if "with" not in problem[0]]


# ---- which is better -----------------------------------------------------------------------------------------------


def loss(name: str, **options: Any) -> float:
    """Mean relative proxy loss over problems with correlated inputs, uneven rows and columns."""
    made, total = quantizer(name, **options), 0.0
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(400, 128, generator=g) @ (torch.randn(128, 128, generator=g) * torch.rand(128, generator=g))
        weight = torch.randn(64, 128, generator=g) * torch.rand(64, 1, generator=g).add(0.2)
        hessian = x.T @ x / 400
        values = made.dequantize(made.quantize(weight, hessian))
        total += proxy_loss(weight, values, hessian) / proxy_loss(weight, torch.zeros_like(weight), hessian) / 2
    return total


def test_the_lattice_is_the_choice_for_two_bits() -> None:
    """Fewer bits than any of the others (2.1 against 2.3 and more), and the least loss; each step to it helps."""
    nearest, optq, rotated = loss("rtn", bits=2), loss("optq", bits=2), loss("quip", bits=2, passes=0)
    lattice, with_passes = loss("quip_sharp", bits=2, passes=0), loss("quip_sharp", bits=2)
    assert with_passes < 0.9 * lattice < 0.7 * rotated < rotated < optq < nearest


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_trellis_has_less_loss_than_the_lattice(bits: int) -> None:
    assert loss("qtip", bits=bits, state_bits=10) < 0.97 * loss("quip_sharp", bits=bits, passes=0)


def test_a_weight_for_exl3_is_rounded_with_feedback() -> None:
    """Nearly as well as qtip's: runs of 128 features instead of whole rows, and 64 rows padded to 128."""
    assert loss("exl3", bits=3, state_bits=10, code="3inst") < 1.3 * loss("qtip", bits=3, state_bits=10)


def test_passes_on_a_trellis_never_hurt() -> None:
    losses = [loss("qtip", bits=3, state_bits=8, passes=passes) for passes in (0, 1, 3)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("name", ["optq", "quip", "quip_sharp"])
def test_each_pass_helps_and_none_hurts(name: str) -> None:
    losses = [loss(name, bits=3, passes=passes) for passes in (0, 1, 2, 4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_awq_is_between_nearest_and_optq() -> None:
    assert loss("optq", bits=3) < loss("awq", bits=3) < loss("rtn", bits=3)


def test_awq_finds_no_worse_than_its_grid_without_scales() -> None:
    """r = 0 is among the candidates, and scored by the loss itself."""
    assert loss("awq", bits=3, clip=False) <= loss("rtn", bits=3, clip=False) * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_brings_the_typical_error_down(bits: int) -> None:
    """Σ|w − ŵ| falls against the grid of the extremes; groups have an outlier, as real ones do."""
    weight = torch.randn(64, 256)
    weight[:, ::40] *= 6
    errors = []
    for iterations in (0, 20):
        made = quantizer("hqq", bits=bits, iterations=iterations)
        errors.append((made.dequantize(made.quantize(weight)) - weight).abs().mean().item())
    assert errors[1] < errors[0]


def test_hqq_keeps_a_group_far_from_zero() -> None:
    """Its grids need not contain zero, and scales are bounded so that float16 can hold the zero point."""
    weight = 5 + 0.001 * torch.randn(4, 64)
    made = quantizer("hqq", bits=4)
    assert (made.dequantize(made.quantize(weight)) - weight).abs().max() < 0.01


# ---- rotated layers in use -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40), (7, 33), (1, 1), (5, 172)], ids=str)
@pytest.mark.parametrize(
    ("name", "bits"), [*((name, bits) for name in ("quip_sharp", "qtip") for bits in (2, 3, 4)), ("qtip", 5)]
)
def test_rotated_layers_take_every_shape(name: str, bits: int, shape: tuple[int, int]) -> None:
    made = quantizer(name, bits=bits, passes=1, **({"state_bits": 9} if name == "qtip" else {}))
    weight = torch.randn(shape)
    packed = made.quantize(weight, torch.eye(shape[1]))
    codes = (shape[0], -(-shape[1] // 8)) if name == "quip_sharp" else (shape[0], -(-shape[1] // 16) * bits)
    assert next(iter(packed.values())).shape == codes
    x = torch.randn(3, shape[1], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(made.linear(x, packed), x @ made.dequantize(packed).double().T, rtol=1e-4, atol=1e-4)
    assert torch.autograd.gradcheck(lambda x: made.linear(x, packed), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qtip", "quip_sharp", "quip", "awq"])
def test_half_precision_is_as_near_as_a_dense_layer_of_that_type(name: str, dtype: torch.dtype) -> None:
    made = quantizer(name)
    packed = made.quantize(torch.randn(48, 64) * 0.02, torch.eye(64))
    x = torch.randn(200, 64).to(dtype)
    weight = made.dequantize(packed)
    truth = x.double() @ weight.double().T
    errors = [(y.double() - truth).square().mean().sqrt() for y in (made.linear(x, packed), x @ weight.to(dtype).T)]
    assert errors[0] < 2.5 * errors[1]


@pytest.mark.parametrize("name", ["qtip", "quip_sharp", "quip", "awq", "hqq"])
def test_backward_keeps_only_packed_tensors(name: str) -> None:
    """The rotated activations are not among them."""
    made = quantizer(name)
    packed = made.quantize(torch.randn(48, 64), torch.eye(64))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        made.linear(torch.randn(1000, 64, requires_grad=True), packed).sum()
    assert max(t.numel() for t in kept) <= max(t.numel() for t in packed.values())


def test_the_lattice_takes_small_rows_beside_large_ones() -> None:
    """The rotation mixes rows; each is brought to the same size first, so that the small do not drown."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=g) * torch.logspace(0, -2, 64)[:, None]
    x = torch.randn(400, 64, generator=g)
    hessian = x.T @ x / 400
    made = quantizer("quip_sharp", bits=2)
    approximation = made.dequantize(made.quantize(weight, hessian))
    relative = (weight - approximation).square().sum(1) / weight.square().sum(1)
    assert relative.max() < 0.25


def test_the_lattice_finds_a_size_for_weights_that_rotation_leaves_uneven() -> None:
    """One singular value outweighs the others: at the Gaussian size the lattice cuts off the tails."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 1, generator=g) @ torch.randn(1, 64, generator=g) + 0.3 * torch.randn(64, 64, generator=g)
    x = torch.randn(400, 64, generator=g)
    hessian = x.T @ x / 400
    losses = []
    for scale in (1.03, None):
        made = quantizer("quip_sharp", bits=4, passes=0, scale=scale)
        losses.append(proxy_loss(weight, made.dequantize(made.quantize(weight, hessian)), hessian))
    assert losses[1] < 0.9 * losses[0]
