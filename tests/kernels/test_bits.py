"""The bit stream: what goes in comes out, and the bits lie where the published formats have them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtools.kernels.bits import pack, unpack, words


def bit_string(stream: torch.Tensor) -> str:
    """The bits of one row of words, lowest first."""
    width = 8 * stream.element_size()
    return "".join(f"{int(word) % 2**width:0{width}b}"[::-1] for word in stream)


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=100), st.sampled_from(["int32", "uint8"]))
def test_codes_come_back(bits: int, values: list[int], word: str) -> None:
    codes = (torch.tensor([values, values[::-1]]) % 2**bits).to(torch.uint8)
    stream = pack(codes, bits, getattr(torch, word))
    assert stream.shape == (2, words(len(values), bits, 8 * stream.element_size()))
    assert torch.equal(unpack(stream, bits, len(values)), codes)


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_code_i_occupies_bits_from_i_times_bits(bits: int, values: list[int]) -> None:
    codes = [value % 2**bits for value in values]
    expected = "".join(f"{code:0{bits}b}"[::-1] for code in codes)
    for dtype in (torch.int32, torch.uint8):
        string = bit_string(pack(torch.tensor(codes), bits, dtype))
        assert string.startswith(expected) and "1" not in string[len(expected) :]


def test_three_bits_straddle_words_at_codes_10_and_21() -> None:
    """32 codes in three words, as GPTQ's 3-bit kernels have them: 10 codes and 2 bits, 1 bit and 10 codes, …"""
    codes = torch.arange(32) % 8
    low, middle, high = (int(word) % 2**32 for word in pack(codes, 3))
    assert low == sum((i % 8) << 3 * i for i in range(10)) + ((10 % 8 & 3) << 30)
    assert middle == (10 % 8 >> 2) + sum((i % 8) << (3 * i - 32) for i in range(11, 21)) + ((21 % 8 & 1) << 31)
    assert high == (21 % 8 >> 1) + sum((i % 8) << (3 * i - 64) for i in range(22, 32))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_whole_codes_in_a_word_are_lowest_first(bits: int) -> None:
    codes = torch.arange(64 // bits) % 2**bits
    assert torch.equal(pack(codes, bits) & 0xFF, pack(codes, bits, torch.uint8).view(-1, 4)[:, 0].to(torch.int32))
    first = int(pack(codes, bits)[0]) % 2**32
    assert [first >> bits * i & (2**bits - 1) for i in range(32 // bits)] == codes[: 32 // bits].tolist()


def test_leading_dimensions_are_kept() -> None:
    codes = torch.randint(0, 8, (2, 3, 50))
    assert torch.equal(unpack(pack(codes, 3), 3, 50), codes.to(torch.uint8))
    assert unpack(pack(codes[:, :0], 3), 3, 50).shape == (2, 0, 50)
