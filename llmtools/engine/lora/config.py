"""The published settings of a finetuning run: sixteen keyword arguments, and values derived from them."""

from __future__ import annotations

import os

from ...cli.legacy import accumulation, world_size
from ...errors import InputError


class FinetuneConfig:
    """Dataset, schedule and adapter of a finetuning run.

    The sixteen keyword arguments are attributes of the same names. Derived are `gradient_accumulation_steps` (how many
    batches of `mbatch_size` on each process make one of `batch_size`), and from the environment that `accelerate
    launch` sets: `world_size`, `local_rank`, `ddp` and `device_map`.
    """

    def __init__(
        self,
        *,
        dataset: str | None,
        ds_type: str | None = None,
        data_type: str | None = None,
        lora_out_dir: str,
        mbatch_size: int,
        batch_size: int,
        epochs: float,
        lr: float,
        cutoff_len: int,
        lora_r: int,
        lora_alpha: float,
        lora_dropout: float,
        val_set_size: float,
        warmup_steps: int,
        save_steps: int,
        save_total_limit: int,
        logging_steps: int,
    ) -> None:
        """dataset: a file, or None for the one on the hub. ds_type, data_type: synonyms, such as alpaca.

        val_set_size: share of the rows that is held out, or above 1 their number.

        Raises InputError where the two batch sizes do not fit each other.
        """
        if ds_type is not None and data_type is not None and ds_type != data_type:
            raise InputError(f"ds_type={ds_type!r} and data_type={data_type!r} are synonyms; pass one")
        self.dataset = dataset
        self.ds_type = self.data_type = ds_type or data_type or "alpaca"
        self.lora_out_dir = lora_out_dir
        self.mbatch_size = mbatch_size
        self.batch_size = batch_size
        self.epochs = epochs
        self.lr = lr
        self.cutoff_len = cutoff_len
        self.lora_r = lora_r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.val_set_size = int(val_set_size) if val_set_size > 1 else float(val_set_size)
        self.warmup_steps = warmup_steps
        self.save_steps = save_steps
        self.save_total_limit = save_total_limit
        self.logging_steps = logging_steps
        self.world_size = world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.ddp = self.world_size != 1
        self.device_map = {"": self.local_rank} if self.ddp else "auto"
        self.gradient_accumulation_steps = accumulation(batch_size, mbatch_size, self.world_size)

    def __repr__(self) -> str:
        return f"FinetuneConfig({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"
