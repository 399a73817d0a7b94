"""What the tests against other programs share: one linear between their tensors and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtools import QuantizedLinear
from llmtools.formats.base import Format
from llmtools.formats.tensors import Module


def opened(form: Format, tensors: Mapping[str, Tensor], out: int, n: int) -> QuantizedLinear:
    """The layer that their tensors (by their names within the module) become."""
    quantizer, packed = form.read(Module({f"layer.{k}": v for k, v in tensors.items()}, "layer"), out, n)
    layer = QuantizedLinear(n, out, quantizer, device="meta")
    layer.pack_(packed)
    return layer


def linear(out: int = 64, n: int = 128, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Linear:
    return nn.Linear(n, out, dtype=dtype, **options).requires_grad_(False)
