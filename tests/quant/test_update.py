"""Q(Ŵ + b a): codes nearest but for dither, the same in blocks and as a whole, rotated and in natural coordinates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmtools.errors import InputError
from llmtools.kernels.lattice import decode_e8p, encode_lattice
from llmtools.quant import Packed, Quantizer, quantizer, update
from llmtools.quant.bases import SignedHadamard
from llmtools.quant.external import ColumnGrid
from llmtools.quant.grids.lattice import Lattice
from llmtools.quant.grids.scalar import Scalar


def problem(name: str, options: dict[str, Any], shape: tuple[int, int]) -> tuple[Quantizer, Packed, Tensor, Tensor]:
    """(quantizer, packed weight, b, a), where b a is about a tenth of the weight."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator) for size in (shape, (2 * shape[1], shape[1])))
    made = quantizer(name, **options)
    b, a = torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator)
    return made, made.quantize(weight, x.T @ x / len(x)), 0.06 * b, a


KINDS = [
    ("rtn", {"bits": 3, "group_size": 20}),
    ("rtn", {"bits": 8, "group_size": -1, "symmetric": True}),
    ("hqq", {"bits": 2, "group_size": 24}),
    ("nf4", {"group_size": 20}),
    ("nf4", {"group_size": 16, "double_quantization": True}),
    ("awq", {"bits": 4, "group_size": 16}),
    ("optq", {"bits": 4, "group_size": 16, "act_order": True, "clip": False}),
    ("affine", {"bits": 5, "group_size": 16, "float_zeros": True}),
    ("affine_columns", {"bits": 3, "group_size": 16}),
]


