"""Export of a model to one GGUF file, for llama.cpp: LLaMA-like decoders and mixtures, grids that its basic types hold.

Source: llama.cpp, ggml/src/ggml-common.h (block_q4_0, block_q4_1, block_q5_0, block_q8_0) and gguf-py/gguf.

llama.cpp's types have blocks of 32 weights of a row, with a float16 scale d:

    Q4_0   d · (q − 8)      4 bits      Q5_0   d · (q − 16)     5 bits
    Q4_1   d · q + m        4 bits      Q8_0   d · q, q signed  8 bits

Our value is scale · (code − zero), so the range of code − zero decides. All grids of 2 and 3 bits lie in −7 … 7 and
fit Q4_0, as symmetric 4 bits do; asymmetric 4 bits fit Q4_1 where m = −scale · zero is a float16, else Q5_0. The
smallest type that holds a layer is used. The K-types quantize their scales and hold none of our grids exactly.

One projection of all experts of a layer is one tensor [E, out, in], in the smallest type that holds each of them.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.experts import unfused_experts, unfused_within
from ..nn.swap import packed_layers
from ..quant import GGMLBlocks, Packed, Quantizer
from .base import Format, WriteResult, formats
from .expert_names import USUAL
from .pretokenizer import rule_of
from .readers import readers_of
from .tensors import Module
from .uniform import Limits, Requantized, Uniform, requantized, uniform_of

log = logging.getLogger(__name__)

BLOCK = 32
"""Number of weights in a block."""
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
"""Types of blocks that layers are stored in, the smallest first."""
MIXTURES = {"mixtral": True, "qwen2_moe": False, "qwen3_moe": True, "olmoe": False}
"""Value of model_type of a mixture of experts → whether llama.cpp has the weights of a token's experts sum to 1."""
ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "mixtral": "LLAMA",
    "qwen2_moe": "QWEN2MOE",
    "qwen3_moe": "QWEN3MOE",
    "olmoe": "OLMOE",
}
"""Value of model_type → llama.cpp's architecture."""
_LOSSY = Limits(bits=(4,))


@formats.register("gguf")
class GGUF(Format):
    """GGUF files as exports. They are read by `gguf_reading.py`, since a file is no folder with a config."""

    marker = "gguf"

    @classmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        return False

    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        raise NotImplementedError("GGUF files are not read")

    @classmethod
    def writes(cls) -> bool:
        return True

    @classmethod
    def write_model(
        cls,
        model: nn.Module,
        tokenizer: Any,
        folder: Path,
        *,
        lossy: bool = False,
        reader: str | None = None,
        max_shard_size: str | int = "5GB",
    ) -> WriteResult:
        """Writes ``model.gguf``. Raises InputError for what GGUF cannot hold exactly, unless `lossy`."""
        readers = readers_of(cls.name, [], [], reader)
        gguf = require_package()
        hf_model: Any = model
        config = hf_model.config
        if config.model_type not in ARCHITECTURES:
            raise InputError(
                f"GGUF export of {config.model_type} is not supported ({', '.join(ARCHITECTURES)} are); export it with "
                "--format dense and use llama.cpp's convert_hf_to_gguf.py"
            )
        arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        writer = gguf.GGUFWriter(folder / "model.gguf", gguf.MODEL_ARCH_NAMES[arch])
        with unfused_within(model):
            _check_mixture(model)
            layers = packed_layers(model)
            places = _places(model)
            placed = {f"{path}.weight" for paths in places.values() for path in paths}
            stored = {f"{path}.{name}" for path, layer in layers.items() for name in layer.packed}
            dense = {name: tensor for name, tensor in model.state_dict().items() if name not in stored}
            changed: list[Requantized] = []
            data: dict[str, tuple[Any, Any]] = {}
            for place, paths in places.items():
                held = [path for path in paths if path in layers]
                if held and len(held) < len(paths):
                    lacking = next(path for path in paths if path not in layers)
                    raise InputError(
                        f"{lacking} is dense and {held[0]} is not; GGUF files have one type for all experts"
                    )
                if held and layers[paths[0]].shape[0] == 1:  # a vector
                    data[f"{place}.weight"] = _dense(gguf, layers[paths[0]].dequantize(dtype=torch.float32))
                elif held:
                    kind, blocks = _blocks({path: layers[path] for path in paths}, config, lossy, changed)
                    data[f"{place}.weight"] = blocks.numpy(), gguf.GGMLQuantizationType[kind]
                else:
                    data[f"{place}.weight"] = _dense(gguf, torch.stack([dense[f"{path}.weight"] for path in paths]))
            for name, tensor in dense.items():
                if name not in placed:
                    data[name] = _dense(gguf, _rotary_rows_of(tensor, name, config))
        _write_metadata(gguf, writer, config)
        _write_vocabulary(gguf, writer, tokenizer, config)
        if config.tie_word_embeddings:
            data.pop("lm_head.weight", None)
        for name, (values, kind) in data.items():
            target = names.get_name(name, (".weight", ".bias"))
            if target is None:
                raise InputError(f"{name} has no name in GGUF files of {config.model_type}")
            writer.add_tensor(target, values, raw_dtype=kind)
        finish(writer)
        return WriteResult(len(layers), changed, readers)


