"""llama.cpp gives the trained answers from a GGUF file into which an exact adapter was merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtools
from llmtools.formats.writing import export
from llmtools.recipes.merge import Merge, merge

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from tests.interop.test_llama_cpp_models import assert_alike, float32_copy, server

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(4, True), (4, False), (8, True)], ids=["Q4_0", "Q4_1 or Q5_0", "Q8_0"]
)
def test_the_merged_file_gives_the_answers_of_base_and_adapter(
    bits: int, symmetric: bool, stories: Path, tmp_path: Path
) -> None:
    import peft

    from llmtools.model.exact_lora import exact_layers, register

    model, tokenizer = llmtools.load(stories)
    llmtools.quantize(model, "rtn", bits=bits, group_size=32, symmetric=symmetric, skip=["*down_proj", "lm_head"])
    export(model, tokenizer, tmp_path / "base", "gguf", lossy=True)
    file = tmp_path / "base" / "model.gguf"
    base, tokenizer = llmtools.load(file)
    ids = torch.tensor([tokenizer("Once upon a time").input_ids])
    with torch.no_grad():
        before = base(input_ids=ids).logits
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]  # 172 columns fit no block
    adapted: Any = peft.get_peft_model(base, register(peft.LoraConfig(r=4, target_modules=targets)))
    adapted.peft_config["default"].base_model_name_or_path = str(file)
    with torch.no_grad():
        for layer in exact_layers(adapted).values():
            layer.lora_B["default"].weight.normal_(0, 0.02)
        adapted.save_pretrained(tmp_path / "a")
        (tmp_path / "a" / "llmtools.json").write_text(json.dumps({"merge": "exact"}))
        assert (adapted.eval()(input_ids=ids).logits - before).abs().max() > 0.1
    merge(Merge(model=str(file), adapter=str(tmp_path / "a"), out=str(tmp_path / "m")))
    merged = tmp_path / "m" / "model.gguf"
    assert_alike(adapted, tokenizer, server(float32_copy(merged, tmp_path / "f.gguf")), 1e-4, texts=False)
    assert_alike(adapted, tokenizer, server(merged), 1e-2, texts=False)
