"""Whether a training step fits into the memory that is free, before the first one is made.

The model with its adapters is in memory already. What a step takes beside it (gradients, the optimizer's state,
activations, scratch memory) comes from a run of a few of its blocks on tensors without values (`model/memory.py`). That
is less than the process takes, by what the allocator holds beside them: what is refused cannot fit; the rest may not.
"""

from __future__ import annotations

import logging
from typing import Any

from ..errors import InputError
from ..pages import free_memory

log = logging.getLogger(__name__)


def check_memory(trainer: Any, *, force: bool) -> None:
    """Raises InputError, with the ways out, where a trainer's step does not fit; with `force` it is a warning.

    Nothing is said where it is unknown what is free, and of models whose step cannot be estimated.
    """
    arguments, model = trainer.args, trainer.model
    batch, length = arguments.per_device_train_batch_size, _longest(trainer)
    free = _free(model.device)
    if free is None or _bound(model, batch * length) <= free:  # the estimate takes seconds
        return
    needed = step_bytes(model, batch, length, arguments)
    if needed is None or needed <= free:
        return
    ways = [
        *([] if arguments.gradient_checkpointing else ["--training.gradient_checkpointing true"]),
        *(["--training.per_device_train_batch_size 1 (with gradient accumulation)"] if batch > 1 else []),
        f"--training.max_length {max(1, length // 2)}",
    ]
    text = (
        f"a training step of {batch} × {length} tokens takes {needed / 1e9:.2f} GB or more beside the model, and "
        f"{free / 1e9:.2f} GB are free"
    )
    if not force:
        raise InputError(f"{text}; choose {', '.join(ways)}, or --force to try it anyway (llmtools plan shows more)")
    log.warning("%s; --force: it is tried", text)


def step_bytes(model: Any, batch: int, length: int, arguments: Any) -> int | None:
    """Bytes that a step on token ids [batch, length] takes beside the model; None where it cannot be estimated.

    model: a PEFT model in memory; it is not changed.
    """
    from ..model.memory import blueprint, peak
    from ..model.options import OPTIMIZERS

    trained = [each for each in model.parameters() if each.requires_grad]
    gradients = sum(each.nbytes for each in trained)
    try:
        found = peak(blueprint(model), batch, length, device=model.device.type, autocast=bool(arguments.bf16))
    except Exception as error:  # of any model, from operations on tensors without values
        log.debug("the memory of a step was not estimated: %s", error)
        return None
    optimizer = OPTIMIZERS.get(str(getattr(arguments.optim, "value", arguments.optim)), 8.0)
    total: int = gradients + int(optimizer * sum(each.numel() for each in trained)) + found.total
    return total


def _longest(trainer: Any) -> int:
    """Tokens of the longest training sequence."""
    lengths = (len(ids) for ids in trainer.train_dataset["input_ids"])
    return max(lengths, default=1)


def _free(device: Any) -> int | None:
    import torch

    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


def _bound(model: Any, tokens: int) -> int:
    """More bytes than a step on so many tokens takes, by the widths of the model's linears; attention of quadratic
    memory aside."""
    from torch import nn

    widths = sum(each.in_features + each.out_features for each in model.modules() if isinstance(each, nn.Linear))
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return 16 * int(tokens * widths + trained)
