"""HQQ quantizes, we open: the same numbers in every type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtools import CheckpointError
from llmtools.checkpoint.folder import load_model
from llmtools.formats.hqq import HQQ
from llmtools.nn.swap import quantized_linears
from tests.interop.peers import linear, opened
from tests.models import tiny_ids, tiny_model

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


@pytest.mark.parametrize(("bits", "axis"), [(4, 1), (3, 0), (2, 1)])
def test_folders_of_their_own_writers(bits: int, axis: int, tmp_path: Path) -> None:
    """What `save_to_safetensors` writes opens with the same logits; what `save_quantized` pickles is refused."""
    from hqq.models.hf.base import AutoHQQHFModel

    theirs = tiny_model()
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
    AutoHQQHFModel.quantize_model(theirs, config, compute_dtype=torch.float32, device="cpu")
    AutoHQQHFModel.save_to_safetensors(theirs, str(tmp_path / "safe"))
    AutoHQQHFModel.save_quantized(theirs, str(tmp_path / "pickled"))
    with torch.no_grad():
        ours = load_model(tmp_path / "safe")
        torch.testing.assert_close(ours(input_ids=tiny_ids()).logits, theirs(input_ids=tiny_ids()).logits)
    assert len(quantized_linears(ours)) == 14
    with pytest.raises(CheckpointError, match=r"qmodel\.pt.*save_to_safetensors"):
        load_model(tmp_path / "pickled")
