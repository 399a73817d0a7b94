"""QuIP#'s files, packed here by hand from the definition of E8P, E81B and the transforms."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import llmtools
from llmtools import CheckpointError
from llmtools.nn.swap import quantized_linears
from tests.formats.writers import assert_planned, tiny_tokenizer
from tests.models import tiny_ids, tiny_model

ROWS_OF_NORM_12 = """
31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133 33133311 33133131 33131331
33133113 33131313 33131133 31333311 31333131 31331331 31333113 31331313 13331133 13333311 13333131 13331331 13333113
13331313 11331333 33113331"""
BOOKS = {2: ("E8P12", 7), 3: ("E8P12RVQ3B", 18), 4: ("E8P12RVQ4B", 17)}
RESIDUAL = {3: 2.04, 4: 3.45}


@cache
def magnitudes() -> Tensor:
    """[256, 8]: A of section 4.3 of the paper's appendix: by norm up to 10 in lexicographic order, then 29 more."""
    inner = [v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in v) <= 10]
    last = [[int(digit) / 2 for digit in word] for word in ROWS_OF_NORM_12.split()]
    return torch.tensor([*map(list, inner), *last])


def e8p(code: int) -> Tensor:
    s = code & 255
    odd = bin(s).count("1") % 2
    s ^= odd
    v = magnitudes()[code >> 8].clone()
    if v.sum() % 2 == 1:
        v[7] *= -1
    signs = torch.tensor([-1.0 if s >> bit & 1 else 1.0 for bit in (0, 4, 1, 5, 2, 6, 3, 7)])
    return v * signs + (-0.25 if odd else 0.25)


@cache
def e81b() -> Tensor:
    whole = [v for v in itertools.product((-1.0, 0.0, 1.0), repeat=8) if sum(v) % 2 == 0 and sum(x * x for x in v) <= 2]
    half = [v for v in itertools.product((-0.5, 0.5), repeat=8) if sum(v) % 2 == 0]
    return torch.cat([torch.tensor(whole), torch.tensor(half), 2 * torch.eye(8), -2 * torch.eye(8)[:7]])


