"""The interface of an external format: detecting its checkpoints, reading a module, writing a module.

A format is a class, registered under its name, in a file of this package:

    @formats.register("toy8")
    class Toy8(Format):
        marker = "codes"
        limits = Limits(bits=(8,), whole_rows=True)

        @classmethod
        def detect(cls, config): ...                        # whether a quantization config is of this format
        def read(self, stored, out_features, in_features): ...   # a module's tensors -> (quantizer, packed)
        @classmethod
        def write(cls, layer): ...                          # a uniform grid -> a module's tensors
        @classmethod
        def describe(cls, layers, dense): ...               # -> the quantization config

Reading and writing are exact: ``read(write(x)) = x`` (`laws.round_trip`). A format of another package is found by an
entry point in the group ``llmtools.formats``; ``examples/llmtools-toy8`` is one.

Shapes: out, in — features; G — groups per row.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from ..kernels.bits import pack
from ..nn.embedding import QuantizedEmbedding
from ..nn.swap import own_linears, packed_layers
from ..quant import Packed, Quantizer, UniformGrid
from ..quant.grids.scalar import SCALE_TYPES
from ..registry import Registry
from .expert_names import split, stored_paths
from .readers import readers_of
from .tensors import Module, Tensors, write_json, write_shards
from .uniform import Limits, Requantized, Uniform, uniform_layers

FLOATS = tuple(SCALE_TYPES.values())
"""Types of scales."""
TYPE_NAMES = {dtype: name for name, dtype in SCALE_TYPES.items()}
"""Type of scales → its name in our quantizers' options."""


class WriteResult(NamedTuple):
    """The result of writing a model's files."""

    modules: int
    """Number of quantized linears."""
    requantized: list[Requantized]
    """Linears that the format cannot hold exactly, re-quantized under `lossy`."""
    readers: tuple[str, ...]
    """Programs known to read the files, of `readers.READERS`."""


formats: Registry[Format] = Registry("format", "llmtools.formats")


class Format(ABC):
    """An external format. An instance reads one checkpoint; `config` is that checkpoint's quantization config."""

    name: ClassVar[str]
    """Name in the registry, and on the command line for export."""
    marker: ClassVar[str]
    """Name of a tensor that every quantized module has, and no other module."""
    companion: ClassVar[str | None] = None
    """Name of a second tensor of every quantized module, to identify the format without a config."""
    implied: ClassVar[Mapping[str, Any] | None] = None
    """Quantization config of a folder without one, if the tensors describe themselves; else None."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Names of tensors that some writers add, and that the weight does not depend on."""
    by_expert: ClassVar[bool] = True
    """Whether mixtures can be written: experts one by one under their family's names (`expert_names`), or stacked."""
    limits: ClassVar[Limits | None] = None
    """Grids that the format can hold; None for a format that is read only."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def detect(cls, config: Mapping[str, Any]) -> bool:
        """Whether checkpoints with this quantization config are of this format."""

    @abstractmethod
    def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        """The weight [out_features, in_features] as one of our quantizers and its packed tensors, bit for bit.

        stored: the module's tensors in the file. Raises CheckpointError for damaged tensors.
        """

    def parts(self, path: str) -> tuple[str, ...]:
        """Paths of the model's linears whose weights, concatenated over outputs, are stored as the module `path`."""
        return (path,)

    def read_parts(
        self, stored: Module, out_features: Sequence[int], in_features: int
    ) -> list[tuple[Quantizer, Packed]]:
        """`read` for each of the parts; out_features: their numbers of outputs."""
        (whole,) = out_features
        return [self.read(stored, whole, in_features)]

    def bias(self, stored: Module, out_features: int) -> Tensor:
        """The module's bias [out_features]; it has one."""
        return stored.get("bias", out_features)

    def scales(self, stored: Module, packed: Packed) -> dict[str, Tensor]:
        """The module's tensors that hold floating values of `packed`, with those values: name → tensor of the file's
        shape and dtype. All others of the module stay; `read` then gives `packed`.

        Raises InputError where the module's tensors cannot hold any values of these; by default always.
        """
        raise InputError(f"{self.name} files cannot be written with other scales")

    def codes(self, stored: Module, quantizer: Quantizer, packed: Packed) -> dict[str, Tensor]:
        """The module's tensors that hold the codes of `packed`: name → tensor of the file's shape and dtype; as
        `scales`. With it, a merged checkpoint is written in this format again."""
        raise InputError(f"{self.name} files cannot be written with other codes")

    def tensors(self, folder: Path) -> Mapping[str, Tensor]:
        """Name → tensor of the files, each read on access. A format whose files hold several modules in one tensor
        gives them apart."""
        return Tensors(folder)

    def modules(self, names: Iterable[str]) -> list[str]:
        """Paths of the quantized modules, in the order of the tensors' names."""
        end = f".{self.marker}"
        return [name.removesuffix(end) for name in names if name.endswith(end)]

    @classmethod
    def writes(cls) -> bool:
        """Whether models can be written in this format."""
        return cls.limits is not None

    @classmethod
    def write(cls, layer: Uniform) -> dict[str, Tensor]:
        """Name → tensor of one linear, names relative to its path. The layer is within `limits`."""
        raise NotImplementedError(f"{cls.__name__}.write")

    @classmethod
    def describe(cls, layers: Mapping[str, Uniform], dense: list[str]) -> dict[str, Any]:
        """The ``quantization_config`` of a model with these layers; dense: paths of the unquantized linears."""
        raise NotImplementedError(f"{cls.__name__}.describe")

    @classmethod
    def files(cls, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """Further files that readers expect: name → contents as JSON. config: the quantization config."""
        return {}

    @classmethod
    def write_model(
        cls,
        model: nn.Module,
        tokenizer: Any,
        folder: Path,
        *,
        lossy: bool = False,
        reader: str | None = None,
        max_shard_size: str | int = "5GB",
    ) -> WriteResult:
        """Writes a model with quantized linears into a folder, in transformers' layout.

        Raises InputError for a layer that is not within `limits`, unless `lossy`, and for one that `reader` does not
        support.
        """
        layers = own_linears(model)
        assert cls.limits is not None, cls.name
        uniform, requantized = uniform_layers(layers, cls.limits, lossy=lossy)
        names = stored_paths(model)
        uniform = {names.get(path, path): layer for path, layer in uniform.items()}
        dense = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in layers]
        dense = [names.get(path, path) for path in [*dense, *(_routers(model) if names else [])]]
        inside = [path for path in dense if path.rpartition(".")[2] != "lm_head"]
        readers = readers_of(cls.name, list(uniform.values()), inside, reader)
        described = cls.describe(uniform, dense)
        written = {path: cls.write(layer) for path, layer in uniform.items()}
        write_folder(model, tokenizer, folder, written, described, max_shard_size)
        for name, contents in cls.files(described).items():
            write_json(folder / name, contents)
        return WriteResult(len(uniform), requantized, readers)


