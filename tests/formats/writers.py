"""Checkpoints as other programs write them, made here from their formats' definitions and nothing of ours.

A writer takes (out, in) and gives the tensors of one linear and the dense weight, float32, that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import llmtools
from llmtools.nn.swap import quantized_linears
from tests.models import VOCABULARY, tiny_ids, tiny_model

Writer = Callable[[str, int, int], tuple[dict[str, Tensor], Tensor]]


def stream(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] as a little-endian bit stream of int32 words: all bits in a row, packed by NumPy."""
    digits = (codes.numpy().astype(np.int64)[:, :, None] >> np.arange(bits)) & 1
    digits = digits.reshape(len(codes), -1)
    digits = np.pad(digits, ((0, 0), (0, -digits.shape[1] % 32)))
    return torch.from_numpy(np.packbits(digits.astype(np.uint8), axis=1, bitorder="little").view(np.int32).copy())


def draw(path: str, bits: int, out: int, groups: int, n: int, **kind: Any) -> tuple[Tensor, Tensor, Tensor]:
    """codes [out, n], scales [out, groups], zeros [out, groups] of a linear, the same for the same path."""
    generator = torch.Generator().manual_seed(sum(map(ord, path)))
    codes = torch.randint(2**bits, (out, n), generator=generator)
    scales = (
        torch.rand(out, groups, generator=generator).add(0.2).mul(0.3 / 2**bits).to(kind.get("dtype", torch.float16))
    )
    scales[0] *= -1  # AutoRound's may be negative
    zeros = torch.randint(2**bits, (out, groups), generator=generator)
    if kind.get("symmetric"):
        zeros.fill_(2 ** (bits - 1))
    return codes, scales, zeros


def dense(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Tensor:
    return (codes - zeros[:, group_of]).float() * scales.float()[:, group_of]


def write(
    folder: Path, writer: Writer, quantization: Mapping[str, Any], *, side: str = "", family: str = "llama"
) -> Any:
    """A folder with every linear of a tiny model's blocks written by `writer`; returns the dense model it is of."""
    model = tiny_model(family)
    tensors = {}
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    for path, linear in linears.items():
        if path == "lm_head":
            continue
        written, weight = writer(path, *linear.weight.shape)
        tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in written.items()}
        linear.weight = nn.Parameter(weight)
    packed = {path for path in linears if path != "lm_head"}
    tensors |= {
        name: tensor.clone() for name, tensor in model.state_dict().items()
        if name.removesuffix(".weight") not in packed
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"dtype": "float32", "architectures": [type(model).__name__]}
    if side:
        (folder / side).write_text(json.dumps(dict(quantization)))
    else:
        config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3, w4, … of the tiny models' vocabulary."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")


def assert_same(folder: Path, expected: Any, dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)) -> Any:
    """`folder` opens as `expected`: every weight to the bit in float32, rounded once in the others, and the logits."""
    model, _ = llmtools.load(folder)
    layers = quantized_linears(model)
    assert len(layers) == sum(isinstance(m, nn.Linear) for m in expected.modules()) - 1
    for path, layer in layers.items():
        weight = expected.get_submodule(path).weight
        assert torch.equal(layer.dequantize(dtype=torch.float32), weight), path
        for dtype in dtypes:
            assert torch.equal(layer.dequantize(dtype=dtype), weight.to(dtype)), (path, dtype)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tiny_ids()).logits, expected(input_ids=tiny_ids()).logits)
    return model


def assert_planned(model: str | Path) -> None:
    """`llmtools plan` of a checkpoint says, to the byte, what the opened model holds, with weights in files too."""
    from llmtools.checkpoint.loading import open_model
    from llmtools.nn.swap import packed_layers
    from llmtools.recipes.estimate import Plan, plan

    opened, _ = open_model(str(model))
    planned = plan(Plan(str(model), max_length=16, device="cpu", offload="disk"))
    packed = {id(each): each.nbytes for layer in packed_layers(opened).values() for each in layer.packed.values()}
    assert planned.memory.packed == sum(packed.values()) > 0
    assert planned.in_files == sum(each.nbytes for each in [*opened.parameters(), *opened.buffers()])
