"""Writes the golden folders of tests/assets/golden: `python -m tests.golden tests/assets/golden`.

They were written by version 0.1.0, commit 5e7082e, and stay: what a version has written, all later ones open
(`tests/model/test_golden.py`). New kinds are added; what is there is never written again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {"bits": 4, "group_size": 32}),
    "optq": ("optq", {"bits": 3, "group_size": 20, "act_order": True}),
    "hqq": ("hqq", {"bits": 2, "group_size": 16}),
    "nf4": ("nf4", {"group_size": 32, "double_quantization": True}),
    "awq": ("awq", {"bits": 3, "group_size": 32, "symmetric": True}),
    "quip": ("quip", {"bits": 2}),
    "quip_sharp": ("quip_sharp", {"bits": 3}),
}
"""Folder → the quantizer and its options."""
WORDS = 64


def input_ids() -> Tensor:
    """What the stored logits belong to: int64 [1, 16]."""
    return torch.arange(16)[None] * 5 % (WORDS - 3) + 3


def calibration() -> list[Tensor]:
    """Token ids for the quantizers that want some: 4 × int64 [1, 32]."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, WORDS, (1, 32), generator=generator) for _ in range(4)]


def model() -> Any:
    """A LLaMA of one layer with random bfloat16 weights; 50 is no multiple of any group, nor of eight."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=48, intermediate_size=50, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def tokenizer() -> Any:
    """One word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, WORDS)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """[1, 16, WORDS] float32."""
    return model(input_ids=input_ids()).logits.float()


def write(folder: Path) -> None:
    """Every kind, its packed weights' rows and its logits; an adapter over `rtn`, as `llmtools finetune` leaves it."""
    from safetensors.torch import save_file

    import llmtools
    from llmtools.nn.swap import quantized_linears
    from llmtools.recipes.finetune import Finetune, Lora, finetune

    os.chdir(folder)  # so that no absolute path is written down
    for name, (quantizer, options) in KINDS.items():
        made = model()
        report = llmtools.quantize(made, quantizer, calibration(), **options)
        llmtools.save(made, tokenizer(), name, report=report)
        back, _ = llmtools.load(name, dtype=torch.float32)
        rows = {path: layer.dequantize(slice(0, 4)) for path, layer in quantized_linears(back).items()}
        save_file({"logits": logits(back), **rows}, f"{name}/expected.safetensors")
    Path("lines.jsonl").write_text('{"prompt": "w3 w4", "completion": " w5 w6 w7"}\n' * 4)
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 16, "learning_rate": 0.1}
    finetune(Finetune(model="rtn", data="lines.jsonl", out="adapter", lora=Lora(r=2), training=training))
    Path("lines.jsonl").unlink()
    save_file({"logits": logits(adapted("rtn", "adapter"))}, "adapter/expected.safetensors")


def adapted(base: str | Path, adapter: str | Path) -> Any:
    """The base in float32 with the adapter."""
    import peft

    import llmtools

    back, _ = llmtools.load(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(back, str(adapter)).eval()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
