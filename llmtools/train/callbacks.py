"""Callbacks of the trainer: progress and metrics, early stopping, the end of a time limit."""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..ranks import is_first
from .options import Finetune

log = logging.getLogger(__name__)


def say_when_it_ends() -> None:
    log.warning("this step is finished and saved first; the same again stops at once")


def seconds(training: dict[str, Any]) -> float | None:
    """Of work that may be lost; None where the user said when to save."""
    from .checkpoints import SECONDS

    return None if training.keys() & {"save_steps", "save_strategy"} else SECONDS


def watch(metrics: Path, checkpoint: Path | None, keeper: Any) -> Any:
    """The callback that shows progress, of validation too, writes one JSON line a record, and stops where the loss is
    no number."""
    from contextlib import ExitStack

    from transformers import TrainerCallback

    from ..progress import progress

    begun = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if is_first():
        _forget_after(metrics, begun)

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.stack, self.validation = ExitStack(), ExitStack()
            self.note = ""
            self.batches = 0
            """of this validation, so far"""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step < state.max_steps:
                self.step = self.stack.enter_context(progress("finetune", unit="steps"))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step(state.global_step, state.max_steps, self.note)

        def on_prediction_step(
            self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
        ) -> None:
            if self.batches == 0:
                self.validating = self.validation.enter_context(progress("validation", unit="batches", brief=True))
            self.batches += 1
            self.validating(self.batches, len(eval_dataloader))

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.batches = 0
            self.validation.close()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stack.close()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
            if keeper.stopped:  # a summary of what has not come to its end
                return
            numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
            bad = {key: value for key, value in numbers.items() if not math.isfinite(value)}
            if any(key in bad for key in ("loss", "eval_loss", "grad_norm")):
                self.validation.close()
                self.stack.close()
                raise InputError(
                    f"training diverged: {', '.join(f'{key} is {value}' for key, value in bad.items())} at step "
                    f"{state.global_step}; lower --training.learning_rate (now {args.learning_rate}), or look for "
                    f"broken examples; checkpoints before this step are in {args.output_dir}"
                )
            if "loss" in numbers:
                self.note = f"loss {numbers['loss']:.4f}"
            if "eval_loss" in numbers:
                log.info("step %d: validation loss %.4f", state.global_step, numbers["eval_loss"])
            if state.is_world_process_zero:
                with metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")

    return Watch()


def _forget_after(metrics: Path, step: int) -> None:
    """Takes out the records of steps that are going to be made again, and what a kill left of a line."""
    from ..files import write_whole

    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_whole(metrics, "".join(f"{line}\n" for line in kept))


VALIDATION_STEPS = 10
"""The fewest steps between two validations, where the user gave no number and nothing is decided by them."""


def spaced(recipe: Finetune) -> list[Any]:
    """The callback that keeps a short run from validating at each step, or none where the recipe says how often.

    A validation at each tenth of the run suits long ones; the steps of a run are known when it begins.
    """
    if recipe.early_stopping is not None or recipe.training.keys() & {"eval_steps", "save_steps"}:
        return []
    from transformers import TrainerCallback

    class Spaced(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.eval_steps = max(state.eval_steps, min(VALIDATION_STEPS, state.max_steps))
            if args.load_best_model_at_end:
                state.save_steps = state.eval_steps

    return [Spaced()]


def stopper(recipe: Finetune) -> list[Any]:
    """transformers' callback that ends a run which no longer gets better, if the recipe asks for it."""
    if recipe.early_stopping is None:
        return []
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(early_stopping_patience=recipe.early_stopping)]
