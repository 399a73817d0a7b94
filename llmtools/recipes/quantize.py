"""Quantize a model: open it, read the calibration text, walk, write a checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.options import ModelOptions
from ..errors import InputError
from ..model.options import (
    NO_RECOVERY,
    ONE_SIDED,
    OPEN_RECOVERY,
    OPEN_TUNING,
    TWO_SIDED,
    BlockTuning,
    Recovery,
    check_rounding,
)
from ..model.processes import Processes, together
from ..train.options import StepOptions
from .fit import STEP, fitted
from .quality import expanded, with_quality

log = logging.getLogger(__name__)

ALLOCATION = "allocation.yaml"


@dataclass(frozen=True, kw_only=True)
class QuantizerOptions:
    """A quantizer with its options, and the linear layers that it is applied to."""

    quantizer: str | dict[str, Any] | None = None
    """Name of a quantizer (`llmtools list` shows them), or module:Class; in a YAML also {name: …, bits: …, …}; by
    default optq."""
    bits: int | None = None
    """Number of bits per code (quantizers that have the option)."""
    group_size: int | None = None
    """Number of input features that share a scale, -1 for the whole row (quantizers that have the option)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other options of the quantizer, such as --options.damping 0.05; `llmtools list QUANTIZER` shows them."""
    overrides: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Options by pattern of module paths, best in a YAML: {down_proj: {bits: 4}, "*.0.*": null}; null keeps a linear
    dense."""
    skip: list[str] | None = None
    """Patterns of linear layers to keep dense; by default those outside the transformer blocks (lm_head)."""


@dataclass(frozen=True)
class Quantize(QuantizerOptions, ModelOptions):
    """Quantize the linear layers of a model and write a checkpoint that transformers opens."""

    model: str
    """Folder or hub name of the model, in 16 or 32 bits or float8, or a GGUF file."""
    out: str
    """Folder to write the quantized model to."""
    quantizer: str | dict[str, Any] | None = field(default=None, kw_only=True)
    """Quantizer: rtn, optq, nf4, …, a plug-in's name, or module:Class; in a YAML also {name: …, bits: …, …}; by default
    that of --quality."""
    quality: str | None = field(default=None, kw_only=True)
    """Tested set of options for a width: fast (seconds, without text), balanced, or best (hours); options that are
    given win. By default balanced where no quantizer is named; `llmtools list balanced` shows what it is."""
    calibration: str | None = None
    """Calibration text: a .txt or .jsonl file (.gz too), or wikitext2 | c4 from the hub."""
    num_samples: int | None = None
    """Number of calibration sequences; by default that of --quality, or 128."""
    max_length: int | None = None
    """Length of a calibration sequence in tokens; by default that of --quality, or the model's positions, at most
    2048."""
    seed: int = 0
    """Seed of the choice of calibration sequences."""
    sequential: bool = True
    """Hessians of each group of linears measured with the block's earlier groups quantized; without: faster, a little
    less accurate."""
    error_propagation: float | None = None
    """Strength, from 0 to 1, of a correction of each weight, before it is quantized, for the errors of the layers
    before it; --error_propagation 0.5. The walk takes about twice as long. By default 0, or what the quality says."""
    rounding: str | None = None
    """What the rounding of optq, quip, quip_sharp and qtip makes least: one_sided, the error of a layer's output;
    two_sided, its effect on the whole model's distributions, by gradients of the original model. By default
    one_sided, or what the quality says."""
    finetune_blocks: BlockTuning = OPEN_TUNING
    """Block-wise reconstruction: each block trained towards its original outputs, after each group of linears;
    --finetune_blocks.epochs 5."""
    recover: Recovery = OPEN_RECOVERY
    """End-to-end recovery: scales and norms of the quantized model trained on the original's distributions, over the
    calibration text; --recover with its defaults, or --recover.steps 200."""
    bits_per_weight: float | None = None
    """Stored bits per weight, scales included, to divide among the linears where they lower the estimated loss most; in
    place of --bits. The widths are written to allocation.yaml, to be edited and used by --config."""
    fit: str | float | None = None
    """Memory that a later finetuning step is to fit into, such as 6GB, in place of --bits: the widest codes that do are
    chosen by `llmtools plan`, and with calibration text what is left is divided as by --bits_per_weight."""
    fit_step: StepOptions = STEP
    """The step that is to fit; --fit_step.batch_size 4 --fit_step.max_length 512."""
    adapter_rank: int = 0
    """Largest rank of LoRA adapters whose initialisation from the quantization error is stored, for finetune
    --lora.init error; with --recover they are then trained, and written to the folder's adapter; 0: none."""
    route_all: bool = False
    """Calibration of each expert of a mixture on all tokens instead of those that its router sends there: for experts
    that see few (the report counts them), at several times the work."""
    hidden_states: float = 4.0
    """Gigabytes of memory for the hidden states of the calibration text; what is beyond is kept in files."""
    resume: bool = False
    """Continuation of a run that was stopped, at its first unfinished block."""
    overwrite: bool = False
    """Permission to replace the output folder."""


