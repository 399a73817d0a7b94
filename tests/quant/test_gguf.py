"""ggml's block types: the simple ones are rounded to nearest, the others are read only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmtools import InputError
from llmtools.kernels.ggml import TYPES
from llmtools.quant import quantizer
from tests.kernels.test_ggml import blocks

SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.mark.parametrize("kind", SIMPLE)
def test_rounding_is_to_the_nearest_value_of_the_stored_grid(kind: str) -> None:
    chosen = quantizer("gguf", type=kind)
    weight = torch.randn(8, 96) * 0.1
    packed = chosen.quantize(weight)
    error = (chosen.dequantize(packed) - weight).abs()
    scale = packed["blocks"].reshape(-1, TYPES[kind].bytes)[:, :2].contiguous().view(torch.float16).float().abs()
    inside = error.reshape(-1, 32) <= scale / 2 * 1.001
    assert inside.float().mean() > 0.95  # the end of a grid with one side longer may be clipped
    assert bool((error.reshape(-1, 32) <= scale * 1.001).all())


@pytest.mark.parametrize("kind", SIMPLE)
def test_rounding_is_no_worse_than_that_of_the_package_gguf(kind: str) -> None:
    gguf: Any = pytest.importorskip("gguf")
    weight = torch.randn(64, 256) * 0.1
    chosen, number = quantizer("gguf", type=kind), gguf.GGMLQuantizationType[kind]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), number), number)
    ours = chosen.dequantize(chosen.quantize(weight)).numpy()
    assert np.square(ours - weight.numpy()).sum() <= np.square(theirs - weight.numpy()).sum() * 1.001


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in SIMPLE])
def test_the_other_types_are_read_only(kind: str) -> None:
    chosen = quantizer("gguf", type=kind)
    with pytest.raises(InputError, match=rf"{kind} can be read but not quantized to; .*llama-quantize"):
        chosen.quantize(torch.randn(4, 512))
    packed = {"blocks": blocks(kind, 9, 512)}
    chosen.check(packed)
    assert {name: (tuple(each.shape), each.dtype) for name, each in packed.items()} == {
        name: tuple(spec) for name, spec in chosen.layout(9, 512).items()
    }
    whole = chosen.dequantize(packed, dtype=torch.bfloat16)
    for rows in (slice(0, 1), slice(3, 8), slice(8, 9)):
        assert torch.equal(chosen.dequantize(packed, rows, torch.bfloat16), whole[rows])
    x, dense = torch.randn(3, 512), chosen.dequantize(packed)
    torch.testing.assert_close(chosen.linear(x, packed), x @ dense.T, rtol=1e-4, atol=1e-4 * float(dense.abs().max()))


@pytest.mark.parametrize("kind", TYPES)
def test_a_scale_that_is_no_number_is_refused(kind: str) -> None:
    packed = blocks(kind, 4, 512)
    chosen = quantizer("gguf", type=kind)
    chosen.check({"blocks": packed})
    for at in TYPES[kind].halves or (54,):
        spoiled = packed.clone()
        spoiled.view(-1)[3 * TYPES[kind].bytes + at + 1] = 0xFC
        if not TYPES[kind].halves:  # the four top nibbles are 0x7C00
            spoiled.view(-1)[3 * 56 + 49 : 4 * 56 : 2] = torch.tensor([0x00, 0x00, 0xC0, 0x70], dtype=torch.uint8)
        with pytest.raises(InputError, match="NaN or infinite"):
            chosen.check({"blocks": spoiled})


def test_what_a_block_cannot_hold_is_said() -> None:
    with pytest.raises(InputError, match="blocks of 256 weights, and 96 columns"):
        quantizer("gguf", type="Q4_K").layout(4, 96)
    with pytest.raises(InputError, match="no type 'Q4_k'; did you mean 'Q4_K'"):
        quantizer("gguf", type="Q4_k")
    with pytest.raises(InputError, match="reaches 1e"):
        quantizer("gguf", type="Q4_1").quantize(torch.full((1, 32), 1e6))
    with pytest.raises(InputError, match="NaN"):
        quantizer("gguf").quantize(torch.full((1, 32), float("nan")))


@pytest.mark.parametrize("kind", TYPES)
def test_scales_are_tensors_while_they_are_trained(kind: str) -> None:
    chosen = quantizer("gguf", type=kind)
    packed = {"blocks": blocks(kind, 4, 512)}
    apart = chosen.unpacked(packed)
    again = chosen.repacked(apart)
    assert torch.equal(again["blocks"], packed["blocks"]) and again.keys() == packed.keys()
    assert torch.equal(chosen.dequantize(apart), chosen.dequantize(packed))
    names = chosen.tunable(apart)
    assert len(names) == max(1, len(TYPES[kind].halves))
    doubled = chosen.repacked(apart | {name: 2 * apart[name] for name in names})
    assert torch.equal(chosen.dequantize(doubled), 2 * chosen.dequantize(packed))  # linear in them, in every type
    floats = {name: apart[name].double().float().requires_grad_() for name in names}
    x, grad = torch.randn(40, 512), torch.randn(40, 4)
    found = torch.autograd.grad(chosen.linear(x, apart | floats), list(floats.values()), grad)
    dense = grad.double().T @ x.double()  # the gradient of the weight
    per_block = len(apart["scales"][0])
    for name, got in zip(names, found, strict=True):
        zeros = {each: torch.zeros_like(apart[each]) for each in names}
        unit = chosen.dequantize(chosen.repacked(apart | zeros | {name: torch.ones_like(apart[name])}))
        expected = (dense * unit).unflatten(1, (per_block, -1)).sum(-1)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
