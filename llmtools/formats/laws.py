"""Conformance checks of an external format: ``read(write(x)) = x`` for every grid that the format can hold."""

from __future__ import annotations

import torch

from ..nn.linear import QuantizedLinear
from ..quant import OPTQ, RTN, Quantizer
from .base import Format, formats
from .tensors import Module
from .uniform import mismatch, uniform_of


def round_trip(external: type[Format], layer: QuantizedLinear) -> bool:
    """Checks that a layer, written and read again, has bitwise the same weights, and is written as the same tensors.

    Returns whether the format can hold the layer. Raises AssertionError where the check fails: the config is not
    detected, a weight differs, a second writing differs.
    """
    uniform = uniform_of(layer)
    assert external.limits is not None, f"{external.name} is not written module by module"
    if isinstance(uniform, str) or mismatch(uniform, external.limits) is not None:
        return False
    tensors = {name: tensor.contiguous() for name, tensor in external.write(uniform).items()}
    config = external.describe({"layer": uniform}, [])
    reader = next((kind for kind in formats.classes() if kind.detect(config)), None)
    assert reader is not None, f"no format detects what {external.name} describes: {config}"
    stored = Module({f"layer.{name}": tensor for name, tensor in tensors.items()}, "layer")
    quantizer, packed = reader(config).read(stored, layer.out_features, layer.in_features)
    again = QuantizedLinear(layer.in_features, layer.out_features, quantizer)
    again.pack_(packed)
    assert torch.equal(again.dequantize(dtype=torch.float32), layer.dequantize(dtype=torch.float32)), "rows differ"
    second = uniform_of(again)
    assert not isinstance(second, str), second
    for name, tensor in external.write(second).items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype, f"{name} differs"
    return True


def check(external: type[Format], *, out_features: int = 24, in_features: int = 96) -> int:
    """Runs `round_trip` over grids of all bits, group sizes and symmetries; returns the number that the format holds.

    Raises AssertionError where a check fails, or the format holds none of them.
    """
    held = 0
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    inputs = torch.randn(4 * in_features, in_features, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)  # [in, in]; act-order sorts the columns by its diagonal
    grids: list[Quantizer] = [
        RTN(bits=bits, group_size=group_size, symmetric=symmetric)
        for bits in (2, 3, 4, 8)
        for group_size in (32, -1)
        for symmetric in (True, False)
    ]
    for quantizer in [*grids, OPTQ(bits=4, group_size=32, symmetric=True, act_order=True)]:
        layer = QuantizedLinear(in_features, out_features, quantizer)
        layer.pack_(quantizer.quantize(weight, hessian))
        held += round_trip(external, layer)
    assert held, f"{external.name} holds none of the grids"
    return held
