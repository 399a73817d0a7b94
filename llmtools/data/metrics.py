"""Perplexity, by the protocol of the published figures; ROUGE.

For perplexity the text is one row of tokens, split into consecutive windows of `context` tokens that do not overlap;
a last, shorter window is dropped. Within a window each token but the first is predicted from those before it:
context − 1 predictions. Perplexity is the exponential of the mean over windows of the mean negative log-likelihood. A
longer context gives a lower perplexity, so the context belongs to the result (4096 instead of 2048 moves LLaMA-2-7B
from 5.47 to 5.12).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.wide import run_wide

OnStep = Callable[[int, int], None]
"""Progress callback: (number of steps done, total)."""

CHUNK = 256
"""Number of positions whose logits are cast to float32 at a time: 256 with a vocabulary of 128 000 are 125 MiB."""


class Perplexity(NamedTuple):
    """A perplexity with the windows that it was measured on."""

    value: float
    """Perplexity, exp(nll)."""
    nll: float
    """Mean negative log-likelihood of a token, in nats."""
    tokens: int
    """Number of tokens in all windows: windows · context."""
    context: int
    """Tokens in a window."""


def perplexity(model: nn.Module, ids: Tensor, *, context: int, on_step: OnStep | None = None) -> Perplexity:
    """Perplexity of a causal language model on `ids`, int64 [1, t] or [t], in windows of `context` tokens.

    `on_step(done, total)` is called after every window. The model's training mode is left as it was.

    Raises InputError if the context is below 2, longer than the model's positions or than the text, or if the loss is
    not finite.
    """
    ids = ids.reshape(-1)
    positions = model_positions(model)
    if context < 2:
        raise InputError(f"context={context}: at least 2 tokens are needed for one prediction")
    if positions is not None and context > positions:
        raise InputError(
            f"context={context} is longer than the model's {positions} positions; use a context of at most {positions}"
        )
    windows = len(ids) // context
    if windows == 0:
        raise InputError(
            f"the text has {len(ids)} tokens, fewer than one window of context={context}; "
            f"give more text or lower the context to at most {len(ids)}"
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for window in range(windows):
            part = ids[None, window * context : (window + 1) * context].to(device)  # [1, context]
            total += mean_nll(model, part)
            if on_step is not None:
                on_step(window + 1, windows)
    finally:
        model.train(was_training)
    nll = total / windows
    if not math.isfinite(nll):
        raise InputError(f"the model's loss on this text is {nll}: its weights or activations are not finite")
    return Perplexity(value=math.exp(min(nll, 700.0)), nll=nll, tokens=windows * context, context=context)


@torch.no_grad()
def mean_nll(model: nn.Module, ids: Tensor) -> float:
    """Mean negative log-likelihood in nats of ids[:, 1:]; ids: int64 [1, context]."""
    logits = run_wide(model, (), {"input_ids": ids, "use_cache": False}).logits[0, :-1]  # [context − 1, vocabulary]
    targets = ids[0, 1:]
    losses = [
        nn.functional.cross_entropy(part.float(), target, reduction="sum").double()
        for part, target in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return float(torch.stack(losses).sum() / len(targets))


def rouge(outputs: list[str], references: list[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, 2, L and Lsum with Porter stemming, from 0 to 1, by Google's `rouge-score`.

    ROUGE-Lsum treats a line as a sentence, as `rouge-score` does; L and Lsum agree for outputs of one line.

    Raises InputError where `rouge-score` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError(f"ROUGE is computed by rouge-score ({error}): pip install 'llmtools[eval]'") from error
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(reference, output) for output, reference in zip(outputs, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


def model_positions(model: nn.Module) -> int | None:
    """Maximum number of positions of the model (`max_position_embeddings`); None if its configuration has none."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    return int(positions) if positions and positions > 0 else None  # XLNet's is -1: unlimited
