"""Perplexity of any text, and of two data sets by their published protocols (see `llmtools.data.metrics`).

The result depends on the context length, which is therefore part of it. Published figures for `wikitext2` and `c4` are
mostly for 2048, some for 4096 tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..calibration import documents_of, text_ids
from ..metrics import OnStep, model_positions, perplexity
from ..text_io import existing_file, lines_of
from .base import Task, tasks

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


@tasks.register("perplexity")
@dataclass(frozen=True)
class PerplexityTask(Task):
    """Perplexity of a text in windows of `context` tokens; lower is better."""

    data: str
    """Text: a .txt or .jsonl file (.gz, .xz too), or wikitext2 | c4 from the hub."""
    has_answers: ClassVar[bool] = False
    reads_file: ClassVar[bool] = True

    context: int | None = None
    """Tokens in a window; by default the model's number of positions, at most 2048."""

    def ids(self, tokenizer: PreTrainedTokenizerBase, context: int) -> Tensor:
        """The text as one row of tokens, int64 [1, t]."""
        return text_ids(self.data, tokenizer)

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int | None = None,
        batch_size: int = 1,
        on_step: OnStep | None = None,
    ) -> dict[str, Any]:
        if batch_size != 1:
            log.warning("batch_size=%d has no effect: perplexity is measured window by window", batch_size)
        context = self.context if self.context is not None else min(model_positions(model) or 2048, 2048)
        ids = self.ids(tokenizer, context)
        if limit is not None:
            ids = ids[:, : limit * context]
        result = perplexity(model, ids, context=context, on_step=on_step)
        return {
            "perplexity": result.value,
            "nll": result.nll,
            "tokens": result.tokens,
            "context": result.context,
        }


@tasks.register("wikitext2")
@dataclass(frozen=True)
class WikiText2(PerplexityTask):
    """Perplexity of WikiText-2's raw test split: its rows joined by two newlines, tokenized once."""

    data: str
    """Text: wiki.test.raw with one row per line and blank lines for empty rows (.gz, .xz too), or wikitext2 from the
    hub."""

    def ids(self, tokenizer: PreTrainedTokenizerBase, context: int) -> Tensor:
        if self.data == self.name:
            return text_ids(self.data, tokenizer)
        rows = [line if line.strip() else "" for line in lines_of(existing_file(self.data))]
        return text_ids(["\n\n".join(rows)], tokenizer)


@tasks.register("c4")
@dataclass(frozen=True)
class C4(PerplexityTask):
    """Perplexity of C4 validation text ("c4-new"): the first 1100 documents joined by spaces, at most 256 windows."""

    data: str
    """Documents: a .jsonl file with the "text" of each (.gz, .xz too), or c4 from the hub."""

    def ids(self, tokenizer: PreTrainedTokenizerBase, context: int) -> Tensor:
        documents = documents_of(self.data, split="test")[:1100]
        return text_ids([" ".join(documents)], tokenizer)[:, : 256 * context]
