"""Rows of a task as training examples: prompts shortened, chats in the tokenizer's template, token ids."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import fields
from typing import Any

from ..errors import InputError
from .options import Finetune, Row

log = logging.getLogger(__name__)


def training_task(recipe: Finetune) -> Any:
    """The task with its options. Raises InputError for an unknown one, wrong options, or files that are not there."""
    from ..checkpoint.loading import task_class
    from ..data.tasks import make_task
    from ..data.tasks.base import check_data

    cls = task_class(recipe.task)
    known = {each.name for each in fields(cls)}  # type: ignore[arg-type]
    given = {"data": recipe.data, "validation_data": recipe.validation, "seed": recipe.seed}
    task = make_task(recipe.task, **{key: given[key] for key in given if key in known}, **recipe.options)
    check_data(cls, recipe.data, recipe.validation)
    return task


def rows_of(recipe: Finetune) -> tuple[Any, list[Row], list[Row], dict[str, Any]]:
    """(task, training rows, validation rows, its prompt format), checked before anything is loaded."""
    from ..checkpoint.loading import template_of
    from ..data.tasks.base import spread

    task = training_task(recipe)
    rows = task.train()
    train, validation = spread(rows, recipe.num_samples), spread(task.validation(), recipe.num_samples)
    if not train:
        raise InputError(f"{recipe.data}: there is nothing to train on")
    form = _form(train[0])
    prompt_format: dict[str, Any] = {"record_format": form, "template": template_of(task)}
    if form == "messages" and len(systems := _system_prompts(rows)) == 1:
        prompt_format["system_prompt"] = systems.pop()
    if form == "messages" and "assistant_only_loss" not in recipe.training:
        train, validation = turns(train), turns(validation)
    return task, train, validation, prompt_format


def _system_prompts(rows: list[Row]) -> set[str | None]:
    """The system prompts that chats begin with; None stands for chats without one."""
    first = (row["messages"][0] for row in rows)
    return {str(message["content"]) if message["role"] == "system" else None for message in first}


def _form(row: Row) -> str:
    """The form that a row is learned in. A record with an answer may have a text or messages of its own beside it."""
    from ..data.tasks.text import FORMS, form_of

    return "prompt" if all(key in row for key in FORMS["prompt"]) else form_of(row)


def turns(rows: list[Row]) -> list[Row]:
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


def shortened(rows: list[Row], task: Any, tokenizer: Any, limit: int | None) -> list[Row]:
    """Rows with nothing but the fields of their form, prompts shortened as the task does it, with room for the answer.

    A prompt that cannot be short enough stays as it is; `examples_of` leaves it out.
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


def examples_of(rows: list[Row], tokenizer: Any, arguments: dict[str, Any], what: str) -> tuple[list[Row], int]:
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
