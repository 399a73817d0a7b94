"""Finetune adapters on a model, quantized or not. Adapters are PEFT's, training is TRL's SFTTrainer.

Work goes on in a folder beside the output, ``OUT.training``: checkpoints, ``metrics.jsonl``, ``run.json``. At the end
the adapter is written to ``OUT`` in one piece, with a picture of the losses and the last checkpoints for a later
``--resume``, and the work folder goes. A run that was stopped is continued by ``--resume``; it ends with the same bits
as one that was not. It goes on with what it began with: ``run.json`` holds hashes of the rows, the model and the
tokenizer.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean
from ..files import json_or_empty
from ..ranks import is_first, processes
from ..signals import Request, Stopped, interruptible, put_off

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


def finetune(recipe: Finetune, callbacks: Sequence[Any] = ()) -> Finetuned:
    """Trains adapters and writes them as a PEFT folder; `callbacks` are called as the Trainer's are."""
    from ..files import check_no_input, claim
    from .loading import check_model

    recipe = replace(recipe, training={key: _yes_or_no(key, value) for key, value in recipe.training.items()})
    out = Path(recipe.out).expanduser()
    work = out.with_name(f"{out.name}.training")
    check_model(recipe.model)
    if not is_first():
        with interruptible():
            return _finetune(recipe, out, work, callbacks)
    reads = [recipe.model, recipe.data, recipe.validation if isinstance(recipe.validation, str) else None]
    reads += [value for value in recipe.options.values() if isinstance(value, str)]
    check_no_input(work, reads)
    with claim(out, overwrite=recipe.overwrite or recipe.resume, reads=reads, called=work):
        return _finetune(recipe, out, work, callbacks)


