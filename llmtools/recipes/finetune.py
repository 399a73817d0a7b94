"""Finetune adapters on a model, quantized or not. Adapters are PEFT's, training is TRL's SFTTrainer.

Work goes on in a folder beside the output, ``OUT.training``: checkpoints, ``metrics.jsonl``, ``run.json``. At the end
the adapter is written to ``OUT`` in one piece, with a picture of the losses and the last checkpoints for a later
``--resume``, and the work folder goes. A run that was stopped is continued by ``--resume``; it ends with the same bits
as one that was not. It goes on with what it began with: ``run.json`` holds hashes of the rows, the model and the
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
from ..signals import Request, Stopped, interruptible, put_off
from ..train.adapters import check_start, fit_to, lora_config, say_without_adapter
from ..train.arguments import arguments_of, check_choosing, check_fsdp, check_training, yes_or_no
from ..train.callbacks import say_when_it_ends, seconds, spaced, stopper, watch
from ..train.options import Finetune, Finetuned, Lora, facts
from ..train.rows import examples_of, rows_of, shortened
from ..train.run_folder import TENSORS, done, lasting_name, together, working
from ..train.trainer import best_loss, last_logged, make_trainer, run_trainer

__all__ = ["Finetune", "Finetuned", "Lora", "finetune"]


def finetune(recipe: Finetune, callbacks: Sequence[Any] = ()) -> Finetuned:
    """Trains adapters and writes them as a PEFT folder; `callbacks` are called as the Trainer's are."""
    from ..checkpoint.loading import check_model
    from ..files import check_no_input, claim

    recipe = replace(recipe, training={key: yes_or_no(key, value) for key, value in recipe.training.items()})
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
    from ..checkpoint.loading import content_of_template, import_plugins, open_model, quiet_libraries
    from ..checkpoint.model_card import CARD, write_card
    from ..checkpoint.run_info import record, write_json
    from ..content import rows_content, tensors_content
    from ..data.tasks.base import needs_chat_template
    from ..files import MARK, NameTaken, files_of, remove, sort_metadata, write_whole, writing
    from ..model.fingerprint import FINGERPRINT, as_text, fingerprint
    from ..model.integrity import note_checksums
    from ..nn.lora_init import start_adapters
    from ..nn.swap import count_parameters
    from ..train import checkpoints
    from ..train.learning import learning_check
    from ..train.losses import draw_losses

    began = time.monotonic()
    task, train, validation, prompt_format = rows_of(recipe)
    inputs = {"training data": rows_content(train), "validation data": rows_content(validation)}
    quiet_libraries()
    check_training(recipe.training)
    check_fsdp(recipe.training)
    check_choosing(recipe, validation)
    check_start(recipe)
    config = lora_config(recipe)
    starts = load_starts(recipe.model) if recipe.lora.init == "error" else None

    import_plugins(recipe.plugin)
    model, tokenizer = open_model(
        recipe.model, load=recipe.load, trust_remote_code=recipe.trust_remote_code, verify=recipe.verify
    )
    if is_first():
        inputs |= content_of_model(recipe.model)
        inputs |= {TENSORS: tensors} if (tensors := tensors_content(recipe.model)) is not None else {}
    base = fingerprint(model)
    fit_to(config, model, recipe.lora)
    if prompt_format["record_format"] == "messages":
        needs_chat_template(tokenizer)
        prompt_format["chat_template"] = content_of_template(tokenizer.chat_template)
    if tokenizer.eos_token is None:
        raise InputError(f"{recipe.model}: its tokenizer has no end-of-text token, which training teaches to write")
    arguments = arguments_of(recipe, work, model, prompt_format["record_format"], bool(validation), task.max_length())
    train, validation = (shortened(rows, task, tokenizer, arguments["max_length"]) for rows in (train, validation))
    train, left_out = examples_of(train, tokenizer, arguments, "training")
    validation, _ = examples_of(validation, tokenizer, arguments, "validation")
    if "completion_mask" in train[0]:
        arguments.setdefault("completion_only_loss", True)

    run = record(
        "finetune", recipe, prompt_format=prompt_format, training=arguments, base_model=lasting_name(recipe.model)
    )
    run["inputs"] = inputs
    with working(recipe, out, work, run, base) as checkpoint:
        request = Request()
        notes = {FINGERPRINT: as_text(base)}
        keeper = checkpoints.keeper(request, seconds(recipe.training), also=[work / "metrics.jsonl"], notes=notes)
        watcher = watch(work / "metrics.jsonl", checkpoint, keeper)
        listeners = [watcher, keeper, learning_check(), *spaced(recipe), *stopper(recipe), *callbacks]
        trainer = make_trainer(model, tokenizer, arguments, config, train, validation, listeners)
        say_without_adapter(trainer.model, recipe.lora)
        if starts is not None and checkpoint is None:
            start_adapters(trainer.model, starts)
        for adapter in trainer.model.peft_config.values():
            adapter.base_model_name_or_path = run["base_model"]
            for names in ("target_modules", "exclude_modules"):  # sets, which are written in another order each time
                if isinstance(found := getattr(adapter, names, None), set):
                    setattr(adapter, names, sorted(found))
        with put_off(request, say_when_it_ends) if arguments["save_strategy"] != "no" else nullcontext():
            run_trainer(trainer, checkpoint)
        if keeper.stopped:
            raise Stopped(exit_code=request.exit_code)
        history = trainer.state.log_history
        counted = count_parameters(trainer.model)
        result = Finetuned(
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
            try:
                with writing(out, overwrite=recipe.overwrite or recipe.resume) as folder:
                    trainer.model.save_pretrained(folder)
                    sort_metadata(folder)
                    write_whole(folder / FINGERPRINT, notes[FINGERPRINT])
                    if (work / "metrics.jsonl").exists():
                        shutil.copy(work / "metrics.jsonl", folder / "metrics.jsonl")
                    draw_losses(folder)
                    best = getattr(trainer.state, "best_global_step", None)
                    checkpoints.keep(work / "checkpoints", folder / "checkpoints", best)
                    info = {**run, "facts": facts(recipe, result), "result": asdict(result)}
                    info["files"] = files_of(folder, CARD)
                    write_json(folder / MARK, {**info, "checksums": note_checksums(folder, info)})
                    write_card(folder, name=out.name, former=out)  # in place of PEFT's empty form
            except NameTaken:
                remove(work, of=out)
                raise
            except InputError as error:
                if not checkpoints.all_in(work / "checkpoints"):
                    raise
                raise InputError(f"{error} but the checkpoints in {work}; --resume writes it from them") from error
        together()  # nobody goes on, or ends, before the adapter is on the disk
    if is_first():
        done(work, out)
    return result
