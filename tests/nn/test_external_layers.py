"""Layers that another library quantized carry adapters by PEFT's own knowledge; routers and their like do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmtools.nn.adapters import not_adaptable


class OthersWeight(nn.Parameter):
    """A weight of another library's own type, packed into bytes."""


class OthersLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight = OthersWeight(torch.zeros(outputs * inputs // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Router(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_router_is_left_out_and_anothers_quantized_layer_is_not() -> None:
    model = nn.ModuleDict({"packed": OthersLinear(8, 8), "router": Router(8, 4), "plain": nn.Linear(8, 8)})
    assert not_adaptable(model) == ["router"]
    assert not_adaptable(nn.ModuleDict({"packed": OthersLinear(8, 8)})) == []
