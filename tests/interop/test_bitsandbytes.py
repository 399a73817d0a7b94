"""bitsandbytes quantizes, we open: the same numbers in every type."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtools.formats.bitsandbytes import BitsAndBytes
from llmtools.quant import quantizer
from tests.interop.peers import linear, opened

pytestmark = pytest.mark.filterwarnings("ignore")
bnb: Any = pytest.importorskip("bitsandbytes")


def read(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """What they make of it. Their processor kernel takes blocks to start anew in every row, unlike all their others."""
    import bitsandbytes.functional as F
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    if state.shape[-1] % state.blocksize == 0:
        return F.dequantize_4bit(packed, state)
    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return _dequantize_4bit_compute(packed.view(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)


def tensors_of(module: Any) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize(("shape", "block"), [((64, 128), 64), ((48, 96), 64), ((300, 256), 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_four_bits(kind: str, nested: bool, shape: tuple[int, int], block: int, dtype: torch.dtype) -> None:
    import bitsandbytes.functional as F

    weight = torch.randn(shape, dtype=dtype) * 0.1
    packed, state = F.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)
    tensors = {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    layer = opened(BitsAndBytes({"quant_method": "bitsandbytes", "load_in_4bit": True}), tensors, *shape)
    assert torch.equal(layer.dequantize(dtype=dtype), read(packed, state))
    if block == 64 and shape[1] == 128:
        assert layer.quantizer.double_quantization == nested  # type: ignore[attr-defined]


def test_a_layer_saved_by_bitsandbytes() -> None:
    dense = linear(64, 128)
    theirs = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=True)
    theirs.load_state_dict(dense.state_dict(), strict=False)
    theirs = theirs.to("cpu")
    if theirs.weight.quant_state is None:
        theirs.weight = theirs.weight._quantize("cpu")
    layer = opened(BitsAndBytes({"quant_method": "bitsandbytes", "load_in_4bit": True}), tensors_of(theirs), 64, 128)
    import bitsandbytes.functional as F

    theirs_dense = F.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(layer.dequantize(dtype=theirs_dense.dtype), theirs_dense)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_our_nf4_is_theirs(nested: bool) -> None:
    """Not only opened alike: our own quantizer makes the same numbers."""
    import bitsandbytes.functional as F

    weight = torch.randn(64, 256)
    packed, state = F.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    ours = quantizer("nf4", group_size=64, double_quantization=nested)
    assert torch.equal(ours.dequantize(ours.quantize(weight)), F.dequantize_4bit(packed, state))
