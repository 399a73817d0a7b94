"""The bit stream in plain torch. 32 codes of b bits are b 32-bit words, so both directions work on such runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RUN = 32  # codes; a run of 32 codes fills a whole number of 32-bit words at every width


def words(n: int, bits: int, word_bits: int = 32) -> int:
    """Words that n codes of `bits` bits need."""
    return -(-n * bits // word_bits)


def pack(codes: Tensor, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """codes [..., n], integers in [0, 2^bits), to a stream of words [..., w] of `dtype` int32 or uint8."""
    n = codes.shape[-1]
    padded = F.pad(codes.to(torch.int64), (0, -n % RUN)).unflatten(-1, (-1, RUN))  # [..., r, 32]
    out = torch.zeros(*padded.shape[:-1], bits, dtype=torch.int64, device=codes.device)
    for i in range(RUN):
        word, shift = divmod(i * bits, 32)
        out[..., word] |= (padded[..., i] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            out[..., word + 1] |= padded[..., i] >> (32 - shift)
    out = torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32).flatten(-2)
    if dtype == torch.uint8:
        return out.view(torch.uint8)[..., : words(n, bits, 8)].contiguous()
    return out[..., : words(n, bits)].contiguous()


def unpack(stream: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes of each row: words [..., w] int32 or uint8 -> codes [..., n] uint8."""
    octets = stream.contiguous().view(torch.uint8)
    if bits == 8:
        return octets[..., :n]
    if bits in (1, 2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
        codes: Tensor = ((octets.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)  # [..., bytes · per_byte]
        return codes[..., :n]
    # Any other width: 8 codes fill `bits` bytes, so code i of such a run starts at a fixed byte and bit.
    octets = F.pad(octets, (0, -octets.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int32)
    fields = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        field = octets[..., byte] >> shift
        if shift + bits > 8:
            field = field | (octets[..., byte + 1] << (8 - shift))
        fields.append((field & (2**bits - 1)).to(torch.uint8))
    return torch.stack(fields, -1).flatten(-2)[..., :n]
