"""Callbacks of the trainer: progress, metrics, early stopping; and the log line of an interrupted run."""

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


def log_pending_stop() -> None:
    """Logs, after a first signal, that the run stops after this step."""
    log.warning("the current step is finished and saved first; a second signal stops at once")


def checkpoint_interval(training: dict[str, Any]) -> float | None:
    """Seconds between checkpoints, the work that may be lost; None where the arguments set the saving strategy."""
    from .checkpoints import SECONDS

    return None if training.keys() & {"save_steps", "save_strategy"} else SECONDS


def metrics_callback(metrics: Path, checkpoint: Path | None, keeper: Any) -> Any:
    """The TrainerCallback that shows progress (of validation, too) and appends each record to `metrics` as a JSON line.

    checkpoint: the one that the run resumes from, if any. keeper: the callback of `checkpoints.keeper`. It raises
    InputError where a loss or the gradient's norm is not finite.
    """
    from contextlib import ExitStack

    from transformers import TrainerCallback

    from ..progress import progress

    first = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if is_first():
        _drop_records_after(metrics, first)

    class Metrics(TrainerCallback):
        def __init__(self) -> None:
            self.stack, self.validation = ExitStack(), ExitStack()
            self.postfix = ""
            self.batches = 0
            """Number of batches of the current validation so far."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step < state.max_steps:
                self.step = self.stack.enter_context(progress("finetune", unit="steps"))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step(state.global_step, state.max_steps, self.postfix)

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
            if keeper.stopped:  # a summary of a run that is not complete
                return
            values = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
            bad = {key: value for key, value in values.items() if not math.isfinite(value)}
            if any(key in bad for key in ("loss", "eval_loss", "grad_norm")):
                self.validation.close()
                self.stack.close()
                raise InputError(
                    f"training diverged: {', '.join(f'{key} is {value}' for key, value in bad.items())} at step "
                    f"{state.global_step}; lower --training.learning_rate (now {args.learning_rate}), or look for "
                    f"broken examples; checkpoints before this step are in {args.output_dir}"
                )
            if "loss" in values:
                self.postfix = f"loss {values['loss']:.4f}"
            if "eval_loss" in values:
                log.info("step %d: validation loss %.4f", state.global_step, values["eval_loss"])
            if state.is_world_process_zero:
                with metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **values}) + "\n")

    return Metrics()


def _drop_records_after(metrics: Path, step: int) -> None:
    """Removes the records of steps that are going to be repeated, and a line that was left incomplete."""
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
"""Minimum number of steps between two validations, where the recipe does not set it."""


def spaced_validation(recipe: Finetune) -> list[Any]:
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


def early_stopping(recipe: Finetune) -> list[Any]:
    """transformers' callback for early stopping, if the recipe sets it."""
    if recipe.early_stopping is None:
        return []
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(early_stopping_patience=recipe.early_stopping)]


def warmup(model: Any, share: float) -> Any:
    """The callback that begins to round the adapters of --merge exact after that share of the steps.

    Raises InputError where an adapter is on anything but a quantized linear.
    """
    from transformers import TrainerCallback

    from ..model.exact_lora import exact_layers

    layers = exact_layers(model)

    class Warmup(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for layer in layers.values():
                layer.rounds = state.global_step >= round(share * state.max_steps)

    return Warmup()
