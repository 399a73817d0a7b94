"""Grids whose codes name tiles of several rows and columns keep every law, with all that chooses codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmtools.quant import ALL, Packed, TensorSpec, proxy_loss
from llmtools.quant.composed import Composed
from llmtools.quant.grids.base import Grid, tile_rows
from llmtools.quant.grids.scalar import resolve_group_size
from llmtools.quant.laws import check, problems
from llmtools.quant.quip_sharp import ROWS, SCALES, search_scale
from llmtools.quant.rounding import Nearest, Sequential


@cache
def points(size: int) -> Tensor:
    """128 tiles of that many weights, the first of them zero: Gaussian, so that no row has values of its own."""
    table = torch.randn(128, size, generator=torch.Generator().manual_seed(1)) * 0.5
    table[0] = 0
    return table


@dataclass(frozen=True)
class Tiles(Grid):
    """A byte for a tile of height × width weights, a scale for each row of a group."""

    codes = ("codes",)
    height: int = 2  # type: ignore[misc]
    width: int = 1  # type: ignore[misc]
    group_size: int = 16

    def resolve_group_size(self, in_features: int) -> int:
        return resolve_group_size(self.group_size, in_features)

    def fit(self, group: Tensor, importance: Tensor | None = None) -> Tensor:
        return group.abs().amax(1, keepdim=True).half().to(group.dtype)

    def quantize_values(self, values: Tensor, params: Tensor) -> Tensor:
        assert len(values) == len(params) and len(values) % self.height == 0
        shape = (-1, self.height), (-1, self.width)
        tiles = values.unflatten(0, shape[0]).unflatten(2, shape[1]).transpose(1, 2)  # [n / h, c / w, h, w]
        scales = params.unflatten(0, shape[0])[:, None, None]  # [n / h, 1, 1, h, 1]
        table = points(self.height * self.width).to(values).unflatten(1, (self.height, self.width))
        return (tiles[:, :, None] - scales * table).square().sum((3, 4)).argmin(-1)

    def dequantize_codes(self, codes: Tensor, params: Tensor) -> Tensor:
        tiles = points(self.height * self.width).to(params)[codes.long()]  # [n / h, c / w, h · w]
        tiles = tiles.unflatten(2, (self.height, self.width)).transpose(1, 2)  # [n / h, h, c / w, w]
        return tiles.flatten(2).flatten(0, 1) * params

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        groups = -(-in_features // self.resolve_group_size(in_features))
        return {
            "scales": TensorSpec((out_features, groups), torch.float16),
            "codes": TensorSpec((-(-out_features // self.height), -(-in_features // self.width)), torch.uint8),
            "columns": TensorSpec((0, in_features), torch.uint8),
        }

    def pack(self, codes: Tensor, params: Tensor, in_features: int) -> Packed:
        columns = torch.empty((0, in_features), dtype=torch.uint8)
        return {"scales": params[..., 0].half(), "codes": codes.to(torch.uint8), "columns": columns}

    def params(self, packed: Packed, rows: slice = ALL) -> Tensor:
        return packed["scales"][rows].float()[..., None]

    def requantize(self, weight: Tensor, packed: Packed, rows: slice = ALL) -> Packed:
        """Where the weight ends within a tile, the tile is not one of zeros there: the former stays if as near."""
        made, out_features = super().requantize(weight, packed, rows)["codes"], len(packed["scales"])
        strips = tile_rows(rows, out_features, self.height)[0]
        former, errors = packed["codes"][strips], []
        for codes in (made, former):
            whole = packed["codes"].clone()
            whole[strips] = codes
            error = (self.dequantize(packed | {"codes": whole}, rows) - weight).square()
            error = F.pad(error, (0, -error.shape[1] % self.width, 0, -len(error) % self.height))
            errors.append(error.unflatten(0, (-1, self.height)).sum(1).unflatten(1, (-1, self.width)).sum(2))
        return {"codes": torch.where(errors[0] < errors[1], made, former)}

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        (out_features, _), in_features = packed["scales"].shape, packed["columns"].shape[1]
        strips, wanted = tile_rows(rows, out_features, self.height)
        codes = packed["codes"][strips]
        values = self.dequantize_codes(codes, torch.ones(len(codes) * self.height, 1))[wanted, :in_features]
        group = torch.arange(in_features) // self.resolve_group_size(in_features)
        return (values * packed["scales"][rows].float()[:, group]).to(dtype)


@dataclass(frozen=True)
class Tiled(Composed):
    """Sequential rounding on such a grid."""

    name = "tiled"
    needs_hessian = True

    height: int = 2
    width: int = 1
    passes: int = 3
    static_groups: bool = False

    @property
    def grid(self) -> Tiles:
        return Tiles(self.height, self.width)

    @property
    def rounding(self) -> Sequential:
        return Sequential(passes=self.passes, static_groups=self.static_groups)


KINDS = [(Tiled(passes=1), 1), (Tiled(2, 2, passes=1), 3), (Tiled(3, passes=1), 3), (Tiled(static_groups=True), 3)]


@pytest.mark.parametrize(("quantizer", "every"), KINDS, ids=str)
def test_tiles_keep_the_laws(quantizer: Tiled, every: int) -> None:
    broken = [outcome for outcome in check(quantizer, seed=2, every=every) if outcome.error]
    assert not broken, broken


@pytest.mark.parametrize("kind", [(2, 1), (2, 2), (3, 1)], ids=str)
def test_coordinate_descent_never_loses(kind: tuple[int, int]) -> None:
    for what, weight, hessian in islice(problems(3), 0, None, 2):
        before, after = (
            proxy_loss(weight, made.dequantize(made.quantize(weight, hessian)), hessian)
            for made in (Tiled(*kind, passes=0), Tiled(*kind, passes=4))
        )
        # The sweep minimises the damped loss: what falls is that.
        assert after <= before * 1.001, (what, before, after)


def test_a_tile_is_the_nearest_of_all() -> None:
    """Nearest rounding against a search over the table in plain loops."""
    grid, weight = Tiles(2, 2, group_size=4), torch.randn(5, 7)
    codes, params = Nearest()(weight, None, grid)
    assert codes.shape == (3, 4) and params.shape == (5, 2, 1)
    padded = torch.zeros(6, 8)
    padded[:5, :7] = weight
    for i in range(3):
        for k in range(4):
            scale = torch.zeros(2, 1)
            scale[: min(2, 5 - 2 * i)] = params[2 * i : 2 * i + 2, k // 2]
            tile = padded[2 * i : 2 * i + 2, 2 * k : 2 * k + 2]
            distances = [float((tile - scale * each.view(2, 2)).square().sum()) for each in points(4)]
            assert distances[int(codes[i, k])] == pytest.approx(min(distances), abs=1e-6)


@pytest.mark.parametrize("out_features", [1, 2, 31, 32])
@pytest.mark.parametrize("height", [1, 2, 3, 16])
def test_the_rows_of_tiles_hold_the_rows_asked_for(height: int, out_features: int) -> None:
    strips = torch.arange(-(-out_features // height) * height).view(-1, height)
    for rows in every_slice(out_features):
        touched, within = tile_rows(rows, out_features, height)
        assert torch.equal(strips[touched].flatten()[within], torch.arange(out_features)[rows]), rows


def every_slice(size: int) -> Iterator[slice]:
    yield from (slice(None), slice(0, 0), slice(size, size + 3), slice(-3, None), slice(5, 2), slice(1, None, 3))
    yield from (slice(start, stop) for start in range(0, size, 5) for stop in range(start, size + 1, 3))


@dataclass(frozen=True)
class Watched(Tiles):
    """Expects weights that are their own number of a row, and neighbours to come together."""

    def fit(self, group: Tensor, importance: Tensor | None = None) -> Tensor:
        numbers = group[:, 0].unflatten(0, (-1, self.height)) / group[0, 0]
        assert torch.equal(numbers.diff().round(), torch.ones_like(numbers.diff()))
        assert bool(((numbers[:, 0].round() - 1) % self.height == 0).all())
        return super().fit(group, importance)


@pytest.mark.parametrize("height", [1, 2, 16])
def test_the_scale_search_keeps_rows_together_that_share_a_code(height: int) -> None:
    weight = torch.arange(1, 10 * ROWS + 1, dtype=torch.float32)[:, None].expand(-1, 8).contiguous()
    assert search_scale(weight, torch.eye(8), Watched(height)) in SCALES


@pytest.mark.parametrize("kind", [(2, 1), (2, 2)], ids=str)
def test_the_scale_search_finds_the_least_loss(kind: tuple[int, int]) -> None:
    """Of a grid that holds no scale, as a lattice does not: weights that are too large for it want to be smaller."""

    class Unscaled(Tiles):
        def fit(self, group: Tensor, importance: Tensor | None = None) -> Tensor:
            return torch.ones(len(group), 1)

    grid, hessian = Unscaled(*kind), torch.eye(16)
    found = set()
    for size in (0.2, 0.5, 1.0, 2.0):
        weight = torch.randn(31, 16) * size
        losses = {}
        for scale in SCALES:
            values = grid.dequantize(grid.pack(*Nearest()(weight * scale, None, grid), 16))
            losses[scale] = proxy_loss(weight, values / scale, hessian)
        found.add(search_scale(weight, hessian, grid))
        assert search_scale(weight, hessian, grid) == min(losses, key=losses.__getitem__)
    assert len(found) > 1
