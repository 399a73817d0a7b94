"""Calibration data: windows of tokens over which the statistics of a network's activations are collected.

The published recipe (OPTQ, arXiv:2210.17323, §4) takes 128 random windows of 2048 tokens, each inside a random
document that is long enough. Documents of ordinary files are often shorter than a window; then windows are cut from the
concatenated documents. The log says which of the two happened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from .text_io import read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

HUB: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "c4": {
        "path": "allenai/c4",
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    },
}
"""Names of published data sets → arguments of `datasets.load_dataset`."""

ENOUGH = 8
"""Tokenization stops at this multiple of the requested tokens where documents are too short for a window."""


def calibration(
    source: str | Path | list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    tokens: int = 2048,
    seed: int = 0,
) -> list[Tensor]:
    """`samples` random windows of exactly `tokens` tokens: a list of int64 tensors [1, tokens].

    `source` is a ``.txt`` or ``.jsonl`` file (``.gz`` too), a list of documents, or a known name (wikitext2, c4).
    Documents are visited in a random order. When `samples` of them are at least `tokens` long, each gives one window,
    at a random position. Otherwise windows are cut at random positions (they may overlap) from the concatenation of all
    visited documents, each with the tokenizer's start token. The same seed gives the same windows.

    Raises InputError for a missing file, a source without text, or one of fewer than `tokens` tokens.
    """
    if samples < 1 or tokens < 1:
        raise InputError(f"samples={samples} windows of tokens={tokens} tokens: both must be at least 1")
    documents = documents_of(source, split="train")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()

    seen: list[Tensor] = []  # [t] each
    long: list[Tensor] = []
    for ids in encoded((documents[index] for index in order), tokenizer):
        seen.append(ids)
        if len(ids) >= tokens:
            long.append(ids)
        if len(long) == samples or sum_of_lengths(seen) >= ENOUGH * samples * tokens:
            break
    if len(long) == samples:
        log.info("calibration: %d windows of %d tokens, each from a document of its own", samples, tokens)
        return [_window(ids, tokens, generator) for ids in long]

    text = torch.cat(seen)  # [t]
    if len(text) < tokens:
        raise InputError(
            f"the calibration text has {len(text)} tokens, fewer than one window of tokens={tokens}; "
            f"give more text or a smaller number of tokens"
        )
    overlap = " (they overlap: more text would be better)" if len(text) < samples * tokens else ""
    log.info("calibration: %d windows of %d tokens out of %d tokens of text%s", samples, tokens, len(text), overlap)
    return [_window(text, tokens, generator) for _ in range(samples)]


def _window(ids: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """[t] -> [1, tokens], from a random position."""
    start = int(torch.randint(len(ids) - tokens + 1, (1,), generator=generator))
    return ids[start : start + tokens].clone()[None]


def text_ids(source: str | Path | list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A whole evaluation text as one row of tokens, int64 [1, t].

    A ``.txt`` without separators is tokenized once, verbatim; several documents are concatenated, each with the
    tokenizer's start token. The name ``wikitext2`` is its test split, rows joined by two newlines, as published.

    Raises InputError for a missing file, or a source without text.
    """
    return torch.cat(list(encoded(documents_of(source, split="test"), tokenizer)))[None]


def documents_of(source: str | Path | list[str], *, split: str) -> list[str]:
    """The documents of a file, a list, or a known name.

    Raises InputError for a missing file, a source without text, or a data set that cannot be read from the hub.
    """
    if isinstance(source, list):
        documents = [document for document in source if document.strip()]
        if not documents:
            raise InputError("the list of documents holds no text")
        return documents
    if str(source) in HUB:
        return _from_hub(str(source), split)
    return read_documents(source)


def encoded(documents: Iterator[str] | list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Each document's tokens, int64 [t], with the tokenizer's special tokens."""
    for document in documents:
        yield torch.tensor(tokenizer(document, verbose=False)["input_ids"], dtype=torch.int64)


def sum_of_lengths(tensors: list[Tensor]) -> int:
    return sum(len(tensor) for tensor in tensors)


def _from_hub(name: str, split: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{name!r} is read with datasets: pip install 'llmtools[train]', or give a file") from error
    if name == "c4" and split == "test":
        split = "validation"
    try:
        rows = datasets.load_dataset(**HUB[name], split=split)
    except Exception as error:  # the hub's client raises many types, all meaning that nothing was read
        raise InputError(f"{name!r} could not be read from the hub ({error}); give a .txt or .jsonl file") from error
    texts = [str(row["text"]) for row in rows]
    if name == "wikitext2":  # one line per row: the text is their join, as published perplexities take it
        return ["\n\n".join(texts)]
    return [text for text in texts if text.strip()]
