"""How a packed weight is multiplied on this processor: chosen by measuring the ways that there are, once, and kept.

Which way is fastest is not written on a processor: one with bfloat16 instructions may be slower in bfloat16 than in
float32, and another twice as fast. So the first product with a weight of some size on a CPU times a packed weight of
four million parameters in every way, in a second or two of the processor: blocks of rows in the activations' type or in
float32, blocks of several sizes, and the kernel that multiplies while decoding (`Rows.multiply`) at several numbers of
tokens, with activations as bytes or floats; forward and transposed product apart. What is chosen must be faster than
the default by a margin, as the least of interleaved repetitions, so that other programs on the machine do not choose.
All are within one tolerance.

The choice is kept beside the compiled kernels (`kernels/build.py`), in a file of JSON that is named after the
processor, the threads, the libraries' versions and the C sources, so that runs on one machine agree; a file that is
none of ours, or damaged, is measured and written again. `llmtools env` shows it.

Environment: LLMTOOLS_PRODUCTS=default measures nothing and reads no file. LLMTOOLS_PRODUCTS="dtype=float32,few=16" sets
parts of the choice: dtype (bfloat16, float16 or float32), bytes (yes or no), few (tokens, or all) and block_mib, for
both directions, or for one as "forward.few=16" or "transposed.dtype=float32".

Shapes: out, in — features; t — tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import build
from ..kernels.ops import constant_result, direct

log = logging.getLogger(__name__)

VARIABLE = "LLMTOOLS_PRODUCTS"
ALL_TOKENS = 2**31
"""As a number of tokens that are few: any."""
DEFAULT_BLOCK_BYTES = 4 * 2**20
"""Scratch memory for one block of rows on a CPU. Of 1, 2, 4 … 64 MB, 2 to 8 were best for three shapes and 64 to 512
tokens, within the noise; 1 MB cost up to 15 % more, 32 MB up to 100 % (`python -m benchmarks.materialize`)."""
HALVES = (torch.bfloat16, torch.float16)

_FORMAT = 1
_SMALL = 2**18  # weights; of smaller ones nothing is measured
_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BLOCKS = tuple(mib * 2**20 for mib in (1, 2, 4, 8))
_FEW = (4, 16, 32, 64, 128)
_MANY = 128  # tokens
_SIZE = 2048  # features in and out
_REPEATS = 3
_MARGIN = 0.93  # of the default's time: what another way must reach
_HOPELESS = 2.0  # times the best in a small product: not measured further


class Way(NamedTuple):
    """How one direction is multiplied."""

    dtype: torch.dtype
    """Type in which blocks of rows are decoded and multiplied."""
    block_bytes: int
    """Bytes of a block."""
    few: int
    """Largest number of tokens for `Rows.multiply`, where there is one."""
    bytes: bool = True
    """Whether it is given half-precision activations as they are, for byte products; float32 otherwise."""

    def __str__(self) -> str:
        blocks = f"blocks of {self.block_bytes / 2**20:g} MiB in {_name(self.dtype)}"
        packed = "while decoding" if self.bytes else "while decoding, in float32"
        if self.few == 0:
            return blocks
        return packed if self.few >= ALL_TOKENS else f"{packed}, from {self.few + 1} tokens on {blocks}"


class Choice(NamedTuple):
    """The ways of one type of activations and number of threads."""

    forward: Way
    transposed: Way


Figures = dict[str, dict[str, float]]
"""Milliseconds of a thread's CPU time, by what was measured and by way."""


def choice(x: Tensor, weights: Callable[[], int]) -> Choice:
    """The ways for activations x [..., in] on a CPU and a weight of `weights()` parameters.

    Measured now if need be, but for small weights, and where x is none to measure with (fake, traced, a subclass).
    Raises InputError for what the variable holds.
    """
    if torch.compiler.is_compiling():
        return chosen(x.dtype)
    known = _known.get((x.dtype, torch.get_num_threads()))
    if known is not None and (known.final or weights() < _SMALL or not _measurable(x)):
        return known.choice
    return find(x.dtype, measured=_measurable(x) and weights() >= _SMALL).choice


def _measurable(x: Tensor) -> bool:
    return not torch._C._len_torch_dispatch_stack() and direct(x.detach())


@constant_result
def chosen(dtype: torch.dtype) -> Choice:
    """The ways for activations of that type on a CPU, without a measurement."""
    return find(dtype).choice


class Found(NamedTuple):
    """A choice, and where it comes from."""

    choice: Choice
    figures: Figures
    """Measured times; empty where nothing was measured."""
    final: bool
    """Whether no measurement is to come."""


_known: dict[tuple[torch.dtype, int], Found] = {}
"""Choices of this process, by type of activations and threads."""


