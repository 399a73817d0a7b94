"""QTIP's trellis codes (arXiv:2406.11235, section 3): 256 weights at a time, each of L bits of which k are its own.

A tile of 16 × 16 weights, read row by row, is a sequence. Its code is a circle of 256·k bits, the state of weight i
is the L bits from bit i·k on, and the weight is a fixed function of its state, one that looks random and has a
Gaussian's distribution. Neighbours share L − k bits, so that a code of k bits per weight works as one of a dimension in
the hundreds; Viterbi's search finds a nearest sequence nevertheless, in 2^L steps a weight. At 2 bits the mean squared
error on N(0, 1) is 0.074 for L = 12 and 0.070 for L = 16, where E8P has 0.091 and no code of 2 bits is below 0.0625.

Bits are stored as QTIP does, the first one highest, in 16-bit words; a row of the tile holds the k words that begin
with its sixteen weights. So a row needs no other than itself and the first word of the next one (of the tile's first,
for the last), and its weights are decoded side by side. Where the rows of a weight end within a tile, the circle is
shorter.

EXL3's files have the same circles, two more codes, and another order of a tile's weights
(`tables.py`): there a row finds its weights in the 2k words that it shares with the row eight above or below.

QTIP's hybrid code, hyb, has a state for two weights, at each even place of the circle, and takes what it is worth from
a `table` that goes with the weight. It has up to 4 bits per weight, and any number of bits of state above 2k.

Shapes: b — blocks of sixteen columns; k — `bits`, 1 to 8; L — `state_bits`, 8 to 16; t — tokens; table [512, 2] float,
of hyb alone.

    dequantize_trellis:  trellis [out, k·b] int16 -> rows start … stop of the weight [out, 16b], differentiable in table
    multiply_trellis:    x [t, 16b], trellis -> x @ weight.T [t, out], while decoding (GEMV)
                         or x [t, out] -> x @ weight [t, 16b], `transposed`
    encode_trellis:      weight [out, 16b] -> trellis
    decode_states:       the value of every state, [2^L]
    fitted_table:        a table of hyb for Gaussian weights of standard deviation one

`SCALE[bits]` is the standard deviation that makes Gaussian weights fit best, in units of the code's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..ops import constant_result, define, has_triton
from . import native, reference
from .hybrid import fitted_table
from .tables import CODES, ORDERS, PAIRS, TILE, places, values

__all__ = [
    "CODES",
    "ORDERS",
    "PAIRS",
    "SCALE",
    "TILE",
    "check_trellis",
    "decode_states",
    "decodes",
    "dequantize_trellis",
    "encode_trellis",
    "fitted_table",
    "has_hybrid",
    "multiplies",
    "multiply_trellis",
]

SCALE = {1: 1.0, 2: 0.95, 3: 0.9, 4: 0.85, 5: 0.8, 6: 0.75, 7: 0.75, 8: 0.75}


def has_hybrid(bits: int, state_bits: int) -> bool:
    """Whether the code hyb exists at this many bits per weight and bits of state."""
    return bits <= 4 and state_bits > 2 * bits


def check_trellis(bits: int, state_bits: int, code: str, order: str = "rows") -> None:
    """Raises InputError for what no trellis has."""
    if bits not in SCALE or isinstance(bits, bool):
        raise InputError(f"bits={bits!r}; a trellis has 1 to 8 bits per weight")
    if isinstance(state_bits, bool) or not isinstance(state_bits, int) or not 8 <= state_bits <= 16:
        raise InputError(f"state_bits={state_bits!r}; the state of a trellis has 8 to 16 bits")
    if code not in CODES:
        raise InputError(f"code={code!r}; the codes of a trellis are {', '.join(CODES)}")
    if code == "hyb" and not has_hybrid(bits, state_bits):
        raise InputError(f"bits={bits} and state_bits={state_bits}; hyb has 1 to 4 bits, and a state more than twice")
    if state_bits < bits + 4:
        raise InputError(f"state_bits={state_bits} with bits={bits}; the state has at least four bits more")
    if order not in ORDERS:
        raise InputError(f"order={order!r}; the orders of a tile are {' and '.join(ORDERS)}")


def dequantize_trellis(
    trellis: Tensor,
    bits: int,
    state_bits: int,
    code: str,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    order: str = "rows",
    table: Tensor | None = None,
) -> Tensor:
    """Rows start … stop of the weight, by default all: trellis [out, k·b] int16 -> [stop − start, 16b] of `dtype`."""
    check_trellis(bits, state_bits, code, order)
    _check_table(code, table)
    if order != "rows" and len(trellis) % TILE:
        raise InputError(f"{len(trellis)} rows in the order {order}; it is one of whole tiles of {TILE} rows")
    if trellis.dtype != torch.int16 or trellis.dim() != 2 or trellis.shape[1] % bits:
        raise InputError(
            f"a trellis of {bits} bits is int16 [out, {bits}·b], not {trellis.dtype} of shape {tuple(trellis.shape)}"
        )
    stop = len(trellis) if stop is None else stop
    if not 0 <= start <= stop <= len(trellis):
        raise InputError(f"rows {start} to {stop} of a weight with {len(trellis)} rows")
    if table is not None and table.requires_grad and torch.is_grad_enabled():
        result: Tensor = _Dequantize.apply(table, trellis, bits, state_bits, order, start, stop, dtype)
        return result
    return _dequantize(trellis, table, bits, state_bits, code, order, start, stop, dtype)


class _Dequantize(torch.autograd.Function):
    """Rows of a weight of hyb, differentiable in the table [512, 2]."""

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        trellis: Tensor,
        bits: int,
        state_bits: int,
        order: str,
        start: int,
        stop: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(table, trellis)
        ctx.options = bits, state_bits, order, start, stop
        return _dequantize(trellis, table, bits, state_bits, "hyb", order, start, stop, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Each weight's gradient is added where its value is from, which a table of places tells, with the sign."""
        table, trellis = ctx.saved_tensors
        bits, state_bits, order, start, stop = ctx.options
        numbers = torch.arange(1, 2 * PAIRS + 1, device=table.device, dtype=torch.float32).view(PAIRS, 2)
        drawn = _dequantize(trellis, numbers, bits, state_bits, "hyb", order, start, stop, torch.float32).flatten()
        grad = grads[0].to(table.dtype).flatten() * drawn.sign().to(table.dtype)
        total, place = table.new_zeros(2 * PAIRS), drawn.abs_().long() - 1
        if table.is_cpu:  # in the order of the weights, and twenty times faster
            total.scatter_add_(0, place, grad)
        else:
            total.index_put_((place,), grad, accumulate=True)  # sorts, so that sums have one order
        return total.view(PAIRS, 2), *(7 * [None])


