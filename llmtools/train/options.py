"""Options and result of finetuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.options import ModelOptions, OffloadOptions

Row = dict[str, Any]
"""A training example: ``text``, ``prompt`` and ``completion``, or ``messages``."""

NEEDS_TRAIN = "finetuning uses trl and datasets ({error}): pip install 'llmtools[train]'"


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter: low-rank updates of the linear layers (arXiv:2106.09685), by PEFT."""

    r: int = 8
    """Rank of the update."""
    alpha: float = 32
    """Scale of the update, which is multiplied by alpha / r."""
    dropout: float | None = None
    """Probability of dropping an input of the update in training; 0.05 by default, and 0 for a dense mixture, whose
    fused experts PEFT adapts without dropout only."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers to adapt: all-linear (all but the output head), or names such as [q_proj, v_proj]; of a mixture of
    experts also attention, shared_experts and experts, joined by +, such as attention+shared_experts."""
    init: str = "zero"
    """LoRA initialisation; zero: B = 0, the model is unchanged; error: the best low-rank approximation of the
    quantization error (of a model that was quantized with --adapter_rank)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other arguments of peft.LoraConfig, such as --lora.options.use_dora true."""


LORA = Lora()


@dataclass(frozen=True, kw_only=True)
class StepOptions(OffloadOptions):
    """A finetuning step whose memory is planned."""

    lora: Lora = LORA
    """LoRA adapter, as in finetune."""
    batch_size: int = 1
    """Number of sequences per device and step (per_device_train_batch_size)."""
    max_length: int | None = None
    """Length of a sequence in tokens; by default the model's positions, at most 1024, as in finetune."""
    gradient_checkpointing: bool | None = None
    """Whether only the inputs of blocks are kept, and the rest is recomputed; by default on a GPU, as in finetune."""
    optim: str = "adamw_torch"
    """Optimizer by transformers' name: adamw_torch | adamw_bnb_8bit | sgd."""
    device: str | None = None
    """Device of the step: cuda | cpu; by default a GPU if there is one."""


@dataclass(frozen=True)
class Finetune(ModelOptions, OffloadOptions):
    """Train LoRA adapters on a model, quantized or not, on your own text, question/answer pairs or chats."""

    model: str
    """Folder or hub name of the model."""
    data: str
    """Training data: .txt, or .jsonl with "text", or "prompt" and "completion", or "messages" (.gz too); for a task
    that knows its data set, such as samsum: a file, a folder with a file per split, or the task's name (from the
    hub)."""
    out: str
    """Folder to write the adapter to."""
    validation: float | str = 0.0
    """File of validation data, or the fraction of the data to hold out, such as 0.1; 0: the data set's own validation
    split, if it has one."""
    early_stopping: int | None = None
    """Number of validations in a row without a lower loss after which training stops; the best adapter is written."""
    num_samples: int | None = None
    """Number of training (and of validation) examples, evenly spaced over the data; by default all."""
    lora: Lora = Lora()
    """LoRA adapter."""
    training: dict[str, Any] = field(default_factory=dict)
    """Arguments of trl.SFTConfig: --training.max_steps 200 --training.learning_rate 2e-4 --training.packing true
    --training.report_to tensorboard …; https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig. Several processes
    (torchrun, accelerate launch) share gradient_accumulation_steps, so that the effective batch is that of one."""
    merge: str | None = None
    """Merge without loss that the adapter is trained for: exact (trained through the rounding to the base's own codes,
    which `llmtools merge` then writes, bit for bit), or zeros (QA-LoRA: a plain LoRA that is constant in each
    quantization group, for bases with floating zero points or minima, into which `llmtools merge` puts it); by default
    none."""
    merge_warmup: float = 0.0
    """Share of the steps before --merge exact begins to round."""
    load: str | None = None
    """Quantization by bitsandbytes while an unquantized model loads: nf4 or int8, for QLoRA and LLM.int8() as
    baselines."""
    task: str = "text"
    """Task that the training examples come from; `llmtools list` shows the tasks."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other options of the task: --options.prompt "Q: {question}" --options.completion " {answer}"."""
    seed: int = 0
    """Seed of the LoRA initialisation, the order of the data, and dropout."""
    resume: bool = False
    """Whether to resume from the last checkpoint of a run that was stopped (or has finished, with more steps)."""
    overwrite: bool = False
    """Permission to replace the output folder, or a run that was stopped."""
    force: bool = False
    """Permission to train where the estimate of a step's memory exceeds what is free."""
    allow_other_base: bool = False
    """Permission to resume with another base model than the one that the run began with, with a warning."""


@dataclass(frozen=True)
class FinetuneResult:
    """The adapter, and the metrics of its training."""

    out: str
    """Folder of the adapter."""
    steps: int
    """Number of optimizer steps."""
    train_loss: float | None
    """Training loss at the last logged step."""
    validation_loss: float | None
    """Validation loss of the adapter that was written."""
    trainable: int
    """Number of parameters of the adapter."""
    parameters: int
    """Number of parameters of model and adapter; a packed weight counts as the weights that it stands for."""
    examples: int
    """Number of training examples."""
    left_out: int
    """Number of training examples left out, being longer than max_length."""
    seconds: float
    """Duration in seconds."""

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


def facts(recipe: Finetune, result: FinetuneResult, base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Facts about the training and its base for the model card, see `run_info.facts_of`. base: those of a GGUF file."""
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
    return {"training": known, "base": {"loaded as": recipe.load} if recipe.load else base}
