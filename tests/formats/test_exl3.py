"""EXL3's files, decoded here by hand from the definition of its codes, circles, tiles and transforms."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

import llmtools
from llmtools import CheckpointError
from llmtools.errors import InputError
from llmtools.formats.exl3 import EXL3, tensors_of
from llmtools.formats.tensors import Module
from llmtools.formats.writing import export
from llmtools.nn import QuantizedLinear
from llmtools.nn.swap import quantized_linears
from llmtools.quant import EXL3Trellis
from llmtools.recipes.quantize import Quantize, quantize
from tests.formats.writers import assert_planned, tiny_tokenizer
from tests.models import tiny_ids, tiny_model

FACTORS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
CODES = ("3inst", "mcg", "mul1")


# ---- the definition --------------------------------------------------------------------------------------------------


@cache
def values(code: str) -> list[float]:
    """Of every state, one at a time."""
    return [value(state, code) for state in range(1 << 16)]


def half(word: int) -> float:
    return float(np.array([word], dtype=np.uint16).view(np.float16)[0])


def value(state: int, code: str) -> float:
    if code == "mul1":  # one multiplication and addition, rounded once
        word = state * FACTORS["mul1"] % 2**32
        return float(np.float16((1024 + sum(word.to_bytes(4, "little"))) * half(0x1EEE) + half(0xC931)))
    word = (state * 89226354 + 64248484 if code == "3inst" else state * FACTORS["mcg"]) % 2**32
    word = (word & 0x8FFF8FFF) ^ 0x3B603B60
    return float(np.float16(half(word >> 16) + half(word & 0xFFFF)))


def tile(words: list[int], bits: int, code: str) -> np.ndarray[Any, Any]:
    """The words of a tile, as stored -> [16 inputs, 16 outputs]."""
    string = "".join(f"{words[i ^ 1] & 0xFFFF:016b}" for i in range(len(words)))  # pairs are 32-bit words, swapped
    circle, out = string + string, np.empty((16, 16))
    for t in range(256):
        end = (t + 1) * bits + (len(string) if (t + 1) * bits < 16 else 0)
        lane, element = divmod(t, 8)
        row = lane % 4 * 2 + (0, 1, 8, 9)[element % 4]
        out[row, lane // 4 + element // 4 * 8] = values(code)[int(circle[end - 16 : end], 2)]
    return out


def weight_of(tensors: dict[str, Tensor], code: str) -> Tensor:
    """[out, in] float64, of the padded sizes."""
    trellis = tensors["trellis"]
    blocks = [
        [tile(words, trellis.shape[2] // 16, code) for words in row]  # a row of tiles: 16 inputs
        for row in trellis.tolist()
    ]
    inner = np.concatenate([np.concatenate(row, 1) for row in blocks])
    signs = np.array([[(-1) ** (i & j).bit_count() for j in range(128)] for i in range(128)]) / 128**0.5
    left, right = (np.kron(np.eye(size // 128), signs) for size in inner.shape)
    suh, svh = tensors["suh"].double().numpy(), tensors["svh"].double().numpy()
    return torch.from_numpy((suh[:, None] * (left @ inner @ right) * svh).T)


def drawn(m: int, n: int, bits: int, code: str, seed: int) -> dict[str, Tensor]:
    """A linear's tensors, of padded sizes m, n."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "trellis": torch.randint(-(2**15), 2**15, (n // 16, m // 16, 16 * bits), generator=generator).short(),
        "suh": (torch.randn(n, generator=generator).sign() * (0.5 + torch.rand(n, generator=generator))).half(),
        "svh": (torch.randn(m, generator=generator) * 0.05).half(),
    }
    if code in FACTORS:
        factor = torch.tensor(FACTORS[code], dtype=torch.int64)
        tensors[code] = (factor - 2**32).to(torch.int32)
    return tensors