@dataclass(frozen=True)
class QuantizeResult:
    """The checkpoint, its size, and the quantization error of each module."""

    out: str
    """Folder of the checkpoint."""
    quantizer: dict[str, Any]
    """Specification of the quantizer: its name and options."""
    modules: int
    """Number of quantized linear layers."""
    bits_per_weight: float
    """Stored bits per quantized weight, scales included."""
    packed_bytes: int
    """Bytes of the packed weights and their scales."""
    seconds: float
    """Duration in seconds."""
    report: dict[str, Any]
    """Entry per module: error, proxy loss, seconds, bytes; modules that stay dense, with the reason."""
    table: str
    """Report as a table for printing."""
    recovery: dict[str, Any] | None = None
    """KL divergence from the original before and after end-to-end recovery, steps and number of trained values."""

    def __str__(self) -> str:
        recovered = ""
        if self.recovery:
            before, after = self.recovery["before"], self.recovery["after"]
            adapter = self.recovery.get("with_adapter")
            recovered = f"recovery: KL divergence from the original {before:.4f} → {after:.4f} nats per token"
            recovered += "\n" if adapter is None else f", with the adapter {adapter:.4f}\n"
        return (
            f"{self.table}\n{recovered}{self.out}: {self.modules} modules at {self.bits_per_weight:.2f} bits per "
            f"weight, {self.packed_bytes / 2**20:.2f} MiB, in {self.seconds:.1f} s"
        )


def quantize(recipe: Quantize) -> QuantizeResult:
    """Quantizes the linear layers of a model and writes the checkpoint."""
    from ..files import claim
    from ..signals import interruptible

    reads = [recipe.model, recipe.calibration]
    with (
        interruptible(),
        together() as processes,
        claim(recipe.out, overwrite=recipe.overwrite, reads=reads) if processes.is_first else nullcontext(),
    ):
        return _quantize(recipe, processes)


def _quantize(recipe: Quantize, processes: Processes) -> QuantizeResult:
    from ..checkpoint.loading import check_model, import_plugins, open_model, quiet_libraries
    from ..checkpoint.streaming import is_converted, opened_whole, why_not_streamed

    began = time.monotonic()
    check_model(recipe.model)
    import_plugins(recipe.plugin)
    recipe = fitted(recipe, divide=processes.count == 1)
    quantizer = checked_quantizer(recipe)
    given, recipe = recipe, _block_by_block(recipe, with_quality(recipe))
    _check_divided(recipe, processes.count)
    quiet_libraries()

    def run(model: Any, tokenizer: Any, storage: Any = None) -> QuantizeResult:
        return _quantized(_without_head(given, recipe, model), quantizer, model, tokenizer, storage, processes, began)

    if (why := _why_resident(recipe)) is None:
        with _streamed(recipe, processes) as (model, tokenizer, storage):
            return run(model, tokenizer, storage)
    if recipe.resume:
        raise InputError(f"--resume: nothing is kept of this run, since {why}; start without --resume")
    log.info("the whole model is read into memory, since %s", why)
    if is_converted(recipe.model) and why_not_streamed(recipe.model) is None:
        with opened_whole(recipe.model, verify=recipe.verify) as (model, tokenizer):
            return run(model, tokenizer)
    return run(
        *open_model(recipe.model, trust_remote_code=recipe.trust_remote_code, any_task=True, verify=recipe.verify)
    )