def _finetune(recipe: Finetune, out: Path, work: Path, callbacks: Sequence[Any]) -> Finetuned:
    from ..checkpoint.folder import load_starts
    from ..checkpoint.inputs import content_of_model
    from ..checkpoint.model_card import write_card
    from ..checkpoint.run_info import record, write_json
    from ..content import rows_content, tensors_content
    from ..data.tasks.base import needs_chat_template
    from ..files import NameTaken, remove, sort_metadata, write_whole, writing
    from ..model.fingerprint import FINGERPRINT, as_text, fingerprint
    from ..model.integrity import note_checksums
    from ..nn.lora_init import start_adapters
    from ..nn.swap import count_parameters
    from ..train import checkpoints
    from ..train.learning import learning_check
    from ..train.losses import draw_losses
    from .loading import content_of_template, import_plugins, open_model, quiet_libraries

    began = time.monotonic()
    task, train, validation, words = _rows(recipe)
    inputs = {"training data": rows_content(train), "validation data": rows_content(validation)}
    quiet_libraries()
    _check_training(recipe.training)
    _check_fsdp(recipe.training)
    _check_choosing(recipe, validation)
    _check_start(recipe)
    config = _lora_config(recipe)
    starts = load_starts(recipe.model) if recipe.lora.init == "error" else None

    import_plugins(recipe.plugin)
    model, tokenizer = open_model(
        recipe.model, load=recipe.load, trust_remote_code=recipe.trust_remote_code, verify=recipe.verify
    )
    if is_first():
        inputs |= content_of_model(recipe.model)
        inputs |= {TENSORS: tensors} if (tensors := tensors_content(recipe.model)) is not None else {}
    base = fingerprint(model)
    _leave_out(config, model)
    if words["form"] == "messages":
        needs_chat_template(tokenizer)
        words["chat_template"] = content_of_template(tokenizer.chat_template)
    if tokenizer.eos_token is None:
        raise InputError(f"{recipe.model}: its tokenizer has no end-of-text token, which training teaches to write")
    arguments = _arguments(recipe, work, model, words["form"], bool(validation), task.max_length())
    train, validation = (_shortened(rows, task, tokenizer, arguments["max_length"]) for rows in (train, validation))
    train, left_out = _examples(train, tokenizer, arguments, "training")
    validation, _ = _examples(validation, tokenizer, arguments, "validation")
    if "completion_mask" in train[0]:
        arguments.setdefault("completion_only_loss", True)

    run = record("finetune", recipe, words=words, training=arguments, base_model=_lasting_name(recipe.model))
    run["inputs"] = inputs
    with _working(recipe, out, work, run, base) as checkpoint:
        request = Request()
        notes = {FINGERPRINT: as_text(base)}
        keeper = checkpoints.keeper(request, _seconds(recipe.training), also=[work / "metrics.jsonl"], notes=notes)
        watch = _watch(work / "metrics.jsonl", checkpoint, keeper)
        listeners = [watch, keeper, learning_check(), *_stopper(recipe), *callbacks]
        trainer = _trainer(model, tokenizer, arguments, config, train, validation, listeners)
        if starts is not None and checkpoint is None:
            start_adapters(trainer.model, starts)
        for adapter in trainer.model.peft_config.values():
            adapter.base_model_name_or_path = run["base_model"]
            for names in ("target_modules", "exclude_modules"):  # sets, which are written in another order each time
                if isinstance(found := getattr(adapter, names, None), set):
                    setattr(adapter, names, sorted(found))
        with put_off(request, _say_when_it_ends) if arguments["save_strategy"] != "no" else nullcontext():
            _train(trainer, checkpoint)
        if keeper.stopped:
            raise Stopped(exit_code=request.exit_code)
        history = trainer.state.log_history
        counted = count_parameters(trainer.model)
        result = Finetuned(
            out=recipe.out,
            steps=trainer.state.global_step,
            train_loss=_last(history, "loss"),
            validation_loss=_best_loss(trainer) or _last(history, "eval_loss"),
            trainable=counted.trainable,
            parameters=counted.total,
            examples=len(train),
            left_out=left_out,
            seconds=time.monotonic() - began,
        )
        if is_first():
            try:
                with writing(out, overwrite=recipe.overwrite or recipe.resume) as folder:
                    trainer.model.save_pretrained(folder)
                    sort_metadata(folder)
                    write_whole(folder / FINGERPRINT, notes[FINGERPRINT])
                    if (work / "metrics.jsonl").exists():
                        shutil.copy(work / "metrics.jsonl", folder / "metrics.jsonl")
                    draw_losses(folder)
                    note = {**run, "result": asdict(result)}
                    write_json(folder / "run.json", {**note, "checksums": note_checksums(folder, note)})
                    write_card(folder, name=out.name, former=out)  # in place of PEFT's empty form
                    best = getattr(trainer.state, "best_global_step", None)
                    checkpoints.keep(work / "checkpoints", folder / "checkpoints", best)
            except NameTaken:
                remove(work, of=out)
                raise
            except InputError as error:
                if not checkpoints.all_in(work / "checkpoints"):
                    raise
                raise InputError(f"{error} but the checkpoints in {work}; --resume writes it from them") from error
        _together()  # nobody goes on, or ends, before the adapter is on the disk
    if is_first():
        _done(work, out)
    return result


def _train(trainer: Any, checkpoint: Path | None) -> None:
    """Trains from the beginning or a checkpoint; one that has all steps is only loaded, as it would be at their end."""
    from ..files import disk_says_no
    from ..train.checkpoints import Finished, all_in, damage

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Finished:
        assert checkpoint is not None
        log.info("%s has all %d steps already; nothing is trained", checkpoint, trainer.state.global_step)
        if trainer.args.load_best_model_at_end and (step := getattr(trainer.state, "best_global_step", None)):
            best = checkpoint.with_name(f"checkpoint-{step}")
            if (why := damage(best)) is not None:
                raise InputError(f"--resume: the best checkpoint is asked for, and {why}") from None
            trainer.model.load_adapter(str(best), "default", is_trainable=True)
    except Exception as error:  # of the libraries that write checkpoints, each has its own
        if isinstance(error, RuntimeError) and "does not require grad" in str(error):
            raise InputError(
                "no adapter is used by the model: the loss depends on none of them; name modules that the model uses "
                "in --lora.target_modules"
            ) from error
        if (reason := disk_says_no(error)) is None:
            raise
        place = Path(trainer.args.output_dir)
        left = "--resume goes on from the last whole one" if all_in(place) else "nothing was kept"
        raise InputError(f"{place}: cannot be written ({reason}); {left}") from error


