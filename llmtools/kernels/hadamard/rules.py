"""Which orthogonal matrix of ±1 belongs to a size: the rule, a short string.

A rule lists Kronecker factors; the rest of n is a power of two, for Sylvester's matrix:

    sylvester              n = 2^t
    paley1:11              n = 12·2^t:   paley1:11 ⊗ sylvester
    paley1:11*paley2:25    n = 12·52·2^t: a product of two, for sizes without a single one
    blocks:64              n = 64·b:     block diagonal, b times the Sylvester matrix of order 64
    blocks:12:paley1:11    n = 12·b:     block diagonal, b times the rule after the colon

Sizes that QuIP# supports get QuIP#'s own table, since checkpoints depend on it. A checkpoint stores the version of
these rules (the quantizer's option `hadamard`, now 1): a better choice for some size becomes version 2 beside them.
"""

from __future__ import annotations

from functools import cache
from math import prod

from ...errors import InputError
from .matrices import WILLIAMSON_ORDERS, order, prime_power

# A factor is applied as a dense product: above this size a product of smaller ones, or blocks, are the better bargain.
MAX_FACTOR = 2048

_PUBLISHED = {k: f"paley1:{k - 1}" for k in (12, 20, 60, 108, 140)}
_PUBLISHED |= {k: f"paley2:{k // 2 - 1}" for k in (28, 36)}
_PUBLISHED |= {k: f"williamson:{k}" for k in WILLIAMSON_ORDERS}


@cache
def rule_for(n: int) -> str:
    """The rule for vectors of length n; there is one for every n ≥ 1."""
    if n < 1:
        raise InputError(f"a Hadamard transform needs at least one feature, not {n}")
    for block in (n // d for d in range(1, n + 1) if n % d == 0):
        found = _factors_for(*_odd_and_twos(block))
        if found is not None:
            inner = "*".join(found) or "sylvester"
            return inner if block == n else f"blocks:{block}" + (f":{inner}" if found else "")
    raise AssertionError("the block of one always exists")


@cache
def factors(rule: str, n: int) -> tuple[str, ...]:
    """The names of the matrices whose Kronecker product, repeated along the diagonal, is the rule's [n, n] matrix.

    The last one is Sylvester's, perhaps of order 1. Their orders multiply to the block size, which divides n.
    Raises InputError where the rule is malformed or does not fit n.
    """
    block, inner = n, rule
    if rule.startswith("blocks:"):
        size, _, inner = rule.removeprefix("blocks:").partition(":")
        block = int(size) if size.isascii() and size.isdecimal() and len(size) < 10 else 0
        inner = inner or "sylvester"
    names = () if inner == "sylvester" else tuple(inner.split("*"))
    orders = [order(name) for name in names]
    if n < 1 or block < 1 or n % block or block % prod(orders) or _odd_and_twos(block // prod(orders))[0] != 1:
        raise InputError(f"Hadamard rule {rule!r} does not fit {n} features; rule_for({n}) is {rule_for(max(n, 1))!r}")
    if max(orders, default=1) > MAX_FACTOR:
        raise InputError(f"Hadamard rule {rule!r} has a factor of order {max(orders)}; at most {MAX_FACTOR} is allowed")
    return (*names, f"sylvester:{block // prod(orders)}")


def _factors_for(odd: int, twos: int) -> tuple[str, ...] | None:
    """Names with orders odd·2^t in all, t ≤ twos: one matrix if there is one, else the product of smallest orders."""
    if odd == 1:
        return ()
    single = _single(odd, twos)
    return (single,) if single is not None else _kronecker(odd, twos)


@cache
def _single(odd: int, twos: int) -> str | None:
    """The name of a matrix of order odd·2^t with the smallest t ≤ twos."""
    for t in range(2, twos + 1):
        k = odd << t
        if k > MAX_FACTOR:
            return None
        if k in _PUBLISHED:
            return _PUBLISHED[k]
        if prime_power(k - 1):
            return f"paley1:{k - 1}"
        if (k // 2 - 1) % 4 == 1 and prime_power(k // 2 - 1):
            return f"paley2:{k // 2 - 1}"
    return None


@cache
def _kronecker(odd: int, twos: int) -> tuple[str, ...] | None:
    found = []
    for d in (d for d in range(3, odd // 2, 2) if odd % d == 0):
        first = _single(d, twos)
        if first is not None:
            rest = _factors_for(odd // d, twos - _odd_and_twos(order(first))[1])
            if rest is not None:
                found.append((first, *rest))
    return min(found, key=lambda names: sum(order(name) for name in names), default=None)


def _odd_and_twos(n: int) -> tuple[int, int]:
    """(o, t) with n = o·2^t and o odd."""
    twos = (n & -n).bit_length() - 1
    return n >> twos, twos
