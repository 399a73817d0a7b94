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
| `llama.cpp`    | gguf               | everything |

Read in vLLM 0.33 and transformers 5.23, tried with GPTQModel 7.7 and compressed-tensors 0.20 (`make test-interop`).
What is not in the table is not known to work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...errors import InputError
from .uniform import Uniform

READERS = ("vllm", "gptqmodel", "transformers", "llama.cpp")

_WHOLE = {
    "vllm": ("dense", "lora"),
    "gptqmodel": ("gptq_v2",),
    "transformers": ("gguf", "dense", "lora", "gptq_v2"),
    "llama.cpp": ("gguf",),
}
"""reader → formats of which it takes everything that we write."""
_SYMMETRIC = "it reads symmetric grids only: quantize with --options.symmetric true"
_WIDTHS = "it reads 4 and 8 bits only: quantize with --bits 4"
_GROUPS = (-1, 32, 64, 128)


def refusal(reader: str, form: str, layers: Sequence[Uniform], dense: Iterable[str] = ()) -> str | None:
    """Why a reader does not take a model exported in the format `form`, with the remedy; None where it does.

    dense: paths of linears in the blocks that stayed dense.
    """
    if form in _WHOLE[reader]:
        return None
    symmetric = all(layer.symmetric for layer in layers)
    if (reader, form) in (("gptqmodel", "gptq"), ("transformers", "gptq")):
        return None if symmetric else f"{_SYMMETRIC}, or export as gptq_v2"
    if (reader, form) == ("transformers", "compressed-tensors"):
        return None if symmetric else _SYMMETRIC
    if reader != "vllm" or form not in ("gptq", "compressed-tensors"):
        takes = [known for known in ("gptq", "gptq_v2", "compressed-tensors", "gguf", "dense") if _may(reader, known)]
        return f"it does not read {form}, but {', '.join(takes)}"
    if not symmetric:
        return _SYMMETRIC
    if any(layer.bits not in (4, 8) for layer in layers):
        return _WIDTHS
    if any(_group_size(layer) not in _GROUPS for layer in layers):
        return "it reads groups of 32, 64, 128 or whole rows: quantize with --group_size 128"
    if form == "gptq":
        if any(layer.group_of is not None for layer in layers):
            return "it reads columns in natural order: quantize without act_order, or with static_groups"
        if len({(layer.bits, _group_size(layer)) for layer in layers}) > 1 or any(dense):
            return "it reads one setting for all linears of the blocks: quantize without overrides and skip"
    return None


def readers_of(
    form: str, layers: Sequence[Uniform], dense: Sequence[str], wanted: str | None = None
) -> tuple[str, ...]:
    """The readers that take the export. Raises InputError where `wanted` is none of them."""
    if wanted is not None and (reason := refusal(wanted, form, layers, dense)):
        raise InputError(f"{wanted} would not open this {form} export: {reason}; nothing was written")
    return tuple(reader for reader in READERS if refusal(reader, form, layers, dense) is None)


def _may(reader: str, form: str) -> bool:
    return form in _WHOLE[reader] or (reader, form) in (
        ("vllm", "gptq"),
        ("vllm", "compressed-tensors"),
        ("gptqmodel", "gptq"),
        ("transformers", "gptq"),
        ("transformers", "compressed-tensors"),
    )


def _group_size(layer: Uniform) -> int:
    return -1 if layer.group_size >= layer.codes.shape[1] else layer.group_size