def _say_when_it_ends() -> None:
    log.warning("this step is finished and saved first; the same again stops at once")


def _seconds(training: dict[str, Any]) -> float | None:
    """Of work that may be lost; None where the user said when to save."""
    from ..train.checkpoints import SECONDS

    return None if training.keys() & {"save_steps", "save_strategy"} else SECONDS


# ------------------------------------------------------------------------------------------------ where, and from where


@contextmanager
def _working(
    recipe: Finetune, out: Path, work: Path, run: dict[str, Any] | None = None, base: dict[str, Any] | None = None
) -> Iterator[Path | None]:
    """Makes the folder to work in ready, and gives the checkpoint to go on from, if any.

    run: what its ``run.json`` is to say; gets the ``id`` of the run that goes on.
    base: the fingerprint of the base model, to compare with that of the run that goes on.
    A run that ends early leaves its folder if there is a checkpoint in it, and nothing otherwise. Of several processes
    the first makes and clears folders, and the others wait for it.
    """
    from ..checkpoint.run_info import record
    from ..train.checkpoints import all_in

    run = record("finetune", recipe) if run is None else run
    checkpoint = _begin(recipe, out, work, run, base) if is_first() else None
    _together()
    if recipe.resume and not is_first():
        checkpoint = next(iter(all_in(work / "checkpoints")), None)  # what is damaged, the first has put aside
    try:
        yield checkpoint
    except BaseException as error:
        if not is_first():
            raise
        last = next(iter(all_in(work / "checkpoints")), None)
        if last is None:
            _done(work, out)
        elif isinstance(error, KeyboardInterrupt):
            raise Stopped(f"stopped; --resume goes on from {last}", getattr(error, "exit_code", 130)) from error
        raise


def _done(work: Path, out: Path) -> None:
    """Takes the work folder away, unless somebody has put something of theirs into it."""
    from ..files import remove, strangers

    if (others := strangers(work)) == []:
        remove(work, of=out)
    else:
        log.warning("%s stays, because it holds something that is not of this run: %s", work, (others or ["?"])[0])


def _together() -> None:
    """Waits until each process of the run has come here."""
    if processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _begin(recipe: Finetune, out: Path, work: Path, run: dict[str, Any], base: dict[str, Any] | None) -> Path | None:
    from ..checkpoint.run_info import as_json
    from ..files import remove, strangers, write_whole
    from ..train.checkpoints import all_in

    others = strangers(work) if work.exists() else []
    if others or others is None:
        what = "is no folder of such a run" if others is None else f"holds {others[0]}, which llmtools did not write"
        raise InputError(f"this run would work in {work}, which {what}; move that away, or choose another --out")
    if recipe.resume:
        checkpoint = _going_on(recipe, out, work, run, base)
        run["id"] = _run(work).get("id")
        write_whole(work / "run.json", as_json(run))
        return checkpoint
    if all_in(work / "checkpoints") and not recipe.overwrite:
        raise InputError(f"{work} holds a run that was stopped; --resume goes on with it, --overwrite begins anew")
    remove(work, of=out)
    run["id"] = secrets.token_hex(8)
    _appear(work, out, {"run.json": as_json(run)})
    return None


