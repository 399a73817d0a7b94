"""Dithered rounding of updates: offsets in the cells of the present codes, and updates that are kept in the mean."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
import torch

from llmtools.quant import Packed, Quantizer, quantizer
from llmtools.quant.dither import PERIOD, STRIDE, length, offsets, sequence, uniform
from llmtools.quant.grids.codebook import NF4
from llmtools.quant.grids.lattice import _cells, _outside

CPU = torch.device("cpu")


def test_the_sequence_is_the_hash_of_its_indices() -> None:
    """In whole numbers of Python: the same on every device and in every version."""
    expected = []
    for index in range(1, 200):
        x = index * 0x9E3779B1 % 2**32
        for factor in (0x21F0AAAD, 0x735A2D97):
            x = (x ^ x >> 16) * factor % 2**32
        x ^= x >> 15
        expected.append((((x >> 8) + 0.5) / 2**24 - 0.5) * (1 - 2**-8))
    torch.testing.assert_close(sequence(199, CPU), torch.tensor(expected), rtol=0, atol=1e-8)


def test_rows_are_windows_of_the_sequence() -> None:
    whole = uniform(slice(0, 2100), 24, CPU)
    values = sequence(length(24), CPU)
    for row in (0, 1, 7, PERIOD - 1, PERIOD, 2099):
        start = STRIDE * (row % PERIOD)
        assert torch.equal(whole[row], values[start : start + 24])
        assert torch.equal(uniform(slice(row, row + 1), 24, CPU)[0], whole[row])
    assert abs(float(whole.mean())) < 0.01 and abs(float(whole.square().mean()) - 1 / 12) < 0.002


def test_offsets_stay_in_the_cells_of_a_table() -> None:
    levels = torch.tensor(NF4)
    codes = torch.randint(16, (64, 200), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scales = torch.linspace(-0.5, 0.5, 64)[:, None].expand(64, 200)  # negative ones as well
    moved = levels[codes.long()] + offsets(slice(0, 64), torch.ones(64, 200), codes, levels)
    assert torch.equal(torch.bucketize(moved, (levels[1:] + levels[:-1]) / 2).to(torch.uint8), codes)
    torch.testing.assert_close(
        offsets(slice(0, 64), scales, codes, levels), scales * (moved - levels[codes.long()]), rtol=1e-4, atol=1e-6
    )


def roots() -> torch.Tensor:
    """The 240 shortest vectors of E8."""
    found = []
    for (i, j), signs in product(combinations(range(8), 2), product((1, -1), repeat=2)):
        root = torch.zeros(8)
        root[i], root[j] = signs
        found.append(root)
    found += [torch.tensor(s) / 2 for s in product((1.0, -1.0), repeat=8) if s.count(-1.0) % 2 == 0]
    return torch.stack(found)


def test_vectors_are_uniform_in_the_cell_of_e8() -> None:
    """All are inside by the definition, and their second moment is the known one (Conway and Sloane, table 2.3)."""
    cells = _cells(2**16, CPU).view(-1, 8)
    assert float((cells @ roots().T).max()) < 1
    assert float(cells.square().mean()) == pytest.approx(0.0716821, rel=0.02)


def test_outside_is_beyond_a_root() -> None:
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * 0.45
    products = (x @ roots().T).amax(1)
    clear = (products - 1).abs() > 0.01
    assert torch.equal(_outside(x)[clear], products[clear] > 1)
    assert 100 < int(_outside(x).sum()) < 3900


KINDS: list[tuple[str, dict[str, Any], float]] = [
    ("rtn", {"bits": 4, "group_size": 32, "clip": False}, 0.8),
    ("nf4", {}, 0.8),
    ("optq", {"bits": 4, "group_size": 32, "act_order": True}, 0.7),
    ("quip", {"bits": 4, "passes": 0}, 0.8),
    ("quip_sharp", {"bits": 2, "passes": 0}, 0.3),  # most points are at the border of the codebook
    ("quip_sharp", {"bits": 4, "passes": 0}, 0.5),
    ("affine_columns", {"bits": 4, "group_size": 32}, 0.8),
    ("gguf", {"type": "Q4_1"}, 0.8),
    ("gguf", {"type": "Q8_0"}, 0.9),
]


def packed_weight(name: str, options: dict[str, Any]) -> tuple[Quantizer, Packed]:
    made = quantizer(name, **options)
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    return made, made.quantize(weight, torch.eye(256))


@pytest.mark.parametrize(("name", "options", "least"), KINDS, ids=str)
def test_small_updates_are_kept_in_the_mean(name: str, options: dict[str, Any], least: float) -> None:
    """Of an update that is a hundredth of the weight, and that rounding to nearest would lose."""
    made, packed = packed_weight(name, options)
    former = made.dequantize(packed)
    generator = torch.Generator().manual_seed(1)
    b, a = 0.01 * torch.randn(256, 1, generator=generator), torch.randn(1, 256, generator=generator)
    change = made.dequantize(made.updated(packed, b, a)) - former
    share = float((change * (b @ a)).sum() / (b @ a).square().sum())
    assert least < share < 1.15
    double = made.dequantize(made.updated(packed, 2 * b, a)) - former
    assert 1.6 * share < float((double * (b @ a)).sum() / (b @ a).square().sum()) < 2.5 * share  # in proportion
