"""Quantize a network in place: one visitor of the walk, and the report of what it did.

For each block, and in it for each group of linears that read one tensor: run the block over the calibration text, add
up the group's Hessian, quantize its linears, put the packed layers in their place, and go on with the next group, whose
inputs now carry the error of this one. When the block is done its outputs are computed anew and feed the next block.
That is the order of arXiv:2210.17323, section 4 ("true sequential" in its code), for any quantizer.

A quantizer that wants no data needs no walk: its linears are replaced one by one.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, within
from ..nn.linear import QuantizedLinear
from ..nn.swap import set_module
from ..quant import HessianSum, Quantizer, proxy_loss
from .blocks import Block
from .hub import attach
from .plan import Left, Overrides, Plan, any_index, base_quantizer
from .walk import Calls, OnStep, evaluating, walk

log = logging.getLogger(__name__)


def quantize(
    model: nn.Module,
    quantizer: str | Quantizer,
    calibration: Sequence[Tensor] | Tensor | None = None,
    *,
    overrides: Overrides | None = None,
    skip: Sequence[str] | None = None,
    sequential: bool = True,
    on_step: OnStep | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Report:
    """Quantizes the linears of `model` in place, and says how well it went.

    ``quantize(model, "optq", text, bits=3, group_size=64, overrides={"down_proj": {"bits": 4}, "*.0.*": None})``

    quantizer: a name, with its `options`, or a quantizer.
    calibration: token ids [batch, t], as `llmtools.calibration` gives them. A quantizer that needs no data ignores
        them, save that the report then has a proxy loss.
    overrides: options by pattern (as in a shell) of a module's path or its end; the first that matches counts.
    skip: patterns of linears to leave alone. None leaves out every linear outside the blocks (``lm_head``); a list
        replaces that default, so ``()`` quantizes the head as well.
    sequential: each group of linears is measured with the earlier groups of its block quantized. Without, a block is
        measured once: about twice as fast, a little worse, and all Hessians of the block are in memory together.
    device: where to work, a block at a time, if the model as a whole is elsewhere.
    on_step: called with (modules done, of how many, path).

    Raises InputError for a model that cannot be quantized and for unusable calibration, before anything is changed. If
    the work is interrupted later the model is half quantized; it then carries `INCOMPLETE`, and the error says so.
    """
    plan = Plan.of(model, base_quantizer(quantizer, options), overrides or {}, skip)
    batches = None if calibration is None else _checked_calibration(model, calibration)
    hungry = next((path for path, each in plan.quantizers.items() if each.needs_hessian), None)
    if batches is None and hungry is not None:
        raise InputError(
            f"{plan.quantizers[hungry].name} needs calibration text and none was given; pass `calibration`, such as "
            f"llmtools.calibration('train.txt', tokenizer), or use a quantizer without data such as 'rtn' or 'nf4'"
        )
    _check_weights(model, plan.quantizers)
    work = _Work(model, plan, sequential, on_step)
    with _marked_while_incomplete(model, work), torch.no_grad():
        if batches is None:
            work.without_data(device)
        else:
            walk(model, batches, work.visit, device=device)
            work.outside_blocks(batches)
    attach(model)
    return Report(work.rows, plan.left)


@dataclass(frozen=True)
class Row:
    """What happened to one linear."""

    path: str
    quantizer: dict[str, Any]
    """The quantizer's name and options."""
    shape: tuple[int, int]
    """[out, in]"""
    packed_bytes: int
    bits_per_weight: float
    """All that is stored, scales included, by the number of weights."""
    relative_error: float
    """|E| / |W|, Frobenius."""
    proxy_loss: float | None
    """tr(E H Eᵀ), E the error of W: the outputs' mean squared error, summed over them; None without calibration."""
    relative_proxy_loss: float | None
    """tr(E H Eᵀ) / tr(W H Wᵀ)"""
    tokens: int | None
    """How many tokens H was measured on."""
    seconds: float


