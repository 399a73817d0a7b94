"""Who can read what an export writes: other programs take less than their formats can say.

| reader         | format             | takes |
|---|---|---|
| `vllm`         | gptq               | symmetric 4 and 8 bits, columns in natural order, one setting for all modules |
|                | compressed-tensors | symmetric 4 and 8 bits |
|                | dense, lora        | everything |
| `gptqmodel`    | gptq               | symmetric grids |
|                | gptq_v2            | everything |
| `transformers` | compressed-tensors | symmetric grids (with the package compressed-tensors) |
|                | gguf, dense, lora  | everything |
|                | gptq, gptq_v2      | what GPTQModel takes, through it |
| `llama.cpp`    | gguf, gguf-lora    | everything |

From the sources of vLLM 0.33 and transformers 5.23. `make test-interop` opens exports in GPTQModel and in transformers
with compressed-tensors; vLLM is not run. What is not in the table is not known to work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import InputError
from .uniform import Uniform

READERS = ("vllm", "gptqmodel", "transformers", "llama.cpp")

_Limit = Callable[[Sequence[Uniform], Sequence[str]], str | None]
"""(layers, paths of dense linears in the blocks) → why a reader does not take them, with the remedy; None if it does"""


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


_TAKES: Mapping[str, Mapping[str, tuple[_Limit, ...]]] = {
    "vllm": {
        "gptq": (_asymmetric, _other_widths, _other_groups, _reordered, _several_settings),
        "compressed-tensors": (_asymmetric, _other_widths, _other_groups),
        "dense": (),
        "lora": (),
    },
    "gptqmodel": {"gptq": (_asymmetric_v1,), "gptq_v2": ()},
    "transformers": {
        "gptq": (_asymmetric_v1,),
        "gptq_v2": (),
        "compressed-tensors": (_asymmetric,),
        "gguf": (),
        "dense": (),
        "lora": (),
    },
    "llama.cpp": {"gguf": (), "gguf-lora": ()},
}
"""reader → format → what it does not take of it"""


def refusal(reader: str, form: str, layers: Sequence[Uniform], dense: Sequence[str] = ()) -> str | None:
    """Why a reader does not take a model exported in the format `form`, with the remedy; None where it does.

    dense: paths of linears in the blocks that stayed dense.
    """
    takes = _TAKES[reader]
    if form not in takes:
        return f"it does not read {form}, but {', '.join(known for known in takes if not known.endswith('lora'))}"
    return next((reason for limit in takes[form] if (reason := limit(layers, dense)) is not None), None)


def readers_of(
    form: str, layers: Sequence[Uniform], dense: Sequence[str], wanted: str | None = None
) -> tuple[str, ...]:
    """The readers that take the export. Raises InputError where `wanted` is none of them."""
    if wanted is not None and (reason := refusal(wanted, form, layers, dense)):
        raise InputError(f"{wanted} would not open this {form} export: {reason}; nothing was written")
    return tuple(reader for reader in READERS if refusal(reader, form, layers, dense) is None)


def _group_size(layer: Uniform) -> int:
    return -1 if layer.group_size >= layer.codes.shape[1] else layer.group_size