def _going_on(recipe: Finetune, out: Path, work: Path, run: dict[str, Any], base: dict[str, Any] | None) -> Path:
    """The checkpoint to go on from, in `work`; what a finished run kept is brought there."""
    from ..train.checkpoints import SEAL, last_whole, put_aside, seal, steps_of

    former = _run(work) or _run(out)
    allowed = recipe.overwrite or bool((former.get("recipe") or {}).get("overwrite"))  # now, or when it began
    run["recipe"]["overwrite"] = allowed
    if out.exists() and any(out.iterdir()) and _run(out).get("id") != former.get("id") and not allowed:
        raise InputError(
            f"--resume: {out} is of another run than the one in {work}; pass --overwrite, too, to replace it at the end"
        )
    checkpoint, complaints = last_whole(work / "checkpoints")
    kept = None
    if checkpoint is None and _run(out).get("id") == former.get("id"):
        kept, more = last_whole(out / "checkpoints")
        complaints += more
    if checkpoint is None and kept is None:
        where = f"in {work} or {out / 'checkpoints'}"
        if complaints:
            raise InputError(f"--resume: no checkpoint {where} is whole: {complaints[0]}; begin anew with --overwrite")
        raise InputError(f"--resume: there is no checkpoint {where}; start without --resume")
    _check_base(recipe, checkpoint or kept, base)
    _check_same(recipe, former, run)
    for complaint in complaints:
        log.warning("%s; going on from %s", complaint, checkpoint or kept)
    if kept is not None:
        checkpoint = _brought(kept, out, work)
    assert checkpoint is not None
    if not (checkpoint / SEAL).exists():  # the run was killed a moment too early for it
        seal(checkpoint)
    put_aside(work / "checkpoints", steps_of(checkpoint))
    log.info("going on from %s", checkpoint)
    return checkpoint


def _brought(kept: Path, out: Path, work: Path) -> Path:
    """The checkpoint in the work folder, with what else a finished run kept, beside whatever is damaged there."""
    from ..train.checkpoints import put_aside

    if not work.exists():
        _appear(work, out, {name: out / name for name in ("run.json", "metrics.jsonl")})
    put_aside(work / "checkpoints", -1)
    shutil.copytree(kept.parent, work / "checkpoints", dirs_exist_ok=True)
    return work / "checkpoints" / kept.name


def _appear(work: Path, out: Path, files: dict[str, Path | str]) -> None:
    """Makes the work folder, never without what says whose it is. files: a text, or a file to copy, by its name."""
    from ..files import partial_of, write_whole

    fresh = work.with_name(partial_of(out).name)
    fresh.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, str):
            write_whole(fresh / name, content)
        elif content.exists():
            shutil.copy(content, fresh / name)
    fresh.rename(work)


