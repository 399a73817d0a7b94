"""What the tests against other programs share: one linear between their tensors and ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtools import QuantizedLinear
from llmtools.formats.base import Format
from llmtools.formats.tensors import Module
from tests.models import tiny_ids


def opened(form: Format, tensors: Mapping[str, Tensor], out: int, n: int) -> QuantizedLinear:
    """The layer that their tensors (by their names within the module) become."""
    quantizer, packed = form.read(Module({f"layer.{k}": v for k, v in tensors.items()}, "layer"), out, n)
    layer = QuantizedLinear(n, out, quantizer, device="meta")
    layer.pack_(packed)
    return layer


def linear(out: int = 64, n: int = 128, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Linear:
    return nn.Linear(n, out, dtype=dtype, **options).requires_grad_(False)


BYTES = 259
"""the first token of the stories model's vocabulary that is no byte"""


class LlamaCpp:
    """llama.cpp with the ``model.gguf`` of a folder, on the processor."""

    def __init__(self, folder: Path) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(folder / "model.gguf")
        options.n_ctx, options.n_gpu_layers, options.cpuparams.n_threads, options.warmup = 128, 0, 1, False
        self.server = xllamacpp.Server(options)

    def next(self, ids: list[int]) -> dict[int, float]:
        """The log probabilities of the ten likeliest next tokens, the likeliest first.

        Raises LookupError where that is a part of a character: its server keeps those back.
        """
        asked = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 10}
        (step,) = self.server.handle_completions(asked)["choices"][0]["logprobs"]["content"] or [None]
        if step is None:
            raise LookupError("the next token is a part of a character")
        return {each["id"]: each["logprob"] for each in step["top_logprobs"]}

    def greedy(self, prompt: str, count: int) -> list[int]:
        """The tokens of the greedy continuation of a text, all of which are whole characters."""
        asked = {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 1}
        told = self.server.handle_completions(asked)
        return [step["id"] for step in told["choices"][0]["logprobs"]["content"]]


def assert_as_likely(theirs: LlamaCpp, ours: Any) -> None:
    """llama.cpp rounds activations to 8 bits a block where it multiplies: its probabilities are near, not equal."""
    tried = 0
    for seed in range(64):
        ids = tiny_ids(1, 12, seed=seed)
        with torch.no_grad():
            expected = ours(input_ids=ids).logits[0, -1].float().log_softmax(-1)
        if expected.topk(2).indices.min() < BYTES or tried == 4:
            continue
        found = theirs.next(ids[0].tolist())
        assert len(found) == 10 and expected[next(iter(found))] > expected.max() - 0.1
        for token, value in found.items():
            assert abs(value - expected[token].item()) < 0.1
        tried += 1
    assert tried == 4