def words(codes: Tensor) -> Tensor:
    """E8P codes [m, n/8] in words of four, one bit at a time: int64 [m, n/32]."""
    m, blocks = codes.shape
    out = []
    for big_row, big_column, r, c in itertools.product(range(m // 16), range(blocks // 8), range(8), range(4)):
        word = 0
        for i in range(4):
            code = int(codes[16 * big_row + 2 * r + i % 2, 8 * big_column + 2 * c + i // 2])
            word |= (code >> 8) << 8 * i
            for j in range(8):
                word |= (code >> j & 1) << (32 + 4 * j + i)
        out.append(word - (1 << 64) if word >> 63 else word)
    return torch.tensor(out).reshape(m, blocks // 4)


def orthogonal(n: int) -> Tensor:
    """Had_K ⊗ Sylvester over √n for n = 2^t and 12·2^t, float64."""
    small = torch.ones(1, 1, dtype=torch.float64)
    if n % 3 == 0:  # Paley's first construction over 11
        squares = {x * x % 11 for x in range(1, 11)}
        small = torch.ones(12, 12, dtype=torch.float64)
        small[0, 1:] = -1
        for i, j in itertools.product(range(11), range(11)):
            small[1 + i, 1 + j] = 1 if i == j or (i - j) % 11 in squares else -1
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(small) * len(sylvester) < n:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    return torch.kron(small, sylvester) / n**0.5


def fused(path: str, bits: int, m: int, n: int, parts: int, residual: float) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(sum(map(ord, path)))
    codes = torch.randint(65536, (m, n // 8), generator=generator)
    inner = torch.stack([e8p(int(code)) for code in codes.flatten()]).reshape(m, n)
    stored = [words(codes)]
    if bits == 4:
        more = torch.randint(65536, (m, n // 8), generator=generator)
        inner = inner + torch.stack([e8p(int(code)) for code in more.flatten()]).reshape(m, n) / residual
        stored.append(words(more))
    if bits == 3:
        fine = torch.randint(256, (m, n // 8), generator=generator, dtype=torch.uint8)
        inner = inner + e81b()[fine.long()].reshape(m, n) / residual
        stored.append(fine.view(torch.int64))
    su = (torch.randint(0, 2, (n,), generator=generator) * 2 - 1 + 0.1 * torch.randn(n, generator=generator)).half()
    sv = (torch.randn(m, generator=generator) * 0.05).half()
    wscale = torch.tensor(1.0 if parts == 1 else 1.25).half()
    weight = orthogonal(m) @ inner.double() @ orthogonal(n).T * su.double() * sv.double()[:, None] * wscale.double()
    tensors = {
        "Qidxs": torch.cat(stored, 1),
        "SU": su,
        "SV": sv,
        "Wscale": wscale,
        "codebook_id": torch.tensor(BOOKS[bits][1]),
    }
    return tensors, weight


def write(folder: Path, bits: int, residual: float | None = None) -> Any:
    """A folder as QuIP# writes it, of a tiny model; returns the dense model that it stands for."""
    model = tiny_model(intermediate_size=192)
    scale = residual or RESIDUAL.get(bits, 1.0)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if "_proj" not in name}
    for index, layer in enumerate(model.model.layers):
        groups = {
            "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "self_attn.o_proj": ["self_attn.o_proj"],
            "mlp.upgate_proj": ["mlp.up_proj", "mlp.gate_proj"],
            "mlp.down_proj": ["mlp.down_proj"],
        }
        for name, parts in groups.items():
            linears = [layer.get_submodule(part) for part in parts]
            rows = [linear.out_features for linear in linears]
            written, weight = fused(f"{index}.{name}", bits, sum(rows), linears[0].in_features, len(parts), scale)
            scales = torch.ones(1)
            if len(parts) > 1:
                scales = torch.tensor([0.7, 1.3, 0.9])[: len(parts)].half()
                written["fuse_scales"] = scales
            for linear, part, factor in zip(linears, weight.split(rows), scales, strict=True):
                linear.weight = nn.Parameter((part * factor.double()).float())
            prefix = f"model.layers.{index}.{name}."
            tensors |= {prefix + key: tensor.contiguous() for key, tensor in written.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    params = {"lora_rank": 0, "rescale_WH": False, "codebook": BOOKS[bits][0], "codebook_version": 1, "codesz": 8}
    params |= {"resid_scale_override": residual or -1, "idx_dtype": "torch.int64", "packsz": 4, "model_version": 1}
    config = model.config.to_dict() | {"quip_params": params, "dtype": "float32", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def opened(folder: Path) -> Any:
    from llmtools.formats.reading import detect, open_model

    found = detect(str(folder), {})
    assert found is not None
    model, info = open_model(found, {})
    assert not info["missing_keys"]
    return model


@pytest.mark.parametrize(("bits", "residual"), [(2, None), (3, None), (4, None), (4, 3.0)])
def test_every_width(bits: int, residual: float | None, tmp_path: Path) -> None:
    expected = write(tmp_path / "q", bits, residual)
    model = opened(tmp_path / "q")
    layers = quantized_linears(model)
    assert len(layers) == 14
    for path, layer in layers.items():
        torch.testing.assert_close(layer.dequantize(dtype=torch.float32), expected.get_submodule(path).weight)
    with torch.no_grad():
        got, wanted = model(input_ids=tiny_ids()).logits, expected(input_ids=tiny_ids()).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_parts_share_their_codes_and_gradients_pass(tmp_path: Path) -> None:
    expected = write(tmp_path / "q", 2)
    model = opened(tmp_path / "q")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.packed["codes"] is attention.v_proj.packed["codes"]
    assert attention.q_proj.quantizer.spec()["name"] == "quip_sharp_rows"
    assert attention.o_proj.quantizer.spec()["name"] == "quip_sharp"
    x = torch.randn(3, 64, requires_grad=True)
    attention.k_proj(x).square().sum().backward()
    weight = expected.model.layers[0].self_attn.k_proj.weight
    torch.testing.assert_close(x.grad, 2 * x.detach() @ weight.T @ weight, rtol=1e-4, atol=1e-4)


def test_a_step_on_it_is_planned_with_its_codes_once(tmp_path: Path) -> None:
    write(tmp_path / "q", 2)
    tiny_tokenizer().save_pretrained(tmp_path / "q")
    assert_planned(tmp_path / "q")


def test_it_is_saved_as_ours(tmp_path: Path) -> None:
    write(tmp_path / "q", 3)
    model = opened(tmp_path / "q")
    model.save_pretrained(tmp_path / "ours")
    from transformers import AutoModelForCausalLM

    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(back(input_ids=tiny_ids()).logits, model(input_ids=tiny_ids()).logits)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "quip_params" not in config
    assert config["quantization_config"]["origin"]["codebook"] == "E8P12RVQ3B"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook": "D4"}, "codebook 'D4' is not read"),
        ({"codebook": "E8P12RVQ4B"}, "codebook_id 7 is not that of"),
        ({"rescale_WH": True}, "rescale_WH"),
    ],
)
def test_what_cannot_be_read_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "q", 2)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quip_params"] |= changes
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        llmtools.load(tmp_path / "q")
