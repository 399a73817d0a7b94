"""The way to the Triton kernels: an op's implementation for graphics processors, imported at its first call.

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
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Op = Callable[..., Tensor]
_OLDEST = (8, 0)  # Ampere


def kernel(package: str, reference: Op) -> Op:
    """The function of `reference`'s name in `package`.triton; `reference` itself where Triton cannot run."""

    @functools.wraps(reference)
    def implementation(*args: Any) -> Tensor:
        device = next(argument.device for argument in args if isinstance(argument, Tensor))
        if not usable(device):
            return reference(*args)
        function: Op = getattr(importlib.import_module(f"{package}.triton"), reference.__name__)
        with torch.cuda.device(device):  # kernels are launched on the current device
            return function(*args)

    return implementation


@functools.cache
def usable(device: torch.device) -> bool:
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
