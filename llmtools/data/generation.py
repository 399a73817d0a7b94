"""Generation from prompts, and the choice between given continuations by likelihood.

With a batch size of 1 nothing is padded, and an output does not depend on the other prompts. Larger batches are several
times faster; prompts are left-padded and the padding is masked, so outputs are the same up to rounding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .metrics import OnStep, model_positions

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


LEAST_TEMPERATURE = 1e-5
"""Smallest temperature above 0: below it, logits become infinite."""


class GeneratedText(NamedTuple):
    """The text that a model generated after a prompt."""

    text: str
    """Generated text without the prompt, special tokens, and what follows a stop string."""
    tokens: int
    """Number of generated tokens, an end-of-text token included."""


def complete(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **options: Any) -> list[str]:
    """The texts of `generate_completions`, with its options."""
    return [completion.text for completion in generate_completions(model, tokenizer, prompts, **options)]


@torch.no_grad()
def generate_completions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    chat: bool = False,
    batch_size: int = 1,
    on_step: OnStep | None = None,
) -> list[GeneratedText]:
    """The completion of each prompt: greedy decoding at temperature 0, else sampling with `seed`.

    It ends at an end-of-text token, before the first of the strings in `stop`, or after `max_new_tokens`. Of the
    model's generation config only the special tokens are used, so that temperature 0 is greedy for every model.
    Sampling depends on the batch size, too. `chat`: the prompts are formatted with the tokenizer's chat template,
    special tokens included, so none are added.

    Raises InputError, before anything is generated, if a prompt and `max_new_tokens` do not fit into the model's
    positions, and for a temperature that is negative, not finite, or too small to divide logits by.
    """
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise InputError(f"temperature={temperature}: 0 (greedy decoding), or at least {LEAST_TEMPERATURE} is expected")
    ids = [_prompt_ids(tokenizer, prompt, number, chat) for number, prompt in enumerate(prompts, start=1)]
    _check_positions(model, ids, max_new_tokens)
    device = next(model.parameters()).device
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    outputs = [GeneratedText("", 0)] * len(prompts)
    ends_of_text = _ends_of_text(model, tokenizer)
    done = 0
    with _evaluating(model), _plain_generation(model, ends_of_text):
        for batch in _batches([len(each) for each in ids], batch_size):
            inputs, mask = _padded([ids[index] for index in batch], _padding(tokenizer), left=True)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed + batch[0])
                generated = model.generate(  # type: ignore[operator]
                    input_ids=inputs.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max_new_tokens,
                    pad_token_id=_padding(tokenizer),
                    **sampling,
                    **_stopping(tokenizer, stop, inputs.shape[1]),
                )
            for index, row in zip(batch, generated[:, inputs.shape[1] :].tolist(), strict=True):
                count = next((at + 1 for at, token in enumerate(row) if token in ends_of_text), len(row))
                text = _text_after(tokenizer, ids[index] + row[:count], len(ids[index]))
                ends = [at for at in map(text.find, stop) if at >= 0]
                outputs[index] = GeneratedText(text[: min(ends)] if ends else text, count)
            done += len(batch)
            if on_step is not None:
                on_step(done, len(prompts))
    return outputs


@torch.no_grad()
def choose(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    choices: list[str],
    *,
    batch_size: int = 1,
    on_step: OnStep | None = None,
) -> list[int]:
    """For each prompt, the index of the most likely of `choices` after it: the largest sum of log-probabilities.

    Raises InputError if a prompt with a choice does not fit into the model's positions.
    """
    device = next(model.parameters()).device
    chosen = [0] * len(prompts)
    done = 0
    selects = (
        "logits_to_keep" in inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    )
    starts = [_prompt_ids(tokenizer, prompt, number) for number, prompt in enumerate(prompts, start=1)]
    with _evaluating(model):
        for batch in _batches([len(start) for start in starts], batch_size):
            whole = [_ids(tokenizer, prompts[index] + choice) for index in batch for choice in choices]
            _check_positions(model, whole, 0)
            begins = [  # at least 1: the first token has nothing to be predicted from
                max(1, common_length(starts[index], whole[k]))
                for k, index in enumerate(i for i in batch for _ in choices)
            ]
            inputs, mask = _padded(whole, _padding(tokenizer), left=False)
            read = {"logits_to_keep": inputs.shape[1] - min(begins) + 1} if selects else {}
            logits = model(input_ids=inputs.to(device), attention_mask=mask.to(device), use_cache=False, **read).logits
            skipped = inputs.shape[1] - logits.shape[1]
            sums = [
                _log_likelihood(logits[k, begin - 1 - skipped : len(row) - 1 - skipped], row[begin:])
                for k, (row, begin) in enumerate(zip(whole, begins, strict=True))
            ]
            for position, index in enumerate(batch):
                own = sums[position * len(choices) : (position + 1) * len(choices)]
                chosen[index] = max(range(len(choices)), key=own.__getitem__)
            done += len(batch)
            if on_step is not None:
                on_step(done, len(prompts))
    return chosen


def _ends_of_text(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-text tokens: those of the model's generation config, else the tokenizer's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = ends if isinstance(ends, list) else [ends if ends is not None else tokenizer.eos_token_id]
    return [int(each) for each in ids if each is not None]


@contextmanager
def _plain_generation(model: Any, ends_of_text: list[int]) -> Iterator[None]:
    """Gives the model a generation config with its special tokens alone; restores its own on exit.

    transformers takes every argument that a call omits from that config: penalties, suppressed tokens, stop strings.
    """
    from transformers import GenerationConfig

    owners = [model]  # a PEFT model has a config of its own, and its base's
    if hasattr(model, "get_base_model"):
        owners.append(model.get_base_model())
    former = [owner.generation_config for owner in owners]
    kept = {key: getattr(former[-1], key, None) for key in ("bos_token_id", "decoder_start_token_id")}
    for owner in owners:
        owner.generation_config = GenerationConfig(eos_token_id=ends_of_text or None, **kept)
    try:
        yield
    finally:
        for owner, config in zip(owners, former, strict=True):
            owner.generation_config = config


class _evaluating:
    """Puts the model into evaluation mode; restores its mode on exit."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        self.model.train(self.was_training)


