"""TRL's SFTTrainer with a chunked loss that never holds all logits, run from a checkpoint or the beginning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..ranks import processes
from .options import NEEDS_TRAIN, Row

log = logging.getLogger(__name__)


def run_trainer(trainer: Any, checkpoint: Path | None) -> None:
    """Trains from the beginning or a checkpoint; one that has all steps already is only loaded.

    Raises InputError where no adapter is used, the best checkpoint is damaged, or checkpoints cannot be written.
    """
    from ..files import disk_error
    from .checkpoints import Finished, all_in, damage

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Finished:
        assert checkpoint is not None
        log.info("%s has all %d steps already; nothing is trained", checkpoint, trainer.state.global_step)
        if trainer.args.load_best_model_at_end and (step := getattr(trainer.state, "best_global_step", None)):
            best = checkpoint.with_name(f"checkpoint-{step}")
            if (why := damage(best)) is not None:
                raise InputError(f"--resume: load_best_model_at_end needs the best checkpoint, and {why}") from None
            trainer.model.load_adapter(str(best), "default", is_trainable=True)
    except Exception as error:  # each library that writes checkpoints has its own
        if isinstance(error, RuntimeError) and "does not require grad" in str(error):
            raise InputError(
                "no adapter is used by the model: the loss depends on none of them; name modules that the model uses "
                "in --lora.target_modules"
            ) from error
        folder, reason = Path(trainer.args.output_dir), disk_error(error)
        remedy = "--resume continues from the last intact one" if all_in(folder) else "no checkpoint was kept"
        if reason is None and _lost_a_process(error):
            raise InputError(f"another process of this run ended; start it again ({folder}: {remedy})") from error
        if reason is None:
            raise
        raise InputError(f"{folder}: cannot be written ({reason}); {remedy}") from error


def _lost_a_process(error: BaseException) -> bool:
    """Whether an error is that of a collective operation whose other side is gone: torch has no type for gloo's."""
    import torch.distributed as dist

    gone = "gloo" in str(error) or "Connection closed by" in str(error)
    return processes() > 1 and (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and gone))


def make_trainer(
    model: Any,
    tokenizer: Any,
    arguments: dict[str, Any],
    config: Any,
    train: list[Row],
    validation: list[Row],
    callbacks: Sequence[Any],
) -> Any:
    """TRL's trainer without its printing. Raises InputError for arguments, data and adapters that it does not take."""
    try:
        import datasets
        from jinja2 import TemplateError
        from transformers import PrinterCallback
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise InputError(NEEDS_TRAIN.format(error=error)) from error
    from ..nn.adapters import prepare_for_training, refuse_fsdp1
    from .heap import guard_heap, map_large_blocks

    try:
        args = SFTConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"training: {error}") from error
    refuse_fsdp1(str((getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version")))
    datasets.disable_progress_bars()
    map_large_blocks()
    prepare_for_training(model, gradient_checkpointing=args.gradient_checkpointing)
    try:
        with warnings.catch_warnings():  # PEFT's own ranks for fused experts, said of modules and meant for parameters
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            trainer = _with_chunked_loss(SFTTrainer)(
                model=model,
                args=args,
                train_dataset=datasets.Dataset.from_list(train),
                eval_dataset=datasets.Dataset.from_list(validation) if validation else None,
                processing_class=tokenizer,
                peft_config=config,
                callbacks=list(callbacks),
            )
    except (ValueError, TemplateError) as error:  # no such target module, a chat template that refuses a role, …
        hint = ""
        if "ParamWrapper" in str(error):  # PEFT treats fused experts as linears
            hint = " Fused experts are adapted, too: pass --lora.dropout 0, or --lora.target_modules with a list"
        raise InputError(f"this cannot be trained: {error}{hint}") from error
    trainer.remove_callback(PrinterCallback)
    guard_heap(trainer.model)
    return trainer


def _with_chunked_loss(trainer: type) -> type:
    """SFTTrainer with the loss of `nn/loss.py` in training, where both are equal; elsewhere its own.

    TRL's chunked loss recomputes the logits for the backward, and in the type of the activations.
    """
    import torch

    from ..nn.adapters import inputs_uncast, plain_lora
    from ..nn.loss import CausalLoss

    class ChunkedLossTrainer(trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            plain = (
                getattr(self.args, "loss_type", "nll") in ("nll", "chunked_nll")
                and self.label_smoother is None
                and self.compute_loss_func is None
                and not getattr(self, "aux_loss_enabled", False)
                and getattr(self.accelerator, "parallelism_config", None) is None
            )
            self.causal_loss = CausalLoss(self.model) if plain else None
            head = self.model.get_base_model().get_output_embeddings()
            self.from_logits = plain and hasattr(
                head, "token_adapter"
            )  # trained tokens of a tied head, which TRL's loss ignores
            self.uncast = plain_lora(self.model) if self.accelerator.native_amp else []
            self.accuracies: list[Any] = []
            self.losses: list[Any] = []

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found = None
            if not model.training and "labels" in inputs:
                if self.from_logits:
                    outputs, found = _from_logits(model, inputs)
                    loss = found.sum / found.tokens.clamp(min=1)
                    result = (loss, outputs) if return_outputs else loss
                else:
                    result = super().compute_loss(model, inputs, return_outputs=return_outputs)
                    loss = result[0] if return_outputs else result
                tokens = (inputs["labels"][:, 1:] != -100).sum()
                self.losses.append(torch.stack([loss.detach().double() * tokens, tokens.double()]))
                return result
            if self.causal_loss is not None and model.training and not return_outputs:
                found = self.causal_loss(model, inputs)
            if found is None and self.from_logits and not return_outputs:
                _, found = _from_logits(model, inputs)
            if found is None:
                return super().compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )
            self.accuracies.append(torch.stack([found.correct, found.tokens]))
            if num_items_in_batch is None:
                return found.sum / found.tokens.clamp(min=1)
            loss = found.sum / torch.as_tensor(num_items_in_batch).to(found.sum).clamp(min=1)
            return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with inputs_uncast(self.uncast):
                return super().training_step(*args, **kwargs)

        def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            """The Trainer's, whose loss is a mean over batches, with the mean over all target tokens instead."""
            self.losses = []
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            if self.losses:
                total, tokens = self.accelerator.reduce(torch.stack(self.losses).sum(0), "sum").tolist()
                output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
            return output

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if self.accuracies and "loss" in logs:
                correct, tokens = torch.stack(self.accuracies).sum(0).tolist()
                logs = {**logs, "mean_token_accuracy": correct / max(tokens, 1)}
                self.accuracies.clear()
            super().log(logs, start_time)

    return ChunkedLossTrainer


def _from_logits(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """(the model's outputs, the loss of its logits)."""
    from ..nn.loss import loss_of_logits

    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    return outputs, loss_of_logits(outputs.logits[:, :-1], inputs["labels"][:, 1:])


def best_loss(trainer: Any) -> float | None:
    """The validation loss of the adapter that is written, where that is the best and not the last."""
    chosen = trainer.args.load_best_model_at_end and trainer.args.metric_for_best_model in ("loss", "eval_loss")
    return None if not chosen or trainer.state.best_metric is None else float(trainer.state.best_metric)


def last_logged(history: list[dict[str, Any]], key: str) -> float | None:
    """The last value of a metric in the trainer's log history."""
    return next((float(entry[key]) for entry in reversed(history) if key in entry), None)
