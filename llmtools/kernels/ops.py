"""The one way to register an op: plain torch for every device, C for the CPU, Triton for graphics processors.

    multiply_grouped = define("multiply_grouped(Tensor x, …) -> Tensor", package=__name__, fake=…,
                              reference=reference.multiply_grouped, native=native.multiply_grouped)

makes ``torch.ops.llmtools.multiply_grouped`` and returns the function to call it by. The dispatcher of torch chooses
the implementation by device; the reference serves devices that have none of their own, and is the
specification of the others. An op is a folder: CONTRIBUTING.md has the steps.

Triton comes with PyTorch's CUDA builds and takes a second to import, so nothing here imports it before a tensor on a
GPU asks. Where it is missing, or the GPU is older than Ampere and lacks bfloat16, ops run in plain torch on that GPU,
and one log line says so and what to do about it.

Environment: LLMTOOLS_TRITON=0 turns Triton off.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Op = Callable[..., Tensor]
"""Function of tensors and constants, in the order of the op's schema, that returns a new tensor."""
_Arguments = ParamSpec("_Arguments")
_Function = TypeVar("_Function", bound=Callable[..., Any])

_OLDEST = (8, 0)  # Ampere


def define(
    schema: str,
    *,
    package: str,
    reference: Callable[_Arguments, Tensor],
    native: Op,
    fake: Op,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[_Arguments, Tensor]:
    """Registers ``llmtools::<schema>`` and returns what calls it, with the signature of `reference`.

    Arguments are positional, and the first is a tensor. reference is plain torch for any device, native the
    implementation on the CPU (which falls back to the reference by itself), fake gives an empty result of the right
    shape and type, [...] as the op's. The GPU's has the reference's name in the module `package`.triton. With backward
    and setup_context, as in `torch.library.register_autograd`, the op is differentiable; without, it is not.
    """
    short, _, signature = schema.partition("(")
    name = f"llmtools::{short}"
    torch.library.define(name, f"({signature}", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", reference)
    torch.library.impl(name, "cpu", native)
    torch.library.impl(name, "cuda", gpu(package, reference))
    torch.library.register_fake(name, fake)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context)
    dispatched = getattr(torch.ops.llmtools, short)

    @functools.wraps(reference)
    def op(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> Tensor:
        tensor: Any = arguments[0]
        result: Tensor = (native if direct(tensor) else dispatched)(*arguments, **options)
        return result

    return op


def direct(tensor: Tensor) -> bool:
    """Whether an op on `tensor` [...] may skip the dispatcher: a `plain` tensor without autograd.

    A call through the dispatcher to Python and back takes 10 to 20 µs, as long as a small layer's product.
    """
    return plain(tensor) and not (tensor.requires_grad and torch.is_grad_enabled())


def plain(tensor: Tensor) -> bool:
    """Whether `tensor` [...] is torch's own, on the CPU, and nothing is being traced or transformed."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # by torch.func
        return False
    return (type(tensor) is Tensor or type(tensor) is torch.nn.Parameter) and tensor.is_cpu


def gpu(package: str, reference: Op) -> Op:
    """The function of `reference`'s name in `package`.triton; `reference` itself where Triton cannot run."""

    @functools.wraps(reference)
    def implementation(*args: Any) -> Tensor:
        device = next(argument.device for argument in args if isinstance(argument, Tensor))
        if not has_triton(device):
            return reference(*args)
        function: Op = getattr(importlib.import_module(f"{package}.triton"), reference.__name__)
        with torch.cuda.device(device):  # kernels are launched on the current device
            return function(*args)

    return implementation


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this GPU. The answer holds for the life of the process."""
    if os.environ.get("LLMTOOLS_TRITON", "1") == "0":
        return False
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return _say(f"{torch.cuda.get_device_name(device)} is older than Ampere")
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return _say(f"Triton does not import ({error}); pip install triton, of the version that this torch asks for")
    return True


@functools.cache
def _say(reason: str) -> bool:
    log.warning("GPU kernels run in plain torch, several times slower: %s (LLMTOOLS_TRITON=0 silences this)", reason)
    return False


def constant_result(function: _Function) -> _Function:
    """Marks a function of constants (a device, a number of bits) that torch.compile may call instead of tracing.

    It sets what `torch.compiler.assume_constant_result` sets. That decorator imports the whole compiler first, more
    than a second of processor time which every start would pay for; `tests/kernels/test_ops.py` compares the two.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