def _check_mixture(model: Any) -> None:
    """Raises InputError for a mixture that llama.cpp computes otherwise; nothing for other models."""
    config = model.config
    if config.model_type not in MIXTURES:
        return
    normalized = MIXTURES[config.model_type]
    if getattr(config, "norm_topk_prob", normalized) != normalized:
        raise InputError(
            f"norm_topk_prob={config.norm_topk_prob}, and llama.cpp runs every {config.model_type} with {normalized}: "
            "the file would be another model"
        )
    if len(unfused_experts(model)) != config.num_hidden_layers:
        raise InputError(f"llama.cpp runs {config.model_type} with experts in every layer, and some layers have none")
    if getattr(config, "clip_qkv", None) is not None:
        raise InputError(f"clip_qkv={config.clip_qkv}; llama.cpp does not clip for {config.model_type}")


def _places(model: nn.Module) -> dict[str, list[str]]:
    """Path in files → paths of the linears whose weights are there: each packed layer's own, and one for all experts of
    a layer and projection."""
    mixtures: dict[str, Any] = unfused_experts(model)
    experts = {
        f"{path}.{USUAL[name]}": [f"{path}.{index}.{name}" for index in range(module.num_experts)]
        for path, module in mixtures.items()
        for name in module._modules["0"]._modules
    }
    inside = {path for paths in experts.values() for path in paths}
    return {path: [path] for path in packed_layers(model) if path not in inside} | experts


def _blocks(layers: Mapping[str, Any], config: Any, lossy: bool, changed: list[Requantized]) -> tuple[str, Tensor]:
    """(type, bytes) of a layer, [out, size of a row] uint8, or of several in one tensor, [E, out, size of a row].

    Those that had to be re-quantized are added to `changed`; InputError for the first one without lossy.
    """
    uniforms: list[Uniform] = []
    found: list[tuple[str, Tensor]] = []
    for path, layer in layers.items():
        if isinstance(layer.quantizer, GGMLBlocks):
            rows = _rotary_rows_of(layer.packed["blocks"], f"{path}.weight", config)
            found.append((layer.quantizer.type, rows.contiguous()))
            continue
        uniform = uniform_of(layer)
        packed = uniform if isinstance(uniform, str) else as_blocks(_rotary_rows(uniform, path, config))
        if isinstance(packed, str):
            if not lossy:
                raise InputError(
                    f"{path}: {packed}; nothing was written. --lossy (lossy=True) re-quantizes such layers"
                )
            uniform, error = requantized(layer, _LOSSY)
            changed.append(Requantized(path, packed, error))
            packed = as_blocks(_rotary_rows(uniform, path, config))
            if isinstance(packed, str):
                raise InputError(f"{path}: {packed}, also when re-quantized")
        assert isinstance(uniform, Uniform)
        uniforms.append(uniform)
        found.append(packed)
    if len(layers) == 1:
        return found[0]
    kinds = {kind for kind, _ in found}
    for kind in TYPES if len(kinds) > 1 and len(uniforms) == len(found) else ():
        again = [as_blocks(each, (kind,)) for each in uniforms]
        if not any(isinstance(each, str) for each in again):
            found, kinds = [each for each in again if not isinstance(each, str)], {kind}
            break
    if len(kinds) > 1:
        raise InputError(f"{next(iter(layers))}: no one type holds all experts ({', '.join(sorted(kinds))} are needed)")
    return kinds.pop(), torch.stack([blocks for _, blocks in found])


