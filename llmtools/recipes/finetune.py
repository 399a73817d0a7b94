"""Finetune adapters on a model, quantized or not. Adapters are PEFT's, training is TRL's SFTTrainer.

Work goes on in a folder beside the output, ``OUT.training``: checkpoints, ``metrics.jsonl``, ``run.json``. At the end
the adapter is written to ``OUT`` in one piece, with the last checkpoint for a later ``--resume``, and the work folder
goes. A run that was stopped is continued by ``--resume``; it ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean

log = logging.getLogger(__name__)

Row = dict[str, Any]

NEEDS_TRAIN = "finetuning uses trl and datasets ({error}): pip install 'llmtools[train]'"


@dataclass(frozen=True)
class Lora:
    """The adapter: low-rank updates of the linear layers (LoRA, arXiv:2106.09685), made by PEFT."""

    r: int = 8
    """rank of the update"""
    alpha: float = 32
    """its scale: the update is multiplied by alpha / r"""
    dropout: float = 0.05
    """share of the update's inputs that is dropped in training"""
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
    examples: int
    left_out: int
    """examples longer than max_length"""
    seconds: float

    def __str__(self) -> str:
        loss = "" if self.train_loss is None else f", loss {self.train_loss:.4f}"
        validation = "" if self.validation_loss is None else f", validation loss {self.validation_loss:.4f}"
        left_out = f", {self.left_out} examples too long" if self.left_out else ""
        return (
            f"{self.out}: {self.trainable} parameters, {self.steps} steps on {self.examples} "
            f"example{'s' * (self.examples != 1)}{loss}{validation}"
            f"{left_out}, in {self.seconds:.1f} s"
        )


def finetune(recipe: Finetune, callbacks: Sequence[Any] = ()) -> Finetuned:
    """Trains adapters and writes them as a PEFT folder; `callbacks` are told of each step, as the Trainer's are."""
    from ..data.tasks.base import needs_chat_template
    from ..files import check_free, writing
    from ..model.card import write_card
    from ..model.checkpoint import load_starts
    from ..model.integrity import note_checksums
    from ..nn.start import start_adapters
    from .loading import check_model, import_plugins, open_model, quiet_libraries
    from .record import record, write_json

    began = time.monotonic()
    recipe = replace(recipe, training={key: _yes_or_no(key, value) for key, value in recipe.training.items()})
    out = Path(recipe.out).expanduser()
    work = out.with_name(f"{out.name}.training")
    check_model(recipe.model)
    if not recipe.resume and _is_first():
        check_free(out, overwrite=recipe.overwrite)
    task, train, validation, words = _rows(recipe)
    quiet_libraries()
    _check_training(recipe.training)
    _check_choosing(recipe.training, validation)
    config = _lora_config(recipe)
    starts = load_starts(recipe.model) if recipe.lora.init == "error" else None

    import_plugins(recipe.plugin)
    model, tokenizer = open_model(recipe.model, load=recipe.load, trust_remote_code=recipe.trust_remote_code)
    _leave_out(config, model)
    if words["form"] == "messages":
        needs_chat_template(tokenizer)
    if tokenizer.eos_token is None:
        raise InputError(f"{recipe.model}: its tokenizer has no end-of-text token, which training teaches to write")
    arguments = _arguments(recipe, work, model, words["form"], bool(validation), task.max_length())
    train, validation = (_shortened(rows, task, tokenizer, arguments["max_length"]) for rows in (train, validation))
    train, left_out = _fitting(train, tokenizer, arguments, "training")
    validation, _ = _fitting(validation, tokenizer, arguments, "validation")

    with _working(recipe, out, work) as checkpoint:
        run = record("finetune", recipe, words=words, training=arguments, base_model=_lasting_name(recipe.model))
        if _is_first():
            write_json(work / "run.json", run)
        trainer = _trainer(
            model, tokenizer, arguments, config, train, validation, work / "metrics.jsonl", checkpoint, callbacks
        )
        if starts is not None and checkpoint is None:
            start_adapters(trainer.model, starts)
        for adapter in trainer.model.peft_config.values():
            adapter.base_model_name_or_path = run["base_model"]
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        history = trainer.state.log_history
        result = Finetuned(
            out=recipe.out,
            steps=trainer.state.global_step,
            train_loss=_last(history, "loss"),
            validation_loss=_last(history, "eval_loss"),
            trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            examples=len(train),
            left_out=left_out,
            seconds=time.monotonic() - began,
        )
        if _is_first():
            with writing(out, overwrite=recipe.overwrite or recipe.resume) as folder:
                trainer.model.save_pretrained(folder)
                if (work / "metrics.jsonl").exists():
                    shutil.copy(work / "metrics.jsonl", folder / "metrics.jsonl")
                told = {**run, "result": asdict(result)}
                write_json(folder / "run.json", {**told, "checksums": note_checksums(folder, told)})
                write_card(folder, name=out.name)  # in place of PEFT's empty form
                if (last := _last_checkpoint(work)) is not None:
                    shutil.copytree(last, folder / "checkpoints" / last.name)
        _together()  # nobody goes on, or ends, before the adapter is on the disk
    if _is_first():
        shutil.rmtree(work, ignore_errors=True)
    return result


