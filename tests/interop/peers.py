"""What the tests against other programs share: one linear between their tensors and ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtools import QuantizedLinear
from llmtools.model.foreign.base import Format
from llmtools.model.foreign.tensors import Module


def opened(form: Format, tensors: Mapping[str, Tensor], out: int, n: int) -> QuantizedLinear:
    """The layer that their tensors (by their names within the module) become."""
    quantizer, packed = form.convert(Module({f"layer.{k}": v for k, v in tensors.items()}, "layer"), out, n)
    layer = QuantizedLinear(n, out, quantizer, device="meta")
    layer.pack_(packed)
    return layer


def linear(out: int = 64, n: int = 128, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Linear:
    return nn.Linear(n, out, dtype=dtype, **options).requires_grad_(False)


class LlamaCpp:
    """llama.cpp with the ``model.gguf`` of a folder, on the processor."""

    def __init__(self, folder: Path) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(folder / "model.gguf")
        options.n_ctx, options.n_gpu_layers, options.cpuparams.n_threads, options.warmup = 128, 0, 1, False
        self.server = xllamacpp.Server(options)

    def greedy(self, prompt: str | list[int], count: int) -> tuple[list[int], list[dict[int, float]]]:
        """(tokens, of each step the log probabilities of the likeliest ones by token) of a greedy continuation."""
        asked = {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 5, "ignore_eos": True}
        told = self.server.handle_completions(asked)
        steps = told["choices"][0]["logprobs"]["content"]
        return [step["id"] for step in steps], [
            {each["id"]: each["logprob"] for each in step["top_logprobs"]} for step in steps
        ]
