"""GPTQModel packs, we open; we export, GPTQModel opens. GPTQ's versions and AWQ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llmtools
from llmtools.checkpoint.folder import load_model
from llmtools.formats.awq import AWQ
from llmtools.formats.gptq import GPTQ
from llmtools.formats.writing import export
from llmtools.model.exact_lora import exact_layers, register
from llmtools.nn.swap import quantized_linears
from llmtools.recipes.merge import Merge, merge
from tests.interop.peers import linear, opened
from tests.models import tiny_ids, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
gptqmodel: Any = pytest.importorskip("gptqmodel", exc_type=ImportError)


def torch_linear(bits: int, out: int, n: int, **options: Any) -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    told = {"group_size": 32, "sym": False, "desc_act": False, "bias": False, "register_buffers": True} | options
    return TorchLinear(bits=bits, in_features=n, out_features=out, **told).eval()


def drawn(bits: int, out: int, n: int, act_order: bool) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A linear on a grid, and the grid: scales, zeros [out, G], g_idx."""
    g_idx = (torch.arange(n) // 32).to(torch.int32)
    if act_order:
        g_idx = g_idx[torch.randperm(n)]
    scales = (torch.rand(out, n // 32) * 0.02 + 0.01).half()
    zeros = torch.randint(1, 2**bits, (out, n // 32))
    codes = torch.randint(2**bits, (out, n))
    dense = linear(out, n, bias=False)
    dense.weight.copy_((codes - zeros[:, g_idx.long()]) * scales.float()[:, g_idx.long()])
    return dense, scales.float(), zeros.float(), g_idx


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act-order"])
def test_what_they_pack_we_open(bits: int, act_order: bool) -> None:
    dense, scales, zeros, g_idx = drawn(bits, 64, 128, act_order)
    theirs = torch_linear(bits, 64, 128, desc_act=act_order)
    theirs.pack_block(dense, scales.clone(), zeros.clone(), g_idx)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": "gptq_v2"}
    layer = opened(
        GPTQ(config), {name: getattr(theirs, name) for name in ("qweight", "qzeros", "scales", "g_idx")}, 64, 128
    )
    assert torch.equal(layer.dequantize(dtype=torch.float16), theirs.dequantize_weight().T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act-order"])
def test_what_we_export_they_open(bits: int, form: str, act_order: bool, tmp_path: Path) -> None:
    model = tiny_model()
    calibration = [tiny_ids(1, 32, seed=seed) for seed in range(4)]
    llmtools.quantize(
        model, "optq", calibration, bits=bits, group_size=32, symmetric=form == "gptq", act_order=act_order
    )
    export(model, None, tmp_path / "out", form)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    for path, layer in quantized_linears(model).items():
        theirs = torch_linear(bits, layer.out_features, layer.in_features, desc_act=act_order)
        own = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items() if name.startswith(f"{path}.")}
        theirs.load_state_dict(own)
        if form == "gptq":
            convert_gptq_v1_to_v2_format_module(theirs, bits=bits, pack_dtype=torch.int32)
        assert torch.equal(theirs.dequantize_weight().T, layer.dequantize(dtype=torch.float16)), path


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_whole_folder_opens_in_transformers(form: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    pytest.importorskip("optimum")
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    llmtools.quantize(model, "rtn", bits=bits, group_size=32, symmetric=symmetric)
    export(model, None, tmp_path / "out", form)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    with torch.no_grad():
        expected, got = model(input_ids=tiny_ids()).logits, theirs(input_ids=tiny_ids()).logits
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("bits", [3, 4])
def test_a_merged_folder_gives_them_the_answers_of_base_and_adapter(bits: int, stories: Path, tmp_path: Path) -> None:
    """An exact adapter merged into a GPTQ folder, opened by transformers with GPTQModel."""
    pytest.importorskip("optimum")
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    model = tiny_model()
    llmtools.quantize(model, "rtn", bits=bits, group_size=32)
    export(model, AutoTokenizer.from_pretrained(stories), base, "gptq_v2")
    adapted: Any = peft.get_peft_model(
        load_model(base), register(peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"]))
    )
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    for layer in exact_layers(adapted).values():
        layer.lora_B["default"].weight.normal_(0, 0.05)
    adapted.save_pretrained(adapter)
    (adapter / "llmtools.json").write_text('{"merge": "exact"}')
    merge(Merge(model=str(base), adapter=str(adapter), out=str(out)))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16)
    before, expected, got = (each(input_ids=tiny_ids()).logits.float() for each in (model, adapted.eval(), theirs))
    assert (expected - before).abs().max() > 0.2
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_awq_as_they_pack_it() -> None:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    dense, scales, zeros, g_idx = drawn(4, 64, 128, False)
    theirs = AwqTorchLinear(
        bits=4, group_size=32, sym=False, desc_act=False, in_features=128, out_features=64, bias=False
    )
    theirs.pack(dense, scales.half(), zeros.half(), g_idx)
    tensors = {name: getattr(theirs, name) for name in ("qweight", "qzeros", "scales")}
    layer = opened(AWQ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}), tensors, 64, 128)
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    read = dequantize_gemm(theirs.qweight, theirs.qzeros, theirs.scales, 4, 32)
    assert torch.equal(layer.dequantize(dtype=torch.float16), read.T)
