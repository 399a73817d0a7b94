"""The published way to open a model, over `llmtools.load`.

    llm, config = AutoLLMForCausalLM.from_pretrained(name, load_in_quip=True, device_map="auto")

`llm` is the transformers model that `llmtools.load` opens (an llmtools checkpoint, a third-party quantized one, or a
dense one), so ``llm.generate`` and ``llm.save_pretrained`` are transformers' own; ``llm.push_to_hub`` is
`llmtools.push_to_hub`. The quantizer is stored in the checkpoint; the published flags only state an expectation, and a
wrong one is an error.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from ..checkpoint.folder import load_model
from ..checkpoint.upload import push_to_hub
from ..errors import InputError
from ..nn.swap import quantized_linears

FLAGS = {
    "load_in_quip": frozenset({"quip", "quip_sharp", "quip_sharp_rows"}),
    "load_in_gbtq": frozenset({"optq", "rtn", "affine"}),
}
"""Flag → names of its quantizers; ``gbtq`` is spelled as published, and covers GPTQ's files."""


class AutoLLMForCausalLM:
    """Opens causal language models; not to be instantiated."""

    def __init__(self) -> None:
        raise InputError("use AutoLLMForCausalLM.from_pretrained(name), which returns (model, config)")

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        load_in_quip: bool | None = None,
        load_in_gbtq: bool | None = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> tuple[Any, Any]:
        """(model in eval mode, its quantization config; None for a dense model) of a folder or hub name.

        load_in_quip, load_in_gbtq: the expected quantization. None, the default, expects nothing.
        device_map and the options go to ``AutoModelForCausalLM.from_pretrained``.

        Raises InputError where a flag contradicts the checkpoint.
        """
        expected = {"load_in_quip": load_in_quip, "load_in_gbtq": load_in_gbtq}
        if load_in_quip and load_in_gbtq:
            raise InputError("load_in_quip and load_in_gbtq exclude each other; the checkpoint knows, so pass neither")
        options = {"dtype": "auto", **options}
        if device_map is not None:
            options["device_map"] = device_map
        if trust_remote_code:
            options["trust_remote_code"] = True
        model = load_model(name, **options)
        kinds = {layer.quantizer.name for layer in quantized_linears(model).values()}
        for flag, wanted in expected.items():
            if wanted is not None and wanted != bool(kinds & FLAGS[flag]):
                found = f"quantized with {', '.join(sorted(kinds))}" if kinds else "not quantized"
                raise InputError(f"{flag}={wanted}, and {name} is {found}; leave the flag out")
        model.push_to_hub = MethodType(_push_with_card, model)
        return model, getattr(model.config, "quantization_config", None)


def _push_with_card(model: Any, repo: str, **options: Any) -> str:
    """``llm.push_to_hub``: `llmtools.push_to_hub`, with the tokenizer and the model card."""
    from transformers import AutoTokenizer

    if "tokenizer" not in options:
        try:
            options["tokenizer"] = AutoTokenizer.from_pretrained(model.name_or_path)
        except (OSError, ValueError, TypeError, KeyError):  # the folder has none
            options["tokenizer"] = None
    return push_to_hub(model, repo, **options)
