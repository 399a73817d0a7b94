"""Where the weights of a model are while it is quantized.

The walk and its visitor ask for the weights of a module before they use them, and hand a block over when it is done. A
`Storage` answers. This one is the plain case, a model in memory; `streaming.py` has one whose weights stay in files.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..nn.experts import Part
    from ..quant import Quantizer
    from .report import Report

AROUND = ""
"""The path that stands for the network around its blocks: embeddings, final norm, head."""


class Storage:
    """A model in memory, all of it."""

    resident = True
    """Whether all weights are in memory from the beginning."""

    def unfused(self, parts: Mapping[str, tuple[str, Part]]) -> None:
        """Called before the work, with what became of fused experts, as `nn.experts.unfuse` returns it."""

    def planned(self, quantizers: Mapping[str, Quantizer]) -> None:
        """Called before the work, with the quantizer of each linear that will be quantized."""

    def holding(self, path: str) -> AbstractContextManager[None]:
        """The weights of the module at `path`, or `AROUND` the blocks, are in memory within the context."""
        return nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """All weights can be read within the context, for a run of the network as a whole."""
        return nullcontext()

    def kept(self, hidden: Tensor) -> Tensor:
        """Hidden states [batch, t, features] that are needed later: the tensor, or a copy of it elsewhere."""
        return hidden

    def restored(self, path: str) -> Report | None:
        """Puts the finished module at `path` of an earlier run in its place, and returns its report; None where there
        is none."""
        return None

    def finished(self, path: str, report: Report) -> None:
        """Takes the module at `path`, in which nothing changes any more."""

    def finished_elsewhere(self, path: str) -> None:
        """The same of a module that another process of the run has taken, and this one holds, too."""

    def complete(self) -> None:
        """All weights can be read from here on, those of finished modules included."""