class Target(NamedTuple):
    """Where the weight of a linear is in a GGUF file."""

    tensor: str
    """Name of the tensor."""
    order: Tensor | None = None
    """The file's row for each row of the model, [out]; None for the identity."""
    expert: int | None = None
    """Index in a tensor of all experts."""


_EXPERT = re.compile(rf"(.*)\.(\d+)\.({'|'.join(USUAL)})")


def base_names(config: Any) -> tuple[str, Callable[[str], Target | None]]:
    """(llama.cpp's architecture, function of a linear's path; None for a path without a tensor).

    For models that `GGUF.write_model` supports. Raises InputError for other architectures.
    """
    gguf = require_package()
    if config.model_type not in ARCHITECTURES:
        raise InputError(f"GGUF adapters for {config.model_type} are not supported ({', '.join(ARCHITECTURES)} are)")
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def target(path: str) -> Target | None:
        if match := _EXPERT.fullmatch(path):
            name = names.get_name(f"{match[1]}.{USUAL[match[3]]}.weight", (".weight",))
            return name and Target(name, expert=int(match[2]))
        name = names.get_name(f"{path}.weight", (".weight",))
        if name is None:
            return None
        heads, head = config.num_attention_heads, getattr(config, "head_dim", None)
        size = head or config.hidden_size // heads
        rows = size * (heads if path.endswith("q_proj") else config.num_key_value_heads)
        order = _rotary_order(path, rows, config)
        return Target(name, None if order is None else torch.argsort(order))

    return str(gguf.MODEL_ARCH_NAMES[arch]), target


def as_blocks(layer: Uniform, types: Sequence[str] = TYPES) -> tuple[str, Tensor] | str:
    """(type, bytes [out, in / 32 · size] uint8) of the smallest of `types` that holds the layer; or the reason for
    none."""
    in_features = layer.codes.shape[1]
    if in_features % BLOCK:
        return f"GGUF has blocks of {BLOCK} columns, and {in_features} are not a multiple"
    if layer.group_of is not None:
        return "its groups are of reordered columns"
    if layer.group_size % BLOCK and layer.group_size < in_features:
        return f"GGUF has blocks of {BLOCK} columns, and group_size={layer.group_size} is not a multiple"
    scales = layer.scales.half()
    if not torch.equal(scales.float(), layer.scales.float()):
        return "its scales do not fit float16"
    per_group = torch.arange(in_features // BLOCK) * BLOCK // layer.group_size  # the group of each block
    scale = scales[:, per_group].unsqueeze(-1)  # [out, blocks, 1]
    codes = layer.codes.unflatten(1, (-1, BLOCK)).to(torch.int32)  # [out, blocks, 32]
    zeros = layer.zeros[:, per_group].unsqueeze(-1).to(torch.int32)
    values = codes - zeros
    low, high = int(values.min()), int(values.max())
    minimum = -(scale.float() * zeros)
    head = _bytes(scale)
    if "Q4_0" in types and low >= -8 and high <= 7:
        return "Q4_0", torch.cat([head, _nibbles(values + 8)], -1).flatten(1)
    if "Q4_1" in types and int(codes.max()) <= 15 and torch.equal(minimum.half().float(), minimum):
        return "Q4_1", torch.cat([head, _bytes(minimum.half()), _nibbles(codes)], -1).flatten(1)
    if "Q5_0" in types and low >= -16 and high <= 15:
        shifted = values + 16
        high_bits = ((shifted >> 4).to(torch.int64) << torch.arange(BLOCK)).sum(-1, keepdim=True)  # bit i: weight i's
        high_bits = torch.where(high_bits >= 1 << 31, high_bits - (1 << 32), high_bits).to(torch.int32)
        return "Q5_0", torch.cat([head, _bytes(high_bits), _nibbles(shifted & 15)], -1).flatten(1)
    if "Q8_0" in types and low >= -128 and high <= 127:
        return "Q8_0", torch.cat([head, values.to(torch.int8).view(torch.uint8)], -1).flatten(1)
    return f"its codes minus zero points lie in {low} … {high}, beyond {types[-1]}"


def _bytes(values: Tensor) -> Tensor:
    """[out, blocks, 1] of any type -> its bytes, uint8 [out, blocks, size]."""
    return values.contiguous().view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """[…, 32] in 0 … 15 -> uint8 […, 16]: weight i in the low and weight 16 + i in the high nibble of byte i."""
    return (codes[..., :16] | codes[..., 16:] << 4).to(torch.uint8)


def _rotary_rows(layer: Uniform, path: str, config: Any) -> Uniform:
    """The rows of LLaMA's queries and keys in llama.cpp's order.

    Its rotary embedding pairs neighbouring rows; that of transformers, rows half a head apart.
    """
    order = _rotary_order(path, layer.codes.shape[0], config)
    if order is None:
        return layer
    return layer._replace(codes=layer.codes[order], scales=layer.scales[order], zeros=layer.zeros[order])


def _rotary_rows_of(tensor: Tensor, name: str, config: Any) -> Tensor:
    order = _rotary_order(name.rpartition(".")[0], tensor.shape[0], config)
    return tensor if order is None else tensor[order]


def _rotary_order(path: str, rows: int, config: Any) -> Tensor | None:
    if ARCHITECTURES[config.model_type] != "LLAMA" or not path.endswith(("q_proj", "k_proj")):
        return None
    heads = config.num_attention_heads if path.endswith("q_proj") else config.num_key_value_heads
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def _dense(gguf: Any, tensor: Tensor) -> tuple[Any, Any]:
    """(array, type) of an unquantized tensor: float32 for vectors, as llama.cpp requires, also for those of one row."""
    if tensor.shape[0] == 1:
        tensor = tensor.flatten()
    if tensor.ndim == 1 or tensor.dtype == torch.float32:
        return tensor.float().numpy(), None
    if tensor.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        return gguf.quants.quantize(tensor.float().numpy(), kind), kind
    return tensor.half().numpy(), None


def _write_metadata(gguf: Any, writer: Any, config: Any) -> None:
    rope = dict(config.rope_parameters or {})
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(config.name_or_path or config.model_type).name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    if config.model_type in MIXTURES:
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
        if shared := getattr(config, "shared_expert_intermediate_size", 0):
            writer.add_expert_shared_feed_forward_length(shared)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        log.warning(
            "GGUF: llama.cpp uses full attention, this model a sliding window of %d tokens; longer texts differ",
            config.sliding_window,
        )
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim).numpy())
    elif kind != "default":
        raise InputError(f"GGUF export of rotary embeddings of type {kind!r} is not supported; use --format dense")


def llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Divisor of each rotary frequency [head_dim / 2]: 1 for short wavelengths, `factor` for long ones."""
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, head_dim, 2) / head_dim)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    share = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - share) / float(rope["factor"]) + share)
    return factors


def _write_vocabulary(gguf: Any, writer: Any, tokenizer: Any, config: Any) -> None:
    """Writes the vocabulary, byte-level BPE ("gpt2") or SentencePiece BPE ("llama"), from tokenizer.json."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {}
    model = spec.get("model") or {}
    byte_level = "ByteLevel" in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    if model.get("type") != "BPE" or not (byte_level or model.get("byte_fallback")):
        raise InputError(
            f"GGUF export of a {model.get('type')} tokenizer is not supported (BPE is); export the model with "
            "--format dense and use llama.cpp's convert_hf_to_gguf.py"
        )
    tokens = [f"[PAD{index}]" for index in range(config.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * config.vocab_size
    for token, index in model["vocab"].items():
        tokens[index] = token
        is_byte = not byte_level and len(token) == 6 and token.startswith("<0x")
        kinds[index] = gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
    for added in spec.get("added_tokens") or ():
        if added["id"] >= config.vocab_size:  # the model has no row for it
            continue
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = gguf.TokenType.UNKNOWN
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if byte_level:
        writer.add_tokenizer_pre(rule_of(spec))
        writer.add_token_merges(merges)
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece's score of each token: minus the rank of the first merge that results in it (highest first)."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", ""), index)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def finish(writer: Any) -> None:
    """Writes what a gguf.GGUFWriter was given, and closes its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def require_package() -> Any:
    """The package gguf. Raises InputError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("GGUF files are written with the package gguf: pip install 'llmtools[export]'") from error
    return gguf
