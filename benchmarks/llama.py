"""The shapes of LLaMA models, and of mixtures of experts, that the benchmarks build with random weights."""

from __future__ import annotations

from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Hidden size, intermediate size, blocks, heads, key-value heads, vocabulary size."""

    hidden: int
    intermediate: int
    depth: int
    heads: int
    key_heads: int
    vocabulary: int = 32000


LLAMA = {
    "tiny": Shape(64, 160, 2, 4, 2, 512),
    "160M": Shape(768, 3072, 12, 12, 12),
    "1.1B": Shape(2048, 5632, 22, 32, 4),
    "7B": Shape(4096, 11008, 32, 32, 32),
    "13B": Shape(5120, 13824, 40, 40, 40),
    "30B": Shape(6656, 17920, 60, 52, 52),
    "65B": Shape(8192, 22016, 80, 64, 64),
}


class Mixture(NamedTuple):
    """Hidden size, an expert's intermediate size, blocks, heads, key-value heads, experts, a token's, vocabulary."""

    hidden: int
    intermediate: int
    depth: int
    heads: int
    key_heads: int
    experts: int
    chosen: int
    vocabulary: int


MIXTURES = {
    "tiny-moe": Mixture(64, 32, 2, 4, 2, 4, 2, 512),
    "Qwen3-30B-A3B": Mixture(2048, 768, 48, 32, 4, 128, 8, 151936),
}


def config(name: str, *, depth: int | None = None) -> Any:
    """transformers' LlamaConfig of that shape, or Qwen3MoeConfig, embeddings and head apart, 2048 positions; `depth`
    blocks if given."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    if name in MIXTURES:
        mixture = MIXTURES[name]
        return Qwen3MoeConfig(
            vocab_size=mixture.vocabulary,
            hidden_size=mixture.hidden,
            num_hidden_layers=depth or mixture.depth,
            num_attention_heads=mixture.heads,
            num_key_value_heads=mixture.key_heads,
            head_dim=128,
            num_experts=mixture.experts,
            num_experts_per_tok=mixture.chosen,
            moe_intermediate_size=mixture.intermediate,
            norm_topk_prob=True,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    shape = LLAMA[name]
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=depth or shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
