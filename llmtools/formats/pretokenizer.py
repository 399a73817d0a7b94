"""llama.cpp's name of the pre-tokenizer of a byte-level BPE tokenizer.

A GGUF file only names the pre-tokenizer (``tokenizer.ggml.pre``); under another one newlines, digits and code get
different tokens, without an error. So it is determined from ``tokenizer.json``, not from the model's family, and a
tokenizer without an equivalent is refused.

Source: llama.cpp, src/llama-vocab.cpp (`llm_tokenizer_bpe`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import InputError

_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"\p{N}"
LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = f"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _REST
GPT4O = f"{_HEAD}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_HEAD}{_UPPER}+{_LOWER}*{_ENGLISH}?" + r"|\p{N}{1,3}" + _REST


class _Rule(NamedTuple):
    name: str
    """Name in llama.cpp."""
    ignore_merges: bool = False
    """Whether a pre-token that is in the vocabulary is one token, whatever the merges say."""


RULES: dict[tuple[str, ...], _Rule] = {
    (GPT2,): _Rule("gpt-2"),
    (DIGITS, GPT2): _Rule("smollm"),
    (LLAMA3,): _Rule("llama-bpe", ignore_merges=True),
    (QWEN2,): _Rule("qwen2"),
    (TEKKEN,): _Rule("tekken", ignore_merges=True),
    (GPT4O,): _Rule("gpt-4o"),
}
"""Regular expressions that split a text, in this order → llama.cpp's pre-tokenizer."""


def rule_of(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in a ``tokenizer.json``. Raises InputError where it has no equivalent."""
    remedy = "export the model with --format dense and use llama.cpp's convert_hf_to_gguf.py"
    try:
        patterns = tuple(_patterns(tokenizer.get("pre_tokenizer")))
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from error
    if patterns == (GPT2,) and _has_digits_alone((tokenizer.get("model") or {}).get("vocab") or {}):
        patterns = (DIGITS, GPT2)  # equivalent, as no token spans a digit
    rule = RULES.get(patterns)
    if rule is None:
        raise InputError(f"llama.cpp has no pre-tokenizer with this tokenizer's patterns {patterns}; {remedy}")
    ignores = bool((tokenizer.get("model") or {}).get("ignore_merges"))
    if ignores != rule.ignore_merges:
        raise InputError(
            f"the tokenizer has ignore_merges={ignores}, llama.cpp's pre-tokenizer {rule.name!r} has not; {remedy}"
        )
    return rule.name


def _patterns(step: Any) -> Iterator[str]:
    """The regular expressions of a pre-tokenizer; "Digits" and "ByteLevel" as their equivalent ones."""
    kind = (step or {}).get("type")
    if kind == "Sequence":
        for each in step.get("pretokenizers") or ():
            yield from _patterns(each)
    elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step.get("pattern") or {}
        if "Regex" not in pattern:
            raise InputError(f"the tokenizer splits at {pattern}, which llama.cpp does not support")
        yield str(pattern["Regex"])
    elif kind == "Digits" and step.get("individual_digits"):
        yield DIGITS
    elif kind == "ByteLevel" and not step.get("add_prefix_space"):
        if step.get("use_regex", True):
            yield GPT2
    else:
        raise InputError(f"the tokenizer has the pre-tokenizer {kind} ({step}), which llama.cpp does not have")


def _has_digits_alone(vocabulary: Mapping[str, int]) -> bool:
    """Whether each token of a byte-level vocabulary that contains a number character is that single character."""
    from tokenizers.decoders import ByteLevel

    decoder, found = ByteLevel(), False
    for token in vocabulary:
        text = decoder.decode([token])
        if any(unicodedata.category(character).startswith("N") for character in text):
            if len(text) > 1:
                return False
            found = True
    return found
