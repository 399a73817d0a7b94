"""Telling torch.compile about our functions costs no start-up time, and says the same as torch's own decorator."""

from __future__ import annotations

import subprocess
import sys

import torch

from llmtools.kernels.ops import constant_result


def test_the_mark_is_the_one_that_torch_sets() -> None:
    def ours() -> int:
        return 1

    def its() -> int:
        return 1

    constant_result(ours)
    torch.compiler.assume_constant_result(its)
    assert vars(ours) == vars(its) != {}


def test_a_marked_function_is_called_and_not_traced() -> None:
    calls = []

    @constant_result
    def two() -> int:
        calls.append(1)
        return len({1, 2})

    torch.compiler.reset()
    compiled = torch.compile(lambda x: x * two(), fullgraph=True, backend="eager")
    assert [compiled(torch.tensor(3.0)).item() for _ in range(3)] == [6.0] * 3
    assert len(calls) == 1


def test_quantizers_and_layers_are_there_without_the_compiler() -> None:
    program = (
        "import sys, torch; assert 'torch._dynamo' not in sys.modules\n"
        "import llmtools; llmtools.quantizer('quip_sharp'); llmtools.QuantizedLinear\n"
        "found = {'torch._dynamo', 'torch._inductor', 'sympy', 'triton'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
