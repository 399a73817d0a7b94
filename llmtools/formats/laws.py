"""What "is an external format" means, executable: ``read(write(x)) = x`` for every grid that the format can hold."""

from __future__ import annotations

import torch

from ..nn.linear import QuantizedLinear
from ..quant import OPTQ, RTN, Quantizer
from .base import Format, formats
from .tensors import Module
from .uniform import mismatch, uniform_of


def round_trip(form: type[Format], layer: QuantizedLinear) -> bool:
    """Checks that a layer, written and read again, has the same rows to the bit, and writes the same tensors.

    Returns whether the format holds such a layer at all. Raises AssertionError where the law is broken: the description
    is not detected, a row differs, a second writing differs.
    """
    uniform = uniform_of(layer)
    assert form.limits is not None, f"{form.name} is not written module by module"
    if isinstance(uniform, str) or mismatch(uniform, form.limits) is not None:
        return False
    tensors = {name: tensor.contiguous() for name, tensor in form.write(uniform).items()}
    config = form.describe({"layer": uniform}, [])
    reader = next((kind for kind in formats.classes() if kind.detect(config)), None)
    assert reader is not None, f"no format detects what {form.name} describes: {config}"
    stored = Module({f"layer.{name}": tensor for name, tensor in tensors.items()}, "layer")
    quantizer, packed = reader(config).read(stored, layer.out_features, layer.in_features)
    again = QuantizedLinear(layer.in_features, layer.out_features, quantizer)
    again.pack_(packed)
    assert torch.equal(again.dequantize(dtype=torch.float32), layer.dequantize(dtype=torch.float32)), "rows differ"
    second = uniform_of(again)
    assert not isinstance(second, str), second
    for name, tensor in form.write(second).items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype, f"{name} differs"
    return True


def check(form: type[Format], *, out_features: int = 24, in_features: int = 96) -> int:
    """Runs `round_trip` over grids of all widths, group sizes and symmetries; returns how many the format holds.

    Raises AssertionError where the law is broken, or the format holds none of them.
    """
    held = 0
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    inputs = torch.randn(4 * in_features, in_features, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)  # [in, in]; of its diagonal act-order makes the order of the columns
    grids: list[Quantizer] = [
        RTN(bits=bits, group_size=group_size, symmetric=symmetric)
        for bits in (2, 3, 4, 8)
        for group_size in (32, -1)
        for symmetric in (True, False)
    ]
    for quantizer in [*grids, OPTQ(bits=4, group_size=32, symmetric=True, act_order=True)]:
        layer = QuantizedLinear(in_features, out_features, quantizer)
        layer.pack_(quantizer.quantize(weight, hessian))
        held += round_trip(form, layer)
    assert held, f"{form.name} holds none of the grids"
    return held