def write_folder(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    modules: Mapping[str, Mapping[str, Tensor]],
    described: Mapping[str, Any],
    max_shard_size: str | int,
) -> None:
    """A folder in transformers' layout: path → tensors of each quantized linear, under its stored path
    (`expert_names.stored_paths`); all others of the model; `described` as its quantization config."""
    others = _others(model)
    tensors = split(model, others) if stored_paths(model) else others
    for path, own in modules.items():
        tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in own.items()}
    hf_model: Any = model
    config = copy.deepcopy(hf_model.config)
    config.quantization_config = dict(described)
    config.save_pretrained(folder)
    if hf_model.can_generate():
        hf_model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_shards(folder, tensors, max_shard_size)


def _routers(model: nn.Module) -> list[str]:
    """Paths of the modules that compute with a matrix and are no linears, as a mixture's routers: other programs have
    them as linears, so their names are listed as dense ones."""
    return [
        path
        for path, module in model.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        and (weight := module._parameters.get("weight")) is not None
        and weight.dim() == 2
    ]


def _others(model: nn.Module) -> dict[str, Tensor]:
    """All tensors except those of quantized linears, each once: tied ones by their first name, embeddings as dense."""
    layers = packed_layers(model)
    packed = {f"{path}.{name}" for path, layer in layers.items() for name in layer.packed}
    kept = {
        f"{path}.weight": each.dequantize() for path, each in layers.items() if isinstance(each, QuantizedEmbedding)
    }
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name in packed or (tensor.numel() and tensor.data_ptr() in seen):
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.contiguous()
    return kept


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
    """A uniform grid as our quantizer and its packed tensors: value = scale · (code − zero).

    codes [out, in] uint8, or their bit stream `qweight` [out, w] int32; scales [out, G] float16, bfloat16 or float32;
    zeros [out, G]: integers in [0, 2^bits), or floats, which stay floats. group_of [in]: group of each column; None for
    groups of group_size consecutive columns.
    """
    perm = None
    if group_of is not None:
        perm = torch.argsort(group_of, stable=True)
        if codes is None:
            raise AssertionError("reordered columns need their codes")
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
    """The group of each column, int64 [in], from the tensor `name`; None where groups are consecutive columns.

    Raises CheckpointError where they are not groups of group_size columns, the last one possibly shorter.
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
            "this checkpoint's scales cannot be assigned to columns"
        )
    return group_of


def whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer of the config. Raises CheckpointError where it is missing or of another type."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"the quantization config says {key}={value!r}, an integer is expected")
    return value


def mapping(value: Any, key: str) -> dict[str, Any]:
    """A mapping of the config, {} for null. Raises CheckpointError for another type."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"the quantization config says {key}={value!r}, a mapping is expected")
    return {str(name): each for name, each in value.items()}
