"""Perplexity of any text, by the published protocol (see `llmtools.data.metrics`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..calibration import text_ids
from ..metrics import OnStep, model_positions, perplexity
from .base import Task, tasks

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@tasks.register("perplexity")
@dataclass(frozen=True)
class PerplexityTask(Task):
    """Perplexity of a text in windows of `context` tokens; lower is better."""

    data: str
    """the text: a .txt or .jsonl file (.gz too), or wikitext2 | c4 from the hub"""
    context: int | None = None
    """tokens in a window; the default is the model's positions, at most 2048"""

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, on_step: OnStep | None = None
    ) -> dict[str, Any]:
        context = self.context if self.context is not None else min(model_positions(model) or 2048, 2048)
        result = perplexity(model, text_ids(self.data, tokenizer), context=context, on_step=on_step)
        return {
            "perplexity": result.value,
            "nll": result.nll,
            "tokens": result.tokens,
            "context": result.context,
        }
