"""Options that both `llmtools.quantize` and the command line take; light, so that help needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class BlockTuning:
    """Tune what is left of a block, and the scales of what is packed, against the original block's outputs.

    The procedure is that of QuIP# (arXiv:2402.04396, section 5). Its rates were for many times the steps; these suit
    the 70 steps that 128 sequences make: at 2 bits they brought OPTQ from a perplexity of 95 to 59, a rate of 2.5e-3
    to 65.
    """

    epochs: int = 5
    """passes over the calibration text after each group of linears; 0 for no tuning"""
    learning_rate: float = 1e-2
    """Adam's, for weights that are not quantized yet, norms and biases, as a share of each tensor's size (its RMS)"""
    packed_learning_rate: float = 2e-3
    """Adam's, for the floating tensors of packed layers (scales, sign vectors), as a share of each number's size"""
    batch: int = 8
    """sequences in a step"""
    patience: int = 3
    """stop after so many epochs without a gain on the held-out sequences"""
    held_out: float = 0.125
    """share of the calibration text that is held out, to choose the best epoch and to stop"""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch", 1), ("patience", 1), ("learning_rate", 0), ("held_out", 0)):
            if getattr(self, name) < least:
                raise InputError(f"block tuning: {name}={getattr(self, name)}; at least {least} is expected")
        if not self.packed_learning_rate >= 0:
            raise InputError(f"block tuning: packed_learning_rate={self.packed_learning_rate}; at least 0 is expected")
        if self.held_out >= 1:
            raise InputError(f"block tuning: held_out={self.held_out}; a share below 1 is expected, such as 0.125")


NO_TUNING = BlockTuning(epochs=0)
