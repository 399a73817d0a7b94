"""llama.cpp's rule for cutting words is found by what the tokenizer does; what it has no rule for is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from llmtools import InputError
from llmtools.formats.pretokenizer import GPT2, LLAMA3, QWEN2, TEKKEN, rule_of


def told(pre: Any, *, ignore_merges: bool = False, words: tuple[str, ...] = ("a", "1", "12", "Ġ1")) -> dict[str, Any]:
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    return dict(json.loads(tokenizer.to_str()))


def split(pattern: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])


def test_the_rules_are_told_apart() -> None:
    assert rule_of(told(BYTES)) == "gpt-2"
    assert rule_of(told(DIGITS)) == "smollm"
    assert rule_of(told(split(LLAMA3), ignore_merges=True)) == "llama-bpe"
    assert rule_of(told(split(QWEN2))) == "qwen2"
    assert rule_of(told(split(TEKKEN), ignore_merges=True)) == "tekken"


def test_a_vocabulary_without_digits_in_words_is_that_of_digits_apart() -> None:
    """Then both rules give the same tokens, and the published file names this one."""
    assert rule_of(told(BYTES, words=("a", "1", "2", "Ġa"))) == "smollm"
    assert rule_of(told(BYTES, words=("a", "Ġa"))) == "gpt-2"


@pytest.mark.parametrize(
    "pre",
    [
        split(LLAMA3.replace("{1,3}", "{1,2}")),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTES]),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), BYTES]),
    ],
    ids=["other digits", "digits together", "a space before", "white space", "removed"],
)
def test_what_llama_cpp_does_not_do_is_refused(pre: Any) -> None:
    with pytest.raises(InputError, match="convert_hf_to_gguf"):
        rule_of(told(pre))


def test_merges_that_are_ignored_here_and_not_there_are_refused() -> None:
    with pytest.raises(InputError, match="ignore_merges=False"):
        rule_of(told(split(LLAMA3)))


def test_the_rule_of_gpt2_is_that_of_the_byte_level_itself() -> None:
    text = "I'll  go\n\n at 7:30 -- don't! ünï  "
    own, written = BYTES.pre_tokenize_str(text), split(GPT2).pre_tokenize_str(text)
    assert [word for word, _ in own] == [word for word, _ in written]
