"""How far one `QuantizedLinear.forward` travels: Python functions called, and how often the next lies in another file.

    python -m benchmarks.calls                  every quantizer, one token and 128
    python -m benchmarks.calls optq --list      the calls themselves, in order

Counted are the functions of llmtools that one forward without gradients enters, in order, after a first that builds and
caches; the file changes where a call lies in another file than the call before it. That is what a reader has to follow,
and, at one token, what a product of some 100 µs has to bear.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import llmtools
from llmtools.nn import QuantizedLinear

PACKAGE = str(Path(llmtools.__file__).parent)
QUANTIZERS = ("rtn", "nf4", "hqq", "awq", "optq", "signround", "quip", "quip_sharp")


def calls(layer: nn.Module, tokens: int) -> list[tuple[str, str]]:
    """(file, function) of each call, in order; the first is `forward`."""
    x = torch.randn(1, tokens, 256, dtype=torch.bfloat16)
    seen: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            seen.append((code.co_filename[len(PACKAGE) + 1 :], code.co_qualname))

    with torch.no_grad():
        layer(x)
        sys.setprofile(note)
        try:
            layer.forward(x)
        finally:
            sys.setprofile(None)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantizers", nargs="*", default=QUANTIZERS)
    parser.add_argument("--list", action="store_true", help="each call")
    options = parser.parse_args()
    torch.manual_seed(0)
    linear, hessian = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16), torch.eye(256)
    print(f"{'':12} {'1 token':>20} {'128 tokens':>20}")
    for name in options.quantizers:
        layer = QuantizedLinear.from_linear(linear, llmtools.quantizer(name), hessian)
        counts = []
        for tokens in (1, 128):
            seen = calls(layer, tokens)
            changes = sum(here[0] != there[0] for here, there in pairwise(seen))
            counts.append(f"{len(seen)} calls, {changes} files")
            if options.list and tokens == 1:
                print(*(f"{file:36} {function}" for file, function in seen), sep="\n")
        print(f"{name:12} {counts[0]:>20} {counts[1]:>20}")


if __name__ == "__main__":
    main()
