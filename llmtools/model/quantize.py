"""Quantize a network in place: a visitor of the walk.

For each block, and in it for each group of linears that read one tensor: run the block over the calibration text as far
as that group, add up its Hessian, quantize its linears, put the packed layers in their place, and continue with the
next group, whose inputs now carry the error of this one. When the block is done its outputs are recomputed and feed the
next block. That is the order of arXiv:2210.17323, section 4 ("true sequential" in its code), for any quantizer.

A quantizer without calibration data needs no walk: its linears are replaced one by one.

Blocks can also be trained to reconstruct the original block's outputs (`reconstruct.py`): quantizers with learned
rounding are trained when the Hessians of all groups of the block are there, and block tuning follows each group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, within
from ..nn.experts import route_all as running_all_experts
from ..nn.linear import QuantizedLinear
from ..nn.lora_init import LoraInit, lora_init_from_error
from ..nn.swap import aliases, set_everywhere
from ..quant import HessianSum, Quantizer
from ..quant.base import BlockLearner, Learner
from .batches import checked_calibration
from .blocks import Block, Group, linear_at, unit_of
from .fisher import BlockGradients, block_gradients, gradient_sums
from .mixtures import ExpertStage, PooledSum, expert_stages, in_order, pool, reads_shared_input, with_linear_experts
from .options import BlockTuning, check_rounding
from .processes import Processes
from .propagation import ErrorSum, OriginalStream, check_strength, comparing, corrected
from .reconstruct import (
    HELD_OUT,
    BlockLoss,
    Reconstruction,
    learn_rounding,
    learnable_linear,
    stacked,
    tune,
)
from .report import ModuleReport, Report, module_report
from .storage import Storage
from .targets import NotQuantized, Overrides, Plan, base_quantizer
from .transformers_integration import attach
from .walk import Batch, Calls, Enough, OnStep, evaluating, on_inputs, run_network, walk

log = logging.getLogger(__name__)


@with_linear_experts
def quantize(
    model: nn.Module,
    quantizer: str | Quantizer,
    calibration: Sequence[Batch] | Batch | None = None,
    *,
    overrides: Overrides | None = None,
    skip: Sequence[str] | None = None,
    sequential: bool = True,
    tuning: BlockTuning | None = None,
    error_propagation: float = 0.0,
    rounding: str = "one_sided",
    adapter_rank: int = 0,
    route_all: bool = False,
    on_step: OnStep | None = None,
    device: torch.device | str | None = None,
    storage: Storage | None = None,
    processes: Processes | None = None,
    **options: Any,
) -> Report:
    """Quantizes the linears of `model` in place, and returns a report of the errors.

    ``quantize(model, "optq", text, bits=3, group_size=64, overrides={"down_proj": {"bits": 4}, "*.0.*": None})``

    quantizer: a name, with its `options`, or a quantizer.
    calibration: token ids [batch, t], as `llmtools.calibration` gives them, or what a tokenizer returns: a mapping of
        keyword arguments of the model. Padding under its `attention_mask` is removed: each sequence is run by itself.
        A quantizer that needs no data ignores the text, except that the report then has a proxy loss.
    overrides: options by pattern (as in a shell) of a module's path or its end; the first that matches counts.
    skip: patterns of linears to keep dense. None skips every linear outside the blocks (``lm_head``), and in a
        multimodal model the blocks of the other modalities than text; a list replaces that default, so
        ``()`` quantizes the head as well, and ``["lm_head", "*language_model*"]`` the vision tower alone.
    sequential: the Hessian of each group of linears is computed with the earlier groups of its block quantized.
        Without, a block is run once: about twice as fast, a little worse, and all Hessians of the block are in memory
        together.
    tuning: block-wise reconstruction by `BlockTuning`. None, or 0 epochs: none. The errors of learned and tuned layers
        in the report are relative to the weight that was quantized, which earlier tuning of the block may have changed.
    error_propagation: strength, from 0 to 1, of a correction of each weight for the errors of the layers before it, see
        `propagation.py`; needs calibration text, about twice the time of the walk, and a copy of one block.
    rounding: "two_sided" rounds for what an error costs the whole network, not the layer's output alone, where the
        quantizer rounds by a sweep (optq, quip, quip_sharp, qtip). It needs calibration text, and a backward pass
        through the original model, which is in memory; see `fisher.py` for what it keeps.
    adapter_rank: also computes the LoRA initialisation of this rank from the quantization error, for finetuning at
        that rank or a lower one (`Report.lora_init`).
    route_all: measures each expert of a mixture on all tokens instead of those that its router sends there; see
        `mixtures.py` for what happens without.
    device: where blocks are quantized, one at a time, if the model as a whole is elsewhere.
    on_step: called with (modules done, modules in all, path).
    storage: where the weights are, by default in memory; see `streaming.py` for a model on the meta device.
    processes: those that do this together, with the same arguments, see `processes.py`; by default this one alone.

    Raises InputError for a model that cannot be quantized and for unusable calibration, before anything is changed. If
    it is interrupted later the model is half quantized; it then carries `INCOMPLETE`, and the error says so.
    """
    plan = Plan.of(model, base_quantizer(quantizer, options), overrides or {}, skip)
    batches = None if calibration is None else checked_calibration(model, calibration)
    uncalibrated = next((path for path, each in plan.quantizers.items() if each.needs_hessian), None)
    if batches is None and uncalibrated is not None:
        raise InputError(
            f"{plan.quantizers[uncalibrated].name} needs calibration text and none was given; pass `calibration`, such "
            f"as llmtools.calibration('train.txt', tokenizer), or use a quantizer without data such as 'rtn' or 'nf4'"
        )
    if batches is None and tuning is not None and tuning.epochs:
        raise InputError("block tuning needs calibration text and none was given; pass `calibration`")
    check_strength(error_propagation, tuned=tuning is not None and bool(tuning.epochs))
    if batches is None and error_propagation:
        raise InputError("error propagation needs calibration text and none was given; pass `calibration`")
    check_rounding(rounding)
    two_sided = rounding == "two_sided"
    if batches is None and two_sided:
        raise InputError("two-sided rounding needs calibration text and none was given; pass `calibration`")
    if two_sided and not any(each.rounds_two_sided() for each in plan.quantizers.values()):
        name = next(iter(plan.quantizers.values())).name
        raise InputError(f"{name} has no two-sided rounding; use optq, quip, quip_sharp or qtip, or round one-sided")
    if adapter_rank < 0:
        raise InputError(f"adapter_rank={adapter_rank}; give the rank of the LoRA initialisation, or 0 for none")
    storage = storage or Storage()
    if storage.resident:
        _check_weights(model, plan.quantizers)
    storage.planned(plan.quantizers)
    processes = processes or Processes()
    work = _Quantization(
        model, plan, sequential, tuning, error_propagation, adapter_rank, route_all, on_step, storage, processes
    )
    if work.reconstructs and processes.count > 1:
        raise InputError(
            f"block-wise reconstruction (block tuning, learned rounding) needs all calibration text in one process, "
            f"and this run has {processes.count}; start one, without torchrun"
        )
    with _marked_incomplete(model, work), torch.no_grad():
        if batches is None:
            work.without_data(device)
        else:
            if work.reconstructs:
                batches = stacked(batches, work.sequences)
            if two_sided:
                sequences = processes.share([*enumerate(batches)])
                with storage.whole():
                    work.gradients = block_gradients(model, sequences, plan.blocks, storage.kept)
            walk(model, batches, work.visit, device=device, storage=storage, processes=processes)
            work.outside_blocks(batches)
        storage.complete()
    attach(model)
    return Report(work.rows, plan.not_quantized, work.losses, work.lora_init)


# ---------------------------------------------------------------------------------------------------------------------
# Checks before the model is changed


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


# ---------------------------------------------------------------------------------------------------------------------
# The visitor


class _Quantization:
    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        sequential: bool,
        tuning: BlockTuning | None,
        error_propagation: float,
        adapter_rank: int,
        route_all: bool,
        on_step: OnStep | None,
        storage: Storage,
        processes: Processes,
    ) -> None:
        self.model, self.plan, self.sequential, self.on_step = model, plan, sequential, on_step
        self.storage, self.processes = storage, processes
        self.tuning = tuning if tuning is not None and tuning.epochs else None
        self.adapter_rank, self.route_all = adapter_rank, route_all
        learners = [each for each in plan.quantizers.values() if isinstance(each, BlockLearner)]
        self.reconstructs = bool(learners) or self.tuning is not None
        self.error_propagation = error_propagation
        self.original = OriginalStream()
        self.gradients: BlockGradients = {}
        self.moments: dict[str, Tensor] = {}  # G of linears in the current block, for two-sided rounding
        self.sequences = max(
            [each.block_batch for each in learners] + ([self.tuning.batch] if self.tuning else []) or [1]
        )
        self.rows: list[ModuleReport] = []
        self.losses: dict[str, list[BlockLoss]] = {}
        self.lora_init: dict[str, LoraInit] = {}
        self.pending: dict[str, _Pending] = {}  # linears of the current block that may still change
        self.changed = 0  # number of replaced linears
        self.reached: set[str] = set()  # paths of blocks that ran
        self.aliases = aliases(model)
        self.warned = False

    def without_data(self, device: torch.device | str | None) -> None:
        for unit, paths in self._by_unit(self.plan.quantizers).items():
            if self._restore(unit):
                continue
            with self._dividing(paths) as own:
                for path in own:
                    with self.storage.holding(path):
                        self._replace_on(device, path)
            self._store(unit)

    def _by_unit(self, paths: Iterable[str]) -> dict[str, list[str]]:
        """Block → its linears among `paths`; one outside the blocks is by itself."""
        units: dict[str, list[str]] = {}
        for path in paths:
            units.setdefault(unit_of(path, self.plan.blocks) or path, []).append(path)
        return units

    def _replace_on(self, device: torch.device | str | None, path: str) -> None:
        linear = linear_at(self.model, path)
        home = linear.weight.device
        if device is not None:
            linear.to(device)
        self._replace(path, None)
        self.model.get_submodule(path).to(home)

    def visit(self, block: Block, calls: Calls) -> None:
        """Quantizes one block of the walk, group by group."""
        self.reached.add(block.path)
        original = self.original.beside(calls) if self.error_propagation else None
        target = self._targets(calls) if self.reconstructs else None
        if self._restore(block.path):
            if target is None:
                self._advance(original)
            return
        mixtures = expert_stages(self.model, block, self.plan.quantizers)
        groups = block.groups_among(self.plan.quantizers.keys() - {path for each in mixtures for path in each.paths})
        self.moments = self._output_moments(block, groups, calls)
        stages = [[group] for group in groups] if self.sequential else [groups] if groups else []
        repeats = self.sequential and original is None and target is None and not mixtures
        repeats = repeats and all(group.calls == 1 for group in groups)
        for stage in in_order(block, stages, mixtures):
            if isinstance(stage, ExpertStage):
                self._quantize_experts(stage, calls, target)
            else:
                self._quantize_groups(block, stage, calls, original, target)
                if repeats:  # each later run stops at its group: what it computes before is final
                    calls.remember(linear_at(self.model, path) for path in stage[0].paths)
            if target is not None and not any(each.learner for each in self.pending.values()):
                self._tune(block, target)
        if target is not None:
            self._learn_rounding(block, target)
        else:
            self._advance(original)
        self._finish()
        mixed = {path for each in mixtures for path in each.paths}
        idle = [path for path in block.idle if path in self.plan.quantizers.keys() - mixed]
        if idle:
            log.warning("%d linears of %s got no token (%s …) and are quantized with H = 1; more calibration "
                        "text may reach them", len(idle), block.path, idle[0])  # fmt: skip
        with self._dividing(idle) as own:
            for path in own:
                self._replace(path, None)
        self._store(block.path)

    def _quantize_groups(
        self,
        block: Block,
        groups: list[Group],
        calls: Calls,
        original: Calls | None,
        target: Reconstruction | None,
    ) -> None:
        """Quantizes groups of linears, whose inputs are measured together."""
        paths = [group.paths for group in groups]
        stop = len(groups) == 1 and groups[0].calls == 1
        with (
            _comparing(original, block, paths, stop) as errors,
            accumulating(self.model, paths, stop=stop) as sums,  # the later hook: it stops the block
        ):
            for index in range(len(calls)):
                if original is not None:
                    original.run_one(index)
                calls.run_one(index)
        self._reduce(sums, errors)
        self._replace_groups(paths, sums, target, errors)

    def _quantize_experts(self, stage: ExpertStage, calls: Calls, target: Reconstruction | None) -> None:
        """Quantizes one projection of all experts of a layer. Errors of earlier layers are not propagated to it: the
        original's router may choose other experts."""
        for part in stage.chunks(shared=self.route_all and reads_shared_input(stage)):
            with accumulating(self.model, part) as sums, running_all_experts(self.route_all):
                calls.run()
            self._reduce(sums)
            pooled = pool(sums)
            self._replace_groups(part, [PooledSum(each, pooled) for each in sums], target)

    def _output_moments(self, block: Block, groups: Sequence[Group], calls: Calls) -> dict[str, Tensor]:
        """G [out, out] of the linears of these groups that are rounded two-sided, and that gradients reach."""
        gradients = self.gradients.pop(block.path, [])
        paths = [path for group in groups for path in group.paths]
        paths = [path for path in paths if self.plan.quantizers[path].rounds_two_sided()]
        if not gradients or not paths:
            return {}
        sums = gradient_sums(self.model, block, calls, gradients, paths)
        self._reduce(list(sums.values()))
        found = {}
        for path, total in sums.items():
            with within(path):
                if total.tokens and (moment := total.value()).any():
                    found[path] = moment
        return found

    def _advance(self, original: Calls | None) -> None:
        """Runs the original block, if it runs beside the quantized one."""
        for _ in self.original.advance(original) if original is not None else ():
            pass

    def _targets(self, calls: Calls) -> Reconstruction:
        """The outputs of the original block, which is not changed yet, for its reconstruction."""
        return Reconstruction(
            calls, list(self.original.advance(calls)), self.tuning.held_out if self.tuning else HELD_OUT
        )

    def outside_blocks(self, batches: Sequence[Batch]) -> None:
        """Quantizes the head, and other linears outside the blocks, by forward passes through the whole model."""
        self._leave_idle_stacks()
        done = {row.path for row in self.rows}
        paths = [path for path in self.plan.quantizers if path not in done]
        within = tuple(f"{block}." for block in self.plan.blocks)
        if not paths:
            return
        self.storage.complete()  # the network is run as a whole
        unreached = [path for path in paths if path.startswith(within)]
        outside = [[path] for path in paths if path not in unreached and not self._restore(path)]
        if outside:
            with evaluating(self.model), accumulating(self.model, outside) as sums:
                for batch in self.processes.share(batches):
                    run_network(self.model, batch)
            self._reduce(sums)
            self._replace_groups(outside, sums)
        for [path] in outside:
            self._store(path)
        if unreached:
            log.warning("%d linears are in blocks that never ran (%s …) and are quantized with H = 1",
                        len(unreached), unreached[0])  # fmt: skip
        for unit, linears in self._by_unit(unreached).items():
            if not self._restore(unit):
                with self._dividing(linears) as own:
                    for path in own:
                        self._replace(path, None)
                self._store(unit)

    def _restore(self, unit: str) -> bool:
        """Takes what an earlier run made of a block, or of a linear outside the blocks; False where there is none."""
        report = self.storage.restored(unit)
        if report is None:
            return False
        self.rows += report.rows
        self.losses |= report.reconstruction
        self.lora_init |= report.lora_init
        self.changed += len(report.rows)
        return True

    def _store(self, unit: str) -> None:
        """Hands over a finished block, or a linear outside the blocks, with its part of the report."""
        rows = [row for row in self.rows if row.path == unit or row.path.startswith(f"{unit}.")]
        losses = {path: each for path, each in self.losses.items() if path == unit}
        inits = {row.path: self.lora_init[row.path] for row in rows if row.path in self.lora_init}
        if self.processes.is_first:
            self.storage.finished(unit, Report(rows, [], losses, inits))
        self.processes.wait()
        if not self.processes.is_first:
            self.storage.finished_elsewhere(unit)

    def _leave_idle_stacks(self) -> None:
        """Keeps stacks dense of which no block ran over the text, such as heads for multi-token prediction."""
        for stack in self.plan.stacks:
            if any(block.startswith(f"{stack}.") for block in self.reached):
                continue
            idle = [path for path in self.plan.quantizers if path.startswith(f"{stack}.")]
            if idle:
                log.warning("%s: none of its blocks ran over the calibration text; its %d linears are not quantized",
                            stack, len(idle))  # fmt: skip
            for path in idle:
                del self.plan.quantizers[path]
                linear = linear_at(self.model, path)
                shape = (linear.out_features, linear.in_features)
                self.plan.not_quantized.append(
                    NotQuantized(path, shape, "in blocks that did not run over the calibration text")
                )

    def _replace_groups(
        self,
        groups: list[list[str]],
        sums: Sequence[HessianSum | PooledSum],
        target: Reconstruction | None = None,
        errors: list[ErrorSum] | None = None,
    ) -> None:
        for number, (paths, total) in enumerate(zip(groups, sums, strict=True)):
            self._warn_if_few_tokens(total, paths[0])
            with within(paths[0]):
                hessian = total.value() if total.measured else None
            if errors is not None and hessian is not None:
                self._correct(paths, errors[number].correction(hessian, self.error_propagation))
            with self._dividing(paths) as own:
                for path in own:
                    self._replace(path, hessian, total.tokens, target)

    def _reduce(self, sums: list[HessianSum], errors: list[ErrorSum] | None = None) -> None:
        """Adds up what the processes measured, each on its own batches."""
        if self.processes.count > 1:
            for total in (*sums, *(errors or ())):
                total.reduce(self.processes.add_up)

    @contextmanager
    def _dividing(self, paths: list[str]) -> Iterator[list[str]]:
        """Yields those of these linears that this process replaces; then all of them are replaced in each process."""
        sizes = [linear.in_features * linear.out_features for linear in (linear_at(self.model, path) for path in paths)]
        owners, before = self.processes.owners(sizes), len(self.rows)
        yield [path for path, owner in zip(paths, owners, strict=True) if owner == self.processes.rank]
        if self.processes.count > 1:
            for path, owner in zip(paths, owners, strict=True):
                self._exchange(path, owner)
            self.rows[before:] = sorted(self.rows[before:], key=lambda row: paths.index(row.path))

    def _exchange(self, path: str, owner: int) -> None:
        """Sends a packed linear, with its part of the report, from its owner to the other processes."""
        linear, own = linear_at(self.model, path), owner == self.processes.rank
        row = next(row for row in self.rows if row.path == path) if own else None
        quantizer = linear.quantizer if isinstance(linear, QuantizedLinear) else None
        quantizer, row, init = self.processes.sent((quantizer, row, self.lora_init.get(path)), owner)
        layout = quantizer.layout(linear.out_features, linear.in_features)
        if isinstance(linear, QuantizedLinear):
            packed = linear.packed
        else:
            device = "cpu" if linear.weight.is_meta else linear.weight.device
            packed = {name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for name, spec in layout.items()}
        for name in layout:
            self.processes.copy_from(packed[name], owner)
        if own:
            return
        self._put(path, QuantizedLinear.from_packed(linear, quantizer, packed))
        self.changed += 1
        self.lora_init |= {} if init is None else {path: init}
        self._add_row(row)

    def _add_row(self, row: ModuleReport) -> None:
        self.rows.append(row)
        if self.on_step is not None:
            self.on_step(len(self.rows), len(self.plan.quantizers), row.path)

    def _correct(self, paths: list[str], correction: Tensor | None) -> None:
        """Changes dense weights to make up for the errors of the layers before them."""
        if correction is None:
            return
        for path in paths:
            with within(path):
                self._put(path, corrected(linear_at(self.model, path), correction))

    def _replace(
        self, path: str, hessian: Tensor | None, tokens: int = 0, target: Reconstruction | None = None
    ) -> None:
        """Puts the packed layer in place of the dense one, or with a target, a layer that is still to be trained."""
        started = time.perf_counter()
        quantizer = self.plan.quantizers[path]
        linear = linear_at(self.model, path)
        weight = linear.weight.detach()
        given = hessian if quantizer.needs_hessian else None
        if quantizer.needs_hessian and hessian is None:  # no calibration data
            given = torch.eye(linear.in_features, device=weight.device)
        learner = None
        with within(path):
            if target is not None and isinstance(quantizer, BlockLearner) and given is not None:
                quantizer = self.plan.quantizers[path] = quantizer.suited(weight)
                learner = quantizer.learner(weight, given)
                self._put(path, learnable_linear(linear, learner))
            else:
                outputs = self.moments.pop(path, None)
                self._put(path, QuantizedLinear.from_linear(linear, quantizer, given, outputs))
        self.changed += 1
        self.pending[path] = _Pending(linear, learner, hessian, tokens, time.perf_counter() - started)
        if target is None:
            self._finish()

    def _learn_rounding(self, block: Block, target: Reconstruction) -> None:
        """Trains the block's linears with learned rounding together, packs them, and tunes the floating-point
        tensors."""
        learners = {path: each.learner for path, each in self.pending.items() if each.learner is not None}
        if not learners:
            return
        started = time.perf_counter()
        self._record_loss(block, learn_rounding(block.module, list(learners.values()), target))
        seconds = (time.perf_counter() - started) / len(learners)
        for path, learner in learners.items():
            each = self.pending[path]
            each.seconds += seconds
            with within(path):
                layer = QuantizedLinear.from_packed(each.linear, self.plan.quantizers[path], learner.packed())
            self._put(path, layer)
        self._tune(block, target)

    def _tune(self, block: Block, target: Reconstruction) -> None:
        if self.tuning is not None:
            self._record_loss(block, tune(block.module, target, self.tuning))

    def _record_loss(self, block: Block, loss: BlockLoss) -> None:
        self.losses.setdefault(block.path, []).append(loss)
        log.debug("%s: relative error of the outputs from %.4g to %.4g", block.path, *loss)

    def _finish(self) -> None:
        """Adds the pending linears to the report, with their LoRA initialisation; they do not change any more."""
        for path, each in self.pending.items():
            packed = self.model.get_submodule(path)
            assert isinstance(packed, QuantizedLinear)
            weight = each.linear.weight.detach().float()
            if self.adapter_rank:
                error = weight - packed.dequantize(dtype=torch.float32)
                self.lora_init[path] = lora_init_from_error(error, each.hessian, self.adapter_rank).cpu()
            self._add_row(module_report(path, packed, weight, each.hessian, each.tokens, each.seconds))
        self.pending.clear()

    def _warn_if_few_tokens(self, total: HessianSum | PooledSum, path: str) -> None:
        features = linear_at(self.model, path).in_features
        if 0 < total.tokens < features and not self.warned:
            self.warned = True
            log.warning(
                "%s has %d inputs and its Hessian only %d tokens; more calibration text gives better weights",
                path,
                features,
                total.tokens,
            )

    def _put(self, path: str, module: nn.Module) -> None:
        """Replaces a linear at all its paths."""
        set_everywhere(self.model, path, module, self.aliases)