def _block_by_block(given: Quantize, recipe: Quantize) -> Quantize:
    """The recipe, on a GPU without the rounding that a --quality chose if it alone would need the whole model there."""
    import torch

    if given.rounding is None and torch.cuda.is_available() and not recipe.recover.steps:
        return replace(recipe, rounding=ONE_SIDED)
    return recipe


def _without_head(given: Quantize, recipe: Quantize, model: Any) -> Quantize:
    """The recipe without what a --quality chose that needs logits, if the model has none."""
    from ..model.walk import has_head

    if has_head(model):
        return recipe
    rounding = ONE_SIDED if given.rounding is None else recipe.rounding
    steps = 0 if given.recover.steps is None else recipe.recover.steps
    if (rounding, steps) != (recipe.rounding, recipe.recover.steps):
        log.info("%s gives no logits: rounded one-sided, and not recovered", type(model).__name__)
    return replace(recipe, rounding=rounding, recover=replace(recipe.recover, steps=steps))


def _check_divided(recipe: Quantize, count: int) -> None:
    """Raises InputError for what is not divided among several processes."""
    asked = {
        "--recover.steps": recipe.recover.steps,
        "--finetune_blocks.epochs": recipe.finetune_blocks.epochs,
        "--bits_per_weight": recipe.bits_per_weight,
    }
    option = next((name for name, value in asked.items() if value), None)
    if count > 1 and option is not None:
        chosen = "" if recipe.quality is None else f" (--quality {recipe.quality}; {option} 0 is without)"
        raise InputError(
            f"{option} {asked[option]}{chosen} works in one process, and this run has {count}; start it without "
            f"torchrun"
        )


def _why_resident(recipe: Quantize) -> str | None:
    """Why the model has to be in memory as a whole; None where one block at a time is enough."""
    import torch

    from ..checkpoint.streaming import is_converted, why_not_streamed

    asked = {
        "--recover": bool(recipe.recover.steps),
        "--bits_per_weight": recipe.bits_per_weight is not None,
        f"--rounding {TWO_SIDED}": recipe.rounding == TWO_SIDED,
    }
    if (option := next((name for name, given in asked.items() if given), None)) is not None:
        if torch.cuda.is_available():
            return f"{option} runs it as a whole, on the GPU"
        if is_converted(recipe.model):
            return f"{option} runs it as a whole, and its weights are converted"
    return why_not_streamed(recipe.model, trust_remote_code=recipe.trust_remote_code)


@contextmanager
def _streamed(recipe: Quantize, processes: Processes) -> Iterator[tuple[Any, Any, Any]]:
    """(model on the meta device, tokenizer, its `Streamed`), with the finished blocks in OUT.quantizing."""
    from ..checkpoint.loading import import_libraries
    from ..checkpoint.streaming import open_unread
    from ..model.streaming import Streamed
    from ..train.heap import map_large_blocks

    with _work_folder(recipe, processes) as work:
        map_large_blocks()  # so that the memory of a block is given back when it is done
        converted = work / (f"converted.{processes.rank}" if processes.rank else "converted")
        import_libraries()
        opened = open_unread(recipe.model, converted, verify=recipe.verify)
        budget = int(recipe.hidden_states * 2**30)
        yield opened.model, opened.tokenizer, Streamed(opened.model, opened.index, work, hidden_states=budget)


@contextmanager
def _work_folder(recipe: Quantize, processes: Processes) -> Iterator[Path]:
    """OUT.quantizing, which the first process creates, and removes at the end."""
    from ..checkpoint.work_folder import work_folder
    from ..model.streaming import finished_units

    def kept(work: Path) -> str | None:
        count = len(finished_units(work))
        return f"{count} finished block{'s' * (count > 1)}" if count else None

    if not processes.is_first:
        work = Path(processes.sent("", 0))
        if not work.is_dir():
            raise InputError(f"{work} is missing here; all processes of a run need the same folder for --out")
        yield work
        return
    with work_folder(
        Path(recipe.out),
        "quantizing",
        _settings(recipe),
        resume=recipe.resume,
        overwrite=recipe.overwrite,
        kept=kept,
    ) as work:
        processes.sent(str(work), 0)
        yield work


