"""Calibration batches as the walk takes them: checked against the model, and without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .blocks import text_config
from .walk import Batch


def checked_calibration(model: nn.Module, calibration: Sequence[Batch] | Batch) -> list[Batch]:
    """The sequences without padding, as ids [batch, t] or keyword arguments.

    Raises InputError where the model cannot take one.
    """
    if isinstance(calibration, Tensor | Mapping):
        calibration = [calibration]
    config: Any = getattr(model, "config", None)
    text: Any = text_config(config) if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) and longest > 0 else None  # XLNet says -1 for no end
    vocabulary = getattr(text, "vocab_size", None)
    batches: list[Batch] = []
    for index, batch in enumerate(calibration):
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        ids = given.get("input_ids")
        if ids is None and isinstance(batch, Mapping):
            batches.append(given)  # a model with other inputs
            continue
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() not in (1, 2) or ids.numel() == 0:
            shape = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError(f"calibration[{index}] is {shape}; expected token ids [batch, tokens], at least one")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            wrong = low if low < 0 else high
            raise InputError(
                f"calibration[{index}] holds token {wrong}, and the model knows 0 to {(vocabulary or 0) - 1}; "
                f"use the model's own tokenizer"
            )
        if ids.dim() == 1:
            given = {k: v[None] if isinstance(v, Tensor) and v.shape == ids.shape else v for k, v in given.items()}
        for each in unpadded(given, f"calibration[{index}]"):
            tokens = each["input_ids"].shape[1]
            if longest is not None and tokens > longest:
                raise InputError(
                    f"calibration[{index}] has {tokens} tokens, the model {longest} positions; use tokens={longest}"
                )
            batches.append(each["input_ids"] if each.keys() == {"input_ids"} else each)
    if not batches:
        raise InputError("the calibration is empty; give at least one sequence of token ids")
    return batches


def unpadded(batch: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A batch without the padding under its `attention_mask` [batch, t]: unchanged, or split into single sequences.

    Padding may be at both ends. Raises InputError for a mask with gaps, and for arguments that cannot be split by
    sequence.
    """
    arguments = {key: value for key, value in batch.items() if key not in ("labels", "use_cache", "return_dict")}
    masks: dict[str, Tensor] = {
        side: mask
        for side in ("", "decoder_")
        if isinstance(mask := arguments.get(f"{side}attention_mask"), Tensor) and mask.dim() == 2
    }
    for side in masks:
        del arguments[f"{side}attention_mask"]
    if all(bool(mask.all()) for mask in masks.values()):
        return [arguments]
    rows = []
    for row in range(len(arguments["input_ids"])):
        spans = {side: _span(mask[row], f"{name}, row {row}") for side, mask in masks.items()}
        if all(span.start < span.stop for span in spans.values()):
            rows.append({key: _of_row(key, value, row, spans, arguments, name) for key, value in arguments.items()})
    return rows


def _span(mask: Tensor, name: str) -> slice:
    seen = mask.bool().nonzero().flatten()
    if not len(seen):
        return slice(0, 0)
    start, stop = int(seen[0]), int(seen[-1]) + 1
    if len(seen) != stop - start:
        raise InputError(
            f"{name}: the attention_mask has gaps within the sequence; only padding at its ends can be removed"
        )
    return slice(start, stop)


def _of_row(key: str, value: Any, row: int, spans: Mapping[str, slice], batch: Mapping[str, Any], name: str) -> Any:
    """One sequence's part of an argument of a batch: [1, its tokens, …]."""
    side = "decoder_" if key.startswith("decoder_") else ""
    ids = batch.get(f"{side}input_ids")
    if not isinstance(value, Tensor):
        return value
    if ids is None or value.shape[:2] != ids.shape:
        if len(batch["input_ids"]) == 1:
            return value
        raise InputError(
            f"{name}: {key} {list(value.shape)} cannot be split by sequence, which is needed with padding; "
            f"give one sequence a batch"
        )
    return value[row : row + 1, spans.get(side, slice(None))]
