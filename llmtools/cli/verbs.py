"""The commands: the recipe that each runs, its summary, its examples."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from ..recipes.quality import table as quality_table


class Verb(NamedTuple):
    """A recipe as a command."""

    module: str
    """Module of the recipe, below `llmtools`."""
    options: str
    """Name of its dataclass of options."""
    function: str
    """Name of its function."""
    summary: str
    """Summary for the overview of all commands."""
    example: str
    """Examples for the help, one per line."""
    first: tuple[str, ...] = ()
    """Names of the options that ``--help`` shows, in order; ``--help_all`` shows all. Empty: both show all."""
    further: Callable[[], str] | None = None
    """What makes further text of the help, as it is printed."""
    positional: str | None = None
    """Name of the option that may be given as a first argument without its flag."""

    def recipe(self) -> type[Any]:
        """The dataclass whose fields are the command's options."""
        found: type[Any] = getattr(self._imported(), self.options)
        return found

    def run(self, recipe: Any) -> Any:
        """Runs the recipe; returns its result, whose ``str`` is what the command prints."""
        return getattr(self._imported(), self.function)(recipe)

    def _imported(self) -> Any:
        return importlib.import_module(f"llmtools.{self.module}")


VERBS = {
    "quantize": Verb(
        "recipes.quantize",
        "Quantize",
        "quantize",
        "quantize a model and write a checkpoint",
        """\
llmtools quantize --model DIR --bits 4 --calibration train.txt --out QDIR
llmtools quantize --model DIR --bits 4 --quality fast --out QDIR
llmtools quantize --model DIR --quantizer optq --bits 3 --group_size 64 --calibration train.txt \\
  --num_samples 64 --max_length 512 --out QDIR
llmtools quantize --model DIR --quantizer quip_sharp --bits 2 --calibration train.txt --recover --out QDIR
llmtools quantize --model DIR --quantizer optq --bits_per_weight 2.5 --calibration train.txt --out QDIR
llmtools quantize --model DIR --fit 6GB --fit_step.batch_size 4 --quality fast --out QDIR
llmtools quantize --model DIR --quantizer nf4 --out QDIR
llmtools quantize --config recipe.yaml --bits 2 --options.damping 0.05
llmtools quantize --config recipe.yaml --resume""",
        first=(
            "model",
            "out",
            "quality",
            "quantizer",
            "bits",
            "calibration",
            "num_samples",
            "max_length",
            "recover.steps",
            "options",
        ),
        further=quality_table,
    ),
    "recover": Verb(
        "recipes.recover",
        "Recover",
        "recover",
        "train a quantized model's scales and norms towards the original model",
        """\
llmtools recover --model QDIR --calibration train.txt --out QDIR2
llmtools recover --model QDIR --original DIR --calibration train.txt --recover.steps 200 --out QDIR2 --resume""",
        first=("model", "original", "calibration", "out", "num_samples", "max_length", "recover.steps", "resume"),
    ),
    "finetune": Verb(
        "recipes.finetune",
        "Finetune",
        "finetune",
        "train LoRA adapters on a model, quantized or not",
        """\
llmtools finetune --model QDIR --data train.jsonl --out ADAPTER --lora.r 8 --lora.alpha 32 --training.max_steps 200
llmtools finetune --model QDIR --data train.jsonl --out ADAPTER --training.max_steps 200 --resume
llmtools finetune --model DIR --data book.txt --validation 0.05 --out ADAPTER --training.num_train_epochs 1
llmtools finetune --config samsum_optq_3bit --model QDIR --out ADAPTER""",
        first=(
            "model",
            "data",
            "out",
            "task",
            "training",
            "validation",
            "early_stopping",
            "lora.r",
            "lora.target_modules",
            "resume",
        ),
    ),
    "merge": Verb(
        "recipes.merge",
        "Merge",
        "merge",
        "merge an adapter into its quantized base, in the base's own bits",
        """\
llmtools merge --model QDIR --adapter ADAPTER --data test.txt --out QDIR2
llmtools merge --adapter ADAPTER --task json --data test.jsonl --options.max_new_tokens 48 --out QDIR2
llmtools merge --adapter ADAPTER --how requantize --calibration train.txt --data test.txt --out QDIR2""",
        first=("model", "adapter", "out", "how", "data", "task", "calibration", "num_samples", "max_length"),
    ),
    "evaluate": Verb(
        "recipes.evaluate",
        "Evaluate",
        "evaluate",
        "evaluate a model on a task: perplexity, or answers",
        """\
llmtools evaluate --model QDIR --task perplexity --data test.txt --max_length 512
llmtools evaluate --model QDIR --adapter ADAPTER --task perplexity --data test.txt --json
llmtools evaluate --adapter ADAPTER --task samsum --data samsum --batch_size 8 --num_samples 100
llmtools evaluate --model QDIR --harness arc_easy,hellaswag --batch_size 8""",
        first=(
            "model",
            "adapter",
            "task",
            "data",
            "num_samples",
            "batch_size",
            "max_length",
            "harness",
            "load",
            "options",
        ),
    ),
    "generate": Verb(
        "recipes.generate",
        "Generate",
        "generate",
        "generate text from prompts",
        """\
llmtools generate --model QDIR --adapter ADAPTER --prompt "Once upon a time"
llmtools generate --adapter ADAPTER --prompts prompts.txt --temperature 0.8 --seed 1 --json""",
        first=(
            "model",
            "adapter",
            "prompt",
            "system",
            "prompts",
            "max_new_tokens",
            "temperature",
            "top_p",
            "seed",
            "raw",
        ),
    ),
    "export": Verb(
        "recipes.export",
        "Export",
        "export",
        "write a model or an adapter in an external format",
        """\
llmtools export --model QDIR --format gptq_v2 --out GPTQ
llmtools export --model QDIR --adapter ADAPTER --format dense --out MERGED
llmtools export --adapter ADAPTER --format lora --out LORA""",
        first=("format", "out", "model", "adapter", "reader", "dtype", "lossy", "overwrite"),
    ),
    "push": Verb(
        "recipes.push",
        "Push",
        "push",
        "share a model or an adapter on the Hugging Face hub",
        """\
llmtools push QDIR --repo owner/name --private
llmtools push ADAPTER --repo owner/name --base_name owner/base --results scores.json --dry_run""",
        positional="folder",
    ),
    "sweep": Verb(
        "sweep.runner",
        "Sweep",
        "sweep",
        "quantize, finetune and evaluate every combination, and report the trade-off",
        """\
llmtools sweep sweep.yaml
llmtools sweep sweep_demo --out demo-sweep
llmtools sweep sweep_grid --model DIR --data.samsum FOLDER --data.mnli FOLDER --out grid
llmtools sweep sweep.yaml --report_only""",
        first=("model", "tasks", "out", "quantizers", "baselines", "ranks", "seeds", "training", "data", "report_only"),
        positional="config",
    ),
    "plan": Verb(
        "recipes.estimate",
        "Plan",
        "plan",
        "estimate the memory of a finetuning step",
        """\
llmtools plan --model DIR --quantizer optq --bits 2 --batch_size 1 --max_length 128
llmtools plan --model owner/name --quantizer quip_sharp --device cuda --memory 24 --lora.r 16
llmtools plan --model config.json --quantizer nf4 --gradient_checkpointing true --json""",
        first=(
            "model",
            "quantizer",
            "bits",
            "group_size",
            "batch_size",
            "max_length",
            "lora.r",
            "gradient_checkpointing",
            "device",
            "memory",
        ),
    ),
    "check": Verb(
        "recipes.check",
        "Check",
        "check",
        "run the conformance checks (laws) of a quantizer",
        """\
llmtools check optq --options.bits 3
llmtools check mypackage:MyQuantizer""",
        positional="quantizer",
    ),
    "list": Verb(
        "recipes.listing",
        "List",
        "listing",
        "show quantizers, tasks and recipes, or the options of one",
        """\
llmtools list
llmtools list optq""",
        positional="name",
    ),
    "env": Verb("recipes.env", "Env", "env", "show versions, device, compiler, threads", "llmtools env --json"),
}