def _settings(recipe: Quantize) -> dict[str, Any]:
    """What a run must share with the one that it continues: options, and hashes of its inputs."""
    from ..checkpoint.inputs import content_of_model, contents

    unbound = ("model", "out", "resume", "overwrite", "verify", "hidden_states")
    inputs = contents(recipe)
    options = {key: value for key, value in asdict(recipe).items() if key not in (*unbound, *inputs)}
    return {"options": options, "model": content_of_model(recipe.model) or recipe.model, "inputs": inputs}


def _quantized(
    recipe: Quantize,
    quantizer: Any,
    model: Any,
    tokenizer: Any,
    storage: Any,
    processes: Processes,
    began: float,
) -> QuantizeResult:
    """Quantizes a model that is open, and writes it. storage: its `Storage`, None for a model in memory."""
    import torch

    from ..data.calibration import calibration
    from ..data.metrics import model_positions
    from ..model.allocation import choose_bits
    from ..model.quantize import quantize as quantize_model
    from ..progress import progress
    from .recover import recovering

    device = "cuda" if storage is not None and torch.cuda.is_available() else None
    text = None
    if recipe.calibration is not None:
        length = recipe.max_length if recipe.max_length is not None else min(model_positions(model) or 2048, 2048)
        assert recipe.num_samples is not None  # by `with_quality`
        text = calibration(recipe.calibration, tokenizer, samples=recipe.num_samples, tokens=length, seed=recipe.seed)
    overrides, allocation = recipe.overrides, None
    if recipe.bits_per_weight is not None:
        with progress("choose bits", unit="modules") as step:
            allocation = choose_bits(
                model,
                quantizer,
                text or [],
                recipe.bits_per_weight,
                overrides=overrides,
                skip=recipe.skip,
                seed=recipe.seed,
                on_step=step,
                storage=storage,
            )
        log.info("%s", allocation.table())
        overrides = {**overrides, **allocation.overrides}
    with recovering(model, text or [], recipe.recover, recipe.seed, recipe.adapter_rank, storage) as recover:
        done = 0 if storage is None else storage.modules()
        with progress(f"quantize ({quantizer.name})", unit="modules", done=done) as step:
            report = quantize_model(
                model,
                quantizer,
                text,
                overrides=overrides,
                skip=recipe.skip,
                sequential=recipe.sequential,
                tuning=recipe.finetune_blocks,
                error_propagation=recipe.error_propagation or 0.0,
                rounding=recipe.rounding or ONE_SIDED,
                adapter_rank=recipe.adapter_rank,
                route_all=recipe.route_all,
                on_step=step,
                device=device,
                storage=storage,
                processes=processes,
            )
        recovered = recover(report.lora_init)
    recovery, adapters = recovered or (None, {})
    if processes.is_first:
        _write(recipe, model, tokenizer, report, recovery, adapters, overrides if allocation is not None else None)
    processes.wait()  # the files of the finished blocks stay until all processes are here
    return QuantizeResult(
        out=recipe.out,
        quantizer=quantizer.spec(),
        modules=len(report.rows),
        bits_per_weight=report.bits_per_weight,
        packed_bytes=report.packed_bytes,
        seconds=time.monotonic() - began,
        report=report.to_json(),
        table=report.table(),
        recovery=recovery,
    )


def _write(
    recipe: Quantize,
    model: Any,
    tokenizer: Any,
    report: Any,
    recovery: dict[str, Any] | None,
    adapters: Any,
    chosen: dict[str, Any] | None,
) -> None:
    """Writes the output folder, whole or not at all. chosen: overrides with the widths of --bits_per_weight."""
    from ..checkpoint.folder import ADAPTER, write, write_adapter
    from ..checkpoint.model_card import write_card
    from ..checkpoint.run_info import record
    from ..files import writing
    from .plain_yaml import as_yaml

    out = Path(recipe.out).expanduser()
    with writing(out, overwrite=recipe.overwrite) as folder:
        run = record("quantize", recipe, facts=_facts(recipe), recovery=recovery)
        if recipe.quality is not None:
            run["quality"] = {"name": recipe.quality, "options": expanded(recipe)}
        if adapters:
            write_adapter(model, adapters, folder / ADAPTER, base=str(out.resolve()))
        if chosen is not None:
            (folder / ALLOCATION).write_text(as_yaml({"overrides": chosen}), encoding="utf-8")
        write(model, tokenizer, folder, report=report, run=run, lora_init=adapters or None)  # lists the files so far
        write_card(folder, name=out.resolve().name, former=out)


