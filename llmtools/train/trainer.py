"""TRL's SFTTrainer with a loss that makes no logits, run from a checkpoint or the beginning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .options import NEEDS_TRAIN, Row

log = logging.getLogger(__name__)


def run_trainer(trainer: Any, checkpoint: Path | None) -> None:
    """Trains from the beginning or a checkpoint; one that has all steps is only loaded, as it would be at their end."""
    from ..files import disk_says_no
    from .checkpoints import Finished, all_in, damage

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Finished:
        assert checkpoint is not None
        log.info("%s has all %d steps already; nothing is trained", checkpoint, trainer.state.global_step)
        if trainer.args.load_best_model_at_end and (step := getattr(trainer.state, "best_global_step", None)):
            best = checkpoint.with_name(f"checkpoint-{step}")
            if (why := damage(best)) is not None:
                raise InputError(f"--resume: the best checkpoint is asked for, and {why}") from None
            trainer.model.load_adapter(str(best), "default", is_trainable=True)
    except Exception as error:  # of the libraries that write checkpoints, each has its own
        if isinstance(error, RuntimeError) and "does not require grad" in str(error):
            raise InputError(
                "no adapter is used by the model: the loss depends on none of them; name modules that the model uses "
                "in --lora.target_modules"
            ) from error
        if (reason := disk_says_no(error)) is None:
            raise
        place = Path(trainer.args.output_dir)
        left = "--resume goes on from the last whole one" if all_in(place) else "nothing was kept"
        raise InputError(f"{place}: cannot be written ({reason}); {left}") from error


def make_trainer(
    model: Any,
    tokenizer: Any,
    arguments: dict[str, Any],
    config: Any,
    train: list[Row],
    validation: list[Row],
    callbacks: Sequence[Any],
) -> Any:
    """TRL's trainer without its printing."""
    try:
        import datasets
        from jinja2 import TemplateError
        from transformers import PrinterCallback
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise InputError(NEEDS_TRAIN.format(error=error)) from error
    from ..nn.adapters import prepare_for_training, refuse_fsdp1
    from .heap import keep_large_blocks_apart

    try:
        args = SFTConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"training: {error}") from error
    refuse_fsdp1(str((getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version")))
    datasets.disable_progress_bars()
    keep_large_blocks_apart()
    prepare_for_training(model, gradient_checkpointing=args.gradient_checkpointing)
    try:
        with warnings.catch_warnings():  # PEFT's own ranks for fused experts, said of modules and meant for parameters
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            trainer = _lean(SFTTrainer)(
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
        if "ParamWrapper" in str(error):  # PEFT takes fused experts for linears
            hint = " Fused experts are adapted too: pass --lora.dropout 0, or --lora.target_modules with a list"
        raise InputError(f"this cannot be trained: {error}{hint}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _lean(trainer: type) -> type:
    """SFTTrainer with the loss of `nn/loss.py` in training, where that says the same; elsewhere its own.

    TRL's makes no logits either, but makes them again for the backward, and in the type of the activations.
    """
    import torch

    from ..nn.loss import CausalLoss

    class Lean(trainer):
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
            self.from_logits = plain and hasattr(head, "token_adapter")  # trained tokens of a tied head: not TRL's case
            self.hits: list[Any] = []
            self.validated: list[Any] = []

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
                self.validated.append(torch.stack([loss.detach().double() * tokens, tokens.double()]))
                return result
            if self.causal_loss is not None and model.training and not return_outputs:
                found = self.causal_loss(model, inputs)
            if found is None and self.from_logits and not return_outputs:
                _, found = _from_logits(model, inputs)
            if found is None:
                return super().compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )
            self.hits.append(torch.stack([found.correct, found.tokens]))
            if num_items_in_batch is None:
                return found.sum / found.tokens.clamp(min=1)
            loss = found.sum / torch.as_tensor(num_items_in_batch).to(found.sum).clamp(min=1)
            return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

        def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            """The Trainer's, whose loss is a mean over batches, with the mean over all learned tokens instead."""
            self.validated = []
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            if self.validated:
                total, tokens = self.accelerator.reduce(torch.stack(self.validated).sum(0), "sum").tolist()
                output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
            return output

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if self.hits and "loss" in logs:
                correct, tokens = torch.stack(self.hits).sum(0).tolist()
                logs = {**logs, "mean_token_accuracy": correct / max(tokens, 1)}
                self.hits.clear()
            super().log(logs, start_time)

    return Lean


def _from_logits(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """(the model's outputs, the loss of its logits)"""
    from ..nn.loss import loss_of_logits

    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    return outputs, loss_of_logits(outputs.logits[:, :-1], inputs["labels"][:, 1:])


def best_loss(trainer: Any) -> float | None:
    """The validation loss of the adapter that is written, where that is the best one and not the last."""
    chosen = trainer.args.load_best_model_at_end and trainer.args.metric_for_best_model in ("loss", "eval_loss")
    return None if not chosen or trainer.state.best_metric is None else float(trainer.state.best_metric)


def last_logged(history: list[dict[str, Any]], key: str) -> float | None:
    return next((float(entry[key]) for entry in reversed(history) if key in entry), None)
