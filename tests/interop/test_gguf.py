"""We export GGUF; the gguf package and transformers read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmtools
from llmtools.formats.writing import export
from llmtools.nn.swap import quantized_linears
from tests.models import tiny_ids, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
gguf: Any = pytest.importorskip("gguf")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [{"bits": 2}, {"bits": 3}, {"bits": 4}, {"bits": 4, "symmetric": True}, {"bits": 8, "symmetric": True}],
    ids=str,
)
def test_every_tensor_is_the_same(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    llmtools.quantize(model, "rtn", group_size=32, **options)
    export(model, None, tmp_path / "out", "gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    layers = quantized_linears(model)
    for path, name in (
        ("mlp.down_proj", "ffn_down"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
    ):
        tensor = stored[f"blk.1.{name}.weight"]
        read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(read, layers[f"model.layers.1.{path}"].dequantize(dtype=torch.float32))
    assert ("output.weight" in stored) == (not model.config.tie_word_embeddings)


def test_a_file_is_the_same_bytes_and_replaces_itself_alone(tmp_path: Path) -> None:
    model = tiny_model()
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    written = set()
    for overwrite in (False, True, True):
        export(model, None, tmp_path / "out", "gguf", overwrite=overwrite)
        written.add((tmp_path / "out" / "model.gguf").read_bytes())
    assert len(written) == 1
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(llmtools.InputError, match=r"holds thesis\.tex"):
        export(model, None, tmp_path / "out", "gguf", overwrite=True)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_reads_the_same_model(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    # transformers' reader knows no head size of Qwen3's but its usual one.
    model = tiny_model(family, **({"head_dim": 128} if family == "qwen3" else {}))
    llmtools.quantize(model, "rtn", bits=3, group_size=32)
    export(model, None, tmp_path / "out", "gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        expected, got = model(input_ids=tiny_ids()).logits, theirs(input_ids=tiny_ids()).logits
    torch.testing.assert_close(got, expected)


def test_a_real_tokenizer_goes_along(stories: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = llmtools.load(stories)
    llmtools.quantize(model, "rtn", bits=4, group_size=32, skip=["lm_head", "*down_proj"])
    export(model, tokenizer, tmp_path / "out", "gguf", lossy=True)
    back = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "Once upon a time there was a little dog."
    assert back(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
