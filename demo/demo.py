"""The whole job of llmtools on a real model, in a few minutes on a laptop: `make demo`.

A pretrained model is quantized to 4, 3 and 2 bits, by rounding (RTN) and by OPTQ. Then small LoRA adapters are
finetuned on top of the packed weights, on text of a kind that the model has never seen. Perplexity is measured at each
stage on text that was held out. The default model and the text ship in `demo/assets`; another model is taken by
`make demo MODEL=path-or-hub-name`.

Every step is one of the library's recipes, which the command line offers as well: the command that would do the same
is printed above it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from report import FinetuneRow, QuantizeRow, Results, Sample, write_report
from rich.console import Console

ASSETS = Path(__file__).resolve().parent / "assets"
EMBEDDED = ASSETS / "stories260K"
HOME_TRAIN, HOME_HELD_OUT = ASSETS / "tinystories" / "train.txt", ASSETS / "tinystories" / "held_out.txt"
NEW_TRAIN, NEW_HELD_OUT = ASSETS / "wikitext2" / "train.txt", ASSETS / "wikitext2" / "test.txt"
HOME_PROMPT, NEW_PROMPT = "Once upon a time", " The song was released"
BITS = (4, 3, 2)

console = Console(highlight=False)


@dataclass(frozen=True)
class Demo:
    """Quantize a model to 4, 3 and 2 bits, finetune adapters on each, and report what it cost and bought."""

    model: str = str(EMBEDDED)
    """folder or hub name of the model"""
    out: str = "demo-report"
    """folder for the report, and for the models that were made"""
    group_size: int = 32
    """weights of a row that share a scale"""
    samples: int = 64
    """windows of calibration text for OPTQ"""
    steps: int = 100
    """training steps for each model"""
    batch: int = 8
    """sequences in a step"""
    tokens: int = 256
    """tokens in a sequence"""
    rank: int = 8
    """of the adapters"""
    learning_rate: float | None = None
    """by default 0.32 / the model's hidden size: 5e-3 for the embedded model, 8e-5 for one of 7 billion parameters"""
    context: int | None = None
    """tokens in a window of held-out text; by default what the model was made for, at most 2048"""
    seed: int = 0
    """of the calibration windows, the adapters, the order of the text, and the samples"""


def main(demo: Demo) -> None:
    began = time.monotonic()
    out = Path(demo.out)
    (out / "models").mkdir(parents=True, exist_ok=True)
    texts = (
        "It was trained on children's stories (TinyStories); Wikipedia articles (WikiText-2) are new to it."
        if demo.model == str(EMBEDDED)
        else "It is measured on children's stories (TinyStories) and finetuned on Wikipedia articles (WikiText-2)."
    )
    console.print(
        "\n[bold]llmtools[/bold] stores the linear layers of a language model in 4, 3 or 2 bits per weight instead of "
        "16, and finetunes small adapters (LoRA) on top of the packed weights. This demo measures what the first costs "
        "and what the second buys.\n"
        f"\nModel: {_shown(demo.model)}. {texts} Measured is perplexity on held-out text: the lower, the better the "
        "model expects it.\n"
    )
    if demo.model == str(EMBEDDED):
        torch.set_num_threads(1)  # its layers are so small that threads would only wait for one another
    base = sixteen_bits(demo, out / "models" / "16-bit")
    name = Path(demo.model).name if demo.model == str(EMBEDDED) else demo.model
    results = Results(model=name, settings=vars(demo) | {"model": _shown(demo.model)})

    step(1, "Quantize", "each model is measured on held-out stories")
    results.quantized.append(measured(demo, base, "none", 16))
    for bits in BITS:
        for quantizer in ("rtn", "optq"):
            folder = quantized(demo, base, quantizer, bits, out / "models" / f"{quantizer}-{bits}-bit")
            results.quantized.append(measured(demo, folder, quantizer, bits))

    step(2, "Finetune", f"{demo.steps} steps on articles, measured before and after")
    for bits in (16, *BITS):
        model = base if bits == 16 else out / "models" / f"optq-{bits}-bit"
        results.finetuned.append(finetuned(demo, model, bits, out / "models" / f"adapter-{bits}-bit"))

    step(3, "Generate", "a story before finetuning, an article after")
    for bits in (16, *BITS):
        model = base if bits == 16 else out / "models" / f"optq-{bits}-bit"
        story = generated(demo, model, None, HOME_PROMPT)
        article = generated(demo, model, out / "models" / f"adapter-{bits}-bit", NEW_PROMPT)
        results.samples.append(Sample(bits, story, article))

    results.seconds = time.monotonic() - began
    write_report(results, out, console)


