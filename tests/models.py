"""Tiny decoders of the families that we promise to quantize: random weights, two layers, hidden size 64, 512 tokens.

They are built from configurations, so no test needs a download, and each keeps what makes its family a special case:
grouped keys, fused projections, biases, tied embeddings, sliding windows, learned positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 512
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA_LIKE = _SHAPE | {"intermediate_size": 96, "num_key_value_heads": 2}


def llama_config(**changes: Any) -> PreTrainedConfig:
    """Grouped keys, untied head: the plain case."""
    from transformers import LlamaConfig

    return LlamaConfig(**_LLAMA_LIKE | changes)


def mistral_config(**changes: Any) -> PreTrainedConfig:
    """A sliding window shorter than the test sequences."""
    from transformers import MistralConfig

    return MistralConfig(**_LLAMA_LIKE | {"sliding_window": 16} | changes)


def qwen3_config(**changes: Any) -> PreTrainedConfig:
    """Norms on queries and keys, heads wider than hidden / heads, tied embeddings."""
    from transformers import Qwen3Config

    return Qwen3Config(**_LLAMA_LIKE | {"head_dim": 32, "tie_word_embeddings": True} | changes)


def gemma3_config(**changes: Any) -> PreTrainedConfig:
    """Layers that differ: one local, one global, each with its own rotary embedding; norms on both sides."""
    from transformers import Gemma3TextConfig

    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "head_dim": 16}
    return Gemma3TextConfig(**_LLAMA_LIKE | layers | changes)


def phi3_config(**changes: Any) -> PreTrainedConfig:
    """Queries, keys and values fused in one linear; gate and up in another."""
    from transformers import Phi3Config

    return Phi3Config(**_LLAMA_LIKE | changes)


def opt_config(**changes: Any) -> PreTrainedConfig:
    """Biases everywhere, learned positions, layer norms, tied embeddings."""
    from transformers import OPTConfig

    return OPTConfig(**_SHAPE | {"ffn_dim": 96, "word_embed_proj_dim": 64} | changes)


def bloom_config(**changes: Any) -> PreTrainedConfig:
    """ALiBi, fused projections with biases, and the old names for sizes."""
    from transformers import BloomConfig

    shape = {key: value for key, value in _SHAPE.items() if key not in ("num_hidden_layers", "num_attention_heads")}
    return BloomConfig(**shape | {"n_layer": 2, "n_head": 4} | changes)


def gpt2_config(**changes: Any) -> PreTrainedConfig:
    """No `nn.Linear` in its blocks but `Conv1D`: nothing that we can quantize, and we must say so."""
    from transformers import GPT2Config

    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2Config(**sizes | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | changes)


CONFIGS = {
    "llama": llama_config,
    "mistral": mistral_config,
    "qwen3": qwen3_config,
    "gemma3": gemma3_config,
    "phi3": phi3_config,
    "opt": opt_config,
    "bloom": bloom_config,
    "gpt2": gpt2_config,
}
FAMILIES = [name for name in CONFIGS if name != "gpt2"]
"""The families whose linears we quantize."""


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of `family` in eval mode, the same for the same seed; `changes` go to its configuration.

    Weights are drawn wider than the library's 0.02 so that layers matter, biases and norms are drawn too, for a
    forgotten bias shows only where biases are not zero.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[family](**changes))
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                if parameter.ndim >= 2:
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(0.1 * noise)
    return model.eval()


_MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
}  # fmt: skip


def tiny_mixture(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A mixture of four experts, two of them a token: without a shared expert, with one, with a dense layer too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **_LLAMA_LIKE | {"num_experts_per_tok": 2} | _MIXTURES[family])
        return AutoModelForCausalLM.from_config(config).eval()


def tiny_ids(sequences: int = 2, tokens: int = 24, *, seed: int = 0) -> torch.Tensor:
    """Token ids [sequences, tokens], without the special ones."""
    return torch.randint(3, VOCABULARY, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def training_rows(path: Path, count: int = 8) -> str:
    """Writes a few prompts with completions to train on, as JSON lines; returns the path as text."""
    rows = ({"prompt": f"Tom had {n} cats.", "completion": f" He gave {n} balls to them."} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ENCODABLE: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"bits": 3, "group_size": 16}),
    ("hqq", {"bits": 4}),
    ("awq", {"bits": 4}),
    ("quip_sharp", {"bits": 2}),
    ("quip_sharp", {"bits": 3}),
    ("quip_sharp", {"bits": 4}),
    ("quip", {"bits": 4}),
    ("nf4", {}),
    ("nf4", {"double_quantization": True}),
    ("optq", {"bits": 4, "act_order": True}),
]
"""Quantizers with options that encode a weight on its own scales, one of each kind."""


def other_model(kind: str, *, seed: int = 0) -> PreTrainedModel:
    """A tiny model that is no decoder: t5, bart, bert (a classifier), xlm, embedding (a decoder without a head), llava
    (whose vision tower is the larger part)."""
    import transformers as t

    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    heads: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any
        match kind:
            case "t5":
                shape = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
                model = t.T5ForConditionalGeneration(t.T5Config(**sizes | shape | {"decoder_start_token_id": 0}))
            case "bart":
                layers = {
                    f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")
                }
                shape = {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "decoder_start_token_id": 2}
                model = t.BartForConditionalGeneration(t.BartConfig(**sizes | layers | shape))
            case "bert":
                config = t.BertConfig(**sizes | heads | {"num_hidden_layers": 2, "num_labels": 3})
                model = t.BertForSequenceClassification(config)
            case "embedding":
                model = t.LlamaModel(t.LlamaConfig(**sizes | heads | {"num_hidden_layers": 2}))
            case "xlm":
                model = t.XLMWithLMHeadModel(t.XLMConfig(vocab_size=VOCABULARY, emb_dim=64, n_layers=2, n_heads=4))
            case "llava":
                text = t.LlamaConfig(**_LLAMA_LIKE)
                sight = t.CLIPVisionConfig(**heads | {"num_hidden_layers": 6, "image_size": 28, "patch_size": 14})
                config = t.LlavaConfig(text_config=text, vision_config=sight, image_token_index=5)
                model = t.LlavaForConditionalGeneration(config)
            case _:
                raise ValueError(kind)
    return model.eval()  # type: ignore[no-any-return]