def _log_likelihood(logits: Tensor, ids: list[int]) -> float:
    """Σ log p(ids[i]) under logits [i, vocabulary], any float type."""
    logs = logits.float().log_softmax(-1)
    return float(logs.gather(-1, torch.tensor(ids, device=logs.device)[:, None]).sum())


def common_length(a: list[int], b: list[int]) -> int:
    """Length of the common prefix of two rows of tokens."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    """Indices in batches of rows of similar length, so that little is padded."""
    if size < 1:
        raise InputError(f"batch_size={size}: at least 1 is needed")
    order = range(len(lengths)) if size == 1 else sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [list(order[start : start + size]) for start in range(0, len(lengths), size)]


def _padded(rows: list[list[int]], padding: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 [rows, longest]."""
    longest = max(map(len, rows))
    fill = [[padding] * (longest - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, fill, strict=True)]
    mask = [[0] * len(pad) + [1] * len(row) for row, pad in zip(rows, fill, strict=True)]
    if not left:
        mask = [each[::-1] for each in mask]
    return torch.tensor(ids), torch.tensor(mask)


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    known = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return int(known or 0)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool = False) -> list[int]:
    """Token ids of a text: at most one start token, no end token that the text lacks; a chat has its template's."""
    begun = chat or (bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token)))
    ids = list(tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"])
    if not chat and tokenizer.eos_token:  # a tokenizer may append an end token to every text; this text continues
        own = int(text.endswith(str(tokenizer.eos_token)))
        while ids[-1 - own :] == [tokenizer.eos_token_id] * (1 + own):
            ids.pop()
    return ids


def text_ids(tokenizer: PreTrainedTokenizerBase, *texts: str) -> list[list[int]]:
    """The ids of each text as generation and evaluation use them: at most one start token, no appended end token."""
    return [_ids(tokenizer, text) for text in texts]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, number: int, chat: bool = False) -> list[int]:
    ids = _ids(tokenizer, prompt, chat)
    if not ids:
        raise InputError(f"prompt {number} is empty and the tokenizer adds no start token; give a text")
    return ids


def _check_positions(model: nn.Module, ids: list[list[int]], max_new_tokens: int) -> None:
    positions = model_positions(model)
    for number, row in enumerate(ids, start=1):
        if positions is not None and len(row) + max_new_tokens > positions:
            raise InputError(
                f"prompt {number} has {len(row)} tokens; with max_new_tokens={max_new_tokens} that is more than "
                f"the model's {positions} positions; shorten one of the two"
            )


def _stopping(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], length: int) -> dict[str, Any]:
    """The argument of `model.generate` that ends a row once one of `stop` is generated after `length` tokens."""
    if not stop:
        return {}
    from transformers import StoppingCriteria, StoppingCriteriaList

    tail = max(map(len, stop)) + 1  # tokens: a token is at least a character, except for parts of one

    class StopStrings(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            texts = tokenizer.batch_decode(input_ids[:, max(length, input_ids.shape[1] - tail) :])
            return torch.tensor([any(string in text for string in stop) for text in texts], device=input_ids.device)

    return {"stopping_criteria": StoppingCriteriaList([StopStrings()])}


def _text_after(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int) -> str:
    """The text of ids[length:], decoded together with the preceding ids, or its leading space would be lost."""
    before = str(tokenizer.decode(ids[:length], skip_special_tokens=True))
    whole = str(tokenizer.decode(ids, skip_special_tokens=True))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(ids[length:], skip_special_tokens=True))
