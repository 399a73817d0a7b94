"""How far next-token distributions of a GGUF file are from llama.cpp's, and what rounding activations does by itself.

    python -m benchmarks.llama_cpp FILE.gguf          needs xllamacpp, which is llama.cpp

llama.cpp multiplies quantized weights by activations that it rounds to 8 bits in blocks of 32; llmtools does not. The
KL divergence between the two, in nats, stands beside those of our own model from itself with activations rounded
likewise, and of that one from itself with its activations moved by 1e-7 before they are rounded: as much as another
order of float32 sums moves them. So the last figure is what two programs that round activations differ by although they
compute the same; no program that does not sum in llama.cpp's very order is nearer to it.

One JSON line, appended to benchmarks/results/llama_cpp.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import HERE, append
from llmtools.document import markdown_table

RESULTS = HERE / "results" / "llama_cpp.jsonl"
BLOCK = 32
PROMPTS = (
    "What is the capital of France?", "Tell me a story.", "How do plants grow?", "Add 3 and 5.", "Who was Newton?",
    "Once upon a time", "The little dog", "Water boils at", "In the year 1969", "def fibonacci(n):",
)  # fmt: skip


def rounded(x: Tensor, noise: float) -> Tensor:
    """x [..., n] rounded to 8 bits in blocks of 32, as ggml's Q8_0 has it, after relative noise of that size."""
    blocks = (x.float() * (1 + noise * torch.randn_like(x, dtype=torch.float32))).unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return ((blocks / scale).round() * scale.half().float()).flatten(-2).to(x.dtype)


@contextmanager
def rounding(model: Any, noise: float = 0.0) -> Iterator[None]:
    """In this block every quantized linear reads rounded activations."""
    from llmtools.nn.swap import quantized_linears

    linears = quantized_linears(model).values()
    hooks = [each.register_forward_pre_hook(lambda _, args: (rounded(args[0], noise), *args[1:])) for each in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def log_probabilities(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    """Those of the token after each prompt, float64 [vocabulary]."""
    return [model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for ids in prompts]


def divergences(model: Any, prompts: list[list[int]], running: Any) -> dict[str, list[float]]:
    """What is compared → KL divergence for each prompt."""
    from tests.interop.test_llama_cpp_models import divergence

    ours = log_probabilities(model, prompts)
    with rounding(model):
        once = log_probabilities(model, prompts)
    with rounding(model, 1e-7):
        again = log_probabilities(model, prompts)

    def between(first: list[Tensor], second: list[Tensor]) -> list[float]:
        return [float((p.exp() * (p - q)).sum()) for p, q in zip(first, second, strict=True)]

    return {
        "ours from llama.cpp's": [divergence(model, running, ids) for ids in prompts],
        "ours from ours with rounded activations": between(ours, once),
        "rounded from rounded after noise of 1e-7": between(once, again),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="GGUF file of a quantized model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that the row is appended to")
    args = parser.parse_args(argv)
    import llmtools
    from tests.interop.test_llama_cpp_models import server

    torch.manual_seed(0)
    model, tokenizer = llmtools.load(str(args.file))
    found = divergences(model, [tokenizer(prompt).input_ids for prompt in PROMPTS], server(args.file))
    row = {name: {"mean": statistics.mean(each), "most": max(each)} for name, each in found.items()}
    append({"file": args.file.name, "kl": row}, args.out)
    print(markdown_table(["KL", "mean", "most"], [[k, f"{v['mean']:.4f}", f"{v['most']:.4f}"] for k, v in row.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