def sixteen_bits(demo: Demo, folder: Path) -> Path:
    """Where the 16-bit original lies. One stored in 32 bits is rounded to 16 first, so that it is what it is called.

    It is written in 32 bits again: all models of the demo then compute in the same type.
    """
    import llmtools
    from llmtools.checkpoint.loading import check_model, quiet_libraries

    quiet_libraries()
    check_model(demo.model)
    model, tokenizer = llmtools.load(demo.model, dtype="auto")
    if next(model.parameters()).dtype != torch.float32:
        return Path(demo.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    llmtools.save(model, tokenizer, folder, overwrite=True)
    return folder


def quantized(demo: Demo, base: Path, quantizer: str, bits: int, folder: Path) -> Path:
    from llmtools.recipes.quantize import Quantize, quantize

    calibration = {"calibration": str(HOME_TRAIN), "num_samples": demo.samples, "max_length": demo.context}
    recipe = Quantize(
        model=str(base),
        quantizer=quantizer,
        bits=bits,
        group_size=demo.group_size,
        **(calibration if quantizer == "optq" else {}),  # type: ignore[arg-type]
        seed=demo.seed,
        out=str(folder),
        overwrite=True,
    )
    command("quantize", recipe)
    result = quantize(recipe)
    console.print(f"  {result.modules} layers, {result.bits_per_weight:.2f} bits per weight with all scales")
    return folder


def measured(demo: Demo, model: Path, quantizer: str, bits: int) -> QuantizeRow:
    """Perplexity on held-out stories."""
    found = perplexity(demo, model, None, HOME_HELD_OUT)
    bits_per_weight, weight_bytes = found.bits_per_weight, found.weight_bytes
    if quantizer == "none":  # see sixteen_bits: rounded to 16 bits, whatever it is stored in
        bits_per_weight, weight_bytes = 16.0, round(16 * weight_bytes / bits_per_weight)
    return QuantizeRow(bits, quantizer, bits_per_weight, weight_bytes, found.value)


def finetuned(demo: Demo, model: Path, bits: int, adapter: Path) -> FinetuneRow:
    """Perplexity on held-out articles before and after finetuning."""
    from transformers import AutoConfig

    from llmtools.recipes.finetune import Finetune, Lora, finetune

    width = AutoConfig.from_pretrained(model).get_text_config().hidden_size
    training = {
        "max_steps": demo.steps,
        "per_device_train_batch_size": demo.batch,
        "max_length": demo.tokens,
        "learning_rate": demo.learning_rate or 0.32 / width,
        "warmup_steps": demo.steps // 20,
        "save_strategy": "no",
    }
    recipe = Finetune(
        model=str(model),
        data=str(NEW_TRAIN),
        out=str(adapter),
        lora=Lora(r=demo.rank, alpha=2.0 * demo.rank, dropout=0.0),
        training=training,
        seed=demo.seed,
        overwrite=True,
    )
    before = perplexity(demo, model, None, NEW_HELD_OUT)
    command("finetune", recipe)
    result = finetune(recipe)
    after = perplexity(demo, model, adapter, NEW_HELD_OUT)
    size = sum(file.stat().st_size for file in adapter.glob("adapter_model.*"))
    return FinetuneRow(bits, result.trainable, size, before.value, after.value, result.seconds)


def perplexity(demo: Demo, model: Path, adapter: Path | None, text: Path) -> Any:
    from llmtools.recipes.evaluate import Evaluate, evaluate

    recipe = Evaluate(
        model=str(model), adapter=adapter and str(adapter), task="perplexity", data=str(text), max_length=demo.context
    )
    command("evaluate", recipe)
    result = evaluate(recipe)
    console.print(f"  perplexity [bold]{result.value:.2f}[/bold]")
    return result


def generated(demo: Demo, model: Path, adapter: Path | None, prompt: str) -> str:
    from llmtools.recipes.generate import Generate, generate

    recipe = Generate(
        model=str(model),
        adapter=adapter and str(adapter),
        prompt=prompt,
        max_new_tokens=80,
        temperature=0.6,
        seed=demo.seed,
    )
    command("generate", recipe)
    (completion,) = generate(recipe).completions
    return (completion.prompt + completion.completion).strip()


def step(number: int, title: str, what: str) -> None:
    console.rule(f"[bold]{number} of 3 · {title}[/bold]: {what}", align="left")


def command(verb: str, recipe: Any) -> None:
    """Prints the command line of a recipe: what differs from its defaults, by relative paths."""
    words = ["llmtools", verb]
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name == "overwrite" or value == _default(field):
            continue
        if isinstance(value, dict):
            words += [f"--{field.name}.{key} {_shown(entry)}" for key, entry in value.items()]
        elif hasattr(value, "__dataclass_fields__"):
            changed = [each for each in fields(value) if getattr(value, each.name) != _default(each)]
            words += [f"--{field.name}.{each.name} {_shown(getattr(value, each.name))}" for each in changed]
        else:
            words.append(f"--{field.name} {_shown(value)}")
    console.print(f"[dim]$ {' '.join(words)}[/dim]", soft_wrap=True)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _shown(value: Any) -> str:
    text = os.path.relpath(value) if isinstance(value, str) and os.path.exists(value) else str(value)
    return f'"{text}"' if " " in text else text


if __name__ == "__main__":
    from llmtools import InputError
    from llmtools.cli.app import read_recipe

    logging.basicConfig(format="  %(message)s")
    logging.getLogger("llmtools").setLevel(logging.INFO)
    try:
        if (demo := read_recipe("demo.py", Demo, sys.argv[1:])) is not None:
            main(demo)
    except InputError as error:
        sys.exit(f"demo: {error}")