@dataclass
class Report:
    """What was quantized, how well, and what was not."""

    rows: list[Row] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """The number of weights that were quantized."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def packed_bytes(self) -> int:
        return sum(row.packed_bytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.packed_bytes / max(1, self.weights)

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def relative_error(self) -> float:
        """The mean over modules."""
        return sum(row.relative_error for row in self.rows) / max(1, len(self.rows))

    @property
    def relative_proxy_loss(self) -> float | None:
        """The mean over modules; None without calibration."""
        return _mean([row.relative_proxy_loss for row in self.rows])

    def to_json(self) -> dict[str, Any]:
        """The whole report as plain data, ready for `json.dump`."""
        return {
            "modules": [dataclasses.asdict(row) | {"shape": list(row.shape)} for row in self.rows],
            "left": [{"path": left.path, "shape": list(left.shape), "reason": left.reason} for left in self.left],
            "totals": {
                "modules": len(self.rows),
                "weights": self.weights,
                "packed_bytes": self.packed_bytes,
                "bits_per_weight": self.bits_per_weight,
                "relative_error": self.relative_error,
                "relative_proxy_loss": self.relative_proxy_loss,
                "seconds": self.seconds,
            },
        }

    def table(self) -> str:
        """The report as text: one line for the modules of the same name and quantizer in all blocks, then the total."""
        kinds: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            kinds.setdefault((any_index(row.path), _short(row.quantizer)), []).append(row)
        lines: list[tuple[str, ...]] = [
            ("modules", "n", "quantizer", "bits/weight", "weight error", "output error", "seconds")
        ]
        lines += [_line(name, quantizer, Report(rows)) for (name, quantizer), rows in kinds.items()]
        if len(kinds) != 1:
            lines.append(_line("all", "", self))
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if column in (0, 2) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        reasons: dict[tuple[str, str], int] = {}
        for left in self.left:
            key = (any_index(left.path), left.reason)
            reasons[key] = reasons.get(key, 0) + 1
        text += [f"not quantized: {path} ({count}): {reason}" for (path, reason), count in reasons.items()]
        return "\n".join(text)


def _line(name: str, quantizer: str, report: Report) -> tuple[str, ...]:
    loss = report.relative_proxy_loss
    return (
        name,
        str(len(report.rows)),
        quantizer,
        f"{report.bits_per_weight:.2f}",
        f"{report.relative_error:.4f}",
        "-" if loss is None else f"{loss:.5f}",
        f"{report.seconds:.1f}",
    )


def _short(spec: Mapping[str, Any]) -> str:
    width = f" {spec['bits']}-bit" if "bits" in spec else ""
    group = spec.get("group_size")
    return f"{spec['name']}{width}" + (f" g{group}" if isinstance(group, int) and group > 0 else "")


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


# ---------------------------------------------------------------------------------------------------------------------
# What is refused before anything is touched


def _check_weights(model: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
    for path in quantizers:
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        if weight.is_meta:
            raise InputError(f"{path}: the weight is on the meta device; load the model with its weights in memory")
        if not weight.is_floating_point():
            raise InputError(f"{path}: the weight is {weight.dtype}, not floating point; start from the original model")
        if not torch.isfinite(weight).all():
            raise InputError(f"{path}: NaN or infinity in the weight; the model is damaged, load or download it again")


def _checked_calibration(model: nn.Module, calibration: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """The sequences as [batch, t]; raises InputError where the model could not read one."""
    if isinstance(calibration, Tensor):
        calibration = [calibration]
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text_config, "max_position_embeddings", None)
    vocabulary = getattr(text_config, "vocab_size", None)
    batches = []
    for index, ids in enumerate(calibration):
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() not in (1, 2) or ids.numel() == 0:
            shape = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError(f"calibration[{index}] is {shape}; expected token ids [batch, tokens], at least one")
        ids = ids if ids.dim() == 2 else ids[None]
        if longest is not None and ids.shape[1] > longest:
            raise InputError(
                f"calibration[{index}] has {ids.shape[1]} tokens, the model {longest} positions; use tokens={longest}"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            wrong = low if low < 0 else high
            raise InputError(
                f"calibration[{index}] holds token {wrong}, and the model knows 0 to {(vocabulary or 0) - 1}; "
                f"use the model's own tokenizer"
            )
        batches.append(ids)
    if not batches:
        raise InputError("the calibration is empty; give at least one sequence of token ids")
    return batches


# ---------------------------------------------------------------------------------------------------------------------
# The work


class _Work:
    def __init__(self, model: nn.Module, plan: Plan, sequential: bool, on_step: OnStep | None) -> None:
        self.model, self.plan, self.sequential, self.on_step = model, plan, sequential, on_step
        self.rows: list[Row] = []
        self.warned = False

    def without_data(self, device: torch.device | str | None) -> None:
        for path in self.plan.quantizers:
            linear = self._linear(path)
            home = linear.weight.device
            if device is not None:
                linear.to(device)
            self._replace(path, None)
            self.model.get_submodule(path).to(home)

    def visit(self, block: Block, calls: Calls) -> None:
        """Quantizes one block of the walk, group by group."""
        groups = [[path for path in group.paths if path in self.plan.quantizers] for group in block.groups]
        groups = [paths for paths in groups if paths]
        for stage in [[paths] for paths in groups] if self.sequential else [groups] if groups else []:
            with self._summing(stage) as sums:
                calls.run()
            self._replace_groups(stage, sums)
        idle = [path for path in block.idle if path in self.plan.quantizers]
        if idle:
            log.warning("%d linears of %s saw no token (%s …) and are quantized as if all inputs were alike; more "
                        "calibration text may reach them", len(idle), block.path, idle[0])  # fmt: skip
        for path in idle:
            self._replace(path, None)

    def outside_blocks(self, batches: Sequence[Tensor]) -> None:
        """The head, and whatever else was asked for outside the blocks, from passes through the whole model."""
        done = {row.path for row in self.rows}
        paths = [path for path in self.plan.quantizers if path not in done]
        within = tuple(f"{block}." for block in self.plan.blocks)
        if not paths:
            return
        unreached = [path for path in paths if path.startswith(within)]
        outside = [[path] for path in paths if path not in unreached]
        if outside:
            with evaluating(self.model), self._summing(outside) as sums:
                home = next(self.model.parameters()).device
                for ids in batches:
                    self.model(input_ids=ids.to(home), use_cache=False)
            self._replace_groups(outside, sums)
        if unreached:
            log.warning("%d linears are in blocks that never ran (%s …) and are quantized as if all inputs were alike",
                        len(unreached), unreached[0])  # fmt: skip
        for path in unreached:
            self._replace(path, None)

    @contextmanager
    def _summing(self, groups: list[list[str]]) -> Iterator[list[HessianSum]]:
        """One Hessian a group, added up while the context lasts from what its first linear reads."""
        sums, hooks = [], []
        for paths in groups:
            linear = self._linear(paths[0])
            sums.append(HessianSum(linear.in_features, linear.weight.device))
            hooks.append(linear.register_forward_pre_hook(_adder(sums[-1], paths[0])))
        try:
            yield sums
        finally:
            for hook in hooks:
                hook.remove()

    def _replace_groups(self, groups: list[list[str]], sums: list[HessianSum]) -> None:
        for paths, total in zip(groups, sums, strict=True):
            self._warn_if_few(total, paths[0])
            hessian = total.value() if total.tokens else None
            for path in paths:
                self._replace(path, hessian, total.tokens)

    def _replace(self, path: str, hessian: Tensor | None, tokens: int = 0) -> None:
        """Puts the packed layer in place of the dense one, and a row in the report."""
        started = time.perf_counter()
        quantizer = self.plan.quantizers[path]
        linear = self._linear(path)
        weight = linear.weight.detach()
        given = hessian if quantizer.needs_hessian else None
        if quantizer.needs_hessian and hessian is None:  # nothing known about the inputs: all alike
            given = torch.eye(linear.in_features, device=weight.device)
        with within(path):
            packed = QuantizedLinear.from_linear(linear, quantizer, given)
        seconds = time.perf_counter() - started
        self.rows.append(_row(path, packed, weight.float(), hessian, tokens, seconds))
        set_module(self.model, path, packed)
        if self.on_step is not None:
            self.on_step(len(self.rows), len(self.plan.quantizers), path)

    def _warn_if_few(self, total: HessianSum, path: str) -> None:
        features = self._linear(path).in_features
        if 0 < total.tokens < features and not self.warned:
            self.warned = True
            log.warning(
                "%s has %d inputs and was measured on %d tokens only; more calibration text gives better weights",
                path,
                features,
                total.tokens,
            )

    def _linear(self, path: str) -> nn.Linear:
        linear = self.model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        return linear


def _adder(total: HessianSum, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        with within(path):
            total.add(args[0])

    return hook


def _row(
    path: str, packed: QuantizedLinear, weight: Tensor, hessian: Tensor | None, tokens: int, seconds: float
) -> Row:
    approx = packed.dequantize(dtype=torch.float32)
    size = sum(tensor.numel() * tensor.element_size() for tensor in packed.packed.values())
    loss = None if hessian is None else proxy_loss(weight, approx, hessian)
    signal = None if hessian is None else proxy_loss(weight, torch.zeros_like(weight), hessian)
    return Row(
        path=path,
        quantizer=packed.quantizer.spec(),
        shape=(packed.out_features, packed.in_features),
        packed_bytes=size,
        bits_per_weight=8 * size / weight.numel(),
        relative_error=_ratio(float((approx - weight).norm()), float(weight.norm())),
        proxy_loss=loss,
        relative_proxy_loss=None if loss is None or signal is None else _ratio(loss, signal),
        tokens=tokens if hessian is not None else None,
        seconds=seconds,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


INCOMPLETE = "_llmtools_incomplete"
"""Attribute of a model whose quantization was interrupted; saving refuses a model that has it."""


@contextmanager
def _marked_while_incomplete(model: nn.Module, work: _Work) -> Iterator[None]:
    setattr(model, INCOMPLETE, True)
    try:
        yield
    except BaseException as error:
        if work.rows:
            error.add_note(
                f"the model is half quantized ({len(work.rows)} of {len(work.plan.quantizers)} linears); load it afresh"
            )
        else:
            delattr(model, INCOMPLETE)
        raise
    delattr(model, INCOMPLETE)