# ------------------------------------------------------------------------------------------------ where, and from where


@contextmanager
def _working(recipe: Finetune, out: Path, work: Path) -> Iterator[Path | None]:
    """Makes the folder to work in ready, and gives the checkpoint to go on from, if any.

    A run that ends early leaves its folder if there is a checkpoint in it, and nothing otherwise. Of several processes
    the first makes and clears folders, and the others wait for it.
    """
    checkpoint = _begin(recipe, out, work) if _is_first() else None
    _together()
    if recipe.resume and not _is_first():
        checkpoint = _last_checkpoint(work)
    try:
        yield checkpoint
    except BaseException as error:
        if not _is_first():
            raise
        last = _last_checkpoint(work)
        if last is None:
            shutil.rmtree(work, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            log.warning("stopped; --resume goes on from %s", last)
        raise


def _is_first() -> bool:
    """Whether this is the only process of the run, or the first of those that torchrun or accelerate started."""
    return int(os.environ.get("RANK", "0")) == 0


def _together() -> None:
    """Waits until each process of the run has come here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _begin(recipe: Finetune, out: Path, work: Path) -> Path | None:
    if recipe.resume:
        if not work.exists() and (out / "checkpoints").is_dir():
            shutil.copytree(out / "checkpoints", work / "checkpoints")
            for name in ("run.json", "metrics.jsonl"):
                if (out / name).exists():
                    shutil.copy(out / name, work / name)
        last = _last_checkpoint(work)
        if last is None:
            raise InputError(
                f"--resume: there is no checkpoint in {work} or {out / 'checkpoints'}; start without --resume"
            )
        _check_same(recipe, work / "run.json")
        log.info("going on from %s", last)
        return last
    if _last_checkpoint(work) is not None and not recipe.overwrite:
        raise InputError(f"{work} holds a run that was stopped; --resume goes on with it, --overwrite begins anew")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return None


def _last_checkpoint(work: Path) -> Path | None:
    """The checkpoint with the most steps that is whole: the Trainer writes trainer_state.json last."""
    found = [path for path in (work / "checkpoints").glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _check_same(recipe: Finetune, run: Path) -> None:
    """A run goes on with the model, data and adapter it began with; only the training arguments may change."""
    try:
        before = json.loads(run.read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError):
        log.warning("%s cannot be read; whether the recipe is still the same is not known", run)
        return
    now = json.loads(json.dumps(asdict(recipe), default=str))
    for key in ("model", "load", "data", "validation", "limit", "lora", "task", "options", "seed"):
        if before.get(key) != now[key]:
            raise InputError(
                f"--resume: {key} was {before.get(key)!r} and is {now[key]!r}; go on with the same, or begin anew with "
                f"--overwrite"
            )
    if before.get("training") != now["training"]:
        log.warning("training arguments changed from %s to %s", before.get("training"), now["training"])


def _lasting_name(model: str) -> str:
    """What the adapter calls its base: a hub name as it is, a folder by its full path."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.exists() else model


# ---------------------------------------------------------------------------------------------------------------- rows


def _rows(recipe: Finetune) -> tuple[Any, list[Row], list[Row], dict[str, Any]]:
    """(task, training rows, validation rows, the words they are in), checked before anything is loaded."""
    from ..data.tasks import make_task, tasks
    from ..data.tasks.base import spread
    from .loading import with_current_folder

    if ":" in recipe.task:
        with_current_folder()
    known = {each.name for each in fields(tasks.get(recipe.task))}  # type: ignore[arg-type]
    given = {"data": recipe.data, "validation_data": recipe.validation, "seed": recipe.seed}
    task = make_task(recipe.task, **{key: given[key] for key in given if key in known}, **recipe.options)
    train, validation = (spread(rows, recipe.limit) for rows in (task.train(), task.validation()))
    if not train:
        raise InputError(f"{recipe.data}: there is nothing to train on")
    form = _form(train[0])
    template = task.template
    words: dict[str, Any] | None
    if recipe.task == "text" and recipe.options.get("prompt") is not None:
        words = {"prompt": recipe.options["prompt"], "completion": recipe.options["completion"]}
    else:
        words = template._asdict() if template is not None else None
    if form == "messages" and "assistant_only_loss" not in recipe.training:
        train, validation = _turns(train), _turns(validation)
    return task, train, validation, {"form": form, "template": words}


def _form(row: Row) -> str:
    """The form that a row is learned in. A record with an answer may have a text or messages of its own beside it."""
    from ..data.tasks.text import FORMS, form_of

    return "prompt" if all(key in row for key in FORMS["prompt"]) else form_of(row)


def _turns(rows: list[Row]) -> list[Row]:
    """A chat as one example for each answer in it: what precedes is the prompt, the answer is learned.

    The loss is on the answers alone, with any chat template. (TRL can do it in one example where the template marks
    the answers: --training.assistant_only_loss true.)
    """
    return [
        {"prompt": row["messages"][:index], "completion": [message]}
        for row in rows
        for index, message in enumerate(row["messages"])
        if message["role"] == "assistant" and index > 0
    ]


def _shortened(rows: list[Row], task: Any, tokenizer: Any, limit: int | None) -> list[Row]:
    """Rows with nothing but the fields of their form, prompts shortened as the task does it, with room for the answer.

    A prompt that cannot be short enough stays as it is; `_fitting` leaves it out.
    """
    from ..data.tasks.text import FORMS

    short = []
    for row in rows:
        form = _form(row)
        if form == "prompt" and isinstance(row["prompt"], str):
            answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            with suppress(InputError):
                row = task.fitted(row, tokenizer, limit and limit - len(answer) - 1)
        short.append({key: row[key] for key in FORMS[form]})
    return short


def _fitting(rows: list[Row], tokenizer: Any, arguments: dict[str, Any], what: str) -> tuple[list[Row], int]:
    """(rows that fit into max_length, how many did not). TRL would cut the end of these, which is the answer.

    Plain text has no answer; packed and wrapped, the default, it is cut into windows and nothing of it is lost.
    """
    limit = arguments["max_length"]
    plain = bool(rows) and "text" in rows[0]
    if limit is None or not rows or (plain and arguments["packing"] and arguments["packing_strategy"] == "wrapped"):
        return rows, 0
    lengths = [_length(row, tokenizer, f"{what} example {number}") for number, row in enumerate(rows, start=1)]
    long = [index for index, length in enumerate(lengths) if length > limit]
    if not long:
        return rows, 0
    if len(long) == len(rows) and not plain:
        raise InputError(
            f"all {len(rows)} {what} examples are longer than max_length={limit} tokens (the shortest has "
            f"{min(lengths)}); raise --training.max_length, or shorten them"
        )
    log.warning(
        "%d of %d %s examples are longer than max_length=%d tokens and %s: %s%s",
        len(long),
        len(rows),
        what,
        limit,
        "lose their end (not with --training.packing true)" if plain else "left out, so that no answer is cut",
        ", ".join(f"number {index + 1} ({lengths[index]} tokens)" for index in long[:3]),
        ", …" if len(long) > 3 else "",
    )
    if plain:
        return rows, 0
    return [row for row, length in zip(rows, lengths, strict=True) if length <= limit], len(long)


def _length(row: Row, tokenizer: Any, where: str) -> int:
    """Tokens of a row, as TRL writes it: with the end-of-text token, or in the chat template."""
    from ..data.tasks.base import in_chat_template

    if "messages" in row or isinstance(row.get("prompt"), list):
        chat = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        return len(in_chat_template(chat, tokenizer, where=where, tokenize=True, return_dict=True)["input_ids"])
    text = row["text"] if "text" in row else row["prompt"] + row["completion"]
    return len(tokenizer(text + tokenizer.eos_token, verbose=False)["input_ids"])


# ------------------------------------------------------------------------------------------------------------ arguments


def _training_arguments() -> dict[str, str]:
    """Each argument of SFTConfig, with its type as it is written there."""
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise InputError(NEEDS_TRAIN.format(error=error)) from error
    return {each.name: str(each.type) for each in fields(SFTConfig) if each.init}


def _yes_or_no(key: str, value: Any) -> Any:
    """``save_strategy: no`` is the word; YAML reads it as false."""
    return "no" if value is False and key.endswith("_strategy") else value


def _check_training(training: dict[str, Any]) -> None:
    """Raises InputError for an argument that SFTConfig does not have, or a value of another kind."""
    known = _training_arguments()
    for key, value in training.items():
        if key not in known:
            raise InputError(f"training: no argument {key!r} in trl.SFTConfig; {_near(key, known)}")
        if key == "output_dir":
            raise InputError("training.output_dir: the output folder is --out")
        kinds = set(re.findall(r"\b(int|float|bool|str|dict|list)\b", known[key]))
        if kinds and value is not None and type(value).__name__ not in kinds | ({"int"} if "float" in kinds else set()):
            raise InputError(f"training.{key}={value!r}: {' or '.join(sorted(kinds))} is expected")


def _check_choosing(training: dict[str, Any], validation: list[Row]) -> None:
    """Raises InputError for arguments that use validation rows where there are none."""
    for key in ("load_best_model_at_end", "eval_strategy"):
        if not validation and training.get(key) not in (None, False, "no"):
            raise InputError(
                f"training.{key}={training[key]}: there are no validation rows; pass --validation with a file, or the "
                f"share of the data to hold out, such as 0.1"
            )


def _near(key: str, known: dict[str, str]) -> str:
    """Only the nearest names: there are 150 of them."""
    import difflib

    near = difflib.get_close_matches(key, known, n=4, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else "see the documentation of trl.SFTConfig"


def _lora_config(recipe: Finetune) -> Any:
    from peft import LoraConfig

    lora = recipe.lora
    own = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
    known = {each.name for each in fields(LoraConfig) if each.init}
    for key in lora.options:
        if key in own:
            raise InputError(f"lora.options.{key}: this is --lora.{own[key]}")
        if key not in known:
            raise InputError(f"lora.options: no argument {key!r} in peft.LoraConfig; {did_you_mean(key, known)}")
    if lora.r < 1 or not 0 <= lora.dropout < 1 or lora.alpha <= 0:
        raise InputError(
            f"lora: r={lora.r}, alpha={lora.alpha}, dropout={lora.dropout}; r at least 1, alpha above 0, dropout from "
            f"0 to below 1 are expected"
        )
    if lora.init not in ("zero", "error"):
        raise InputError(f"lora.init={lora.init!r}; {did_you_mean(lora.init, ('zero', 'error'))}")
    try:
        return LoraConfig(
            r=lora.r,
            lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            **{"task_type": "CAUSAL_LM", **lora.options},
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {error}") from error


def _leave_out(config: Any, model: Any) -> None:
    """Takes out of PEFT's "all-linear" what it cannot adapt, in place."""
    from ..nn.adapters import not_adaptable

    if config.target_modules == "all-linear" and not config.exclude_modules:
        config.exclude_modules = not_adaptable(model) or None


def _arguments(
    recipe: Finetune, work: Path, model: Any, form: str, validates: bool, length: int | None = None
) -> dict[str, Any]:
    """The arguments of SFTConfig: ours where the user gave none.

    Adapters are float32. "bf16" computes with them in bfloat16 (autocast), on a GPU that can. On a CPU only for a model
    that is bfloat16 itself: then nothing is lost by it, and PEFT keeps no float32 copy of each layer's input.
    Checkpointing recomputes activations to save memory, which on a CPU is worth less than its time.
    """
    import torch

    from ..data.metrics import model_positions

    gpu = torch.cuda.is_available()
    positions = model_positions(model)
    cpu = not gpu and not torch.accelerator.is_available()
    half = cpu and model.get_input_embeddings().weight.dtype == torch.bfloat16
    ours: dict[str, Any] = {
        "learning_rate": 2e-4,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": torch.cuda.is_bf16_supported() if gpu else half,
        "use_cpu": cpu,
        "gradient_checkpointing": gpu,
        "max_length": min(length or 1024, positions or length or 1024),
        "packing": form == "text",
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "report_to": "none",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
    }
    if validates:
        ours |= {"eval_strategy": "steps", "eval_steps": 0.1}
    if 0 < recipe.training.get("max_steps", 0) < 100:
        ours["logging_steps"] = max(1, recipe.training["max_steps"] // 10)
    arguments = ours | recipe.training
    if form == "text" and arguments["packing"]:
        arguments.setdefault("packing_strategy", "wrapped")  # cuts anywhere and loses nothing
    elif arguments["packing"]:
        arguments.setdefault("packing_strategy", "bfd")
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):  # renamed in transformers 5.23
        new = old.replace("gradient", "activation")
        if old in arguments and new in _training_arguments():
            arguments.setdefault(new, arguments.pop(old))
    length = arguments["max_length"]
    if length is not None and positions is not None and length > positions:
        raise InputError(
            f"training.max_length={length} is longer than the model's {positions} positions; use at most {positions}"
        )
    return {**arguments, "output_dir": str(work / "checkpoints")}


# -------------------------------------------------------------------------------------------------------------- trainer


def _trainer(
    model: Any,
    tokenizer: Any,
    arguments: dict[str, Any],
    config: Any,
    train: list[Row],
    validation: list[Row],
    metrics: Path,
    checkpoint: Path | None,
    callbacks: Sequence[Any] = (),
) -> Any:
    """TRL's trainer with our record of what happens in place of its printing."""
    try:
        import datasets
        from jinja2 import TemplateError
        from transformers import PrinterCallback
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise InputError(NEEDS_TRAIN.format(error=error)) from error
    from ..nn.adapters import prepare_for_training
    from .heap import keep_large_blocks_apart

    try:
        args = SFTConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"training: {error}") from error
    datasets.disable_progress_bars()
    keep_large_blocks_apart()
    prepare_for_training(model, gradient_checkpointing=args.gradient_checkpointing)
    try:
        trainer = _lean(SFTTrainer)(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list(train),
            eval_dataset=datasets.Dataset.from_list(validation) if validation else None,
            processing_class=tokenizer,
            peft_config=config,
            callbacks=[_watch(metrics, checkpoint), *callbacks],
        )
    except (ValueError, TemplateError) as error:  # no such target module, a chat template that refuses a role, …
        hint = ""
        if "ParamWrapper" in str(error):  # PEFT takes fused experts for linears
            hint = " Fused experts are adapted too: pass --lora.dropout 0, or --lora.target_modules with a list"
        raise InputError(f"this cannot be trained: {error}{hint}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _lean(trainer: type) -> type:
    """SFTTrainer with the loss of `nn/loss.py` in training, where that says the same; elsewhere its own.

    TRL's makes no logits either, but makes them again for the backward, and in the type of the activations.
    """
    import torch

    from ..nn.loss import CausalLoss

    class Lean(trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            plain = (
                getattr(self.args, "loss_type", "nll") in ("nll", "chunked_nll")
                and self.label_smoother is None
                and self.compute_loss_func is None
                and not getattr(self, "aux_loss_enabled", False)
                and getattr(self.accelerator, "parallelism_config", None) is None
            )
            self.causal_loss = CausalLoss(self.model) if plain else None
            self.hits: list[Any] = []

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found = None
            if self.causal_loss is not None and model.training and not return_outputs:
                found = self.causal_loss(model, inputs)
            if found is None:
                return super().compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )
            self.hits.append(torch.stack([found.correct, found.tokens]))
            if num_items_in_batch is None:
                return found.sum / found.tokens.clamp(min=1)
            loss = found.sum / torch.as_tensor(num_items_in_batch).to(found.sum).clamp(min=1)
            return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if self.hits and "loss" in logs:
                correct, tokens = torch.stack(self.hits).sum(0).tolist()
                logs = {**logs, "mean_token_accuracy": correct / max(tokens, 1)}
                self.hits.clear()
            super().log(logs, start_time)

    return Lean


def _watch(metrics: Path, checkpoint: Path | None) -> Any:
    """The callback that shows progress, writes one JSON line a record, and stops where the loss is no number."""
    from contextlib import ExitStack

    from transformers import TrainerCallback

    from ..progress import progress

    begun = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if _is_first():
        _forget_after(metrics, begun)

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stack = ExitStack()
            self.step = self.stack.enter_context(progress("finetune", unit="steps"))
            self.note = ""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step(state.global_step, state.max_steps, self.note)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stack.close()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
            numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
            bad = {key: value for key, value in numbers.items() if not math.isfinite(value)}
            if any(key in bad for key in ("loss", "eval_loss", "grad_norm")):
                self.stack.close()
                raise InputError(
                    f"training diverged: {', '.join(f'{key} is {value}' for key, value in bad.items())} at step "
                    f"{state.global_step}; lower --training.learning_rate (now {args.learning_rate}), or look for "
                    f"broken examples; checkpoints before this step are in {args.output_dir}"
                )
            if "loss" in numbers:
                self.note = f"loss {numbers['loss']:.4f}"
            if "eval_loss" in numbers:
                log.info("step %d: validation loss %.4f", state.global_step, numbers["eval_loss"])
            if state.is_world_process_zero:
                with metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")

    return Watch()


def _forget_after(metrics: Path, step: int) -> None:
    """Takes out the records of steps that are going to be made again."""
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.strip() and json.loads(line)["step"] <= step]
    metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _last(history: list[dict[str, Any]], key: str) -> float | None:
    return next((float(entry[key]) for entry in reversed(history) if key in entry), None)