@pytest.fixture
def nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding without dither."""
    for kind in (Scalar, Lattice, ColumnGrid):
        monkeypatch.setattr(kind, "dither", lambda *_: None)


@pytest.mark.usefixtures("nearest")
@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_each_weight_gets_the_nearest_value_of_its_group(name: str, options: dict[str, Any]) -> None:
    """Against a search over all codes of each weight, one code of the whole weight at a time."""
    made, packed, b, a = problem(name, options, (40, 72))
    target, bits = made.dequantize(packed) + b @ a, options.get("bits", 4)
    values = []
    for code in range(2**bits):
        stream = sum(code << bits * i for i in range(32))  # the same code everywhere
        words = [stream >> 32 * i & 0xFFFFFFFF for i in range(bits)]
        row = torch.tensor([word - (1 << 32) * (word >> 31) for word in words], dtype=torch.int32)
        width = packed["qweight"].shape[1]
        every = row.repeat(-(-width // bits))[:width].expand(40, -1).contiguous()
        values.append(made.dequantize(packed | {"qweight": every}))
    least = torch.stack([(each - target).abs() for each in values]).amin(0)
    now = made.dequantize(made.updated(packed, b, a))
    torch.testing.assert_close((now - target).abs(), least, rtol=1e-4, atol=1e-5)
    assert not torch.equal(now, made.dequantize(packed))


def test_pruned_search_of_the_lattice_is_the_whole_search() -> None:
    grid, generator = Lattice(2), torch.Generator().manual_seed(0)
    codes, _ = encode_lattice(torch.randn(64, 32, generator=generator), 2)
    packed = {"codes": codes}
    for size in (0.02, 0.1, 0.3, 1.0):
        values = grid.dequantize(packed) + size * torch.randn(64, 32, generator=generator)
        got = grid.dequantize(grid.requantize(values, packed))
        whole = decode_e8p(encode_lattice(values, 2)[0]).flatten(1)
        errors = [(each - values).unflatten(1, (-1, 8)).square().sum(-1) for each in (got, whole)]
        torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 4])
def test_residual_codes_are_no_worse_than_greedy_ones(bits: int) -> None:
    grid, generator = Lattice(bits), torch.Generator().manual_seed(0)
    codes, residual = encode_lattice(torch.randn(64, 32, generator=generator), bits)
    assert residual is not None
    packed = {"codes": codes, "residual": residual}
    for size in (0.05, 0.3, 1.0):
        values = grid.dequantize(packed) + size * torch.randn(64, 32, generator=generator)
        greedy = dict(zip(("codes", "residual"), encode_lattice(values, bits), strict=True))
        errors = [
            float((grid.dequantize(each) - values).square().mean())
            for each in (grid.requantize(values, packed), greedy)
        ]  # type: ignore[arg-type]
        assert errors[0] <= 1.05 * errors[1]  # in the ball around its point a block keeps it


ROTATED: list[tuple[str, dict[str, Any]]] = [("quip", {"bits": 3, "passes": 0}), ("quip_sharp", {"passes": 0})]


def same(made: Quantizer, one: Packed, other: Packed) -> float:
    """Share of the weights that agree: values half-way between two codes may move over with another order of a sum."""
    return float(((made.dequantize(other) - made.dequantize(one)).abs() < 1e-4).float().mean())


@pytest.mark.parametrize(("name", "options"), [*KINDS, *ROTATED], ids=str)
def test_blocks_and_the_whole_weight_give_the_same_codes(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, packed, b, a = problem(name, options, (40, 72))
    whole = made.updated(packed, b, a)
    monkeypatch.setitem(update._BYTES, "cpu", 1)
    assert same(made, whole, made.updated(packed, b, a)) > 0.99


@pytest.mark.usefixtures("nearest")
@pytest.mark.parametrize(("name", "options"), [*KINDS, *ROTATED], ids=str)
def test_factors_and_the_updated_weight_give_the_same_codes(name: str, options: dict[str, Any]) -> None:
    made, packed, b, a = problem(name, options, (40, 72))
    natural = packed | made.requantize(made.dequantize(packed) + b @ a, packed)
    assert same(made, made.updated(packed, b, a), natural) > 0.99


@pytest.mark.parametrize("out_features", [1, 16, 17, 100])
@pytest.mark.parametrize("height", [1, 2, 16])
def test_blocks_of_rows_cover_the_weight_and_keep_codes_whole(out_features: int, height: int) -> None:
    for in_features in (8, 10_000, 10_000_000):
        blocks = update.row_blocks(out_features, in_features, torch.device("cpu"), height)
        assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(out_features))
        assert all(block.start % 16 == 0 and block.start % height == 0 for block in blocks)


def test_padded_columns_keep_what_they_hold() -> None:
    """13 columns are stored as 16; a change that is seen nowhere changes no code, whatever the other three hold."""
    made, packed, b, a = problem("quip_sharp", {"bits": 2, "passes": 0}, (32, 13))
    nothing = made.updated(packed, torch.zeros_like(b), a)
    assert torch.equal(nothing["codes"], packed["codes"])
    grid = made.grid  # type: ignore[attr-defined]
    factors = made.basis.transform_update(b, a, packed)  # type: ignore[attr-defined]
    assert factors[1].shape == (3, 16)
    rotated = grid.dequantize(packed) + factors[0] @ factors[1]
    back = made.basis.inverse_transform(rotated, packed)  # type: ignore[attr-defined]
    torch.testing.assert_close(back, made.dequantize(packed) + b @ a, rtol=1e-4, atol=1e-4)


def test_rows_of_zeros_do_not_disturb_the_others() -> None:
    basis = SignedHadamard(scale=1.0)
    weight = torch.randn(16, 16)
    state = basis.init(weight, None)
    state["sv"][3] = 0
    b, a = torch.randn(16, 2), torch.randn(2, 16)
    other = b.clone()
    other[3] = 1000
    for each in basis.transform_update(other, a, state):
        assert torch.isfinite(each).all()
    assert torch.equal(basis.transform_update(other, a, state)[0], basis.transform_update(b, a, state)[0])


def test_numbers_that_are_none_are_refused() -> None:
    made, packed, b, a = problem("rtn", {"bits": 4}, (16, 64))
    with pytest.raises(InputError, match="NaN or inf"):
        made.updated(packed, b * float("nan"), a)


def test_a_part_of_a_fused_matrix_changes_alone() -> None:
    from llmtools.quant import FusedLattice

    whole = quantizer("quip_sharp", passes=0)
    weight, eye = torch.randn(24, 16), torch.eye(16)
    stored = whole.quantize(weight, eye)
    part = FusedLattice(2, first=8, total=24)
    packed = {"codes": stored["codes"], "su": stored["su"], "sv": stored["sv"][8:16].float()}
    torch.testing.assert_close(part.dequantize(packed), whole.dequantize(stored)[8:16])
    b, a = 0.6 * torch.randn(8, 2), torch.randn(2, 16)
    change = part.dequantize(part.updated(packed, b, a)) - part.dequantize(packed)
    assert torch.nn.functional.cosine_similarity(change.flatten(), (b @ a).flatten(), dim=0) > 0.5
