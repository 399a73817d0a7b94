"""A quantized embedding, and the output head that is tied to it.

The embedding decodes the rows that are looked up. A tied head multiplies by the embedding's packed tensors and has none
of its own, so nothing is stored, saved or moved twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, where
from ..quant import Packed, Quantizer
from .linear import QuantizedLinear
from .packed import PackedWeight


class QuantizedEmbedding(PackedWeight, nn.Embedding):  # type: ignore[override]
    """A frozen embedding [tokens, features] whose rows are decoded when they are looked up.

    Its quantizer decodes each row independently: every packed tensor has one row per token.
    """

    kind: type[nn.Embedding] = nn.Embedding
    """Class of the embedding that it replaces."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        quantizer: Quantizer,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's: it would allocate the dense weight
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._allocate(quantizer, dtype, device)

    @classmethod
    def empty(
        cls, embedding: nn.Embedding, quantizer: Quantizer, device: torch.device | str | None = None
    ) -> QuantizedEmbedding:
        """A layer of the shape and dtype of `embedding` with uninitialised tensors.

        The forward of a subclass is kept, such as Gemma's, which scales the rows. Raises InputError for a quantizer
        that does not decode each row independently.
        """
        layout = quantizer.layout(embedding.num_embeddings, embedding.embedding_dim)
        if any(spec.shape[0] != embedding.num_embeddings for spec in layout.values()):
            raise InputError(f"{where()}{quantizer} does not decode each row independently, as an embedding requires")
        original: Any = type(embedding)
        ours: Any = cls
        kind: Any = _class_for(original, ours)
        layer: QuantizedEmbedding = kind.__new__(kind)
        QuantizedEmbedding.__init__(
            layer,
            embedding.num_embeddings,
            embedding.embedding_dim,
            quantizer,
            padding_idx=embedding.padding_idx,
            dtype=embedding.weight.dtype,
            device=device,
        )
        for name, value in vars(embedding).items():
            if not name.startswith("_") and name not in vars(layer):
                setattr(layer, name, value)
        _copy_buffers(embedding, layer)
        return layer.train(embedding.training)

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The dense embedding, in `dtype`, of the original class."""
        made = self.kind.__new__(self.kind)
        nn.Module.__init__(made)
        for name, value in vars(self).items():
            if not name.startswith("_") and name not in ("quantizer", "dtype"):
                setattr(made, name, value)
        _copy_buffers(self, made)
        made.weight = nn.Parameter(self.dequantize(dtype=dtype), requires_grad=False)
        return made

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] integers -> [..., features] in the layer's dtype."""
        taken = {name: tensor[ids.flatten()] for name, tensor in self.packed.items()}
        rows: Tensor = self.quantizer.dequantize(taken, dtype=self.dtype)
        return rows.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.quantizer}"


@functools.cache
def _class_for(kind: Any, base: Any) -> Any:
    """The class of a quantized embedding that replaces one of class `kind`, whose own forward calls ours."""
    return base if kind is nn.Embedding else type(f"Quantized{kind.__name__}", (kind, base), {"kind": kind})


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set.update(source._non_persistent_buffers_set)


class TiedLinear(QuantizedLinear):
    """An output head whose weight is that of a quantized embedding; it has no tensors of its own."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = embedding.shape
        self.quantizer, self.dtype = embedding.quantizer, embedding.dtype
        self._packed_names = ()
        self.register_parameter("bias", None)
        self._tied = [embedding]  # in a list, which makes no submodule of it

    @property
    def embedding(self) -> QuantizedEmbedding:
        """The embedding whose weight it shares."""
        return self._tied[0]

    @property
    def stored(self) -> Packed:
        return self.embedding.stored

    @property
    def packed(self) -> Packed:
        return self.embedding.packed

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def pack_(self, packed: Packed) -> None:
        raise InputError(f"{where()}this head is tied to the embedding and has no tensors of its own")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self
