"""What torch.compile is told about our functions, without loading the compiler to tell it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """Marks a function of constants (a device, a number of bits) that torch.compile may call instead of tracing.

    It sets what `torch.compiler.assume_constant_result` sets. That decorator imports the whole compiler first, more
    than a second of processor time which every start would pay for; `tests/kernels/test_compiling.py` compares the two.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
