"""The published name of PEFT: ``quant_peft`` is the installed `peft`, unpatched.

The layers of a quantized model are linears to it, so ``quant_peft.LoraConfig``, ``get_peft_model`` and ``PeftModel``
need no variants of their own. It is imported when the name is first asked for.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "quant_peft":
        import peft

        return peft
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
