"""Continue prompts, one at a time: no padding, so an answer does not depend on its neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from .metrics import OnStep, model_positions

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[str]:
    """What the model writes after each prompt, without the prompt: greedy at temperature 0, else drawn with `seed`.

    Raises InputError if a prompt and `max_new_tokens` do not fit into the model's positions.
    """
    positions = model_positions(model)
    device = next(model.parameters()).device
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    was_training = model.training
    model.eval()
    outputs = []
    try:
        for done, prompt in enumerate(prompts):
            batch = tokenizer(prompt, return_tensors="pt", verbose=False).to(device)
            length = batch["input_ids"].shape[1]
            if length == 0:
                raise InputError(f"prompt {done + 1} is empty and the tokenizer adds no start token; write some words")
            if positions is not None and length + max_new_tokens > positions:
                raise InputError(
                    f"prompt {done + 1} has {length} tokens; with max_new_tokens={max_new_tokens} that is more than "
                    f"the model's {positions} positions; shorten one of the two"
                )
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed + done)
                ids = model.generate(  # type: ignore[operator]
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=max_new_tokens,
                    pad_token_id=padding,
                    **drawn,
                )
            outputs.append(_text_after(tokenizer, ids[0].tolist(), length))
            if on_step is not None:
                on_step(done + 1, len(prompts))
    finally:
        model.train(was_training)
    return outputs


def _text_after(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int) -> str:
    """The text of ids[length:]. Decoded together with what precedes, or a leading space of it would be lost."""
    before = str(tokenizer.decode(ids[:length], skip_special_tokens=True))
    whole = str(tokenizer.decode(ids, skip_special_tokens=True))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(ids[length:], skip_special_tokens=True))