def _run(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says; {} where it is not there or damaged."""
    return json_or_empty(folder / "run.json")


def _check_base(recipe: Finetune, checkpoint: Path | None, base: dict[str, Any] | None) -> None:
    """Raises InputError where the base model is another one than that of the checkpoint, unless that is allowed."""
    from ..model.fingerprint import compare, read_fingerprint

    former = None if checkpoint is None else read_fingerprint(checkpoint)
    difference = None if former is None or base is None else compare(former, base)
    if difference is None:
        return
    if not recipe.allow_other_base:
        raise InputError(
            f"--resume: the model's weights changed since this run began: it {difference}; go on with the same, pass "
            "--allow_other_base, or begin anew with --overwrite"
        )
    log.warning("the run that goes on %s", difference)


ROWS = ("training data", "validation data")
"""names of the hashes of rows in ``inputs`` of run.json; the others are of the model"""
MODEL = ("model's configuration", "model's weights", "model's revision on the hub", "tokenizer")
TENSORS = "model's tensors"
"""the name of the hash that is the same for other shards of the same weights"""


def _check_same(recipe: Finetune, former: dict[str, Any], run: dict[str, Any]) -> None:
    """A run goes on with the model, data and adapter it began with; only the training arguments may change."""
    from ..checkpoint.run_info import as_json

    before, inputs, here = former.get("recipe"), former.get("inputs") or {}, run.get("inputs") or {}
    if not isinstance(before, dict):
        log.warning("run.json cannot be read; whether the recipe is still the same is not known")
        return
    way_out = "go on with the same, or begin anew with --overwrite"
    now = json.loads(as_json(asdict(recipe)))  # without secrets, as what was written
    ignored = {TENSORS}  # runs of earlier versions have none
    if recipe.allow_other_base:
        ignored |= {*MODEL}
    elif inputs.get(TENSORS) is not None and inputs[TENSORS] == here.get(TENSORS):
        ignored |= {"model's weights"}
    changed = [key for key in {**inputs, **here} if inputs.get(key) != here.get(key) and key not in ignored]
    moved = {  # the same from another place is the same
        "data": not {*ROWS} & {*changed},
        "validation": not {*ROWS} & {*changed},
        "model": not {*changed} - {*ROWS},
    }
    moved |= {key: True for key in ("model", "load") if recipe.allow_other_base}
    for key in ("model", "load", "data", "validation", "limit", "lora", "task", "options", "seed"):
        if before.get(key) != now[key] and not moved.get(key):
            raise InputError(f"--resume: {key} was {before.get(key)!r} and is {now[key]!r}; {way_out}")
    if not inputs:
        log.warning("run.json has no hashes of the data and the model; whether they are still the same is not known")
    elif changed:
        raise InputError(f"--resume: the {changed[0]} changed since this run began; {way_out}")
    former_arguments, arguments = before.get("training") or {}, now["training"]
    for key in dict.fromkeys([*former_arguments, *arguments]):
        was, is_now = former_arguments.get(key), arguments.get(key)
        if was != is_now and "token" not in key:  # of the hub, which is nobody's to read
            log.warning("training.%s was %r and is %r", key, was, is_now)


def _lasting_name(model: str) -> str:
    """What the adapter calls its base: a hub name as it is, a folder by its full path."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.exists() else model


# ---------------------------------------------------------------------------------------------------------------- rows


def training_task(recipe: Finetune) -> Any:
    """The task with its options. Raises InputError for an unknown one, wrong options, or files that are not there."""
    from ..data.tasks import make_task
    from ..data.tasks.base import check_data
    from .loading import task_class

    cls = task_class(recipe.task)
    known = {each.name for each in fields(cls)}  # type: ignore[arg-type]
    given = {"data": recipe.data, "validation_data": recipe.validation, "seed": recipe.seed}
    task = make_task(recipe.task, **{key: given[key] for key in given if key in known}, **recipe.options)
    check_data(cls, recipe.data, recipe.validation)
    return task


def _rows(recipe: Finetune) -> tuple[Any, list[Row], list[Row], dict[str, Any]]:
    """(task, training rows, validation rows, the words they are in), checked before anything is loaded."""
    from ..data.tasks.base import spread
    from .loading import template_of

    task = training_task(recipe)
    rows = task.train()
    train, validation = spread(rows, recipe.limit), spread(task.validation(), recipe.limit)
    if not train:
        raise InputError(f"{recipe.data}: there is nothing to train on")
    form = _form(train[0])
    words: dict[str, Any] = {"form": form, "template": template_of(task)}
    if form == "messages" and len(systems := _system_prompts(rows)) == 1:
        words["system"] = systems.pop()
    if form == "messages" and "assistant_only_loss" not in recipe.training:
        train, validation = _turns(train), _turns(validation)
    return task, train, validation, words


def _system_prompts(rows: list[Row]) -> set[str | None]:
    """The system prompts that chats begin with; None stands for chats without one."""
    first = (row["messages"][0] for row in rows)
    return {str(message["content"]) if message["role"] == "system" else None for message in first}


def _form(row: Row) -> str:
    """The form that a row is learned in. A record with an answer may have a text or messages of its own beside it."""
    from ..data.tasks.text import FORMS, form_of

    return "prompt" if all(key in row for key in FORMS["prompt"]) else form_of(row)


def _turns(rows: list[Row]) -> list[Row]:
    """A chat as one example for each answer in it: what precedes is the prompt, the answer is learned.

    The loss is on the answers alone, with any chat template. (TRL can do it in one example where the template marks
    the answers: --training.assistant_only_loss true.)
    """
    from ..data.tasks.text import is_learned

    return [
        {"prompt": row["messages"][:index], "completion": [message], "tools": row.get("tools")}
        for row in rows
        for index, message in enumerate(row["messages"])
        if is_learned(message) and index > 0
    ]


def _shortened(rows: list[Row], task: Any, tokenizer: Any, limit: int | None) -> list[Row]:
    """Rows with nothing but the fields of their form, prompts shortened as the task does it, with room for the answer.

    A prompt that cannot be short enough stays as it is; `_examples` leaves it out.
    """
    from ..data.tasks.text import BESIDE, FORMS

    short = []
    for row in rows:
        form = _form(row)
        if form == "prompt" and isinstance(row["prompt"], str):
            answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            with suppress(InputError):
                row = task.fitted(row, tokenizer, limit and limit - len(answer) - 1)
        kept = (*FORMS[form], *BESIDE["messages"])
        short.append({key: row[key] for key in kept if row.get(key) is not None})
    return short


def _examples(rows: list[Row], tokenizer: Any, arguments: dict[str, Any], what: str) -> tuple[list[Row], int]:
    """(rows as token ids for SFTTrainer, how many did not fit into max_length). It would cut the end of these, which is
    the answer.

    Plain text has no answer; packed and wrapped, the default, it is cut into windows and nothing of it is lost. Chats
    whose answers the template marks itself (--training.assistant_only_loss) are left to the trainer.
    """
    from ..data.tokens import tokenized

    if not rows or "messages" in rows[0]:
        return rows, 0
    limit, plain = arguments["max_length"], "text" in rows[0]
    found = [tokenized(row, tokenizer, f"{what} example {number}") for number, row in enumerate(rows, start=1)]
    if appended := sum(example.end_appended for example in found):
        log.warning(
            "the chat template writes no end token after the answers of %d %s examples; %r is appended, so that "
            "the model learns to stop",
            appended,
            what,
            tokenizer.eos_token,
        )
    wrapped = plain and arguments["packing"] and arguments["packing_strategy"] == "wrapped"
    long = [index for index, each in enumerate(found) if limit and len(each.input_ids) > limit and not wrapped]
    if long and len(long) == len(rows) and not plain:
        raise InputError(
            f"all {len(rows)} {what} examples are longer than max_length={limit} tokens (the shortest has "
            f"{min(len(each.input_ids) for each in found)}); raise --training.max_length, or shorten them"
        )
    if long:
        log.warning(
            "%d of %d %s examples are longer than max_length=%d tokens and %s: %s%s",
            len(long),
            len(rows),
            what,
            limit,
            "lose their end (not with --training.packing true)" if plain else "left out, so that no answer is cut",
            ", ".join(f"number {index + 1} ({len(found[index].input_ids)} tokens)" for index in long[:3]),
            ", …" if len(long) > 3 else "",
        )
    left_out = set() if plain else set(long)
    return [_fed(each) for index, each in enumerate(found) if index not in left_out], len(left_out)


def _fed(example: Any) -> Row:
    """An example as a row of the trainer's data set; numpy's integers take a tenth of the memory of Python's."""
    import numpy as np

    fed = {"input_ids": np.asarray(example.input_ids, dtype=np.int32)}
    if example.completion_mask is not None:
        fed["completion_mask"] = np.asarray(example.completion_mask, dtype=np.int8)
    return fed


# ------------------------------------------------------------------------------------------------------------ arguments


def training_arguments() -> dict[str, str]:
    """Each argument of SFTConfig, with its type as it is written there."""
    from .loading import quiet_libraries

    quiet_libraries()
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
    known = training_arguments()
    for key, value in training.items():
        if key not in known:
            raise InputError(f"training: no argument {key!r} in trl.SFTConfig; {_near(key, known)}")
        if key == "output_dir":
            raise InputError("training.output_dir: the output folder is --out")
        kinds = set(re.findall(r"\b(int|float|bool|str|dict|list)\b", known[key]))
        if kinds and value is not None and type(value).__name__ not in kinds | ({"int"} if "float" in kinds else set()):
            raise InputError(f"training.{key}={value!r}: {' or '.join(sorted(kinds))} is expected")
    reports = training.get("report_to")
    for name in [reports] if isinstance(reports, str) else reports or []:
        _check_report(str(name))


PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit flytekitplugins-deck-standard"}
"""what to install for a name of `report_to`, where that is not the package's own"""


def _check_report(name: str) -> None:
    """Raises InputError unless transformers can report to `name` here."""
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    if name in ("none", "all", *get_available_reporting_integrations()):
        return
    try:
        for callback in get_reporting_integration_callbacks([name]):
            callback()
    except ValueError as error:
        raise InputError(f"training.report_to={name!r}: {error}") from error
    except (RuntimeError, ImportError) as error:  # how a callback says that its package is missing
        raise InputError(
            f"training.report_to={name!r}: its package is not installed: pip install {PACKAGES.get(name, name)}, or "
            f"leave it out: metrics.jsonl has the same numbers"
        ) from error


def _check_fsdp(training: dict[str, Any]) -> None:
    """Raises InputError where the arguments, or accelerate's launcher, ask for the first version of FSDP."""
    from ..nn.adapters import refuse_fsdp1

    config: Any = training.get("fsdp_config") or {}
    if isinstance(config, str) and config.lstrip().startswith("{"):
        with suppress(ValueError):
            config = json.loads(config)
    if isinstance(config, str):
        config = json_or_empty(Path(config).expanduser())
    version = config.get("version", config.get("fsdp_version"))
    refuse_fsdp1(None if version is None else str(version))


def _check_choosing(recipe: Finetune, validation: list[Row]) -> None:
    """Raises InputError for arguments that use validation rows where there are none."""
    training = recipe.training
    if recipe.early_stopping is not None:
        if recipe.early_stopping < 1:
            raise InputError(
                f"early_stopping={recipe.early_stopping}: at least 1 validation without a gain is expected"
            )
        if not validation:
            raise InputError(
                "early_stopping needs validation rows: pass --validation with a file, or a share such as 0.1"
            )
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


_PREPARED = {"corda": "preprocess_corda", "eva": "initialize_lora_eva_weights", "lora_ga": "preprocess_loraga"}
"""Values of init_lora_weights → the function of PEFT that has to be called with data of its own."""


def _check_start(recipe: Finetune) -> None:
    """Raises InputError for starts of PEFT's that change the base's weights, where these are quantized, or need a
    preparation that is not made here."""
    from .loading import is_quantized

    start = recipe.lora.options.get("init_lora_weights")
    kind = start.lower().split("_niter")[0] if isinstance(start, str) else ""
    why = ""
    if kind in ("pissa", "olora", "corda", "loftq") and (recipe.load or is_quantized(recipe.model)):
        why = "changes the weights of the base, and quantized weights are read-only"
    elif kind.startswith(tuple(_PREPARED)):
        name = next(name for name in _PREPARED if kind.startswith(name))
        why = f"needs peft's {_PREPARED[name]} with data of its own, which this command does not call"
    elif kind == "loftq":
        why = "quantizes the base in a way of its own, and this command does not"
    if why:
        raise InputError(
            f"lora.options.init_lora_weights={start!r} {why}; adapters that begin with what best makes up for the "
            "quantization error: llmtools quantize --adapter_rank R, then finetune --lora.init error"
        )


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
    if "per_device_train_batch_size" in recipe.training:  # a batch that fits in training fits in validation
        ours["per_device_eval_batch_size"] = recipe.training["per_device_train_batch_size"]
    if recipe.early_stopping is not None:
        ours |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    if 0 < recipe.training.get("max_steps", 0) < 100:
        ours["logging_steps"] = max(1, recipe.training["max_steps"] // 10)
    arguments = ours | recipe.training
    if form == "text" and arguments["packing"]:
        arguments.setdefault("packing_strategy", "wrapped")  # cuts anywhere and loses nothing
    elif arguments["packing"]:
        arguments.setdefault("packing_strategy", "bfd")
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):  # renamed in transformers 5.23
        new = old.replace("gradient", "activation")
        if old in arguments and new in training_arguments():
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
    callbacks: Sequence[Any],
) -> Any:
    """TRL's trainer without its printing."""
    try:
        import datasets
        from jinja2 import TemplateError
        from transformers import PrinterCallback
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise InputError(NEEDS_TRAIN.format(error=error)) from error
    from ..nn.adapters import prepare_for_training, refuse_fsdp1
    from ..train.heap import keep_large_blocks_apart

    try:
        args = SFTConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"training: {error}") from error
    refuse_fsdp1(str((getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version")))
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
            callbacks=list(callbacks),
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
            head = self.model.get_base_model().get_output_embeddings()
            self.from_logits = plain and hasattr(head, "token_adapter")  # trained tokens of a tied head: not TRL's case
            self.hits: list[Any] = []
            self.validated: list[Any] = []

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found = None
            if not model.training and "labels" in inputs:
                if self.from_logits:
                    outputs, found = _from_logits(model, inputs)
                    loss = found.sum / found.tokens.clamp(min=1)
                    result = (loss, outputs) if return_outputs else loss
                else:
                    result = super().compute_loss(model, inputs, return_outputs=return_outputs)
                    loss = result[0] if return_outputs else result
                tokens = (inputs["labels"][:, 1:] != -100).sum()
                self.validated.append(torch.stack([loss.detach().double() * tokens, tokens.double()]))
                return result
            if self.causal_loss is not None and model.training and not return_outputs:
                found = self.causal_loss(model, inputs)
            if found is None and self.from_logits and not return_outputs:
                _, found = _from_logits(model, inputs)
            if found is None:
                return super().compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )
            self.hits.append(torch.stack([found.correct, found.tokens]))
            if num_items_in_batch is None:
                return found.sum / found.tokens.clamp(min=1)
            loss = found.sum / torch.as_tensor(num_items_in_batch).to(found.sum).clamp(min=1)
            return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

        def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            """The Trainer's, whose loss is a mean over batches, with the mean over all learned tokens instead."""
            self.validated = []
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            if self.validated:
                total, tokens = self.accelerator.reduce(torch.stack(self.validated).sum(0), "sum").tolist()
                output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
            return output

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if self.hits and "loss" in logs:
                correct, tokens = torch.stack(self.hits).sum(0).tolist()
                logs = {**logs, "mean_token_accuracy": correct / max(tokens, 1)}
                self.hits.clear()
            super().log(logs, start_time)

    return Lean


def _from_logits(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """(the model's outputs, the loss of its logits)"""
    from ..nn.loss import loss_of_logits

    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    return outputs, loss_of_logits(outputs.logits[:, :-1], inputs["labels"][:, 1:])


def _watch(metrics: Path, checkpoint: Path | None, keeper: Any) -> Any:
    """The callback that shows progress, of validation too, writes one JSON line a record, and stops where the loss is
    no number."""
    from contextlib import ExitStack

    from transformers import TrainerCallback

    from ..progress import progress

    begun = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if is_first():
        _forget_after(metrics, begun)

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.stack, self.validation = ExitStack(), ExitStack()
            self.note = ""
            self.batches = 0
            """of this validation, so far"""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step < state.max_steps:
                self.step = self.stack.enter_context(progress("finetune", unit="steps"))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step(state.global_step, state.max_steps, self.note)

        def on_prediction_step(
            self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
        ) -> None:
            if self.batches == 0:
                self.validating = self.validation.enter_context(progress("validation", unit="batches", brief=True))
            self.batches += 1
            self.validating(self.batches, len(eval_dataloader))

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.batches = 0
            self.validation.close()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stack.close()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
            if keeper.stopped:  # a summary of what has not come to its end
                return
            numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
            bad = {key: value for key, value in numbers.items() if not math.isfinite(value)}
            if any(key in bad for key in ("loss", "eval_loss", "grad_norm")):
                self.validation.close()
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
    """Takes out the records of steps that are going to be made again, and what a kill left of a line."""
    from ..files import write_whole

    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_whole(metrics, "".join(f"{line}\n" for line in kept))


def _stopper(recipe: Finetune) -> list[Any]:
    """transformers' callback that ends a run which no longer gets better, if the recipe asks for it."""
    if recipe.early_stopping is None:
        return []
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(early_stopping_patience=recipe.early_stopping)]


def _best_loss(trainer: Any) -> float | None:
    """The validation loss of the adapter that is written, where that is the best one and not the last."""
    chosen = trainer.args.load_best_model_at_end and trainer.args.metric_for_best_model in ("loss", "eval_loss")
    return None if not chosen or trainer.state.best_metric is None else float(trainer.state.best_metric)


def _last(history: list[dict[str, Any]], key: str) -> float | None:
    return next((float(entry[key]) for entry in reversed(history) if key in entry), None)
