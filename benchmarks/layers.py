"""One linear layer, forward and backward in x, 5632 × 2048 in bfloat16, beside a dense one and other libraries' layers.

The limit is the two products, at the speed of the machine's faster type.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmtools.nn.linear import QuantizedLinear
from llmtools.quant import quantizer

from .run import Machine, Problem, case, main

OUT, IN = 5632, 2048
TOKENS = (1, 16, 128, 512, 2048)
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "4 bits": ("rtn", {"bits": 4, "clip": False}),
    "3 bits": ("rtn", {"bits": 3, "clip": False}),
    "2 bits": ("rtn", {"bits": 2, "clip": False}),
    "nf4": ("nf4", {}),
}


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and the gradient in x."""

    def run() -> None:
        torch.autograd.grad(layer(x), x, grad)

    return run


def baselines(linear: nn.Linear) -> dict[str, nn.Module]:
    """Layers of other libraries with this weight: of those that are installed, and that work here."""
    makers: dict[str, Callable[[nn.Linear], nn.Module]] = {"bitsandbytes nf4": _bitsandbytes}
    for bits in (4, 3, 2):
        makers[f"GPTQModel {bits} bits"] = functools.partial(_gptqmodel, bits=bits)
        makers[f"HQQ {bits} bits"] = functools.partial(_hqq, bits=bits)
    found = {}
    for name, make in makers.items():
        try:
            layer = make(linear)
            layer(torch.zeros(1, IN, dtype=torch.bfloat16))
        except Exception as error:  # third-party code may raise anything
            print(f"without {name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        found[name] = layer
    return found


def _bitsandbytes(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(IN, OUT, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
    return layer.to("cpu")  # type: ignore[no-any-return]


def _gptqmodel(linear: nn.Linear, bits: int) -> nn.Module:
    """Its kernel in plain torch, with codes that have nothing to do with the weight: time is all that is asked."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own count fails on small machines
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = TorchLinear(
        bits=bits, group_size=64, sym=True, desc_act=False,
        in_features=IN, out_features=OUT, bias=False, register_buffers=True,
    )  # fmt: skip
    scales = torch.full((OUT, IN // 64), 0.01, dtype=torch.float16)
    zeros = torch.full((OUT, IN // 64), 2 ** (bits - 1), dtype=torch.int32)
    layer.pack(copy.deepcopy(linear).float(), scales, zeros, g_idx=torch.arange(IN, dtype=torch.int32) // 64)
    layer.post_init()
    return layer  # type: ignore[no-any-return]


def _hqq(linear: nn.Linear, bits: int) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=64)
    config["weight_quant_params"]["optimize"] = False  # better codes take minutes, and no less time to read
    return HQQLinear(linear, config, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)  # type: ignore[no-any-return]


@case("layers")
def layers(machine: Machine) -> Iterator[Problem]:
    """Forward and backward at several numbers of tokens."""
    linear = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    ours = {
        name: QuantizedLinear.from_linear(linear, quantizer(method, **options))
        for name, (method, options) in OURS.items()
    }
    others = {"bf16 nn.Linear": linear, **baselines(linear)}
    for tokens in TOKENS:
        x = torch.randn(tokens, IN).bfloat16().requires_grad_()
        grad = torch.randn(tokens, OUT).bfloat16()

        def check(x: Tensor = x, grad: Tensor = grad) -> None:
            for layer in ours.values():
                dense = layer.dequantize(dtype=torch.float32)
                y = layer(x)
                (grad_x,) = torch.autograd.grad(y, x, grad)
                for got, truth in ((y, x.detach().float() @ dense.T), (grad_x, grad.float() @ dense)):
                    assert (got - truth).abs().max() <= 2**-6 * truth.abs().max()

        yield Problem(
            f"{tokens} tokens",
            check,
            {name: step(layer, x, grad) for name, layer in ours.items()},
            {name: step(layer, x, grad) for name, layer in others.items()},
            4 * tokens * OUT * IN / machine.best_matmul_speed,
            "the two products",
        )


if __name__ == "__main__":
    sys.exit(main(["layers"]))