def padded(size: int) -> int:
    return -(-size // 128) * 128


def read(tensors: dict[str, Tensor], m: int, n: int) -> tuple[Any, dict[str, Tensor]]:
    stored = Module({f"q.{name}": tensor for name, tensor in tensors.items()}, "q")
    return EXL3({"quant_method": "exl3"}).read(stored, m, n)


# ---- one linear ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_code(bits: int, code: str) -> None:
    m, n = [(128, 256), (256, 128), (200, 130)][bits % 3]
    tensors = drawn(padded(m), padded(n), bits, code, bits)
    expected = weight_of(tensors, code)[:m, :n]
    quantizer, packed = read(tensors, m, n)
    assert (quantizer.bits, quantizer.code) == (bits, code)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == quantizer.layout(m, n)
    truth = quantizer.dequantize(packed, dtype=torch.float64)
    torch.testing.assert_close(truth, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(quantizer.dequantize(packed).double(), expected, rtol=1e-5, atol=1e-5)
    inner = quantizer.grid.dequantize({"trellis": packed["trellis"]})  # codes are read to the bit
    plain = weight_of(tensors | {"suh": torch.ones(padded(n)).half(), "svh": torch.ones(padded(m)).half()}, code)
    ones = {"su": torch.ones(inner.shape[1]).half(), "sv": torch.ones(inner.shape[0]).half()}
    rotated, _ = quantizer.basis.transform(plain, None, ones)
    assert torch.equal(rotated.round(decimals=7).half(), inner.half())


def test_bits_of_signs_as_the_first_versions_wrote() -> None:
    tensors = drawn(128, 256, 3, "3inst", 0)
    generator = torch.Generator().manual_seed(1)
    for name in ("su", "sv"):
        signs = torch.randint(0, 2, tensors.pop(f"{name}h").shape, generator=generator)
        words = signs.view(-1, 16) @ (1 << torch.arange(16))
        tensors[name] = (words - (words >> 15 << 16)).to(torch.int16)
        tensors[f"{name}h"] = (1 - 2 * signs).half()
    expected = weight_of(tensors, "3inst")
    quantizer, packed = read({name: tensors[name] for name in ("trellis", "su", "sv")}, 128, 256)
    torch.testing.assert_close(quantizer.dequantize(packed, dtype=torch.float64), expected, rtol=0, atol=1e-12)


# ---- a model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a folder as EXL3 writes it, with other bits and codes in each linear, and biases; the dense model)."""
    model = tiny_model(hidden_size=128, intermediate_size=192, attention_bias=True)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors = {name: each.clone() for name, each in model.state_dict().items()}
    for index, (path, linear) in enumerate(linears.items()):
        m, n = padded(linear.out_features), padded(linear.in_features)
        code = CODES[index % 3]
        made = drawn(m, n, 6 if path == "lm_head" else 1 + index % 8, code, index)
        del tensors[f"{path}.weight"]
        tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in made.items()}
        weight = weight_of(made, code)[: linear.out_features, : linear.in_features]
        linear.weight = nn.Parameter(weight.float())
        if linear.bias is not None:
            bias = torch.zeros(m).half()
            bias[: linear.out_features] = torch.randn(linear.out_features).half()
            tensors[f"{path}.bias"] = bias
            linear.bias = nn.Parameter(bias[: linear.out_features].float())
    folder = tmp_path_factory.mktemp("exl3") / "model"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "exl3", "version": "0.0.20", "bits": 4.0, "head_bits": 6, "codebook": "mcg"}
    config = model.config.to_dict() | {"quantization_config": method, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder, model


def opened(folder: Path) -> Any:
    from llmtools.formats.reading import detect, open_model

    found = detect(str(folder), {})
    assert found is not None
    model, info = open_model(found, {})
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits


def test_a_step_on_it_is_planned(written: tuple[Path, Any]) -> None:
    tiny_tokenizer().save_pretrained(written[0])
    assert_planned(written[0])


def test_a_model_computes_as_its_dense_one(written: tuple[Path, Any]) -> None:
    folder, dense = written
    model = opened(folder)
    layers = quantized_linears(model)
    assert len(layers) == 15 and layers["lm_head"].quantizer.bits == 6
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


def test_it_is_saved_as_ours_to_the_bit(written: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = opened(written[0])
    model.save_pretrained(tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(back), logits(model))
    for path, layer in quantized_linears(model).items():
        own = back.get_submodule(path)
        assert own.quantizer == layer.quantizer
        assert all(torch.equal(own.packed[name], tensor) for name, tensor in layer.packed.items())
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["quantization_config"]["origin"]["quant_method"] == "exl3"


def test_an_adapter_trains_on_it(written: tuple[Path, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = llmtools.prepare_for_training(opened(written[0]))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    frozen = {name: each.detach().clone() for name, each in model.named_parameters() if not each.requires_grad}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tiny_ids(), labels=tiny_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(torch.equal(each, frozen[name]) for name, each in model.named_parameters() if name in frozen)


def test_a_folder_whose_config_lacks_the_entry_is_told_by_its_tensors(
    written: tuple[Path, Any], tmp_path: Path
) -> None:
    save_file(load_file(written[0] / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((written[0] / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(opened(tmp_path)), logits(opened(written[0])))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trellis": torch.zeros(8, 8, 64).short()}, r"q.trellis has shape \[8, 8, 64\], expected \[16, 8, 'any'\]"),
        ({"trellis": torch.zeros(8, 8).short()}, r"q.trellis has shape \[8, 8\]"),
        ({"trellis": torch.zeros(16, 8, 64).int()}, "q.trellis is torch.int32, expected torch.int16"),
        ({"trellis": torch.zeros(16, 8, 56).short()}, "q: 3.5 bits per weight .tiles of 56 words. are not read"),
        ({"trellis": torch.zeros(16, 8, 144).short()}, "q: 9 bits per weight"),
        ({"trellis": torch.zeros(16, 8, 0).short()}, "q: 0 bits per weight"),
        ({"suh": None}, "q.suh is missing"),
        ({"svh": None}, "q.svh is missing"),
        ({"suh": torch.zeros(128).half()}, r"q.suh has shape \[128\], expected \[256\]"),
        ({"svh": torch.zeros(128)}, "q.svh is torch.float32"),
        ({"svh": None, "sv": torch.zeros(9).short()}, r"q.sv has shape \[9\], expected \[8\]"),
        ({"mul1": torch.tensor(5, dtype=torch.int32)}, "the code mul1 with factor 0x5 is not read; 0x83dcd12d is"),
        ({"mcg": torch.tensor(5, dtype=torch.int32)}, "mcg and mul1, two codes"),
        ({"mul1": torch.tensor(5.0)}, "q.mul1 is torch.float32"),
        ({"mul1": torch.zeros(0, dtype=torch.int32)}, r"q.mul1 has shape \[0\]"),
    ],
    ids=lambda each: each if isinstance(each, str) else "-".join(each),
)
def test_damaged_tensors_are_one_line(changes: dict[str, Tensor | None], message: str) -> None:
    tensors = drawn(128, 256, 4, "mul1", 0) | changes
    with pytest.raises(CheckpointError, match=message) as caught:
        read({name: each for name, each in tensors.items() if each is not None}, 128, 256)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["surplus", "not a number"])
def test_damaged_files_are_one_line(kind: str, written: tuple[Path, Any], tmp_path: Path) -> None:
    path = "model.layers.0.mlp.up_proj"
    tensors = load_file(written[0] / "model.safetensors")
    if kind == "surplus":
        tensors[f"{path}.scale"] = torch.ones(1)
    else:
        tensors[f"{path}.suh"][3] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((written[0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="up_proj") as caught:
        llmtools.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_config_is_not_quantized_again(
    written: tuple[Path, Any], stories: Path, tmp_path: Path
) -> None:
    """It is recognised by its tensors here, too, and not said to be damaged."""
    source = tmp_path / "exl3"
    source.mkdir()
    save_file(load_file(written[0] / "model.safetensors"), source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((written[0] / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(stories).save_pretrained(source)
    with pytest.raises(InputError, match="quantized already"):
        quantize(Quantize(model=str(source), out=str(tmp_path / "q"), quantizer="rtn"))
    assert [path.name for path in tmp_path.iterdir()] == ["exl3"]


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_linear_that_was_read_is_written_to_the_bit(bits: int, code: str) -> None:
    m, n = [(128, 256), (200, 130)][bits % 2]
    tensors = drawn(padded(m), padded(n), bits, code, bits)
    tensors["suh"][n:], tensors["svh"][m:] = 1, 0  # of what is padded
    quantizer, packed = read(tensors, m, n)
    layer = QuantizedLinear(n, m, quantizer)
    layer.pack_(packed)
    again = tensors_of(layer)
    assert again.keys() == tensors.keys()
    assert all(
        again[name].dtype == tensor.dtype and torch.equal(again[name], tensor) for name, tensor in tensors.items()
    )


def test_a_model_is_written_as_it_was_read(written: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = written
    model = opened(folder)
    done = export(model, None, tmp_path / "out", "exl3")
    assert (done.modules, done.requantized) == (15, [])
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        live: Any = ...
        if name.endswith(("suh", "svh", "bias")):  # what is padded is not seen
            linear = model.get_submodule(name.rpartition(".")[0])
            live = slice(linear.in_features if name.endswith("suh") else linear.out_features)
        assert torch.equal(ours[name][live], tensor[live]) and ours[name].shape == tensor.shape, name
    assert torch.equal(logits(opened(tmp_path / "out")), logits(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "exl3" and config["head_bits"] == 6 and 1 < config["bits"] < 8
    storage = json.loads((tmp_path / "out" / "quantization_config.json").read_text())["tensor_storage"]
    for path, layer in quantized_linears(model).items():
        assert storage[path]["bits_per_weight"] == layer.quantizer.bits
        for name, each in storage[path]["stored_tensors"].items():
            tensor = ours[name]
            assert each == {"shape": list(tensor.shape), "n_bytes": tensor.nbytes, "dtype": str(tensor.dtype)}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qtip", {"state_bits": 8}, "EXL3 does not hold weights of qtip.*--quantizer exl3"),
        ("rtn", {}, "EXL3 does not hold weights of rtn"),
        ("exl3", {"state_bits": 8}, "states of 8 bits; EXL3's have 16"),
    ],
)
def test_what_does_not_fit_to_the_bit_is_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = tiny_model(hidden_size=64, intermediate_size=64)
    llmtools.quantize(model, name, [tiny_ids()], bits=2, **options)
    for lossy in (False, True):
        with pytest.raises(InputError, match=message):
            export(model, None, tmp_path / "out", "exl3", lossy=lossy)
    assert not (tmp_path / "out").exists()


def test_a_code_that_exl3_has_not_is_refused(tmp_path: Path) -> None:
    layer = QuantizedLinear(128, 128, EXL3Trellis(2, "1mad"))
    model = tiny_model(hidden_size=128, intermediate_size=128)
    model.model.layers[0].mlp.up_proj = layer
    with pytest.raises(InputError, match="EXL3 has no code 1mad"):
        export(model, None, tmp_path / "out", "exl3")
