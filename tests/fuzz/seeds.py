"""The undamaged folders: a tiny model in several formats, and an adapter, made anew from nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import llmtools
from tests.fuzz.server import Seed, adapter_digest, model_digest
from tests.models import VOCABULARY, tiny_ids, tiny_model

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def make_seeds(place: Path) -> dict[str, Seed]:
    """name → seed; the folders lie in `place`."""
    words = _tokenizer()
    made = {}
    for name, method, options in (
        ("rtn", "rtn", {"bits": 4, "group_size": 32}),
        ("optq", "optq", {"bits": 3, "group_size": 32, "act_order": True}),
        ("quip_sharp", "quip_sharp", {"bits": 2, "passes": 0}),
        ("nf4", "nf4", {"group_size": 32, "double_quantization": True}),
    ):
        model = tiny_model()
        data = [tiny_ids(seed=1)] if llmtools.quantizers.get(method).needs_hessian else None
        report = llmtools.quantize(model, method, data, **options)
        llmtools.save(model, words, place / name, report=report)
        made[name] = Seed(place / name, model_digest, checksums=True)
        if name == "rtn":
            _gptq(place / "gptq", place / "rtn")
            made["gptq"] = Seed(place / "gptq", model_digest, checksums=False)
    tiny_model().save_pretrained(place / "dense", max_shard_size="200KB")
    words.save_pretrained(place / "dense")
    made["dense"] = Seed(place / "dense", model_digest, checksums=False)
    _adapter(place / "adapter", place / "rtn")
    made["adapter"] = Seed(place / "adapter", adapter_digest(place / "rtn"), checksums=True)
    return made


def _gptq(folder: Path, source: Path) -> None:
    from llmtools.formats.writing import export

    export(*llmtools.load(source), folder, "gptq_v2")
    (folder / "llmtools.json").unlink(missing_ok=True)  # as another program would have written it


def _adapter(folder: Path, base: Path) -> None:
    import peft

    from llmtools.checkpoint.model_card import write_card
    from llmtools.model.integrity import record_checksums

    model = llmtools.prepare_for_training(llmtools.load(base)[0])
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_B" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
    adapted.save_pretrained(str(folder))
    run: dict[str, Any] = {
        "command": "finetune",
        "recipe": {"task": "text", "data": "d.jsonl", "options": {"max_new_tokens": 8}, "seed": 0},
        "words": {"form": "prompt", "template": {"prompt": "Q: {question}", "completion": " {answer}"}},
        "versions": {"llmtools": "0"},
        "result": {"train_loss": 1.0, "examples": 3, "steps": 1},
    }
    run["checksums"] = record_checksums(folder, run)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    write_card(folder)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made
