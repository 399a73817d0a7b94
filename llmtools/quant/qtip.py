"""QTIP (arXiv:2406.11235): a rotated weight on a trellis, with the scale search and correction of `quip_sharp.py`.

The sweep rounds sixteen columns at a time, tiles of sixteen rows each by Viterbi's search. Coordinate descent can
follow as for any grid; by default there is none, since each iteration costs another search.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from .base import later, quantizers
from .grids.trellis import Trellis
from .quip_sharp import Rotated


@quantizers.register("qtip")
@dataclass(frozen=True)
class QTIP(Rotated):
    """QTIP (arXiv:2406.11235): rotated weights, 256 at a time on a trellis; the least error per bit, slow to quantize.

    1 to 8 bits per weight and nothing per group: two float16 vectors are all that is stored beside the codes, and
    with the code hyb a table of 2 KB.
    """

    needs_hessian: ClassVar[bool] = True
    rows_tried: ClassVar[int] = 32

    bits: int = 2
    """Bits per weight, 1 to 8."""
    state_bits: int = 12
    """Bits of the trellis' state, 8 to 16 and at least bits + 4; each more takes twice the time to quantize, and brings
    less."""
    code: str | None = None
    """Function from states to weights: 3inst, 1mad, or EXL3's mcg and mul1; or hyb, pairs of weights from a table that
    block tuning and recovery train, 1 to 4 bits and more than twice as many of state. By default 3inst for 1 and 2
    bits, 1mad for more: whichever has less error (docs/results/trellis.md)."""
    scale: float | None = None
    """Standard deviation of the weights on the grid. By default searched for each layer, from what suits Gaussian
    weights best downwards."""
    damping: float = 0.01
    """Damping added to the Hessian's diagonal, as a fraction of its mean."""
    passes: int = 0
    """Largest number of coordinate-descent iterations after the sweep; each takes about as long as the sweep."""
    seed: int = 0
    """Seed of the random signs, which are stored."""
    hadamard: int = 1
    """Version of the rules that say which Hadamard matrix belongs to a size."""
    scale_type: str = later("float16")
    """Type of the scales of rows: float16, bfloat16 or float32; float32 anyway where float16 is too narrow."""

    def __post_init__(self) -> None:
        if self.code is None:  # a checkpoint stores the code itself
            object.__setattr__(self, "code", "3inst" if self.bits in (1, 2) else "1mad")
        super().__post_init__()

    @property
    def fitting_scale(self) -> float:
        return self.grid.scale

    @cached_property
    def grid(self) -> Trellis:
        assert self.code is not None
        return Trellis(self.bits, self.state_bits, self.code)
