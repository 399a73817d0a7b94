"""What a finetuning is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


NEEDS_TRAIN = "finetuning uses trl and datasets ({error}): pip install 'llmtools[train]'"


@dataclass(frozen=True)
class Lora:
    """The adapter: low-rank updates of the linear layers (LoRA, arXiv:2106.09685), made by PEFT."""

    r: int = 8
    """rank of the update"""
    alpha: float = 32
    """its scale: the update is multiplied by alpha / r"""
    dropout: float | None = None
    """share of the update's inputs that is dropped in training; by default 0.05, and 0 for a model with fused experts,
    which PEFT adapts without dropout only"""
    target_modules: str | list[str] = "all-linear"
    """which linears: all-linear (but the output head), or names such as [q_proj, v_proj]"""
    init: str = "zero"
    """how it starts; zero: the model stays as it is; error: what best makes up for the quantization error (the model
    was quantized with --adapter_rank)"""
    options: dict[str, Any] = field(default_factory=dict)
    """any other argument of peft.LoraConfig, such as --lora.options.use_dora true"""


@dataclass(frozen=True)
class Finetune:
    """Train LoRA adapters on a model, quantized or not, on your own text, question/answer pairs or chats."""

    model: str
    """folder or hub name of the model"""
    data: str
    """what to train on: .txt, or .jsonl with "text", or "prompt" and "completion", or "messages" (.gz too); for a task
    that knows its data set, such as samsum: a file, a folder with a file a split, or the task's name (from the hub)"""
    out: str
    """folder to write the adapter to"""
    validation: float | str = 0.0
    """a file to validate on, or the share of the data held out for it, such as 0.1; 0: the data set's own split"""
    early_stopping: int | None = None
    """number of validations in a row without a lower loss after which training stops; the best adapter is written"""
    limit: int | None = None
    """use so many examples only, spread over the data"""
    lora: Lora = Lora()
    """the adapter"""
    training: dict[str, Any] = field(default_factory=dict)
    """any argument of trl.SFTConfig: --training.max_steps 200 --training.learning_rate 2e-4 --training.packing true
    --training.report_to tensorboard …; https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig"""
    load: str | None = None
    """nf4 or int8: quantize a plain model with bitsandbytes while it loads, for QLoRA and LLM.int8() as baselines"""
    task: str = "text"
    """where the rows come from; `llmtools list` shows the tasks"""
    options: dict[str, Any] = field(default_factory=dict)
    """other options of the task: --options.prompt "Q: {question}" --options.completion " {answer}" """
    seed: int = 0
    """of the adapter's start, the order of the data, dropout"""
    resume: bool = False
    """go on from the last checkpoint of a run that was stopped (or has ended, with more steps)"""
    overwrite: bool = False
    """replace the output folder, or a stopped run, if there is one"""
    plugin: str | list[str] | None = None
    """module:Class of your own quantizer, if the checkpoint was made with it"""
    allow_other_base: bool = False
    """permission to go on (--resume) with another base model than the one that the run began with, with a warning"""
    verify: bool = False
    """comparison of every byte of the model's (and adapter's) files with their checksums before they are used"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""


@dataclass(frozen=True)
class Finetuned:
    """Where the adapter lies, and how training went."""

    out: str
    steps: int
    train_loss: float | None
    """the loss at the last logged step"""
    validation_loss: float | None
    trainable: int
    """parameters of the adapter"""
    parameters: int
    """of model and adapter, a packed weight counted as the weights that it stands for"""
    examples: int
    left_out: int
    """examples longer than max_length"""
    seconds: float

    def __str__(self) -> str:
        loss = "" if self.train_loss is None else f", loss {self.train_loss:.4f}"
        validation = "" if self.validation_loss is None else f", validation loss {self.validation_loss:.4f}"
        left_out = f", {self.left_out} examples too long" if self.left_out else ""
        return (
            f"{self.out}: {self.trainable} of {self.parameters} parameters trained "
            f"({100 * self.trainable / max(self.parameters, 1):.2g} %), {self.steps} steps on {self.examples} "
            f"example{'s' * (self.examples != 1)}{loss}{validation}"
            f"{left_out}, in {self.seconds:.1f} s"
        )


def facts(recipe: Finetune, result: Finetuned) -> dict[str, dict[str, Any]]:
    """What the model card says of a training, see `run_info.facts_of`."""
    training = {
        "data": recipe.data,
        "task": recipe.task,
        "seed": recipe.seed,
        "examples": result.examples,
        "steps": result.steps,
        "training loss": result.train_loss,
        "validation loss": result.validation_loss,
    }
    known = {key: value for key, value in training.items() if value is not None}
    return {"training": known, "base": {"loaded as": recipe.load} if recipe.load else {}}
