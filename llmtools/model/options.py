"""Options of both `llmtools.quantize` and the command line; imports no torch, so that help is fast."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError, did_you_mean

ROUNDINGS = ONE_SIDED, TWO_SIDED = ("one_sided", "two_sided")
"""Values of `rounding`: what a quantizer's sweep minimises, tr(E H Eᵀ) or tr(G E H Eᵀ)."""


def check_rounding(rounding: str) -> None:
    """Raises InputError for a value that is not in `ROUNDINGS`."""
    if rounding not in ROUNDINGS:
        raise InputError(f"rounding={rounding!r}; {did_you_mean(str(rounding), ROUNDINGS)}")


@dataclass(frozen=True)
class BlockTuning:
    """Block-wise reconstruction: tune a block's floating-point tensors against the original block's outputs.

    The procedure is that of QuIP# (arXiv:2402.04396, section 5), whose learning rates were for many times the steps.
    These defaults suit the 70 steps over 128 sequences: at 2 bits they reduced OPTQ's perplexity from 95 to 59, a
    learning rate of 2.5e-3 to 65.
    """

    epochs: int | None = 5
    """Number of epochs over the calibration text after each group of linears; 0 for no tuning, null by --quality."""
    learning_rate: float = 1e-2
    """Learning rate for weights that are not quantized yet, norms and biases, relative to each tensor's RMS."""
    packed_learning_rate: float = 2e-3
    """Learning rate for the floating tensors of packed layers (scales, sign vectors), relative to each value."""
    batch: int = 8
    """Number of sequences per step."""
    patience: int = 3
    """Number of epochs without a lower held-out loss before tuning stops."""
    held_out: float = 0.125
    """Share of the calibration text that is held out, to choose the best epoch and to stop."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch", 1), ("patience", 1), ("learning_rate", 0), ("held_out", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"block tuning: {name}={getattr(self, name)}; at least {least} is expected")
        if not self.packed_learning_rate >= 0:
            raise InputError(f"block tuning: packed_learning_rate={self.packed_learning_rate}; at least 0 is expected")
        if self.held_out >= 1:
            raise InputError(f"block tuning: held_out={self.held_out}; a share below 1 is expected, such as 0.125")


NO_TUNING, OPEN_TUNING = BlockTuning(epochs=0), BlockTuning(epochs=None)


@dataclass(frozen=True)
class Recovery:
    """End-to-end recovery: train what stays in floating point on the original model's next-token distributions.

    The codes are fixed. Trained are the floating tensors of packed layers (scales, zero points, sign vectors), norms
    and biases, by the Kullback–Leibler divergence from the original model over calibration text, through the packed
    weights of the whole model.
    """

    steps: int | None = 60
    """Number of training steps; 0 for no recovery, null by --quality."""
    batch: int = 4
    """Number of sequences per step."""
    learning_rate: float = 2e-3
    """Learning rate for the floating tensors of packed layers, relative to each value."""
    dense_learning_rate: float = 2e-3
    """Learning rate for norms and biases, relative to each tensor's RMS."""
    adapter_learning_rate: float = 1e-3
    """Learning rate for adapters (`adapter_rank`), which are trained after the rest, for as many steps."""
    top_k: int = 64
    """Number of most probable tokens per position that are kept of the original's distribution; the others count as
    one."""
    held_out: float = 0.125
    """Share of the sequences that is held out, to keep the best iterate and to stop."""
    evaluations: int = 6
    """Number of evaluations on the held-out sequences; the training state is saved at each."""
    patience: int = 2
    """Number of evaluations without a lower held-out divergence before recovery stops."""

    def __post_init__(self) -> None:
        least = {"steps": 0, "batch": 1, "top_k": 1, "evaluations": 1, "patience": 1}
        for name, lowest in least.items():
            if getattr(self, name) is not None and getattr(self, name) < lowest:
                raise InputError(f"recover: {name}={getattr(self, name)}; at least {lowest} is expected")
        for name in ("learning_rate", "dense_learning_rate", "adapter_learning_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"recover: {name}={getattr(self, name)}; a number of at least 0 is expected")
        if not 0 < self.held_out < 1:
            raise InputError(f"recover: held_out={self.held_out}; a share between 0 and 1 is expected, such as 0.125")


RECOVERY, NO_RECOVERY, OPEN_RECOVERY = Recovery(), Recovery(steps=0), Recovery(steps=None)

OPTIMIZERS = {
    "adamw_torch_fused": 8.0,
    "adamw_torch": 8.0,
    "adamw_bnb_8bit": 2.03,  # one byte for each moment, a float32 maximum for every 256 of them
    "paged_adamw_8bit": 2.03,
    "sgd": 0.0,
}
"""Bytes of optimizer state per trainable parameter, by transformers' name of the optimizer (`optim`)."""
