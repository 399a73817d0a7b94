"""Two choices of `llmtools.quant.materialize`, measured: the scratch for a block of rows, and how many tokens are few.

    python -m benchmarks.materialize [--threads N]

The first table has the milliseconds of a forward and a backward of a 4-bit layer by scratch, the second those of a
forward through the GEMV kernel and through blocks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from llmtools.nn.linear import QuantizedLinear
from llmtools.quant import RTN, materialize_budget
from llmtools.quant.materialize import gemv_tokens

SHAPES = ((2048, 5632), (5632, 2048), (4096, 4096))  # in, out
BUDGETS = tuple(2**k * 2**20 for k in range(0, 7))


def seconds(candidates: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Median processor seconds of each; they take turns."""
    times: dict[Any, list[float]] = {key: [] for key in candidates}
    for round in range(rounds + 1):
        for key, function in candidates.items():
            start = time.process_time()
            function()
            if round:
                times[key].append(time.process_time() - start)
    return {key: statistics.median(values) for key, values in times.items()}


def forward(layer: nn.Module, tokens: int, budget: int, few: int, backward: bool = True) -> Callable[[], None]:
    x = torch.randn(tokens, layer.in_features, dtype=torch.bfloat16, requires_grad=backward)  # type: ignore[arg-type]

    def run() -> None:
        with ExitStack() as stack:
            stack.enter_context(materialize_budget(budget))
            stack.enter_context(gemv_tokens(few))
            y = layer(x)
            if backward:
                torch.autograd.grad(y, x, y)

    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.materialize")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    for n, out in SHAPES:
        layer = QuantizedLinear.from_linear(
            nn.Linear(n, out, bias=False, dtype=torch.bfloat16), RTN(bits=4, clip=False)
        )
        print(f"\n{out} × {n}, 4 bits, forward and backward: CPU ms by scratch, {torch.get_num_threads()} threads")
        print(f"{'tokens':>8}", *(f"{budget >> 20:>6} MB" for budget in BUDGETS))
        for tokens in (64, 128, 512):
            times = seconds({budget: forward(layer, tokens, budget, 0) for budget in BUDGETS}, args.rounds)
            print(f"{tokens:>8}", *(f"{times[budget] * 1e3:9.1f}" for budget in BUDGETS), flush=True)
        print(f"{'tokens':>8}{'few':>9}{'blocks':>9}   forward only")
        for tokens in (1, 4, 8, 16, 32, 48, 64):
            ways = {few: forward(layer, tokens, 4 * 2**20, few, backward=False) for few in (tokens, 0)}
            times = seconds(ways, args.rounds)
            print(f"{tokens:>8}{times[tokens] * 1e3:9.2f}{times[0] * 1e3:9.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
