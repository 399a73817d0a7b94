"""Rows of a task as training examples: prompts truncated, chats in the tokenizer's template, token ids."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import fields
from typing import Any

from ..errors import InputError
from .options import Finetune, Row

log = logging.getLogger(__name__)


def training_task(recipe: Finetune) -> Any:
    """The task with its options. Raises InputError for an unknown task, invalid options, or missing files."""
    from ..checkpoint.loading import task_class
    from ..data.tasks import make_task
    from ..data.tasks.base import check_data

    cls = task_class(recipe.task)
    known = {each.name for each in fields(cls)}  # type: ignore[arg-type]
    given = {"data": recipe.data, "validation_data": recipe.validation, "seed": recipe.seed}
    for key, flag in (("data", "--data"), ("validation_data", "--validation")):
        if given[key] and key in recipe.options:
            raise InputError(f"{key!r} is given twice: as {flag} and among the options")
    task = make_task(recipe.task, **{**{key: given[key] for key in given if key in known}, **recipe.options})
    check_data(cls, recipe.data, recipe.validation)
    return task


def rows_of(recipe: Finetune) -> tuple[Any, list[Row], list[Row], dict[str, Any]]:
    """(task, training rows, validation rows, prompt format), read and checked before the model is loaded.

    The prompt format holds ``record_format`` and ``template``, and for chats that share one ``system_prompt``.
    """
    from ..checkpoint.loading import template_of
    from ..data.tasks.base import spread

    task = training_task(recipe)
    rows = task.train()
    train, validation = spread(rows, recipe.num_samples), spread(task.validation(), recipe.num_samples)
    if not train:
        raise InputError(f"{recipe.data}: there are no training examples")
    record_format = _record_format(train[0])
    prompt_format: dict[str, Any] = {"record_format": record_format, "template": template_of(task)}
    if record_format == "messages" and len(systems := _system_prompts(rows)) == 1:
        prompt_format["system_prompt"] = systems.pop()
    if record_format == "messages" and "assistant_only_loss" not in recipe.training:
        train, validation = turns(train), turns(validation)
    return task, train, validation, prompt_format


def _system_prompts(rows: list[Row]) -> set[str | None]:
    """The system prompts of chats; None stands for chats without one."""
    first = (row["messages"][0] for row in rows)
    return {str(message["content"]) if message["role"] == "system" else None for message in first}


def _record_format(row: Row) -> str:
    """The format that a row is trained in: prompt where it has prompt and completion, whatever fields are beside."""
    from ..data.tasks.text import RECORD_FORMATS, record_format_of

    return "prompt" if all(key in row for key in RECORD_FORMATS["prompt"]) else record_format_of(row)


def turns(rows: list[Row]) -> list[Row]:
    """Chats as one example per answer: the preceding messages are the prompt, the answer is the completion.

    So the loss is on the answers alone, with any chat template. (TRL can do it in one example where the template marks
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
    """Rows with the fields of their format only, prompts truncated by the task so that the answer fits into `limit`.

    A prompt that cannot be short enough is unchanged; `examples_of` leaves the example out.
    """
    from ..data.tasks.text import OPTIONAL_FIELDS, RECORD_FORMATS

    short = []
    for row in rows:
        record_format = _record_format(row)
        if record_format == "prompt" and isinstance(row["prompt"], str):
            answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            with suppress(InputError):
                row = task.fitted(row, tokenizer, limit and limit - len(answer) - 1)
        kept = (*RECORD_FORMATS[record_format], *OPTIONAL_FIELDS["messages"])
        short.append({key: row[key] for key in kept if row.get(key) is not None})
    return short


def examples_of(rows: list[Row], tokenizer: Any, arguments: dict[str, Any], split: str) -> tuple[list[Row], int]:
    """(examples for SFTTrainer, number of those left out, being longer than max_length).

    An example has ``input_ids``, int32 [tokens], and ``completion_mask``, int8 [tokens], where it has an answer.
    SFTTrainer would truncate long examples at the end, which is the answer. Plain text has no answer; packed and
    wrapped, the default, it is cut into sequences, and no token is lost. Chats whose answers the template marks
    (--training.assistant_only_loss) are tokenized by the trainer. split: training or validation, for messages.

    Raises InputError where every example is too long.
    """
    from ..data.tokens import tokenized

    if not rows or "messages" in rows[0]:
        return rows, 0
    max_length, plain = arguments["max_length"], "text" in rows[0]
    found = [tokenized(row, tokenizer, f"{split} example {number}") for number, row in enumerate(rows, start=1)]
    if appended := sum(example.end_appended for example in found):
        log.warning(
            "the chat template writes no end token after the answers of %d %s examples; %r is appended, so that "
            "the model learns to stop",
            appended,
            split,
            tokenizer.eos_token,
        )
    wrapped = plain and arguments["packing"] and arguments["packing_strategy"] == "wrapped"
    long = [
        index for index, each in enumerate(found) if max_length and len(each.input_ids) > max_length and not wrapped
    ]
    if long and len(long) == len(rows) and not plain:
        raise InputError(
            f"all {len(rows)} {split} examples are longer than max_length={max_length} tokens (the shortest has "
            f"{min(len(each.input_ids) for each in found)}); increase --training.max_length, or shorten them"
        )
    if long:
        log.warning(
            "%d of %d %s examples are longer than max_length=%d tokens and %s: %s%s",
            len(long),
            len(rows),
            split,
            max_length,
            "truncated (not with --training.packing true)" if plain else "left out, so that no answer is truncated",
            ", ".join(f"number {index + 1} ({len(found[index].input_ids)} tokens)" for index in long[:3]),
            ", …" if len(long) > 3 else "",
        )
    left_out = set() if plain else set(long)
    return [_arrays(each) for index, each in enumerate(found) if index not in left_out], len(left_out)


def _arrays(example: Any) -> Row:
    """An example as a row of the trainer's data set, in numpy arrays: a tenth of the memory of Python's integers."""
    import numpy as np

    arrays = {"input_ids": np.asarray(example.input_ids, dtype=np.int32)}
    if example.completion_mask is not None:
        arrays["completion_mask"] = np.asarray(example.completion_mask, dtype=np.int8)
    return arrays