def find(dtype: torch.dtype, measured: bool = False, anew: bool = False) -> Found:
    """The choice by the variable, for the rest by the file, else the default.

    measured: instead of the default, and kept; anew: whatever the file says. Raises InputError for what the variable
    holds.
    """
    key = dtype, torch.get_num_threads()
    known = _known.get(key)
    if known is not None and not anew and (known.final or not measured):
        return known
    settings = os.environ.get(VARIABLE, "").strip()
    found = Found(default(dtype), {}, final=True)
    if settings == "default":
        settings = ""
    elif dtype in _TYPES.values() and build.library("grouped") is not None:
        kept = None if measured or anew else _read(dtype)
        found = kept or (_measured(dtype, anew) if measured or anew else found._replace(final=False))
    _known[key] = found = found._replace(choice=_overridden(found.choice, settings))
    return found


def forget() -> None:
    """Lets this process look at the variable and the file again."""
    _known.clear()


@functools.cache
def default(dtype: torch.dtype) -> Choice:
    """The choice without a measurement, by what the processor has.

    Intel's AVX-512 has bfloat16 products, but without AMX they are slower than float32's (Sapphire Rapids, torch 2.13);
    AMD's are faster. 32 tokens are few by byte products (AVX-512 VNNI), beside matrix units (AMX) 4, a guess.
    """
    has = build.features()
    own = bool(has & {"amx_bf16", "bf16"}) or ("avx512_bf16" in has and "GenuineIntel" not in has)
    if dtype == torch.float16:
        own = bool(has & {"amx_fp16", "avx512_fp16"})
    half = dtype in HALVES
    way = Way(torch.float32 if half and not own else dtype, DEFAULT_BLOCK_BYTES, 4 if half and own else 32)
    return Choice(way, way)


# ---- the variable ----


def _overridden(found: Choice, settings: str) -> Choice:
    """The choice with what the variable sets; its other parts stay."""
    ways = {"forward": found.forward, "transposed": found.transposed}
    for setting in filter(None, (part.strip() for part in settings.split(","))):
        key, equals, value = (part.strip() for part in setting.partition("="))
        direction, dot, name = key.rpartition(".")
        read = _SETTINGS.get(name)
        if read is None or not equals or (dot and direction not in ways):
            raise InputError(
                f"{VARIABLE}: {setting!r}; there are default, or {', '.join(_SETTINGS)} as in 'dtype=float32,few=16', "
                "each with 'forward.' or 'transposed.' before it for one direction"
            )
        try:
            changed = read(value)
        except (KeyError, ValueError):
            raise InputError(f"{VARIABLE}: {setting!r}; {_HELP[name]}") from None
        for each in [direction] if dot else ways:
            ways[each] = ways[each]._replace(**changed)
    return Choice(**ways)


def _number(value: str, unit: int = 1) -> int:
    if int(value) < (1 if unit > 1 else 0):
        raise ValueError(value)
    return int(value) * unit


_SETTINGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "dtype": lambda value: {"dtype": _TYPES[value]},
    "bytes": lambda value: {"bytes": {"yes": True, "no": False}[value]},
    "few": lambda value: {"few": ALL_TOKENS if value == "all" else _number(value)},
    "block_mib": lambda value: {"block_bytes": _number(value, 2**20)},
}
_HELP = {
    "dtype": f"give {', '.join(_TYPES)}",
    "bytes": "give yes or no",
    "few": "give a number of tokens, 0 or more, or all",
    "block_mib": "give a whole number of MiB, 1 or more",
}


# ---- the file ----


