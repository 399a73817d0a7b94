"""`quantize --fit 6GB`: the widths with which a later finetuning step fits into a memory.

The planner (`estimate.py`) says what the step holds at each width: the widest that fits is taken. Where there is
calibration text, what is left of the memory buys more bits for single linears (`model/allocation.py`), so that the
packed weights fill it. With `--fit_step.offload disk` weights need no memory, and any width fits that the rest leaves.
"""

from __future__ import annotations

import logging
import math
import re
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError
from ..train.options import StepOptions

if TYPE_CHECKING:
    from .quantize import Quantize

log = logging.getLogger(__name__)

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(GB|GiB|MB|MiB)?")
_UNITS = {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}


STEP = StepOptions()


class Width(NamedTuple):
    """What a step holds with the linears at one width."""

    bits: int | None
    """Bits per code; None for a quantizer with one width."""
    quantizer: Any
    """Quantizer of the linears."""
    stored: float
    """Stored bits per quantized weight, scales included."""
    needed: int
    """Bytes of memory of the step."""
    streamed: int | None
    """The same with its weights in files; None on a GPU, where they cannot be."""


def fitted(recipe: Quantize, *, divide: bool) -> Quantize:
    """The recipe with the widths with which its step fits into its memory (`fit`), which are logged.

    divide: whether memory that is left may be divided among the linears (`bits_per_weight`).

    Raises InputError for a memory that cannot be read, options of widths beside it, and where no width fits.
    """
    from ..checkpoint.loading import quiet_libraries
    from .estimate import read_config

    if recipe.fit is None:
        if recipe.fit_step != STEP:
            raise InputError("--fit_step is the step that is to fit; pass --fit with the memory, such as --fit 6GB")
        return recipe
    memory = bytes_of(recipe.fit)
    if recipe.bits_per_weight is not None:
        raise InputError("--fit chooses the bits; pass it or --bits_per_weight, not both")
    quiet_libraries()
    config = read_config(_planned(recipe))
    widths = _widths(recipe, config)
    fitting = [width for width in widths if width.needed <= memory]
    log.info("%s", _table(recipe, widths))
    if not fitting:
        raise InputError(_refusal(recipe, widths))
    chosen = max(fitting, key=lambda width: width.stored)
    wider = [width for width in widths if width.stored > chosen.stored]
    if not (divide and wider and recipe.calibration and recipe.fit_step.offload is None and chosen.bits is not None):
        log.info("--fit %s: %s", recipe.fit, _shown(chosen))
        return replace(recipe, bits=chosen.bits) if _is_open(recipe) else recipe
    spare = memory - chosen.needed
    stored, weights = _divisible(recipe, chosen, config)
    bits = min(8 * (stored + spare) / weights, max(width.stored for width in wider))
    bits = math.floor(1000 * bits) / 1000
    log.info("--fit %s: %.3f bits per weight, divided among the linears (--bits_per_weight)", recipe.fit, bits)
    return replace(recipe, bits_per_weight=bits)


def bytes_of(size: str | float) -> int:
    """Bytes of "6GB", "800 MiB" or 6, which are GB. Raises InputError for other words."""
    found = _SIZE.fullmatch(str(size).strip())
    count = float(found[1]) * _UNITS[found[2] or "GB"] if found else 0
    if not 0 < count < math.inf:
        raise InputError(f"fit={size!r}; a size of memory is expected, such as 6GB or 800MiB")
    return int(count)


def _widths(recipe: Quantize, config: Any) -> list[Width]:
    """The step at each width that the quantizer has, by rising size; at the one that the recipe names, if it does."""
    from ..model.allocation import WIDTHS
    from .quality import with_quality
    from .quantize import resolve_quantizer

    wide = [bits for bits in WIDTHS if bits > 1]  # one bit is for linears among others of more
    named = [replace(recipe, bits=bits) for bits in wide] if _is_open(recipe) else []
    found: list[Width] = []
    for each in named:
        with suppress(InputError):  # a width that the quantizer does not have, or a quantizer of one width
            resolve_quantizer(with_quality(each))
            found.append(_width(each, config))
    return sorted(found or [_width(recipe, config)], key=lambda width: width.stored)


def _width(recipe: Quantize, config: Any) -> Width:
    from .estimate import needed, resolved, step_memory
    from .quality import with_quality
    from .quantize import resolve_quantizer

    quantizer = resolve_quantizer(with_quality(recipe))
    planned = resolved(config, _planned(recipe))
    memory, _, facts = step_memory(config, planned)
    in_files = None if planned.device != "cpu" else needed(memory, facts, replace(planned, offload="disk"))
    return Width(
        bits=getattr(quantizer, "bits", None),
        quantizer=quantizer,
        stored=8 * memory.packed / facts["weights"],
        needed=needed(memory, facts, planned),
        streamed=in_files,
    )


def _planned(recipe: Quantize) -> Any:
    """The recipe of `llmtools plan` for the step on what this one makes."""
    from .estimate import Plan
    from .quality import with_quality

    filled, step = with_quality(recipe), recipe.fit_step
    shared = ("model", "quantizer", "bits", "group_size", "options", "overrides", "skip", "plugin", "trust_remote_code")
    of_step = {name: getattr(step, name) for name in vars(step)}
    return Plan(**{name: getattr(filled, name) for name in shared}, **of_step)


def _is_open(recipe: Quantize) -> bool:
    """Whether the recipe leaves the width open."""
    named = recipe.quantizer if isinstance(recipe.quantizer, dict) else {}
    return recipe.bits is None and "bits" not in {**named, **recipe.options}


def _divisible(recipe: Quantize, width: Width, config: Any) -> tuple[int, int]:
    """(bytes of packed weights, number of weights) of the linears that widths are chosen for, at one width."""
    import torch

    from ..model.allocation import chosen_among, stored_bytes
    from ..nn.experts import unfused_within
    from .estimate import empty_model

    with torch.device("meta"):
        model = empty_model(config, _planned(recipe))
        with unfused_within(model):
            paths = chosen_among(model, width.quantizer, recipe.overrides, recipe.skip)
            linears = [model.get_submodule(path) for path in paths]
    return sum(stored_bytes(width.quantizer, each) for each in linears), sum(each.weight.numel() for each in linears)


def _refusal(recipe: Quantize, widths: list[Width]) -> str:
    from .estimate import size

    least = min(widths, key=lambda width: width.needed)
    text = f"--fit {recipe.fit}: no width fits; the step takes at least {size(least.needed)}, with {_shown(least)}"
    if recipe.fit_step.offload is not None or least.streamed is None:
        return f"{text}; choose a smaller step (--fit_step.batch_size, --fit_step.max_length), or more memory"
    return f"{text}; with weights in files (--fit_step.offload disk) it takes {size(least.streamed)} at any width"


def _table(recipe: Quantize, widths: list[Width]) -> str:
    from .estimate import size

    step = recipe.fit_step
    where = "" if step.offload is None else f", --offload {step.offload}"
    lines = [f"memory of a finetuning step, batches of {step.batch_size}{where}:"]
    return "\n".join([*lines, *(f"  {_shown(width)}: {size(width.needed)}" for width in widths)])


def _shown(width: Width) -> str:
    bits = "" if width.bits is None else f" --bits {width.bits}"
    return f"{width.quantizer.name}{bits} ({width.stored:.2f} bits per weight)"