def _check_table(code: str, table: Tensor | None) -> None:
    """Raises InputError where hyb has no table [512, 2], or another code has one."""
    if (code == "hyb") != (table is not None):
        raise InputError(f"code={code}; hyb alone has a table, and needs it")
    if table is not None and (table.shape != (PAIRS, 2) or not table.is_floating_point()):
        raise InputError(f"a table of hyb is float [{PAIRS}, 2], not {table.dtype} of shape {tuple(table.shape)}")


def multiply_trellis(
    x: Tensor,
    trellis: Tensor,
    bits: int,
    state_bits: int,
    code: str,
    transposed: bool = False,
    *,
    order: str = "rows",
    table: Tensor | None = None,
) -> Tensor:
    """x [t, 16b] @ weight.T -> [t, out] of x's type; or x [t, out] @ weight -> [t, 16b]. Not differentiable."""
    _check_table(code, table)
    return _multiply(x, trellis, table, bits, state_bits, code, order, transposed)


def encode_trellis(
    weight: Tensor, bits: int, state_bits: int, code: str, order: str = "rows", *, table: Tensor | None = None
) -> Tensor:
    """The trellis [out, k·b] int16 of a weight [out, 16b], searched in float32 and near the nearest."""
    check_trellis(bits, state_bits, code, order)
    _check_table(code, table)
    if weight.dim() != 2 or weight.shape[1] % TILE or not weight.is_floating_point():
        raise InputError(
            f"a trellis codes floating-point weights [out, 16·b], not {tuple(weight.shape)} {weight.dtype}"
        )
    weight = weight.detach().to(torch.float32)
    if order != "rows":
        weight = _sequences(weight, order)
    return native.encode_trellis(weight.contiguous(), table, bits, state_bits, code)


def _sequences(weight: Tensor, order: str) -> Tensor:
    """weight [out, 16b] with the sequence of each tile row by row in the tile's place; out a multiple of 16."""
    if len(weight) % TILE:
        raise InputError(f"{len(weight)} rows in the order {order}; it is one of whole tiles of {TILE} rows")
    tiles = weight.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2)  # [out / 16, b, 16, 16]
    at = places(order, weight.device).flatten().argsort()
    arranged: Tensor = tiles.flatten(2)[..., at].view(tiles.shape)
    return arranged.transpose(1, 2).flatten(2).flatten(0, 1)


def decode_states(code: str, state_bits: int) -> Tensor:
    """The value of every state, [2^L] float32 on the CPU, of a code without a table."""
    return values(code, None, state_bits, torch.device("cpu"), torch.float32)[:, 0]


@constant_result
def decodes(device: torch.device) -> bool:
    """Whether rows are decoded on that device without memory beside the result's."""
    return has_triton(device) if device.type == "cuda" else native.usable(device)


@constant_result
def multiplies(device: torch.device) -> bool:
    """Whether that device has GEMV kernels."""
    return device.type == "cuda" or native.usable(device)


_CODES = "Tensor trellis, Tensor? table, int bits, int state_bits, str code, str order"
_dequantize = define(
    f"dequantize_trellis({_CODES}, int start, int stop, ScalarType dtype) -> Tensor",
    package=__name__,
    reference=reference.dequantize_trellis,
    native=native.dequantize_trellis,
    fake=lambda trellis, table, bits, state_bits, code, order, start, stop, dtype: trellis.new_empty(
        (stop - start, trellis.shape[1] // bits * TILE), dtype=dtype
    ),
)
_multiply = define(
    f"multiply_trellis(Tensor x, {_CODES}, bool transposed) -> Tensor",
    package=__name__,
    reference=reference.multiply_trellis,
    native=native.multiply_trellis,
    fake=lambda x, trellis, table, bits, state_bits, code, order, transposed: x.new_empty(
        (x.shape[0], trellis.shape[1] // bits * TILE if transposed else trellis.shape[0])
    ),
)
