"""What a block computes is computed once, though it runs once for each of its groups of linears.

While a block is quantized group by group, each run over the calibration text goes one group further, and repeats all
before it: of a decoder's four groups the attention is run four times, the first linears as often. Their results are the
same each time, since what comes before a group is final when its turn has come. So the outputs of finished layers, and
of attention, are kept for each batch, up to a limit of memory, and given again; what is not kept is computed again, to
the same bits. A tensor into which the model writes afterwards is seen by its version, and not given again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

REMEMBERED_BYTES = 512 * 2**20
"""Memory for the outputs kept of one block, in bytes."""


class Remembered:
    """The outputs of some layers of a block, and of its attention, by the number of the batch."""

    def __init__(self, limit: int = REMEMBERED_BYTES) -> None:
        self.limit = limit
        self.bytes = 0
        """Bytes kept so far."""
        self._layers: list[nn.Module] = []
        self._kept: dict[tuple[object, int, int], tuple[Tensor, int]] = {}  # with the tensor's version
        self._index: int | None = None
        self._calls: Counter[object] = Counter()

    def add(self, layers: Iterable[nn.Module]) -> None:
        """Keeps what these layers give from now on; in place of their `forward`, until `close`."""
        for layer in layers:
            if "forward" not in vars(layer):
                setattr(layer, "forward", partial(self._forward, layer))  # noqa: B010
                self._layers.append(layer)

    def close(self) -> None:
        """Gives the layers their own `forward` back, and drops what was kept."""
        for layer in self._layers:
            vars(layer).pop("forward", None)
        self._layers.clear()
        self._kept.clear()
        self.bytes = 0

    @contextmanager
    def run(self, index: int) -> Iterator[None]:
        """Within the context the block runs on the batch of this number."""
        self._index = index
        self._calls.clear()
        try:
            with _Attention(self):
                yield
        finally:
            self._index = None

    def recalled(self, key: object, compute: Callable[[], Any]) -> Any:
        """The result of this call in the batch's run, kept or computed; key: the layer or function."""
        if self._index is None:
            return compute()
        call = (key, self._index, self._calls[key])
        self._calls[key] += 1
        if (found := self._kept.get(call)) is not None and found[0]._version == found[1]:
            return found[0]
        result = compute()
        if isinstance(result, Tensor) and not result.requires_grad:
            size = 0 if found is not None else result.numel() * result.element_size()
            if self.bytes + size <= self.limit:
                self._kept[call] = result, result._version
                self.bytes += size
        return result

    def _forward(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.recalled(layer, lambda: type(layer).forward(layer, *args, **kwargs))


class _Attention(TorchFunctionMode):
    """Recalls torch's fused attention, by the order of its calls."""

    def __init__(self, remembered: Remembered) -> None:
        super().__init__()
        self._remembered = remembered

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._remembered.recalled(func, lambda: func(*args, **kwargs))
        return func(*args, **kwargs)
