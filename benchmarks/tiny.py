"""Tiny models of every causal family that transformers knows, from configurations alone: nothing is downloaded.

A family's own defaults are kept but for sizes, which `_SIZES` shrinks by the name of the option; sub-configurations
are shrunk in the same way. What a family wants otherwise stands in `_SPECIAL`, by model type.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

VOCABULARY = 512

_SIZES: list[tuple[str, Any]] = [
    (r"(.*_)?vocab_size(_per_layer_input)?|n_vocab|vocabulary_size", VOCABULARY),
    (r"hidden_size_per_layer_input|hidden_size_per_layer", 16),
    (r"hidden_size|d_model|n_embd|emb_dim|embed_dim|hidden_dim|dim|n_embed|model_dim|embedding_size|embedding_dim", 64),
    (r"word_embed_proj_dim|attention_hidden_size|bottleneck_size|dim_model|output_size|projection_dim|lru_width", 64),
    (r"(shared_|moe_|dense_|shared_expert_|moe_shared_expert_)?(intermediate|ffn_hidden|ffn)_(size|dim)(_mlp)?", 96),
    (r".*(ffn_dim|intermediate_size|intermediate_dim|intermediate_size_mlp)|d_ff|d_inner|n_inner|ff_dim|dim_ff", 96),
    (r"(num_hidden_|num_|n_|encoder_|decoder_|num_encoder_|num_decoder_)(layers?)|(en|de)coder_num_layers|depth", 2),
    (r"num_blocks|num_hidden_blocks", 2),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|mtp_num_layers", 1),
    (r"(num_|n_)(attention_heads?|heads?)|(en|de)coder_attention_heads|num_(en|de)coder_attention_heads", 4),
    (
        r"(num_key_value|num_kv|n_kv|num_global_key_value|num_swa_key_value|swa_num_key_value)_heads?|multi_query_group_num",
        2,
    ),
    (r"head_dim|kv_channels|attention_head_dim|global_head_dim|d_kv|dim_head|swa_head_dim|attention_head_size", 16),
    (r"qk_rope_head_dim|rotary_dim|qk_pos_emb_head_dim", 8),
    (r"qk_nope_head_dim|v_head_dim|swa_v_head_dim|q_head_dim|qk_head_dim", 16),
    (r".*lora_rank|lora_r|.*_low_rank_dim|time_step_rank|mamba_dt_rank", 32),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_moe_experts|moe_n_experts", 4),
    (r"num_experts_per_tok(en)?|moe_(k|topk|top_k)|num_selected_experts|top_k_experts|moe_router_topk|ffn_topk", 2),
    (r"n_groups?|topk_group|num_expert_groups?|expert_group", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|zero_expert_num", 1),
    (r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|seq_length|n_ctx|max_target_positions", 128),
    (
        r"sliding_window|attention_chunk_size|window_size|attention_window_size|sliding_window_size|local_window_size",
        16,
    ),
    (r"(mamba_|ssm_)?(d_)?state(_size|_dim)?|mamba_d_state|ssm_state_size", 16),
    (r"(mamba_|ssm_)?(n_heads|num_heads)|mamba_num_heads", 4),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 32),
    (r"linear_num_(key|value)_heads|linear_num_heads", 4),
    (r"linear_(key|value)_head_dim|linear_head_dim", 16),
    (r"chunk_size|mamba_chunk_size", 16),
    (r"index_n_heads|index_num_heads", 2),
    (r"index_head_dim", 16),
    (r"index_topk", 8),
    (r"num_kv_shared_layers|num_mem_blocks", 0),
    (r"altup_num_inputs", 2),
    (r"image_size", 28),
    (r"patch_size", 14),
    (r"pad_token_id", 0),
    (r"(bos|decoder_start|forced_bos)_token_id", 1),
    (r"(eos|sep|forced_eos)_token_id", 2),
]

_ALWAYS = ("head_dim", "num_experts_per_tok", "n_routed_experts")
"""Sizes that are set where the default is None, too."""

_QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4}  # fmt: skip

_GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96}

_SPECIAL: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "text_config": {"hidden_size_per_layer_input": 0}},
    "gemma4_text": _GEMMA4_MOE,
    "gemma4": {"text_config": _GEMMA4_MOE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron_h": {"num_hidden_layers": 4},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_mem_blocks": 1,
               "mamba_ngroups": 1, "n_mamba_heads": 4, "attention_head_dim": 32, "attention_hidden_size": 128},
    "nemotron": {"num_key_value_heads": 2},
    "dots1": {"n_shared_experts": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "qwen4_exp_text": _QSA,
    "qwen4_exp": {"text_config": _QSA},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}, "num_key_value_heads": 4},
    "cohere_compass_text": {"num_hidden_layers": 2},
    "xlstm": {"qk_dim_factor": 1.0},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False,
                 "attn_layers": ["local", "lsh"], "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8,
                 "hash_seed": 0},
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """The configuration of a tiny model of this type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], _SPECIAL.get(model_type, {}))


def _shrunk(kind: Any, special: dict[str, Any]) -> Any:
    from transformers import PreTrainedConfig

    default = kind()
    options: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        held, value = _value(default, name), parameter.default
        if name in special and not isinstance(special[name], dict):
            options[name] = special[name]
        elif isinstance(held, PreTrainedConfig):
            options[name] = _shrunk(type(held), special.get(name, {}))
        elif isinstance(special.get(name), dict):
            options[name] = special[name]
        elif not isinstance(value, list | tuple | str) and (
            value is not None or name.endswith("_token_id") or name in _ALWAYS
        ):
            size = _size(name)
            if size is not None:
                options[name] = size
    if "kv_lora_rank" in options and "num_key_value_heads" in options:
        options["num_key_value_heads"] = options["num_attention_heads"]  # latent attention has one of each a head
    return _with_all_kinds(kind, options | {name: value for name, value in special.items() if name not in options})


def _with_all_kinds(kind: Any, options: dict[str, Any]) -> Any:
    """A configuration with one layer of each kind that a deeper model of the family would have, at least two."""
    count = options.get("num_hidden_layers")
    listed = "layer_types" in inspect.signature(kind.__init__).parameters
    if not listed or count is None or "layer_types" in options:
        return kind(**options)
    try:
        kinds = list(dict.fromkeys(kind(**options | {"num_hidden_layers": 12}).layer_types))
        if len(kinds) < 2:
            return kind(**options)
        return kind(**options | {"num_hidden_layers": len(kinds), "layer_types": kinds})
    except (ValueError, TypeError):
        return kind(**options)


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some differ from layer to layer, and say so
        return None


def _size(name: str) -> Any:
    return next((value for pattern, value in _SIZES if re.fullmatch(pattern, name)), None)


def tiny_model(model_type: str, *, seed: int = 0) -> Any:
    """A tiny model in float32 and eval mode, weights drawn so that every layer matters and biases are not zero."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape) / max(1, parameter.shape[-1]) ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()
