"""`--quality`: tested sets of options of `quantize` for each width, between a few seconds and a few hours.

A set is data: options as a YAML has them. It fills what the user left open, and whatever is given wins. What a set
costs and gives was measured on SmolLM2-135M-Instruct (docs/results/quality.md); where nothing is said it was not.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import InputError, did_you_mean
from ..model.options import ONE_SIDED

if TYPE_CHECKING:
    from .quantize import Quantize

DEFAULT, DEFAULT_BITS = "balanced", 4
OF_ITS_QUANTIZER = ("options", "group_size", "rounding")
"""Options of a set that were chosen for its quantizer, and do not go to another."""


@dataclass(frozen=True)
class Bundle:
    """A set of options, and what it costs and gives."""

    options: Mapping[str, Any]
    """Options of quantize; quantizer and options are those of a quantizer."""
    measured: str = "not measured"
    """CPU time and perplexity (× that of 16 bits, WikiText-2) on SmolLM2-135M-Instruct, one thread."""


SHORT = {"num_samples": 64, "max_length": 512}
LONG = {"num_samples": 256, "max_length": 512}
RTN8 = Bundle({"quantizer": "rtn", "group_size": 64})
TRELLIS = {"quantizer": "qtip"}
WHOLE = {"error_propagation": 0.5, "rounding": "two_sided"}
"""What looks at the whole network while its linears are rounded."""
BALANCED = {**TRELLIS, **SHORT, **WHOLE}

BUNDLES: dict[str, dict[int, Bundle]] = {
    "fast": {
        2: Bundle({"quantizer": "rtn", "group_size": 32}, "without text, 2 bits are noise: a base for training alone"),
        3: Bundle({"quantizer": "rtn", "group_size": 64}, "7 s, × 3.91"),
        4: Bundle({"quantizer": "nf4", "group_size": 64, "options": {"double_quantization": True}}, "3 s, × 1.29"),
        8: RTN8,
    },
    "balanced": {
        2: Bundle({**BALANCED, "recover": {"steps": 60}}, "without the recovery 8 min, × 2.01 (16 sequences of 1024)"),
        3: Bundle(BALANCED, "6 min, × 1.19 (16 sequences of 1024)"),
        4: Bundle(BALANCED, "6 min, × 1.04 (16 sequences of 1024)"),
        6: Bundle(BALANCED),
        8: RTN8,
    },
    "best": {
        bits: Bundle({**TRELLIS, "options": {"state_bits": 14}, **LONG, **WHOLE, "recover": {"steps": 240}})
        for bits in (2, 3, 4, 6)
    }
    | {8: RTN8},
}
"""Name of a quality → width in bits → its set; other widths take that of the next larger one."""

SUMMARIES = {
    "fast": "Seconds, without calibration text.",
    "balanced": "Minutes: calibrated, and recovered at 2 bits. The default.",
    "best": "Hours: more text, a finer trellis and a long recovery.",
}


def check_quality(name: str) -> None:
    """Raises InputError, with the nearest name, for an unknown quality."""
    if name not in BUNDLES:
        raise InputError(f"quality={name!r}; {did_you_mean(name, BUNDLES)}")


def with_quality(recipe: Quantize) -> Quantize:
    """The recipe with the options that it leaves open: those of its quality, of `DEFAULT` where it names no quantizer
    either, and the plain ones where it names a quantizer only."""
    quality = recipe.quality or (DEFAULT if recipe.quantizer is None else None)
    if quality is None:
        return _filled(recipe, {})
    check_quality(quality)
    options = dict(bundle_of(quality, _width(recipe)).options)
    name = recipe.quantizer["name"] if isinstance(recipe.quantizer, dict) else recipe.quantizer
    if name not in (None, options["quantizer"]):  # another's options are not this one's
        options = {key: value for key, value in options.items() if key not in OF_ITS_QUANTIZER}
    return _filled(replace(recipe, quality=quality), options)


def bundle_of(quality: str, bits: int) -> Bundle:
    """The set of a quality for a width."""
    sets = BUNDLES[quality]
    return sets[min((width for width in sets if width >= bits), default=max(sets))]


def _width(recipe: Quantize) -> int:
    """The width that is asked for, in bits; of an average, the one below."""
    named = recipe.quantizer if isinstance(recipe.quantizer, dict) else {}
    for bits in (recipe.bits, recipe.options.get("bits"), named.get("bits"), recipe.bits_per_weight):
        if isinstance(bits, int | float) and not isinstance(bits, bool):
            return int(bits)
    return DEFAULT_BITS


def _filled(recipe: Quantize, bundle: Mapping[str, Any]) -> Quantize:
    """The recipe with its open options from the bundle, or else the plain ones."""
    named = recipe.quantizer if isinstance(recipe.quantizer, dict) else {}
    options = {key: value for key, value in bundle.get("options", {}).items() if key not in named}
    group_size = recipe.group_size
    if group_size is None and "group_size" not in {**named, **recipe.options}:
        group_size = bundle.get("group_size")
    tuning, recovery = recipe.finetune_blocks, recipe.recover
    if tuning.epochs is None:
        tuning = replace(tuning, epochs=bundle.get("finetune_blocks", {}).get("epochs", 0))
    if recovery.steps is None:
        recovery = replace(recovery, steps=bundle.get("recover", {}).get("steps", 0))
    return replace(
        recipe,
        quantizer=recipe.quantizer if recipe.quantizer is not None else bundle.get("quantizer", "optq"),
        bits=_bits(recipe, bundle),
        group_size=group_size,
        options={**options, **recipe.options},
        num_samples=recipe.num_samples if recipe.num_samples is not None else bundle.get("num_samples", 128),
        max_length=recipe.max_length if recipe.max_length is not None else bundle.get("max_length"),
        error_propagation=_error_propagation(recipe, bundle, tuned=bool(tuning.epochs)),
        rounding=recipe.rounding or (bundle.get("rounding") if recipe.calibration is not None else None) or ONE_SIDED,
        finetune_blocks=tuning,
        recover=recovery,
    )


def _error_propagation(recipe: Quantize, bundle: Mapping[str, Any], *, tuned: bool) -> float:
    """The strength that is given, or the bundle's where there is text, and no block tuning, with which it does not
    go."""
    if recipe.error_propagation is not None:
        return recipe.error_propagation
    strength: float = bundle.get("error_propagation", 0.0)
    return strength if recipe.calibration is not None and not tuned else 0.0


def _bits(recipe: Quantize, bundle: Mapping[str, Any]) -> int | None:
    """The width of a quantizer that the bundle chose, whose own default may be another; nf4 has none to choose."""
    if recipe.quantizer is not None or recipe.bits_per_weight is not None or "bits" in recipe.options:
        return recipe.bits
    if bundle.get("quantizer") == "nf4":
        return None if recipe.bits in (None, 4) else recipe.bits
    return recipe.bits if recipe.bits is not None else DEFAULT_BITS


def expanded(recipe: Quantize) -> str:
    """What the sets may choose, as it was chosen: ``quip_sharp --bits 2 --options.passes 2 …``; of a filled recipe."""
    named = recipe.quantizer if isinstance(recipe.quantizer, dict) else {"name": recipe.quantizer}
    options: dict[str, Any] = {"quantizer": named["name"], "bits": recipe.bits, "group_size": recipe.group_size}
    options |= {"options": {**{key: each for key, each in named.items() if key != "name"}, **recipe.options}}
    if recipe.calibration is not None:
        options |= {"num_samples": recipe.num_samples, "max_length": recipe.max_length}
    options |= {
        "bits_per_weight": recipe.bits_per_weight,
        "error_propagation": recipe.error_propagation,
        "rounding": recipe.rounding if recipe.rounding != ONE_SIDED else None,
        "finetune_blocks": {"epochs": recipe.finetune_blocks.epochs},
        "recover": {"steps": recipe.recover.steps},
    }
    return shown(Bundle({key: each for key, each in options.items() if each is not None}))


def table() -> str:
    """All sets, as the help shows them."""
    texts = (f"{name}: {SUMMARIES[name]}\n" + textwrap.indent(described(name), "  ") for name in BUNDLES)
    return "\n".join(["--quality", *(textwrap.indent(text, "  ") for text in texts)])


def described(name: str) -> str:
    """A quality's sets, a line for each width."""
    return "\n".join(f"{bits} bits: {shown(each)}; {each.measured}" for bits, each in BUNDLES[name].items())


def shown(bundle: Bundle) -> str:
    """A set as it is written on the command line: ``quip_sharp --options.passes 2 --num_samples 64``."""
    options = dict(bundle.options)
    words = [str(options.pop("quantizer"))]
    for key, value in options.items():
        pairs = (
            {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, Mapping) else {key: value}
        )
        words += [f"--{flag} {str(each).lower()}" for flag, each in pairs.items()]
    return " ".join(words)
