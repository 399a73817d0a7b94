"""The dense little-endian bit stream, the one packing below every format of ours.

Along the last axis, code i occupies bits [b·i, b·i + b) of a bit string; bit t of the string is bit t mod W of word
t div W, for words of W bits. For b in {2, 4, 8} that is the familiar "32/b codes a word, first code lowest"; for b = 3,
32 codes fill 3 words and codes 10 and 21 straddle words. GPTQ and compressed-tensors store this same stream.

Shapes: n — codes in a row; w = ceil(n·bits / W) — words in a row.

    pack:    codes [..., n] -> words [..., w]
    unpack:  words [..., w] -> codes [..., n] uint8
"""

from .reference import pack, unpack, words

__all__ = ["pack", "unpack", "words"]
