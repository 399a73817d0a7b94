"""Quantize a model: open it, read the calibration text, walk, write a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..model.options import NO_TUNING, BlockTuning


@dataclass(frozen=True)
class Quantize:
    """Quantize the linear layers of a model and write a checkpoint that transformers opens."""

    model: str
    """folder or hub name of the model"""
    out: str
    """folder to write the quantized model to"""
    quantizer: str | dict[str, Any] = "optq"
    """rtn, optq, nf4, a plug-in's name or module:Class; in a YAML also {name: …, bits: …, …}"""
    bits: int | None = None
    """bits of a code (quantizers that have the option)"""
    group_size: int | None = None
    """inputs that share a scale, -1 for the whole row (quantizers that have the option)"""
    options: dict[str, Any] = field(default_factory=dict)
    """other options of the quantizer, such as --options.damping 0.05; `llmtools list QUANTIZER` shows them"""
    overrides: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """options by pattern of module paths, best in a YAML: {down_proj: {bits: 4}, "*.0.*": null}; null stays dense"""
    skip: list[str] | None = None
    """patterns of linears to leave alone; by default those outside the blocks (lm_head)"""
    calibration: str | None = None
    """text to learn from: a .txt or .jsonl file (.gz too), or wikitext2 | c4 from the hub"""
    samples: int = 128
    """windows of calibration text"""
    tokens: int | None = None
    """tokens in a window; by default the model's positions, at most 2048"""
    seed: int = 0
    """of the choice of the windows"""
    sequential: bool = True
    """measure each group of linears with the earlier ones of its block quantized; without: faster, a little worse"""
    finetune_blocks: BlockTuning = NO_TUNING
    """tune each block against the original one's outputs, after each group of linears; --finetune_blocks.epochs 5"""
    adapter_rank: int = 0
    """also write start values for adapters up to this rank, see finetune --lora.init error"""
    overwrite: bool = False
    """replace the output folder if there is one"""
    plugin: str | list[str] | None = None
    """module:Class of your own quantizer, to use it by its name"""
    verify: bool = False
    """comparison of every byte of the model's (and adapter's) files with their checksums before they are used"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""


@dataclass(frozen=True)
class Quantized:
    """Where the checkpoint lies, how small it is, how well it went."""

    out: str
    quantizer: dict[str, Any]
    modules: int
    bits_per_weight: float
    packed_bytes: int
    seconds: float
    report: dict[str, Any]
    """one entry a module: error, proxy loss, seconds, bytes; what was left dense and why"""
    table: str

    def __str__(self) -> str:
        return (
            f"{self.table}\n{self.out}: {self.modules} modules at {self.bits_per_weight:.2f} bits a weight, "
            f"{self.packed_bytes / 2**20:.2f} MiB, in {self.seconds:.1f} s"
        )


def quantize(recipe: Quantize) -> Quantized:
    """Quantizes the linear layers of a model and writes the checkpoint."""
    from ..files import claim

    with claim(recipe.out, overwrite=recipe.overwrite, reads=[recipe.model, recipe.calibration]):
        return _quantize(recipe)


def _quantize(recipe: Quantize) -> Quantized:
    from ..checkpoint.folder import write
    from ..checkpoint.loading import check_model, import_plugins, open_model, quiet_libraries
    from ..checkpoint.model_card import write_card
    from ..checkpoint.run_info import record
    from ..data.calibration import calibration
    from ..data.metrics import model_positions
    from ..files import writing
    from ..model.quantize import quantize as quantize_model
    from ..progress import progress

    began = time.monotonic()
    check_model(recipe.model)
    import_plugins(recipe.plugin)
    quantizer = checked_quantizer(recipe)

    quiet_libraries()
    model, tokenizer = open_model(
        recipe.model, trust_remote_code=recipe.trust_remote_code, any_task=True, verify=recipe.verify
    )
    text = None
    if recipe.calibration is not None:
        tokens = recipe.tokens if recipe.tokens is not None else min(model_positions(model) or 2048, 2048)
        text = calibration(recipe.calibration, tokenizer, samples=recipe.samples, tokens=tokens, seed=recipe.seed)
    with progress(f"quantize ({quantizer.name})", unit="modules") as step:
        report = quantize_model(
            model,
            quantizer,
            text,
            overrides=recipe.overrides,
            skip=recipe.skip,
            sequential=recipe.sequential,
            tuning=recipe.finetune_blocks,
            adapter_rank=recipe.adapter_rank,
            on_step=step,
        )
    out = Path(recipe.out).expanduser()
    with writing(out, overwrite=recipe.overwrite) as folder:
        write(model, tokenizer, folder, report=report, run=record("quantize", recipe, facts=_facts(recipe)))
        write_card(folder, name=out.resolve().name, former=out)
    return Quantized(
        out=recipe.out,
        quantizer=quantizer.spec(),
        modules=len(report.rows),
        bits_per_weight=report.bits_per_weight,
        packed_bytes=report.packed_bytes,
        seconds=time.monotonic() - began,
        report=report.to_json(),
        table=report.table(),
    )


def checked_quantizer(recipe: Quantize) -> Any:
    """What the recipe describes. Raises InputError for wrong options, and where it lacks the text that it needs."""
    from ..data.calibration import HUB
    from ..data.text_io import existing_file

    quantizer = resolve_quantizer(recipe)
    if quantizer.needs_hessian and recipe.calibration is None:
        raise InputError(
            f"{quantizer.name} learns from text: pass --calibration FILE (.txt or .jsonl), or use a quantizer that "
            f"needs none, such as --quantizer rtn"
        )
    if recipe.finetune_blocks.epochs and recipe.calibration is None:
        raise InputError("--finetune_blocks learns from text: pass --calibration FILE (.txt or .jsonl)")
    if recipe.calibration is not None and recipe.calibration not in HUB:
        existing_file(recipe.calibration)
    return quantizer


def _facts(recipe: Quantize) -> dict[str, Any]:
    """What the model card says of the calibration."""
    if recipe.calibration is None:
        return {}
    return {"calibration": {"text": recipe.calibration, "windows": recipe.samples, "seed": recipe.seed}}


def resolve_quantizer(recipe: Quantize) -> Any:
    """What the recipe describes: name or {name, options}, then `options`, then `bits` and `group_size`."""
    from ..checkpoint.loading import with_current_folder
    from ..quant import quantizer

    options: dict[str, Any] = {}
    if isinstance(recipe.quantizer, str):
        name = recipe.quantizer
    else:
        options = dict(recipe.quantizer)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise InputError(f"quantizer: {{name: …, options}} is expected, not {recipe.quantizer!r}")
    options |= recipe.options
    options |= {
        key: value for key, value in (("bits", recipe.bits), ("group_size", recipe.group_size)) if value is not None
    }
    if ":" in name:
        with_current_folder()
    return quantizer(name, **options)