@contextmanager
def _comparing(
    original: Calls | None, block: Block, groups: list[list[str]], stop: bool
) -> Iterator[list[ErrorSum] | None]:
    """`propagation.comparing`, where there is an original to compare with; groups: paths in the model."""
    if original is None:
        yield None
        return
    within_block = [[path.removeprefix(f"{block.path}.") for path in paths] for paths in groups]
    with comparing(original, block.module, within_block, stop=stop) as sums:
        yield sums


@dataclass
class _Pending:
    """A replaced linear that may still change until its block is done."""

    linear: nn.Linear
    """Dense original."""
    learner: Learner | None
    """Learner of its codes, for quantizers with learned rounding."""
    hessian: Tensor | None
    """Hessian [in, in]; None without calibration."""
    tokens: int
    """Number of tokens in the Hessian."""
    seconds: float
    """Time so far, in seconds."""


@contextmanager
def accumulating(
    model: nn.Module, groups: Sequence[Sequence[str]], *, stop: bool = False
) -> Iterator[list[HessianSum]]:
    """One Hessian per group of linears (paths), accumulated within the context from the inputs of its first one.

    stop: what comes after that linear in its block is not run, see `Calls.run`.
    """
    linears = [linear_at(model, paths[0]) for paths in groups]
    sums = [HessianSum(linear.in_features, linear.weight.device) for linear in linears]
    adders = [_adder(total, paths[0], stop) for total, paths in zip(sums, groups, strict=True)]
    with on_inputs(zip(linears, adders, strict=True)):
        yield sums


def _adder(total: HessianSum, path: str, stop: bool) -> Callable[[Tensor], None]:
    def add(x: Tensor) -> None:
        with within(path):
            total.add(x)
        if stop:
            raise Enough

    return add


INCOMPLETE = "_llmtools_incomplete"
"""Name of the attribute that a model carries while it is half quantized; saving refuses such a model."""


@contextmanager
def _marked_incomplete(model: nn.Module, work: _Quantization) -> Iterator[None]:
    setattr(model, INCOMPLETE, True)
    try:
        yield
    except BaseException as error:
        if work.changed:
            error.add_note(
                f"the model is half quantized ({work.changed} of {len(work.plan.quantizers)} linears); load it again"
            )
        else:
            delattr(model, INCOMPLETE)
        raise
    delattr(model, INCOMPLETE)
