"""Finetune adapters on a model, quantized or not. Adapters are PEFT's, training is TRL's SFTTrainer.

A run works in a folder beside the output, ``OUT.training``: checkpoints, ``metrics.jsonl``, ``run.json``. At the end
the adapter is written to ``OUT`` atomically, with a plot of the losses and the last checkpoints for a later
``--resume``, and the run folder is removed. A run that was stopped is continued by ``--resume``, and ends with the same
bits as one that was not. It must have the same inputs: ``run.json`` holds hashes of the data, the model and the
tokenizer; in ``OUT`` it is part of ``llmtools.json``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..ranks import is_first
from ..signals import Request, Stopped, deferred, interruptible
from ..train.adapters import (
    check_initialisation,
    check_merge,
    fit_config,
    lora_config,
    recommend_initialisation,
    warn_without_adapter,
)
from ..train.arguments import arguments_of, check_fsdp, check_training, check_validation_use, unbooled
from ..train.callbacks import (
    checkpoint_interval,
    early_stopping,
    log_pending_stop,
    metrics_callback,
    spaced_validation,
    warmup,
)
from ..train.options import Finetune, FinetuneResult, Lora, facts
from ..train.preflight import check_memory
from ..train.rows import examples_of, rows_of, shortened
from ..train.run_folder import TENSORS, base_model_name, clear, run_folder, wait_for_all
from ..train.trainer import best_loss, last_logged, make_trainer, run_trainer

__all__ = ["Finetune", "FinetuneResult", "Lora", "finetune"]


def finetune(recipe: Finetune, callbacks: Sequence[Any] = ()) -> FinetuneResult:
    """Trains adapters and writes them as a PEFT folder.

    callbacks: further TrainerCallbacks. Raises InputError for options, data and models that do not go together, and
    where training diverges.
    """
    from ..checkpoint.loading import check_model
    from ..files import check_no_input, claim

    recipe = replace(recipe, training={key: unbooled(key, value) for key, value in recipe.training.items()})
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


def _finetune(recipe: Finetune, out: Path, work: Path, callbacks: Sequence[Any]) -> FinetuneResult:
    from ..checkpoint.folder import load_lora_init
    from ..checkpoint.gguf_base import facts_of_base
    from ..checkpoint.inputs import content_of_model
    from ..checkpoint.loading import compute_fast, content_of_template, import_plugins, open_model, quiet_libraries
    from ..checkpoint.run_info import as_json, record
    from ..content import rows_content, tensors_content
    from ..data.tasks.base import needs_chat_template
    from ..files import METADATA
    from ..model.fingerprint import FINGERPRINT, as_text, fingerprint
    from ..model.zeros_lora import keep_pooled
    from ..nn.lora_init import initialize_lora
    from ..nn.swap import count_parameters
    from ..train import checkpoints
    from ..train.learning import learning_check

    began = time.monotonic()
    task, train, validation, prompt_format = rows_of(recipe)
    inputs = {"training data": rows_content(train), "validation data": rows_content(validation)}
    quiet_libraries()
    check_training(recipe.training)
    check_fsdp(recipe.training)
    check_validation_use(recipe, validation)
    check_initialisation(recipe.lora, recipe.model, recipe.load)
    check_merge(recipe)
    config = lora_config(recipe.lora, merge=recipe.merge)
    initial = load_lora_init(recipe.model) if recipe.lora.init == "error" else None

    import_plugins(recipe.plugin)
    model, tokenizer = open_model(
        recipe.model,
        load=recipe.load,
        trust_remote_code=recipe.trust_remote_code,
        verify=recipe.verify,
        offload=recipe.offload,
    )
    recommend_initialisation(recipe.lora, recipe.model, model)
    if is_first():
        inputs |= content_of_model(recipe.model)
        inputs |= {TENSORS: tensors} if (tensors := tensors_content(recipe.model)) is not None else {}
    base = fingerprint(model)
    file = facts_of_base(recipe.model, model) if is_first() else {}
    compute_fast(model, recipe.offload)
    fit_config(config, model, recipe.lora, merge=recipe.merge)
    if prompt_format["record_format"] == "messages":
        needs_chat_template(tokenizer)
        prompt_format["chat_template"] = content_of_template(tokenizer.chat_template)
    if tokenizer.eos_token is None:
        raise InputError(f"{recipe.model}: its tokenizer has no end-of-text token, which ends every training example")
    arguments = arguments_of(recipe, work, model, prompt_format["record_format"], bool(validation), task.max_length())
    train, validation = (shortened(rows, task, tokenizer, arguments["max_length"]) for rows in (train, validation))
    train, left_out = examples_of(train, tokenizer, arguments, "training")
    validation, _ = examples_of(validation, tokenizer, arguments, "validation")
    if "completion_mask" in train[0]:
        arguments.setdefault("completion_only_loss", True)

    run = record(
        "finetune", recipe, prompt_format=prompt_format, training=arguments, base_model=base_model_name(recipe.model)
    )
    run |= {"merge": recipe.merge} if recipe.merge else {}
    run |= {"inputs": inputs, "facts": {"base": file}}
    with run_folder(recipe, out, work, run, base) as checkpoint:
        request = Request()
        notes = {FINGERPRINT: as_text(base)}
        if recipe.merge:
            notes[METADATA] = as_json({"merge": recipe.merge})
        keeper = checkpoints.keeper(
            request, checkpoint_interval(recipe.training), also=[work / "metrics.jsonl"], notes=notes
        )
        metrics = metrics_callback(work / "metrics.jsonl", checkpoint, keeper)
        listeners = [metrics, keeper, learning_check(), *spaced_validation(recipe), *early_stopping(recipe), *callbacks]
        trainer = make_trainer(model, tokenizer, arguments, config, train, validation, listeners)
        warn_without_adapter(trainer.model, recipe.lora)
        if recipe.merge == "exact":
            trainer.add_callback(warmup(trainer.model, recipe.merge_warmup))
        if initial is not None and checkpoint is None:
            initialize_lora(trainer.model, initial)
        if recipe.merge == "zeros":
            trainer.add_callback(keep_pooled(trainer.model))
        for adapter in trainer.model.peft_config.values():
            adapter.base_model_name_or_path = run["base_model"]
            for names in ("target_modules", "exclude_modules"):  # sets, whose order would change from run to run
                if isinstance(found := getattr(adapter, names, None), set):
                    setattr(adapter, names, sorted(found))
        check_memory(trainer, force=recipe.force)
        with deferred(request, log_pending_stop) if arguments["save_strategy"] != "no" else nullcontext():
            run_trainer(trainer, checkpoint)
        if keeper.stopped:
            raise Stopped(exit_code=request.exit_code)
        history = trainer.state.log_history
        counted = count_parameters(trainer.model)
        result = FinetuneResult(
            out=recipe.out,
            steps=trainer.state.global_step,
            train_loss=last_logged(history, "loss"),
            validation_loss=best_loss(trainer) or last_logged(history, "eval_loss"),
            trainable=counted.trainable,
            parameters=counted.total,
            examples=len(train),
            left_out=left_out,
            seconds=time.monotonic() - began,
        )
        if is_first():
            _write_adapter(recipe, trainer, result, run, out, work, notes[FINGERPRINT])
        wait_for_all()  # no process continues, or ends, before the adapter is on the disk
    if is_first():
        clear(work, out)
    return result


def _write_adapter(
    recipe: Finetune, trainer: Any, result: FinetuneResult, run: dict[str, Any], out: Path, work: Path, base: str
) -> None:
    """Writes the output folder, whole or not at all. base: the text of the base's fingerprint."""
    from ..checkpoint.loading import with_former_keys
    from ..checkpoint.model_card import CARD, write_card
    from ..checkpoint.run_info import write_json
    from ..files import METADATA, RUN, NameTaken, files_of, remove, sort_metadata, write_whole, writing
    from ..model.fingerprint import FINGERPRINT
    from ..model.integrity import record_checksums
    from ..train import checkpoints
    from ..train.losses import plot_losses

    try:
        with writing(out, overwrite=recipe.overwrite or recipe.resume) as folder:
            trainer.model.save_pretrained(folder)
            sort_metadata(folder)
            write_whole(folder / FINGERPRINT, base)
            if (work / "metrics.jsonl").exists():
                shutil.copy(work / "metrics.jsonl", folder / "metrics.jsonl")
            plot_losses(folder)
            best = getattr(trainer.state, "best_global_step", None)
            checkpoints.keep(work / "checkpoints", folder / "checkpoints", best)
            info = {**run, "facts": facts(recipe, result, run["facts"]["base"]), "result": asdict(result)}
            write_json(folder / RUN, {**info, "words": with_former_keys(run["prompt_format"])})  # of earlier versions
            info["files"] = files_of(folder, CARD)
            write_json(folder / METADATA, {**info, "checksums": record_checksums(folder, info)})
            write_card(folder, name=out.name, former=out)  # instead of PEFT's empty template
    except NameTaken:
        remove(work, of=out)
        raise
    except InputError as error:
        if not checkpoints.all_in(work / "checkpoints"):
            raise
        raise InputError(f"{error} but the checkpoints in {work}; --resume writes it from them") from error
