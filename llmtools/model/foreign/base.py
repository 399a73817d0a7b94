"""What a format of others is: how its modules are told among the tensors, and what each becomes.

Shapes: out, in — features; G — groups in a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...kernels.bits import pack
from ...quant import Packed, Quantizer, UniformGrid
from ...quant.grids.scalar import SCALE_TYPES
from .tensors import Module

FLOATS = tuple(SCALE_TYPES.values())
TYPE_NAMES = {dtype: name for name, dtype in SCALE_TYPES.items()}


class Format(ABC):
    """A kind of checkpoint. One object reads one checkpoint; `config` is what that says of its quantization."""

    marker: ClassVar[str]
    """The name of a tensor that every quantized module has, and no other."""
    companion: ClassVar[str]
    """The name of another tensor of every quantized module: with the marker, it tells the format without a config."""
    implied: ClassVar[Mapping[str, Any] | None] = None
    """The quantization config of a folder that has none, if the tensors describe themselves; else None."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Names of tensors that writers put beside the others, and that say nothing about the weight."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def recognise(cls, config: Mapping[str, Any]) -> bool:
        """Whether checkpoints with this quantization config are of this format."""

    @abstractmethod
    def convert(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        """The same weight in our terms, to the bit. Raises CheckpointError where the tensors are damaged."""

    def parts(self, path: str) -> tuple[str, ...]:
        """The linears of the model whose weights, one above the other, are stored as the module at `path`."""
        return (path,)

    def convert_parts(
        self, stored: Module, out_features: Sequence[int], in_features: int
    ) -> list[tuple[Quantizer, Packed]]:
        """`convert` for each of the parts, by their numbers of outputs."""
        (whole,) = out_features
        return [self.convert(stored, whole, in_features)]

    def modules(self, names: Iterable[str]) -> list[str]:
        """The paths of the quantized modules, in the order of the names."""
        end = f".{self.marker}"
        return [name.removesuffix(end) for name in names if name.endswith(end)]


def affine(
    codes: Tensor | None,
    scales: Tensor,
    zeros: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    qweight: Tensor | None = None,
    group_of: Tensor | None = None,
) -> tuple[Quantizer, Packed]:
    """A uniform grid as our quantizer and its tensors: value = scale · (code − zero).

    codes [out, in], or their bit stream `qweight` [out, w] int32 if the caller has it; scales [out, G]; zeros [out, G]:
    integers in [0, 2^bits), or floats, which are kept as such. group_of [in]: the group of each column, if they are
    not runs of group_size columns.
    """
    perm = None
    if group_of is not None:
        perm = torch.argsort(group_of, stable=True)
        if codes is None:
            raise AssertionError("columns in another order need their codes")
        codes = codes[:, perm]
    if qweight is None:
        assert codes is not None
        qweight = pack(codes, bits)
    float_zeros = zeros.is_floating_point()
    symmetric = not float_zeros and bool((zeros == 2 ** (bits - 1)).all())
    quantizer = UniformGrid(
        bits=bits,
        group_size=-1 if group_size >= in_features else group_size,
        symmetric=symmetric,
        scale_type=TYPE_NAMES[scales.dtype],
        float_zeros=float_zeros,
        permuted=perm is not None,
    )
    packed = {
        "qweight": qweight.contiguous(),
        "columns": torch.empty(0, in_features, dtype=torch.uint8),
        "scales": scales.contiguous(),
    }
    if float_zeros:
        packed["zeros"] = zeros.to(scales.dtype).contiguous()
    elif not symmetric:
        packed["qzeros"] = pack(zeros, bits, torch.uint8)
    if perm is not None:
        packed["perm"] = perm.to(torch.int32)
    return quantizer, {name: packed[name] for name in quantizer.layout(qweight.shape[0], in_features)}


def columns_by_group(stored: Module, name: str, in_features: int, group_size: int, groups: int) -> Tensor | None:
    """The group of each column, [in], as the tensor `name` has it; None where groups are runs of columns.

    Raises CheckpointError where they are no groups of group_size columns, the last one possibly shorter.
    """
    if name not in stored:
        return None
    group_of = stored.get(name, in_features, dtypes=(torch.int32, torch.int64)).long()
    natural = torch.arange(in_features) // group_size
    if torch.equal(group_of, natural):
        return None
    if not torch.equal(group_of.sort().values, natural) or int(natural[-1]) != groups - 1:
        raise CheckpointError(
            f"{stored.path}.{name} does not sort {in_features} columns into {groups} groups of {group_size}; "
            "this checkpoint's scales cannot be told apart"
        )
    return group_of


def whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer of the config. Raises CheckpointError where it is missing or something else."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"the quantization config says {key}={value!r}, an integer is expected")
    return value


def mapping(value: Any, key: str) -> dict[str, Any]:
    """A table of the config, {} for null. Raises CheckpointError for something else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"the quantization config says {key}={value!r}, a table is expected")
    return {str(name): each for name, each in value.items()}