def checked_quantizer(recipe: Quantize) -> Any:
    """The recipe's quantizer. Raises InputError for wrong options, and where the calibration text is missing."""
    from ..data.calibration import HUB
    from ..data.text_io import existing_file
    from ..model.propagation import check_strength

    asked, recipe = recipe, with_quality(recipe)
    try:
        quantizer = resolve_quantizer(recipe)
    except InputError as error:
        if asked.quantizer is not None:
            raise
        chosen = f"--quality {recipe.quality} chose {recipe.quantizer}; --quantizer NAME chooses another"
        raise InputError(f"{error} ({chosen})") from error
    if (reader := _reader_of_text(recipe, quantizer)) is not None and recipe.calibration is None:
        ways_out = ""
        if reader == quantizer.name:
            reader += "" if recipe.quality is None else f" (--quality {recipe.quality})"
            ways_out = ", or take what needs none: --quality fast, or --quantizer rtn"
        raise InputError(f"{reader} needs calibration text: pass --calibration FILE (.txt or .jsonl){ways_out}")
    check_strength(recipe.error_propagation or 0.0, tuned=bool(recipe.finetune_blocks.epochs))
    check_rounding(recipe.rounding or ONE_SIDED)
    if recipe.bits_per_weight is not None and recipe.bits is not None:
        raise InputError("--bits_per_weight chooses the bits of each linear; pass it or --bits, not both")
    if not recipe.recover.steps and recipe.recover != NO_RECOVERY:
        raise InputError("--recover: options of recovery, and recover.steps is 0; pass --recover.steps, such as 60")
    if recipe.calibration is not None and recipe.calibration not in HUB:
        existing_file(recipe.calibration)
    return quantizer


def without_unread_text(recipe: Quantize) -> Quantize:
    """The recipe without calibration text where nothing reads it."""
    reader = _reader_of_text(with_quality(recipe), resolve_quantizer(recipe))
    return recipe if reader is not None else replace(recipe, calibration=None)


def _reader_of_text(recipe: Quantize, quantizer: Any) -> str | None:
    """What reads calibration text: the quantizer's name or an option; None for nothing. recipe: with its quality."""
    readers = {
        quantizer.name: quantizer.needs_hessian,
        "--finetune_blocks": recipe.finetune_blocks.epochs,
        "--error_propagation": recipe.error_propagation,
        f"--rounding {TWO_SIDED}": recipe.rounding == TWO_SIDED,
        "--bits_per_weight": recipe.bits_per_weight is not None,
        "--recover": recipe.recover.steps,
    }
    return next((name for name, reads in readers.items() if reads), None)


def _facts(recipe: Quantize) -> dict[str, Any]:
    """Facts about the calibration for the model card."""
    if recipe.calibration is None:
        return {}
    return {"calibration": {"text": recipe.calibration, "windows": recipe.num_samples, "seed": recipe.seed}}


def resolve_quantizer(chosen: QuantizerOptions) -> Any:
    """The quantizer of these options: those of {name, …}, then `options`, then `bits` and `group_size`; later ones win.

    Raises InputError for an unknown name and for options that the quantizer does not take.
    """
    from ..checkpoint.loading import with_current_folder
    from ..quant import quantizer

    options: dict[str, Any] = {}
    if isinstance(chosen.quantizer, dict):
        options = dict(chosen.quantizer)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise InputError(f"quantizer: {{name: …, options}} is expected, not {chosen.quantizer!r}")
    else:
        name = chosen.quantizer or "optq"
    options |= chosen.options
    flat = {"bits": chosen.bits, "group_size": chosen.group_size}
    options |= {key: value for key, value in flat.items() if value is not None}
    if ":" in name:
        with_current_folder()
    return quantizer(name, **options)
