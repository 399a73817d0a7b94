"""A small table of values times a group's largest magnitude: the grid of NF4 (QLoRA, arXiv:2305.14314, section 3).

The arithmetic is that of bitsandbytes: groups of the absolute maximum, nearest level by midpoints with an exact
midpoint going to the lower code, and, with double quantization, the maxima themselves stored in 8 bits: their mean is
taken off and blocks of 256 are written on a signed dynamic map. Codes are chosen with the unrounded maxima, as there.

Shapes: as in `grids/base.py`; params [n, 1] are the maxima; N = ceil(out · G / 256) blocks of maxima.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.bits import pack
from ...kernels.grouped import Weight
from ..base import ALL, Packed, TensorSpec
from .scalar import Scalar, check_group_size, stream_layout

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BLOCK = 256  # maxima that share a second scale


@dataclass(frozen=True)
class Codebook(Scalar):
    """Sixteen values, in rising order, times the largest magnitude of the group.

    Stored: qweight [out, w] int32 and scales [out, G] float32; with double quantization scales [out, G] uint8,
    nested_scales [N] and nested_offset [1] float32; columns [0, in] where needed.
    """

    table: tuple[float, ...] = NF4
    group_size: int = 64
    double_quantization: bool = False
    bits: ClassVar[int] = 4  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_group_size("codebook grid", self.group_size)

    def fit(self, group: Tensor, importance: Tensor | None = None) -> Tensor:
        return group.abs().amax(-1, keepdim=True)

    def quantize_values(self, values: Tensor, params: Tensor) -> Tensor:
        table = constant(self.table, values.device).to(values.dtype)
        normal = values * torch.where(params == 0, 0.0, 1 / params)
        return torch.bucketize(normal.contiguous(), (table[1:] + table[:-1]) / 2)

    def dequantize_codes(self, codes: Tensor, params: Tensor) -> Tensor:
        return constant(self.table, params.device).to(params.dtype)[codes] * params

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        groups = -(-in_features // self.resolve_group_size(in_features))
        layout = stream_layout(out_features, in_features, 4)
        if not self.double_quantization:
            return layout | {"scales": TensorSpec((out_features, groups), torch.float32)}
        return layout | {
            "scales": TensorSpec((out_features, groups), torch.uint8),
            "nested_scales": TensorSpec((-(-out_features * groups // _BLOCK),), torch.float32),
            "nested_offset": TensorSpec((1,), torch.float32),
        }

    def pack(self, codes: Tensor, params: Tensor, in_features: int) -> Packed:
        packed = {"qweight": pack(codes, 4), "scales": params[..., 0].float().contiguous()}
        layout = self.layout(codes.shape[0], in_features)
        if "columns" in layout:
            packed["columns"] = codes.new_empty(layout["columns"].shape, dtype=torch.uint8)
        if self.double_quantization:
            packed |= _nest(packed["scales"])
        return {name: packed[name] for name in layout}

    def params(self, packed: Packed, rows: slice = ALL) -> Tensor:
        return (self._maxima(packed, rows) if self.double_quantization else packed["scales"][rows])[..., None]

    def grouped(self, packed: Packed, rows: slice = ALL) -> Weight:
        qweight, scales, zeros, _, bits, group_size, in_features = super().grouped(packed, rows)
        if self.double_quantization:
            scales = self._maxima(packed, rows)
        return qweight, scales, zeros, constant(self.table, qweight.device), bits, group_size, in_features

    def _maxima(self, packed: Packed, rows: slice) -> Tensor:
        """The maxima of the groups of these rows, out of their 8 bits: [rows, G] float32."""
        out_features, groups = packed["scales"].shape
        start, stop, step = rows.indices(out_features)
        first, last = start * groups, max(start, stop) * groups
        nested = packed["nested_scales"][first // _BLOCK : -(-last // _BLOCK)].repeat_interleave(_BLOCK)
        nested = nested[first % _BLOCK :][: last - first].reshape(-1, groups)[::step]
        scales = packed["scales"][rows]
        values = constant(DYNAMIC, scales.device).index_select(0, scales.flatten().int()).reshape(scales.shape)
        return values.mul_(nested).add_(packed["nested_offset"])


def _dynamic_map() -> tuple[float, ...]:
    """bitsandbytes' signed 8-bit dynamic map: midpoints of 2^i intervals of [0.1, 1] times 10^(i−6), i = 0…6, 0, 1.

    In float32 at every step, which gives the very bits of that library.
    """
    levels = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = 10.0 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)
        levels += [middles, -middles]
    return tuple(torch.cat(levels).sort().values.tolist())


DYNAMIC = _dynamic_map()


def _nest(maxima: Tensor) -> Packed:
    """maxima [out, G] float32 -> 8-bit codes [out, G], a second scale a block [N], their common offset [1]."""
    offset = maxima.mean()
    flat = (maxima - offset).flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)  # [N, 256]
    scale = blocks.abs().amax(-1)
    table = constant(DYNAMIC, maxima.device)
    normal = blocks * torch.where(scale == 0, 0.0, 1 / scale)[:, None]
    codes = torch.bucketize(normal, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return {
        "scales": codes.flatten()[: flat.numel()].view_as(maxima).contiguous(),
        "nested_scales": scale,
        "nested_offset": offset[None],
    }


_tables: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The table as a tensor [len(values)] float32 on that device, made once in a process.

    Constants are never module buffers: loading leaves those uninitialised.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(values, device=device)
    key = (values, device)
    if key in _tables:
        return _tables[key]
    table = torch.tensor(values, device=device)
    if type(table) is Tensor:  # and not one without values, of a mode that only plans
        _tables[key] = table
    return table
