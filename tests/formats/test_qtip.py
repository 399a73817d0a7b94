"""QTIP's files, decoded here by hand from the definition of its codes, circles, tiles and packings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmtools import CheckpointError
from llmtools.formats.qtip import QTIPFiles
from llmtools.formats.tensors import Module
from llmtools.nn.swap import quantized_linears
from tests.formats.test_quip_sharp import opened, orthogonal
from tests.formats.writers import assert_planned, tiny_tokenizer
from tests.models import tiny_ids, tiny_model

PARAMS = {"L": 16, "K": 2, "V": 2, "td_x": 16, "td_y": 16, "tlut_bits": 9, "decode_mode": "quantlut_sym"}
PLAIN = PARAMS | {"V": 1, "tlut_bits": 16}


# ---- the definition --------------------------------------------------------------------------------------------------


def emitted(state: int, mode: str, tlut: Any) -> list[float]:
    if mode == "1mad":
        word = (state * 34038481 + 76625530) % 2**32
        return [float(np.float32(sum(word.to_bytes(4, "little")) - 510) / np.float32(147.800537109375))]
    if mode == "3inst":
        word = ((state * 89226354 + 64248484) % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
        return [float(np.array([word >> 16, word & 0xFFFF], np.uint16).view(np.float16).sum(dtype=np.float16))]
    h = (state * state + state) % 2**32
    first, second = tlut[h >> 6 & 511]
    return [-first if h >> 15 & 1 else first, second]


def tile(string: str, bits: int, mode: str, tlut: Any) -> list[float]:
    """A circle of bits -> 256 values in its order."""
    v = 2 if mode == "quantlut_sym" else 1
    out: list[float] = []
    for step in range(256 // v):
        out += emitted(int((string + string)[step * bits * v : step * bits * v + 16], 2), mode, tlut)
    return out


def drawn(m: int, n: int, bits: int, mode: str, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """(a linear's tensors, its weight [m, n] float64): circles are drawn, decoded, and packed as the program does."""
    generator = np.random.default_rng(seed)
    tlut = (generator.standard_normal((512, 2)) * 0.9682).astype(np.float16)
    kernel = mode == "quantlut_sym" and bits >= 2
    strings = ["".join(map(str, generator.integers(0, 2, 256 * bits))) for _ in range(m * n // 256)]
    inner = np.empty((m, n))
    for index, string in enumerate(strings):
        top, left = index // (n // 16) * 16, index % (n // 16) * 16
        for place, value in enumerate(tile(string, bits, mode, tlut.astype(float))):
            row, column = divmod(place, 16)
            if kernel:  # registers of a thread: pairs, eight rows apart, then eight columns
                thread, element = divmod(place, 8)
                row, column = thread // 4 + element // 2 % 2 * 8, thread % 4 * 2 + element % 2 + element // 4 * 8
            inner[top + row, left + column] = value
    stream = [bytes(int(s[i : i + 8], 2) for i in range(0, len(s), 8)) for s in strings]
    if kernel:
        packed = b""
        for big_row in range(m // 32):
            for big_column in range(n // 32):
                for lane in range(32):
                    for b in range(2):
                        for a in range(2):
                            own = stream[(2 * big_row + a) * (n // 16) + 2 * big_column + b]
                            packed += own[lane * bits : (lane + 1) * bits][::-1]
        words = np.frombuffer(packed, dtype="<i2")
    else:
        words = np.frombuffer(b"".join(stream), dtype=">i2").astype(np.int16)
    su = generator.choice([-1.0, 1.0], n) * (1 + 0.1 * generator.random(n))
    sv = generator.standard_normal(m) * 0.05
    tensors = {
        "trellis": torch.from_numpy(words.astype(np.int16).reshape(-1, 16 * bits)),
        "SU": torch.from_numpy(su).half(),
        "SV": torch.from_numpy(sv).float(),
        "rcp": torch.tensor(0),
        "tp_rank": torch.tensor(8),
    }
    if mode == "quantlut_sym":
        tensors["tlut"] = torch.from_numpy(tlut)
    weight = orthogonal(m) @ torch.from_numpy(inner) @ orthogonal(n).T
    return tensors, weight * tensors["SU"].double() * tensors["SV"].double()[:, None]


def read(tensors: dict[str, Tensor], m: int, n: int, params: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    stored = Module({f"q.{name}": tensor for name, tensor in tensors.items()}, "q")
    return QTIPFiles({"quant_method": "qtip", **params}).read(stored, m, n)


# ---- one linear ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["quantlut_sym", "1mad", "3inst"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_width_and_mode(bits: int, mode: str) -> None:
    m, n = [(64, 32), (32, 96), (96, 64)][bits % 3]
    tensors, expected = drawn(m, n, bits, mode, bits)
    params = (PARAMS if mode == "quantlut_sym" else PLAIN) | {"decode_mode": mode}
    quantizer, packed = read(tensors, m, n, params)
    assert quantizer.bits == bits
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == quantizer.layout(m, n)
    truth = quantizer.dequantize(packed, dtype=torch.float64)
    # 1mad divides by 147.8…, we multiply by its inverse: values differ in the last bit of float32.
    torch.testing.assert_close(truth, expected, rtol=0, atol=2e-7 if mode == "1mad" else 1e-12)
    x = torch.randn(3, n)
    torch.testing.assert_close(quantizer.linear(x, packed), x @ expected.T.float(), rtol=1e-4, atol=1e-4)


# ---- a model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a folder as QTIP writes it, with other bits in some linears; the dense model that it stands for)."""
    model = tiny_model()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if "_proj" not in name}
    for path, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and path != "lm_head":
            bits = 3 if "v_proj" in path else 2
            made, weight = drawn(linear.out_features, linear.in_features, bits, "quantlut_sym", len(tensors))
            linear.weight = nn.Parameter(weight.float())
            tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in made.items()}
    folder = tmp_path_factory.mktemp("qtip") / "model"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    params = PARAMS | {"codebook": "bitshift", "codebook_version": 0, "split_for_tp": False, "skip_list": None}
    config = model.config.to_dict() | {"quip_params": params, "dtype": "float32", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


def test_a_step_on_it_is_planned(written: tuple[Path, Any]) -> None:
    tiny_tokenizer().save_pretrained(written[0])
    assert_planned(written[0])


def test_a_model_computes_trains_and_is_saved(written: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, dense = written
    model = opened(folder)
    layers = quantized_linears(model)
    assert len(layers) == 14 and {layer.quantizer.spec()["name"] for layer in layers.values()} == {"qtip_hybrid"}
    with torch.no_grad():
        logits = model(input_ids=tiny_ids()).logits
        torch.testing.assert_close(logits, dense(input_ids=tiny_ids()).logits, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "ours")
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert torch.equal(back(input_ids=tiny_ids()).logits, logits)
    x = torch.randn(3, 64, requires_grad=True)
    model.model.layers[0].self_attn.k_proj(x).square().sum().backward()
    weight = dense.model.layers[0].self_attn.k_proj.weight
    torch.testing.assert_close(x.grad, 2 * x.detach() @ weight.T @ weight, rtol=1e-4, atol=1e-4)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_mode": "2mad"}, "decode_mode='2mad' is not read"),
        ({"decode_mode": None}, "decode_mode=None"),
        ({"L": 20}, "L=20 is not read"),
        ({"V": 1}, "V=1 and decode_mode=quantlut_sym is not read; 2 is"),
        ({"td_x": 8}, "td_x=8"),
        ({"tlut_bits": 10}, "tlut_bits=10"),
    ],
    ids=str,
)
def test_other_configs_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        QTIPFiles({"quant_method": "qtip"} | PARAMS | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trellis": torch.zeros(7, 32).short()}, r"q.trellis has shape \[7, 32\], expected \[8, 'any'\]"),
        ({"trellis": torch.zeros(8, 33).short()}, "q: tiles of 33 words are not read"),
        ({"trellis": torch.zeros(8, 80).short()}, "q: tiles of 80 words are not read"),
        ({"SU": None}, "q.SU is missing"),
        ({"SV": torch.ones(32)}, r"q.SV has shape \[32\], expected \[64\]"),
        ({"SU": torch.full((32,), 1e-3).double().float()}, "q.SU is torch.float32 with values that float16 has not"),
        ({"tlut": None}, "q.tlut is missing"),
        ({"rcp": torch.tensor(1)}, "rcp=1"),
        ({"rcp": torch.zeros(2)}, r"q.rcp has shape \[2\]"),
    ],
    ids=lambda each: each if isinstance(each, str) else "-".join(each),
)
def test_damaged_tensors_are_one_line(changes: dict[str, Tensor | None], message: str) -> None:
    tensors = drawn(64, 32, 2, "quantlut_sym", 0)[0] | changes
    with pytest.raises(CheckpointError, match=message) as caught:
        read({name: each for name, each in tensors.items() if each is not None}, 64, 32, PARAMS)
    assert "\n" not in str(caught.value)
