"""QuIP#'s lattice codebooks (arXiv:2402.04396, §4): eight weights at a time, 2 bits each, and residuals for 3 and 4.

E8P is a set of 65 536 points of the lattice E8, moved by ¼, that fills a ball and thereby suits weights that a
Hadamard rotation has made Gaussian: at 2 bits its mean squared error on N(0, 1) is 0.091, where the best scalar code
has 0.118. The error can be coded again, larger by `residual_scale`: by 256 points (E81B) for a third bit, by E8P
itself for a third and fourth.

    value = E8P[code] + second[residual] / residual_scale                     (formed in float32, rounded once)

Shapes: b — blocks of eight in a row, in / 8. A code is 16 bits in an int16, whatever their sign; a residual of E81B
is a uint8.

    dequantize_lattice:  codes [..., b] int16, residual [..., b] uint8 | int16 | None -> [..., 8b]
    multiply_lattice:    x [t, 8b], codes [out, b], residual -> x @ weight.T [t, out], while decoding (GEMV)
                         or x [t, out] -> x @ weight [t, 8b], `transposed`
    encode_lattice:      x [..., 8b] -> codes [..., b], residual [..., b] or None, greedy, each stage exact
    encode_e8p, encode_e81b:   x [..., 8] -> codes [...]
    decode_e8p, decode_e81b:   codes [...] -> [..., 8]

`SCALE[bits]` is the standard deviation that makes Gaussian weights fit best, `RESIDUAL_SCALE[bits]` the paper's choice.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from ...errors import InputError
from ..ops import constant_result, define, has_triton
from . import native, reference
from .tables import e8p_table, e81b_table

__all__ = [
    "RESIDUAL_SCALE",
    "SCALE",
    "decode_e8p",
    "decode_e81b",
    "decodes",
    "dequantize_lattice",
    "e8p_table",
    "e81b_table",
    "encode_e8p",
    "encode_e81b",
    "encode_lattice",
    "multiplies",
    "multiply_lattice",
]

SCALE = {2: 1.03, 3: 0.98, 4: 1.03}
RESIDUAL_SCALE = {2: 1.0, 3: 2.04, 4: 3.45}  # at 2 bits there is no residual


def dequantize_lattice(
    codes: Tensor,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weights: codes [..., b] int16, residual [..., b] uint8 (E81B), int16 (E8P) or None -> [..., 8b]."""
    if codes.dtype != torch.int16 or codes.dim() == 0:
        raise InputError(f"lattice codes are int16 [..., b], not {codes.dtype} of shape {tuple(codes.shape)}")
    if residual is not None:
        if residual.dtype not in (torch.uint8, torch.int16) or residual.shape != codes.shape:
            raise InputError(
                f"lattice residuals are uint8 or int16 of the codes' shape {tuple(codes.shape)}, "
                f"not {residual.dtype} of shape {tuple(residual.shape)}"
            )
        if not (isfinite(residual_scale) and residual_scale >= 1e-3):  # else sixteen bits might overflow
            raise InputError(f"residual_scale must be a number of at least 0.001, not {residual_scale}")
    return _dequantize(codes, residual, residual_scale, dtype)


def multiply_lattice(
    x: Tensor,
    codes: Tensor,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    transposed: bool = False,
) -> Tensor:
    """x [t, 8b] @ weight.T -> [t, out] of x's type; or x [t, out] @ weight -> [t, 8b]. Not differentiable."""
    return _multiply(x, codes, residual, residual_scale, transposed)


@constant_result
def decodes(device: torch.device) -> bool:
    """Whether rows are decoded on that device without memory beside the result's."""
    return has_triton(device) if device.type == "cuda" else native.usable(device)


@constant_result
def multiplies(device: torch.device, dtype: torch.dtype, transposed: bool) -> bool:
    """Whether that device has a GEMV kernel for x of that type: with the transpose, or with the weight itself."""
    if device.type == "cuda":
        return True
    return native.usable(device) and not transposed and dtype in (torch.bfloat16, torch.float16)


def encode_lattice(x: Tensor, bits: int, residual_scale: float | None = None) -> tuple[Tensor, Tensor | None]:
    """The nearest points for x [..., 8b]: codes [..., b] int16; residual [..., b], uint8 at 3 bits, int16 at 4."""
    if bits not in SCALE or x.shape[-1] % 8:
        raise InputError(
            f"lattice codes have 2, 3 or 4 bits for rows of blocks of eight, not {bits} for {tuple(x.shape)}"
        )
    vectors = x.detach().to(torch.float32).unflatten(-1, (-1, 8))
    codes = encode_e8p(vectors)
    if bits == 2:
        return codes, None
    scale = RESIDUAL_SCALE[bits] if residual_scale is None else residual_scale
    rest = (vectors - decode_e8p(codes)) * scale
    return codes, encode_e81b(rest) if bits == 3 else encode_e8p(rest)


def encode_e8p(x: Tensor) -> Tensor:
    """The nearest of E8P's 65 536 points for x [..., 8], computed in float32: codes [...] int16."""
    return native.encode_e8p(_vectors(x)).reshape(x.shape[:-1])


def encode_e81b(x: Tensor) -> Tensor:
    """The nearest of E81B's 256 points for x [..., 8], computed in float32: codes [...] uint8."""
    return native.encode_e81b(_vectors(x)).reshape(x.shape[:-1])


def decode_e8p(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """E8P's points for codes [...], int16 or wider integers in 0 … 65 535: [..., 8], exact in every floating type."""
    return reference.look_up("e8p", codes, dtype)


def decode_e81b(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """E81B's points for codes [...] uint8: [..., 8], exact in every floating type."""
    return reference.look_up("e81b", codes, dtype)


def _vectors(x: Tensor) -> Tensor:
    """x [..., 8] -> float32 [n, 8], contiguous."""
    if x.shape[-1:] != (8,) or not x.is_floating_point():
        raise InputError(f"lattice points have eight floating-point elements, not {tuple(x.shape)} of {x.dtype}")
    return x.detach().to(torch.float32).reshape(-1, 8).contiguous()


_CODES = "Tensor codes, Tensor? residual, float residual_scale"
_dequantize = define(
    f"dequantize_lattice({_CODES}, ScalarType dtype) -> Tensor",
    package=__name__,
    reference=reference.dequantize_lattice,
    native=native.dequantize_lattice,
    fake=lambda codes, residual, residual_scale, dtype: codes.new_empty(
        (*codes.shape[:-1], 8 * codes.shape[-1]), dtype=dtype
    ),
)
_multiply = define(
    f"multiply_lattice(Tensor x, {_CODES}, bool transposed) -> Tensor",
    package=__name__,
    reference=reference.multiply_lattice,
    native=native.multiply_lattice,
    fake=lambda x, codes, residual, residual_scale, transposed: x.new_empty(
        (x.shape[0], 8 * codes.shape[1] if transposed else codes.shape[0])
    ),
)
