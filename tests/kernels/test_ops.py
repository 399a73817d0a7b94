"""Ops are well behaved and agree with their references, whatever calls them; telling torch.compile about our functions
costs no start-up time, and says the same as torch's own decorator."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmtools.kernels.grouped
import llmtools.kernels.hadamard
import llmtools.kernels.lattice
from llmtools.kernels.ops import constant_result, direct
from tests.kernels.cases import CASES, Case, check


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_the_cpu_agrees_with_the_reference(case: Case) -> None:
    arguments = case.arguments()
    got = case.of("native")(*arguments)
    check(case, got, arguments)
    assert torch.equal(getattr(torch.ops.llmtools, case.function)(*arguments), got)


def test_torch_finds_the_op_well_behaved(case: Case) -> None:
    torch.library.opcheck(getattr(torch.ops.llmtools, case.function).default, case.arguments())


def test_every_op_has_a_case() -> None:
    """By the registrations in the sources."""
    package = Path(llmtools.kernels.__file__ or "").parent
    found = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(r'[^n]f?"(\w+)\(.*\) -> Tensor"', path.read_text())
    }
    assert found == {each.function for each in CASES.values()}


def test_the_dispatcher_is_skipped_for_plain_tensors_on_the_cpu_only() -> None:
    assert direct(torch.ones(1)) and not direct(torch.ones(1, device="meta"))
    assert not direct(torch.ones(1, requires_grad=True)) and direct(torch.nn.Parameter(torch.ones(1), False))


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
