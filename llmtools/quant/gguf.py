"""ggml's block types as a quantizer: the weights of an opened GGUF file.

The packed tensor has the rows as in the file, [out, row_bytes] uint8: opening changes no bit, and rows decode
independently. The simple types are rounded to nearest, with scales that are rounded to float16 first. Nothing is
quantized to the others; llama.cpp (`llama-quantize`) does that, with searches that are not implemented here.

While it is trained, the float16 scale and minimum of each block are tensors of their own (`unpacked`); the small scales
within blocks of 256 are integers and stay.

Shapes: out, in — features; n — blocks, of a row beside [out, …].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, did_you_mean, where
from ..kernels.ggml import (
    ENCODINGS,
    TYPES,
    codes_ggml,
    decodes,
    dequantize_ggml,
    encode_ggml,
    halves,
    multiply_ggml,
    with_halves,
)
from .base import ALL, Packed, Quantizer, TensorSpec, quantizers
from .dither import offsets
from .shift import stored

_SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_MINIMA = ("Q4_1", "Q5_1")
"""Types whose value is scale · code + minimum, with a float16 minimum for each block."""
_HALVES = ("scales", "minima")
"""Names of the float16 numbers of a block while they are trained, in the order of `kernels.ggml.halves`."""
_TINY, _LARGEST = 2.0**-24, torch.finfo(torch.float16).max


@quantizers.register("gguf")
@dataclass(frozen=True)
class GGMLBlocks(Quantizer):
    """Blocks of 32 or 256 weights as in GGUF files; quantizes to Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0."""

    type: str = "Q8_0"
    """Name of ggml's type: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, or one of IQ1_S to IQ4_XS."""

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise InputError(f"gguf: no type {self.type!r}; {did_you_mean(str(self.type), TYPES)}")

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        kind = TYPES[self.type]
        if in_features % kind.weights or not in_features:
            raise InputError(
                f"{where()}{self.type} has blocks of {kind.weights} weights, and {in_features} columns are no multiple"
            )
        return {"blocks": TensorSpec((out_features, in_features // kind.weights * kind.bytes), torch.uint8)}

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> Packed:
        self.layout(*weight.shape)
        if self.type not in _SIMPLE:
            raise InputError(
                f"{where()}{self.type} can be read but not quantized to; use llama.cpp's llama-quantize, or one of "
                f"{', '.join(_SIMPLE)}"
            )
        values = weight.detach().float().reshape(-1, TYPES[self.type].weights)  # [n, 32]
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{where()}the weight holds NaN or infinite values")
        bits = 8 if self.type == "Q8_0" else int(self.type[1])
        params, codes = _shifted(values, bits) if self.type.endswith("_1") else _symmetric(values, bits)
        tops = [] if bits != 5 else [(codes >> 4).unflatten(1, (4, 8)) << torch.arange(8, device=codes.device)]
        parts = [*(_half(each) for each in params), *(each.sum(-1).to(torch.uint8) for each in tops)]
        parts.append(_low_bits(codes, bits))
        return {"blocks": torch.cat(parts, 1).reshape(weight.shape[0], -1)}

    def requantizes(self) -> bool:
        return self.type in ENCODINGS

    def requantize(self, weight: Tensor, packed: Packed, rows: slice = ALL) -> Packed:
        """As `Quantizer.requantize`. Raises InputError for types whose codes name vectors (IQ1 to IQ3)."""
        if not self.requantizes():
            raise InputError(
                f"{where()}{self.type} cannot encode a weight on the scales that are there ({', '.join(ENCODINGS)} "
                "can); serve the adapter beside the file, or merge it with export --format dense"
            )
        return {"blocks": encode_ggml(weight, packed["blocks"][rows], self.type)}

    def dither(self, packed: Packed, rows: slice) -> Tensor | None:
        return offsets(rows, *codes_ggml(packed["blocks"][rows], self.type)) if self.requantizes() else None

    def shift_group(self, in_features: int) -> int | None:
        """As `Quantizer.shift_group`; the minima within blocks of 256 are small integers."""
        return TYPES[self.type].weights if self.type in _MINIMA else None

    def shift(self, packed: Packed, change: Tensor) -> Packed:
        if self.type not in _MINIMA:
            raise InputError(
                f"{where()}{self.type} has no minima in floating point to move ({', '.join(_MINIMA)} have); merge with "
                "--how round, or export --format dense"
            )
        parts = self.unpacked(packed)
        minima = stored(parts["minima"].float() + change.to(parts["minima"].device).float(), torch.float16)
        return self.repacked(parts | {"minima": minima})

    def dequantize(self, packed: Packed, rows: slice = ALL, dtype: torch.dtype = torch.float32) -> Tensor:
        taken = {name: tensor[rows] for name, tensor in packed.items()}
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in taken.values()):
            return self._differentiable(taken).to(dtype)
        return dequantize_ggml(self.repacked(taken)["blocks"], self.type, dtype)

    def scratch_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        return dtype.itemsize if decodes(device, self.type) else 24

    def multiply(self, x: Tensor, packed: Packed, transposed: bool = False) -> Tensor | None:
        if not decodes(x.device, self.type):
            return None
        return multiply_ggml(x, self.repacked(packed)["blocks"], self.type, transposed)

    def check(self, packed: Packed) -> None:
        if not bool(torch.isfinite(halves(packed["blocks"], self.type)).all()):
            raise InputError("blocks holds NaN or infinite scales")

    def unpacked(self, packed: Packed) -> Packed:
        """blocks, scales and (of the types that have them) minima [out, n] float16."""
        values = halves(packed["blocks"], self.type)  # [out, n, h]
        return {"blocks": packed["blocks"], **dict(zip(_HALVES, values.unbind(-1), strict=False))}

    def repacked(self, packed: Packed) -> Packed:
        values = [packed[name].detach() for name in _HALVES if name in packed]
        if not values:
            return packed
        stored = torch.stack(values, -1).to(torch.float16)
        return {"blocks": with_halves(packed["blocks"], self.type, stored)}

    def _differentiable(self, packed: Packed) -> Tensor:
        """The weight [out, in] float32 by the decoding's linearity in the float16 numbers of a block."""
        given = [packed[name] for name in _HALVES if name in packed]
        parts = []
        for index, values in enumerate(given):
            unit = torch.zeros(*values.shape, len(given), dtype=torch.float16, device=values.device)
            unit[..., index] = 1
            decoded = dequantize_ggml(with_halves(packed["blocks"], self.type, unit), self.type, torch.float32)
            parts.append(decoded * values.float().repeat_interleave(TYPES[self.type].weights, 1))
        return torch.stack(parts).sum(0)


def _half(values: Tensor) -> Tensor:
    """[n, 1] float32 that float16 holds -> its bytes [n, 2]."""
    return values.to(torch.float16).view(torch.uint8)


def _stored(values: Tensor) -> Tensor:
    """Values rounded to float16. Raises InputError for values beyond its range."""
    if bool((values.abs() > _LARGEST).any()):
        raise InputError(
            f"{where()}the weight reaches {values.abs().max():.3g}, and the largest scale of a block is {_LARGEST}"
        )
    return values.to(torch.float16).float()


def _scale(values: Tensor) -> Tensor:
    """Values rounded to float16, nonzero ones to nonzero ones."""
    return _stored(torch.where(values.abs() < _TINY, values.sign() * _TINY, values))


def _symmetric(values: Tensor, bits: int) -> tuple[list[Tensor], Tensor]:
    """(the scale [n, 1], codes [n, 32]): value = scale · (code − 2^(bits−1)); codes of 8 bits are signed."""
    top = 2 ** (bits - 1)
    largest = values.gather(1, values.abs().argmax(1, keepdim=True))
    scale = _scale(largest.abs() / 127 if bits == 8 else largest / -top)  # the code at the end is the largest's
    codes = torch.round(values / torch.where(scale == 0, 1.0, scale))
    codes = codes.clamp(-127, 127) if bits == 8 else codes.clamp(-top, top - 1) + top
    return [scale], codes.long()


def _shifted(values: Tensor, bits: int) -> tuple[list[Tensor], Tensor]:
    """(scale and minimum [n, 1], codes [n, 32]): value = scale · code + minimum."""
    least = _stored(values.amin(1, keepdim=True))
    scale = _scale((values.amax(1, keepdim=True) - least).clamp_min(0) / (2**bits - 1))
    codes = torch.round((values - least) / torch.where(scale == 0, 1.0, scale))
    return [scale, least], codes.clamp(0, 2**bits - 1).long()


def _low_bits(codes: Tensor, bits: int) -> Tensor:
    """[n, 32] -> bytes [n, 32] of 8 bits, or [n, 16]: weight i low and weight 16 + i high in byte i."""
    if bits == 8:
        return codes.to(torch.int8).view(torch.uint8)
    return (codes[:, :16] & 15 | (codes[:, 16:] & 15) << 4).to(torch.uint8)