def _file(dtype: torch.dtype) -> Path:
    """Where the choice is kept, named after all that it depends on."""
    sources = sorted(build.HERE.glob("*.h")) + sorted((build.HERE / "grouped").glob("*.[ch]"))
    parts = [build.processor(), *(path.read_bytes() for path in sources)]
    parts += [f"{_FORMAT} {_name(dtype)} {torch.get_num_threads()} {torch.__version__} {_own_version()}".encode()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    return build.cache() / f"products-{digest[:32]}.json"


def _own_version() -> str:
    try:
        return version("llmtools")
    except PackageNotFoundError:
        return ""


def _read(dtype: torch.dtype) -> Found | None:
    """The kept choice; None where there is none, or it is damaged or another user's."""
    try:
        file = _file(dtype)
        build.check_private(file)
        stored = json.loads(file.read_text(encoding="utf-8"))
        ways = [_way(stored["ways"][direction], dtype) for direction in ("forward", "transposed")]
        figures = {
            str(what): {str(way): float(spent) for way, spent in times.items()}
            for what, times in stored["figures"].items()
        }
        return Found(Choice(*ways), figures, final=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as reason:
        log.debug("no choice of products is kept: %s", reason)
    except build.Unavailable as reason:
        log.debug("no choice of products can be kept: %s", reason)
    return None


def _way(stored: dict[str, Any], dtype: torch.dtype) -> Way:
    """Raises ValueError, KeyError or TypeError for what a measurement does not give."""
    own, block, few, as_bytes = (stored[name] for name in Way._fields)
    sound = _TYPES[own] in (dtype, torch.float32) and block in _BLOCKS and few in (0, *_FEW, ALL_TOKENS)
    if not (sound and isinstance(as_bytes, bool)):
        raise ValueError(f"{stored} is no way to multiply {_name(dtype)}")
    return Way(_TYPES[own], block, few, as_bytes)


def _write(found: Found, dtype: torch.dtype) -> None:
    ways = {name: {**way._asdict(), "dtype": _name(way.dtype)} for name, way in found.choice._asdict().items()}
    try:
        build.put_text(_file(dtype), json.dumps({"ways": ways, "figures": found.figures}, indent=1))
    except (OSError, build.Unavailable) as reason:
        log.debug("the choice of products cannot be kept: %s", reason)


# ---- the measurement ----


def _measured(dtype: torch.dtype, anew: bool) -> Found:
    """Measures, and keeps what was chosen; of several processes that start together one measures."""
    try:
        with build.alone(build.cache()):
            found = None if anew else _read(dtype)
            if found is None:
                found = measure(dtype)
                _write(found, dtype)
            return found
    except (OSError, build.Unavailable) as reason:
        log.debug("the choice of products is not kept: %s", reason)
        return measure(dtype)


@torch.no_grad()
def measure(dtype: torch.dtype) -> Found:
    """Times the ways for activations of that type, about a second of the processor, and chooses.

    Nothing outside is touched: no generator, no setting of torch.
    """
    start = time.process_time()
    figures: Figures = {}
    with torch.autocast("cpu", enabled=False):
        ways = [_measure_direction(dtype, transposed, figures) for transposed in (False, True)]
    log.info("measured how %s is multiplied here, in %.1f CPU seconds", _name(dtype), time.process_time() - start)
    return Found(Choice(*ways), figures, final=True)


def _measure_direction(dtype: torch.dtype, transposed: bool, figures: Figures) -> Way:
    """One part of the way after the other, each beside what is chosen by then."""
    from .materialize import multiply_by

    direction, way = ("forward", "transposed")[transposed], default(dtype)[transposed]

    def times(tokens: int, ways: list[Way], size: int = _SIZE, repeats: int = _REPEATS) -> dict[Way, float]:
        """Of products of so many tokens with a weight [size, size]."""
        source, packed = _weight(size)
        x = torch.linspace(-1, 1, tokens * size, device="cpu").view(tokens, size).to(dtype)
        runs: dict[Way, Callable[[], Any]] = {
            each: functools.partial(multiply_by, each, x, source, packed, transposed) for each in ways
        }
        return _least(runs, repeats)

    def pick(tokens: int, ways: list[Way]) -> Way:
        """The best of the ways for so many tokens; the first unless another is faster by the margin."""
        found = times(tokens, ways)
        kept = figures.setdefault(f"{direction}, {tokens} tokens", {})
        kept.update({str(each): round(1e3 * spent, 3) for each, spent in found.items()})
        best = min(found, key=lambda each: found[each])
        return best if found[best] < _MARGIN * found[ways[0]] else ways[0]

    blocks = way._replace(few=0)
    types = [blocks._replace(dtype=each) for each in sorted({dtype, torch.float32}, key=lambda each: each != way.dtype)]
    probe = times(64, types, size=256, repeats=1)  # a type without instructions may take a hundred times as long
    blocks = pick(_MANY, [each for each in types if probe[each] < _HOPELESS * min(probe.values())])
    blocks = pick(_MANY, [blocks, *(blocks._replace(block_bytes=b) for b in _BLOCKS if b != blocks.block_bytes)])
    fused = blocks._replace(few=ALL_TOKENS)
    if dtype in HALVES and not transposed and {"avx512_vnni", "avx512vbmi"} <= build.features():
        fused = pick(_FEW[0], [fused, fused._replace(bytes=False)])
    few = 0
    for tokens in _FEW:
        if pick(tokens, [fused, blocks]) != fused:
            break
        few = tokens
    return fused._replace(few=ALL_TOKENS if few == _FEW[-1] else few)


def _weight(size: int) -> tuple[Any, dict[str, Tensor]]:
    """A grid of four bits and a weight [size, size] on it, of any codes."""
    from .grids.affine import Affine

    grid = Affine(4, 64)
    codes = torch.arange(size * size // 8, dtype=torch.int32, device="cpu").view(size, -1) * 40503
    scales = torch.full((size, size // 64), 2.0**-6, dtype=torch.float16, device="cpu")
    zeros = torch.full((size, size // 128), 0x88, dtype=torch.uint8, device="cpu")
    return grid, {"qweight": codes, "scales": scales, "qzeros": zeros}


def _least(ways: dict[Way, Callable[[], Any]], repeats: int) -> dict[Way, float]:
    """CPU seconds of each, a thread: the least of repetitions in which they take turns, after one that warms up."""
    times = dict.fromkeys(ways, float("inf"))
    for repeat in range(repeats + 1):
        for way, run in ways.items():
            start = time.process_time()
            run()
            if repeat:
                times[way] = min(times[way], (time.process_time() - start) / torch.get_num_threads())
    return times


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
