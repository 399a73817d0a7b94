"""Tokenization of training examples: one function for all record formats, with the special tokens of inference.

    text                  ids of the text, then the end-of-text token; loss on all
    prompt, completion    ids of both together, then the end-of-text token; loss on what follows the prompt
    chat                  ids of the chat in the tokenizer's chat template; loss on the last answer

There is at most one start token, whether the row or the tokenizer adds it, and one end token at the end. A model
trained in a chat template without an end token after an answer would never stop; one is appended then.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError
from .generation import common_length, text_ids
from .tasks.base import in_chat_template
from .text_io import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """Token ids of a training example."""

    input_ids: list[int]
    """Token ids of prompt and completion."""
    completion_mask: list[int] | None
    """Mask of the loss, 1 for each token in it, as in `trl.SFTTrainer`; None for all."""
    end_appended: bool = False
    """Whether an end-of-text token was appended that the chat template lacks."""


def tokenized(row: Row, tokenizer: PreTrainedTokenizerBase, where: str = "row") -> Example:
    """The token ids of a row ``{"text"}``, ``{"prompt", "completion"}`` (strings, or lists of messages with ``tools``).

    Raises InputError, led by `where`, for a chat that the template rejects, or a row without a token in the loss.
    """
    end = tokenizer.eos_token_id
    if "text" in row:
        return Example(_ended(text_ids(tokenizer, row["text"])[0], end), None)
    if isinstance(row["prompt"], str):
        prompt, whole = text_ids(tokenizer, row["prompt"], row["prompt"] + row["completion"])
        ids, appended = _ended(whole, end), False
    else:
        prompt, ids = _chat(row, tokenizer, where)
        ids, appended = _ended_chat(ids, len(prompt), tokenizer)
    begin = common_length(prompt, ids)
    if begin == len(ids):
        raise InputError(f"{where}: the completion has no tokens, there is nothing to train on")
    return Example(ids, [0] * begin + [1] * (len(ids) - begin), appended)


def _ended(ids: list[int], end: int | None) -> list[int]:
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _chat(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[int]]:
    """(ids of the prompt with the generation prompt, ids of the whole chat)."""
    tools = row.get("tools")
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "where": where}
    if tools:
        options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    prompt = in_chat_template(row["prompt"], tokenizer, add_generation_prompt=True, **options)["input_ids"]
    whole = in_chat_template([*row["prompt"], *row["completion"]], tokenizer, **options)["input_ids"]
    return list(prompt), list(whole)


def _ended_chat(ids: list[int], begin: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """(ids, whether an end-of-text token was appended: where none of the answer's tokens is a special one)."""
    special = {tokenizer.eos_token_id, *tokenizer.all_special_ids}
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if tokenizer.eos_token_id is None or special.intersection(ids[begin:]):
        return ids, False
    return [*ids, tokenizer.eos_token_id], True
