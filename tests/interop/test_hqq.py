"""HQQ quantizes, we open: the same numbers in every type."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtools.formats.hqq import HQQ
from tests.interop.peers import linear, opened

pytestmark = pytest.mark.filterwarnings("ignore")
hqq: Any = pytest.importorskip("hqq.core.quantize")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_width(bits: int, axis: int, dtype: torch.dtype) -> None:
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
    theirs = hqq.HQQLinear(linear(64, 128, dtype), config, compute_dtype=dtype, device="cpu")
    layer = opened(HQQ({"quant_method": "hqq"}), theirs.state_dict(), 64, 128)
    assert torch.equal(layer.dequantize(dtype=dtype), theirs.dequantize())


def test_bytes_viewed_as_floats() -> None:
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32, axis=1, view_as_float=True)
    theirs = hqq.HQQLinear(linear(64, 128, torch.float16), config, compute_dtype=torch.float16, device="cpu")
    layer = opened(HQQ({"quant_method": "hqq"}), theirs.state_dict(), 64, 128)
    assert torch.equal(layer.dequantize(dtype=torch.float16), theirs.dequantize())
