"""Programs that read exported checkpoints; most support only a part of what the formats can express.

| reader         | format             | supports |
|---|---|---|
| `vllm`         | gptq               | symmetric 4 and 8 bits, columns in natural order, one setting for all modules |
|                | compressed-tensors | symmetric 4 and 8 bits |
|                | dense, lora        | everything |
| `gptqmodel`    | gptq               | symmetric grids |
|                | gptq_v2            | everything |
| `transformers` | compressed-tensors | symmetric grids (with the package compressed-tensors) |
|                | gptq, gptq_v2      | everything (with the packages gptqmodel and optimum) |
|                | gguf, dense, lora  | everything |
| `llama.cpp`    | gguf, gguf-lora    | everything |

`make test-interop` opens exports of default and of symmetric grids in each of them except vLLM: supported ones, by the
table, give the same logits, and others an error. vLLM's rows are from the source of version 0.33, untested.
Combinations that are not in the table are not known to work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import InputError
from .uniform import Uniform

READERS = ("vllm", "gptqmodel", "transformers", "llama.cpp")
"""Names of the readers."""

_Limit = Callable[[Sequence[Uniform], Sequence[str]], str | None]
"""(layers, paths of dense linears in the blocks) → reason why a reader does not support them, with the remedy, or
None."""


def _asymmetric(layers: Sequence[Uniform], dense: Sequence[str]) -> str | None:
    symmetric = all(layer.symmetric for layer in layers)
    return None if symmetric else "it reads symmetric grids only: quantize with --options.symmetric true"


def _asymmetric_v1(layers: Sequence[Uniform], dense: Sequence[str]) -> str | None:
    reason = _asymmetric(layers, dense)
    return reason and f"{reason}, or export as gptq_v2"


def _other_widths(layers: Sequence[Uniform], dense: Sequence[str]) -> str | None:
    fits = all(layer.bits in (4, 8) for layer in layers)
    return None if fits else "it reads 4 and 8 bits only: quantize with --bits 4"


def _other_groups(layers: Sequence[Uniform], dense: Sequence[str]) -> str | None:
    fits = all(_group_size(layer) in (-1, 32, 64, 128) for layer in layers)
    return None if fits else "it reads groups of 32, 64, 128 or whole rows: quantize with --group_size 128"


def _reordered(layers: Sequence[Uniform], dense: Sequence[str]) -> str | None:
    fits = all(layer.group_of is None for layer in layers)
    return None if fits else "it reads columns in natural order: quantize without act_order, or with static_groups"


def _several_settings(layers: Sequence[Uniform], dense: Sequence[str]) -> str | None:
    fits = len({(layer.bits, _group_size(layer)) for layer in layers}) <= 1 and not dense
    return None if fits else "it reads one setting for all linears of the blocks: quantize without overrides and skip"


_LIMITS: Mapping[str, Mapping[str, tuple[_Limit, ...]]] = {
    "vllm": {
        "gptq": (_asymmetric, _other_widths, _other_groups, _reordered, _several_settings),
        "compressed-tensors": (_asymmetric, _other_widths, _other_groups),
        "dense": (),
        "lora": (),
    },
    "gptqmodel": {"gptq": (_asymmetric_v1,), "gptq_v2": ()},
    "transformers": {
        "gptq": (),
        "gptq_v2": (),
        "compressed-tensors": (_asymmetric,),
        "gguf": (),
        "dense": (),
        "lora": (),
    },
    "llama.cpp": {"gguf": (), "gguf-lora": ()},
}
"""Reader → format → what the reader does not support of it."""


def refusal(reader: str, format_name: str, layers: Sequence[Uniform], dense: Sequence[str] = ()) -> str | None:
    """The reason why a reader does not support a model exported in this format, with the remedy; None where it does.

    dense: paths of unquantized linears in the blocks.
    """
    limits = _LIMITS[reader]
    if format_name not in limits:
        return (
            f"it does not read {format_name}, but {', '.join(known for known in limits if not known.endswith('lora'))}"
        )
    return next((reason for limit in limits[format_name] if (reason := limit(layers, dense)) is not None), None)


def readers_of(
    format_name: str, layers: Sequence[Uniform], dense: Sequence[str], reader: str | None = None
) -> tuple[str, ...]:
    """The readers that support the export. Raises InputError where `reader` does not."""
    if reader is not None and (reason := refusal(reader, format_name, layers, dense)):
        raise InputError(f"{reader} would not open this {format_name} export: {reason}; nothing was written")
    return tuple(each for each in READERS if refusal(each, format_name, layers, dense) is None)


def _group_size(layer: Uniform) -> int:
    return -1 if layer.group_size >= layer.codes.shape[1] else layer.group_size
