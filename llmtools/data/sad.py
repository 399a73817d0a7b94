"""The published helper for Stanford Alpaca's data, on top of the task `alpaca`: token ids for transformers' Trainer.

    data = TrainSAD(dataset, val_set_size, tokenizer, cutoff_len)
    data.prepare_data()
    Trainer(..., train_dataset=data.train_data, eval_dataset=data.val_data,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))

Only the calls are the published ones; the prompt template is that of the task: Stanford's. The published helper wrote
every row with "### Input:", even an empty one, and began the answer on a new line after "### Response:".

With that collator the loss is taken over the whole text, prompt included, as published; and where the pad token is the
end-of-text token, as published too, the collator masks the end of the answer. ``llmtools finetune --task alpaca`` takes
the loss over the answers alone, their end-of-text token included.
"""

from __future__ import annotations

import logging
from random import Random
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .tasks import make_task
from .text_io import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SEED = 42
"""Random seed of the choice of the held-out rows, as published."""


class TrainSAD:
    """Alpaca's rows as token ids, split into training and validation data."""

    def __init__(
        self, dataset: str | None, val_set_size: float, tokenizer: PreTrainedTokenizerBase, cutoff_len: int
    ) -> None:
        """dataset: a .json or .jsonl file of instruction, input, output; None for tatsu-lab/alpaca on the hub.

        val_set_size: fraction of the rows that is held out, or above 1 their number; 0 for none.
        cutoff_len: maximum number of tokens of an example; longer ones are left out, not truncated.
        """
        self.dataset = dataset
        self.val_set_size = val_set_size
        self.tokenizer = tokenizer
        self.cutoff_len = cutoff_len
        self.train_data: Any = None
        """A `datasets.Dataset` of input_ids and attention_mask, once `prepare_data` has run."""
        self.val_data: Any = None
        """The same of the held-out rows; None if there are none."""

    def prepare_data(self, use_eos_token: bool = True) -> None:
        """Reads, splits and tokenizes; each text ends with the end-of-text token unless `use_eos_token` is false.

        Raises InputError where the data cannot be read, the split leaves nothing, or every example is too long.
        """
        rows = make_task("alpaca", data=self.dataset or "alpaca").train()
        held = self._held_out(len(rows))
        self.train_data = self._tokens([row for at, row in enumerate(rows) if at not in held], use_eos_token)
        self.val_data = self._tokens([rows[at] for at in sorted(held)], use_eos_token) if held else None

    def _held_out(self, count: int) -> set[int]:
        size = self.val_set_size
        held = round(size) if size > 1 else round(size * count)
        if size < 0 or (size > 0 and not 0 < held < count):
            raise InputError(
                f"val_set_size={size} of {count} rows leaves {held} to validate on and {count - held} to train on; "
                "both are needed, or 0 for no validation"
            )
        return set(Random(SEED).sample(range(count), held))

    def _tokens(self, rows: list[Row], use_eos_token: bool) -> Any:
        try:
            from datasets import Dataset
        except ImportError as error:
            raise InputError(f"TrainSAD makes datasets ({error}): pip install 'llmtools[train]'") from error
        end = str(self.tokenizer.eos_token or "") if use_eos_token else ""
        encoded = [self.tokenizer(row["prompt"] + row["completion"] + end, verbose=False) for row in rows]
        fitting = [each for each in encoded if len(each["input_ids"]) <= self.cutoff_len]
        if not fitting:
            raise InputError(
                f"all {len(rows)} examples are longer than cutoff_len={self.cutoff_len} tokens (the shortest has "
                f"{min(len(each['input_ids']) for each in encoded)}); raise cutoff_len"
            )
        if len(fitting) < len(rows):
            log.warning(
                "%d of %d examples are longer than cutoff_len=%d tokens and left out, so that no answer is truncated",
                len(rows) - len(fitting),
                len(rows),
                self.cutoff_len,
            )
        return Dataset.from_list([{key: each[key] for key in ("input_ids", "attention_mask")} for each in fitting])
