"""Check at the first optimizer step that every adapter learns.

An adapter whose layer is bypassed in forward, or whose gradient is lost, keeps its initial weights, and a run that
trains the others ends without a warning. So at the first step of a run the gradients are checked once, and the change
that the step makes. A LoRA adapter is initialised with B = 0, where A has no gradient yet: an adapter learns if one of
its tensors has a gradient. Where the loss depends on a tensor (its gradient is not zero) and the step changed it, the
output changes, so no second forward is needed.

Adapters without a gradient are listed in a warning: experts that the batch did not reach and layers that text does not
use (a vision tower's) have none. It is an error if no adapter at all has a gradient, or if a gradient is not finite; it
is raised before the step, so no weight has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

log = logging.getLogger(__name__)

CHECKED = 64
"""Number of elements of a tensor, those of the largest gradients, that are compared before and after the step."""


def learning_check() -> Any:
    """The TrainerCallback that checks the adapters at the first optimizer step of this process."""
    from transformers import TrainerCallback

    class LearningCheck(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
            self.adapters = adapters_of(model, self.parameters)
            self.finite: dict[str, Tensor] = {}
            self.before: dict[str, tuple[Tensor, Tensor]] = {}
            self.done = getattr(args, "deepspeed", None) is not None  # DeepSpeed does not expose the gradients
            self.hooks = [] if self.done else [self._hooked(*each) for each in self.parameters.items()]

        def _hooked(self, name: str, parameter: Tensor) -> Any:
            """Records whether a gradient is finite when it is accumulated; clipping makes all of them NaN if one is."""

            def record(parameter: Tensor) -> None:
                if parameter.grad is not None:
                    self.finite[name] = torch.isfinite(_local(parameter.grad)).all()

            return parameter.register_post_accumulate_grad_hook(record)

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
        ) -> None:
            if self.done:
                return
            learns, finite = _gradients(self.parameters)
            if not all(finite.values()) and args.fp16:
                return  # the loss scale is still being adjusted, and this step is skipped
            self._unhook()
            self.done = True
            if not all(finite.values()):
                recorded = {name: bool(each) for name, each in self.finite.items()}
                raise InputError(_not_finite(self.adapters, finite if all(recorded.values()) else recorded, state))
            silent = [path for path, names in self.adapters.items() if not any(learns[name] for name in names)]
            if self.adapters and len(silent) == len(self.adapters):
                raise InputError(
                    f"no adapter gets a gradient at step {state.global_step + 1} ({_listed(silent)}): nothing would be "
                    "learned; name modules that the model uses in --lora.target_modules, and check that the examples "
                    "have tokens to train on"
                )
            if silent and state.is_world_process_zero:
                log.warning(
                    "%d of %d adapters get no gradient at the first step, as where the batch reaches no such expert or "
                    "the model does not use the layer: %s",
                    len(silent),
                    len(self.adapters),
                    _listed(silent),
                )
            rates = [group["lr"] for group in getattr(optimizer, "param_groups", [])]
            if rates and all(rate > 0 for rate in rates):  # the first step of a warm-up may have none
                self.before = {name: _largest(self.parameters[name]) for name in self.parameters if learns[name]}

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before, self.before = self.before, {}
            same = {name for name, each in before.items() if not _changed(self.parameters[name], *each)}
            groups = ({*names} & before.keys() for names in self.adapters.values())
            still = [path for path, names in zip(self.adapters, groups, strict=True) if names and names <= same]
            if still and state.is_world_process_zero:
                log.warning(
                    "%d of %d adapters have a gradient, and the first step did not change them: %s; is "
                    "training.learning_rate (%s) too small for their type?",
                    len(still),
                    len(self.adapters),
                    _listed(still),
                    args.learning_rate,
                )

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._unhook()

        def _unhook(self) -> None:
            for hook in self.hooks:
                hook.remove()
            self.hooks = []

    return LearningCheck()


def adapters_of(model: nn.Module, parameters: Iterable[str]) -> dict[str, list[str]]:
    """Path of each adapted module → names of its trainable parameters. Paths are those of the model without adapters.

    PEFT's layers hold the module that they wrap as `base_layer`, or `original_module` where it is trained as a whole.
    """
    modules = dict(model.named_modules())
    found: dict[str, list[str]] = {}
    for name in parameters:
        path = name.rpartition(".")[0]
        holder = path
        while holder and not _holds_a_module(modules.get(holder)):
            holder = holder.rpartition(".")[0]
        path = holder or path
        for part in ("module.", "base_model.model."):  # of DDP, of PEFT
            path = path.removeprefix(part)
        path = path.replace(".base_layer", "").replace(".token_adapter", "")
        found.setdefault(path, []).append(name)
    return found


def _holds_a_module(module: nn.Module | None) -> bool:
    return module is not None and bool({"base_layer", "original_module"} & module._modules.keys())


def _gradients(parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, bool], dict[str, bool]]:
    """(name → whether its gradient is not zero, name → whether it is finite), equal in every process of a run."""
    rows = []
    for each in parameters.values():
        grad = None if each.grad is None else _local(each.grad)
        if grad is None or not grad.numel():
            rows.append(torch.tensor([0, 1]))
        else:
            rows.append(torch.stack([(grad != 0).any(), torch.isfinite(grad).all()]).long())
    if not rows:
        return {}, {}
    device = next((each.grad.device for each in parameters.values() if each.grad is not None), rows[0].device)
    flags = torch.stack([row.to(device) for row in rows])
    flags[:, 1] = 1 - flags[:, 1]  # not finite anywhere
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    found = flags.tolist()
    names = list(parameters)
    return (
        {name: bool(some) for name, (some, _) in zip(names, found, strict=True)},
        {name: not bad for name, (_, bad) in zip(names, found, strict=True)},
    )


def _not_finite(adapters: Mapping[str, list[str]], finite: Mapping[str, bool], state: Any) -> str:
    bad = [path for path, names in adapters.items() if not all(finite.get(name, True) for name in names)]
    return (
        f"training diverged: at step {state.global_step + 1} the gradient of {len(bad)} of {len(adapters)} adapters is "
        f"not finite ({_listed(bad)}); look for broken examples or weights; the step was not taken"
    )


def _listed(paths: list[str]) -> str:
    shown = ", ".join(paths[:6])
    return f"{shown} and {len(paths) - 6} more" if len(paths) > 6 else shown


def _local(tensor: Tensor) -> Tensor:
    """The local shard of a tensor that FSDP2 distributes; other tensors unchanged."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()


def _largest(parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """(indices of the largest gradients in the flat local shard, int64 [k]; the parameter's values there, [k])."""
    assert parameter.grad is not None
    grad = _local(parameter.grad).reshape(-1).abs()
    indices = grad.topk(min(CHECKED, grad.numel())).indices
    return indices, _local(parameter).reshape(-1)[indices].clone()


def _changed(parameter: nn.Parameter, indices: Tensor, values: Tensor) -> bool:
    """Whether the values at `indices` differ now; true where this process has no shard of the parameter."""
    return not indices.numel() or bool((_local(parameter).reshape(-1)[indices] != values).any())
