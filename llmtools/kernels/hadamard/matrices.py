"""Hadamard matrices by construction: square, of ±1, with M Mᵀ = K·I.

A matrix is asked for by name, and the name says how to build it:

    sylvester:64     the Walsh matrix of order 64, entry (-1)^popcount(i & j)
    paley1:11        order q + 1 = 12, from the squares of the field with q = 11 elements, q ≡ 3 mod 4
    paley2:13        order 2 (q + 1) = 28, for q ≡ 1 mod 4
    williamson:52    order 52, from four symmetric circulants of size 13

q may be any prime power: `paley2:49` works in the field of 49 elements. The sources are Paley, *On orthogonal matrices*
(1933), and Williamson, *Hadamard's determinant theorem and the sum of four squares* (1944). With q ∈ {11, 19, 59, 107,
139} (first kind), {13, 17} (second kind) and the five Williamson orders, the results equal, entry for entry, the twelve
tables that QuIP# (arXiv:2402.04396) and its published checkpoints use; the tests hold their hashes.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

from ...errors import InputError

# First rows of the symmetric circulants A, B, C, D; each is a palindrome after its first entry.
_WILLIAMSON = {
    52: ("+-+--++++--+-", "+---++++++---", "++-+--++--+-+", "+----+--+----"),
    116: (
        "++--+--+-+++-++++-+++-+--+--+",
        "++++-++-+---++++++---+-++-+++",
        "+-+---++--+-++++++-+--++---+-",
        "+++---++--+-+----+-+--++---++",
    ),
    124: (
        "+--+++-+--+----++----+--+-+++--",
        "+--+++-+--+----++----+--+-+++--",
        "+-----+++-+-+--++--+-+-+++-----",
        "++++++---+-+-++--++-+-+---+++++",
    ),
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
    172: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++---++++-+--+--++--------++--+--+-++++---+",
    ),
}
WILLIAMSON_ORDERS = tuple(_WILLIAMSON)


@cache
def order(name: str) -> int:
    """How many rows the named matrix has. Raises InputError for a name that names nothing; builds nothing."""
    kind, number = _split(name)
    if kind == "sylvester" and number >= 1 and number & (number - 1) == 0:
        return number
    if kind == "paley1" and number % 4 == 3 and prime_power(number):
        return number + 1
    if kind == "paley2" and number % 4 == 1 and prime_power(number):
        return 2 * (number + 1)
    if kind == "williamson" and number in _WILLIAMSON:
        return number
    raise InputError(
        f"{name!r} names no Hadamard matrix; expected sylvester:2^t, paley1:q (prime power q ≡ 3 mod 4), "
        f"paley2:q (prime power q ≡ 1 mod 4) or williamson:K (K among {', '.join(map(str, _WILLIAMSON))})"
    )


def matrix(name: str) -> Tensor:
    """The named matrix, int8 [K, K] on the CPU, entries ±1."""
    size = order(name)
    kind, number = _split(name)
    if kind == "sylvester":
        return _sylvester(number)
    if kind == "paley1":
        return _paley1(number)
    if kind == "paley2":
        return _paley2(number)
    return _williamson(size)


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _split(name: str) -> tuple[str, int]:
    kind, _, number = name.partition(":")
    return kind, int(number) if number.isascii() and number.isdecimal() and len(number) < 10 else 0


def _sylvester(size: int) -> Tensor:
    result = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    while len(result) < size:
        result = torch.cat([torch.cat([result, result], 1), torch.cat([result, -result], 1)])
    return result


def _paley1(q: int) -> Tensor:
    """First row + - … -, first column all +, and χ(i - j) + [i = j] inside."""
    result = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    result[0, 1:] = -1
    result[1:, 1:] = _characters(q) + _identity(q)
    return result


def _paley2(q: int) -> Tensor:
    """[[S + I, S - I], [S - I, -S - I]], where S is χ(i - j) bordered by ones, and 0 in the corner."""
    bordered = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    bordered[0, 0] = 0
    bordered[1:, 1:] = _characters(q)
    eye = _identity(q + 1)
    plus, minus = bordered + eye, bordered - eye
    return torch.cat([torch.cat([plus, minus], 1), torch.cat([minus, -plus], 1)])


def _williamson(size: int) -> Tensor:
    a, b, c, d = (_circulant(row) for row in _WILLIAMSON[size])
    rows = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, 1) for row in rows])


def _circulant(signs: str) -> Tensor:
    """Row i is row 0 shifted right i times."""
    first = torch.tensor([1 if sign == "+" else -1 for sign in signs], dtype=torch.int8, device="cpu")
    i = torch.arange(len(signs), device="cpu")
    return first[(i[None, :] - i[:, None]) % len(signs)]


def _identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.int8, device="cpu")


# ---- the quadratic character of a finite field -----------------------------------------------------------------------


def _characters(q: int) -> Tensor:
    """χ(i - j) for all elements i, j of the field with q elements, int8 [q, q].

    χ is 0 at 0, 1 on squares, -1 elsewhere.

    Element number e is the polynomial whose coefficients are e's digits in base p, low first: for a prime q, just e
    mod q.
    """
    power = prime_power(q)
    assert power is not None
    p, k = power
    digits = torch.tensor([[(e // p**d) % p for d in range(k)] for e in range(q)], dtype=torch.int64, device="cpu")
    weights = torch.tensor([p**d for d in range(k)], dtype=torch.int64, device="cpu")
    chi = torch.full((q,), -1, dtype=torch.int8, device="cpu")
    chi[list(_squares(p, k))] = 1
    chi[0] = 0
    return chi[(((digits[:, None] - digits[None, :]) % p) * weights).sum(-1)]


@cache
def _squares(p: int, k: int) -> frozenset[int]:
    """The numbers of all squares of the field with p^k elements."""
    modulus = _irreducible(p, k)
    elements = product(range(p), repeat=k)
    return frozenset(_number(_remainder(_times(a, a, p), modulus, p), p) for a in elements)


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """The first monic polynomial of degree k without a factor, by its number in base p; coefficients low first."""
    small = [(*low, 1) for degree in range(1, k // 2 + 1) for low in product(range(p), repeat=degree)]
    for number in range(p**k):
        candidate = (*((number // p**d) % p for d in range(k)), 1)
        if all(any(_remainder(candidate, divisor, p)) for divisor in small):
            return candidate
    raise AssertionError(f"no irreducible polynomial of degree {k} over {p}")


def _times(a: tuple[int, ...], b: tuple[int, ...], p: int) -> tuple[int, ...]:
    result = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            result[i + j] = (result[i + j] + x * y) % p
    return tuple(result)


def _remainder(a: tuple[int, ...], monic: tuple[int, ...], p: int) -> tuple[int, ...]:
    rest, degree = list(a), len(monic) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        factor = rest[top]
        for d in range(degree + 1):
            rest[top - degree + d] = (rest[top - degree + d] - factor * monic[d]) % p
    return tuple(rest[:degree])


def _number(a: tuple[int, ...], p: int) -> int:
    return sum(digit * p**d for d, digit in enumerate(a))
