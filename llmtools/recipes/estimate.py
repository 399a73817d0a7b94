"""Say what a finetuning step will hold in memory, before anything is downloaded, quantized or loaded."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import InputError, did_you_mean, opening
from .finetune import Lora

OPTIMIZERS = {
    "adamw_torch_fused": 8.0,
    "adamw_torch": 8.0,
    "adamw_bnb_8bit": 2.03,  # one byte for each moment, a float32 maximum for every 256 of them
    "paged_adamw_8bit": 2.03,
    "sgd": 0.0,
}
"""Bytes of state for each number that is trained, by the names of transformers' `optim`."""

LORA = Lora()

NOT_COUNTED = (
    "what a kernel allocates within itself, what the allocator rounds up or keeps, libraries and the program "
    "(on a GPU the CUDA context, some 0.5 GB)"
)


@dataclass(frozen=True)
class Plan:
    """Say what a finetuning step will hold in memory, beside 16-bit LoRA's and what is free; no weights are loaded."""

    model: str
    """folder, hub name or config.json of the model"""
    quantizer: str | dict[str, Any] | None = None
    """as in quantize; by default the one that the checkpoint was made with, or optq"""
    bits: int | None = None
    """bits of a code (quantizers that have the option)"""
    group_size: int | None = None
    """inputs that share a scale, -1 for the whole row (quantizers that have the option)"""
    options: dict[str, Any] = field(default_factory=dict)
    """other options of the quantizer, such as --options.act_order true"""
    overrides: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """as in quantize: options by pattern of module paths"""
    skip: list[str] | None = None
    """as in quantize: patterns of linears to leave alone"""
    lora: Lora = LORA
    """the adapter, as in finetune"""
    batch: int = 1
    """sequences in a step of one device (per_device_train_batch_size)"""
    length: int | None = None
    """tokens of a sequence; by default the model's positions, at most 1024, as in finetune"""
    gradient_checkpointing: bool | None = None
    """keep the inputs of blocks only and compute the rest again; by default on a GPU, as in finetune"""
    optim: str = "adamw_torch"
    """the optimizer: adamw_torch | adamw_bnb_8bit | sgd, as in transformers"""
    chunked_loss: bool = True
    """the loss without all logits at once; false for trainers that make them"""
    dtype: str | None = None
    """type of what is not quantized: bfloat16 | float16 | float32; by default the checkpoint's"""
    device: str | None = None
    """cuda | cpu: where the step is to run; by default a GPU if there is one"""
    memory: float | None = None
    """GB (10⁹ bytes) that may be used; by default what is free here"""
    plugin: str | list[str] | None = None
    """module:Class of your own quantizer, to use it by its name"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""


@dataclass(frozen=True)
class Memory:
    """Bytes of one finetuning step at its peak."""

    packed: int
    """quantized weights, as the layouts say"""
    linears: int
    """linears of the blocks that stay dense"""
    embeddings: int
    """embeddings and output head"""
    others: int
    """norms, biases, tables"""
    adapters: int
    """adapters, float32"""
    gradients: int
    """of the adapters"""
    optimizer: int
    """the optimizer's state"""
    activations: int
    """what the forward keeps for the backward"""
    loss: int
    """logits and what is made of them, if they are there at the peak"""
    work: int
    """of the block at hand, if that is the peak: recomputed activations, gradients, rows of weights"""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Planned:
    """What a step holds, what 16-bit LoRA would hold, and whether it fits."""

    model: str
    quantizer: str
    modules: int
    """linears that are quantized"""
    weights: int
    """weights in them"""
    bits_per_weight: float
    """packed bits by weights, scales included"""
    trainable: int
    step: str
    """batch, length, device and what else was assumed"""
    memory: Memory
    total: int
    lora_16_bit: Memory
    total_16_bit: int
    available: int | None
    """bytes, None where they are not known"""
    available_where: str
    fits: bool | None
    ways_out: list[str]
    """where it does not fit: what to change, with the total after each change"""
    not_counted: str = NOT_COUNTED

    def __str__(self) -> str:
        names = {
            "packed": f"packed weights ({self.bits_per_weight:.2f} bits each)",
            "linears": "dense linears of the blocks",
            "embeddings": "embeddings and output head",
            "others": "norms, biases, tables",
            "adapters": f"adapters ({self.trainable / 1e6:.2f} million numbers)",
            "gradients": "their gradients",
            "optimizer": "state of the optimizer",
            "activations": "activations kept for backward",
            "loss": "logits and loss",
            "work": "work on one block",
        }
        width = max(map(len, names.values()))
        column = max(len(self.quantizer), 10)

        def line(label: str, ours: str, its: str) -> str:
            return f"{label:<{width}}  {ours:>{column}}  {its:>11}"

        head = line("", self.quantizer, "16-bit LoRA")
        pairs = {key: (getattr(self.memory, key), getattr(self.lora_16_bit, key)) for key in names}
        rows = [line(names[key], *(size(n) if n else "–" for n in pair)) for key, pair in pairs.items() if any(pair)]
        total = line("total", size(self.total), size(self.total_16_bit))
        lines = [f"{self.model}: a finetuning step, {self.step}", head, *rows, total]
        if self.available is not None:
            verdict = "it fits" if self.fits else "it does not fit"
            lines.append(f"{self.available_where}: {size(self.available)}, so {verdict}")
        lines += [f"  {way}" for way in self.ways_out]
        return "\n".join([*lines, f"not counted: {self.not_counted}"])


def plan(recipe: Plan) -> Planned:
    """The bytes of a finetuning step of the model that the recipe names."""
    from .loading import import_plugins, quiet_libraries

    import_plugins(recipe.plugin)
    quiet_libraries()
    return plan_for(read_config(recipe), recipe)


def plan_for(config: Any, recipe: Plan) -> Planned:
    """The same for a configuration of transformers, such as ``LlamaConfig(hidden_size=…)``."""
    from ..data.metrics import model_positions

    _check(recipe)
    device = recipe.device or _best_device()
    shown: Any = SimpleNamespace(config=config)
    positions = model_positions(shown)
    length = recipe.length if recipe.length is not None else min(1024, positions or 1024)
    if positions is not None and length > positions:
        raise InputError(f"length={length} is longer than the model's {positions} positions; use at most {positions}")
    checkpointing = device == "cuda" if recipe.gradient_checkpointing is None else recipe.gradient_checkpointing
    recipe = dataclasses.replace(recipe, device=device, length=length, gradient_checkpointing=checkpointing)
    ours, name, facts = step_memory(config, recipe)
    dense, _, _ = step_memory(config, recipe, dense=True)
    available, where = _available(recipe)
    fits = None if available is None else ours.total <= available
    words = [f"{recipe.batch} × {length} tokens", "with checkpointing" if checkpointing else "without checkpointing"]
    return Planned(
        model=recipe.model,
        quantizer=name,
        modules=facts["modules"],
        weights=facts["weights"],
        bits_per_weight=8 * ours.packed / facts["weights"],
        trainable=facts["trainable"],
        step=", ".join([*words, f"on {'a GPU' if device == 'cuda' else 'the CPU'}", recipe.optim]),
        memory=ours,
        total=ours.total,
        lora_16_bit=dense,
        total_16_bit=dense.total,
        available=available,
        available_where=where,
        fits=fits,
        ways_out=_ways_out(config, recipe, available) if available is not None and not fits else [],
    )


def read_config(recipe: Plan) -> Any:
    """The model's configuration, from a folder, a file or the hub."""
    from transformers import AutoConfig, PreTrainedConfig

    from ..files import read_json
    from ..formats.gguf_reading import described, find
    from ..model.integrity import check_config
    from .loading import check_model

    path = Path(recipe.model).expanduser()
    if (found := find(recipe.model, {})) is not None:
        return described(found)
    if path.is_file():
        with opening(f"{path} is no config.json of a model that transformers knows", error=InputError):
            values = read_json(path)
            check_config(values, None, str(path))
            return AutoConfig.for_model(**values)
    check_model(recipe.model)
    name = str(path) if path.is_dir() else recipe.model
    with opening(f"{recipe.model}: its configuration cannot be had", error=InputError):
        check_config(PreTrainedConfig.get_config_dict(name)[0], None, name)
        return AutoConfig.from_pretrained(name, trust_remote_code=recipe.trust_remote_code)


def size(count: float) -> str:
    """Bytes for people, in powers of ten as memory is sold and papers report it: ``"1.85 GB"``."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count:.0f} bytes"


# ------------------------------------------------------------------------------------------------------------ counting


def step_memory(config: Any, recipe: Plan, dense: bool = False) -> tuple[Memory, str, dict[str, int]]:
    """(bytes, the quantizer's name, counts) of a step of the model, quantized or dense; the recipe has no gaps left."""
    from ..model.memory import peak, tensors

    assert recipe.length is not None
    model, name, modules = _model(config, recipe, dense)
    held = tensors(model)
    moving = peak(
        model,
        recipe.batch,
        recipe.length,
        device=str(recipe.device),
        autocast=recipe.device == "cuda",
        chunked_loss=recipe.chunked_loss,
    )
    memory = Memory(
        packed=held.packed,
        linears=held.linears,
        embeddings=held.embeddings,
        others=held.others,
        adapters=held.adapters,
        gradients=held.adapters,
        optimizer=int(OPTIMIZERS[recipe.optim] * held.trainable),
        activations=moving.activations,
        loss=moving.loss,
        work=moving.work,
    )
    return memory, name, {"modules": modules, "weights": held.quantized_weights, "trainable": held.trainable}


def _model(config: Any, recipe: Plan, dense: bool) -> tuple[Any, str, int]:
    """(the model on the meta device with adapters, as finetune would train it; quantizer's name; linears quantized)"""
    import torch
    from peft import get_peft_model

    from ..model.memory import planning_attention
    from ..model.transformers_integration import empty_layer, tie_heads
    from ..nn.adapters import prepare_for_training
    from ..nn.swap import set_module
    from .finetune import Finetune, _leave_out, _lora_config

    with torch.device("meta"), planning_attention() as attention:
        model = _empty(config, recipe, attention)
        quantizers, name = _quantizers(model, config, recipe)
        if not dense:
            for path, quantizer in quantizers.items():
                set_module(model, path, empty_layer(model.get_submodule(path), quantizer, path))
            tie_heads(model)
        prepare_for_training(model, gradient_checkpointing=bool(recipe.gradient_checkpointing))
        try:
            config = _lora_config(Finetune(recipe.model, data="", out="", lora=recipe.lora))
            _leave_out(config, model)
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"lora: {error}") from error
        return adapted.train(), name, len(quantizers)


def _empty(config: Any, recipe: Plan, attention: str) -> Any:
    """The model without values; with the attention to plan with, where its family lets one be chosen."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = recipe.dtype or str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": recipe.trust_remote_code}
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, **options)
    except (ValueError, ImportError):
        pass
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{recipe.model}: no language model can be made of its configuration ({first})") from error


def _quantizers(model: Any, config: Any, recipe: Plan) -> tuple[dict[str, Any], str]:
    """(path → quantizer, what to call them): the checkpoint's, or what quantize would choose."""
    from ..model.targets import Plan as Choice
    from ..quant import from_spec
    from .quantize import Quantize, resolve_quantizer

    stored = getattr(config, "quantization_config", None)
    if stored is not None and recipe.quantizer is None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        if stored.get("quant_method") != "llmtools":
            raise InputError(
                f"{recipe.model} was quantized by {stored.get('quant_method')}; pass --quantizer to plan for one of "
                f"ours, or plan for a folder that `llmtools quantize` wrote"
            )
        made = [from_spec(spec) for spec in stored["quantizers"]]
        chosen = {path: made[index] for path, index in stored["modules"].items()}
        return chosen, _called(made[0] if len(made) == 1 else None)
    base = resolve_quantizer(
        Quantize(
            model=recipe.model,
            out="",
            quantizer=recipe.quantizer or "optq",
            bits=recipe.bits,
            group_size=recipe.group_size,
            options=recipe.options,
        )
    )
    return Choice.of(model, base, recipe.overrides, recipe.skip).quantizers, _called(base)


def _called(quantizer: Any) -> str:
    if quantizer is None:
        return "as stored"
    bits = getattr(quantizer, "bits", None)
    return str(quantizer.name) if bits is None else f"{quantizer.name}, {bits} bits"


# ------------------------------------------------------------------------------------------------------- does it fit?


def _available(recipe: Plan) -> tuple[int | None, str]:
    import torch

    if recipe.memory is not None:
        return int(recipe.memory * 1e9), "allowed"
    if recipe.device == "cuda":
        if not torch.cuda.is_available():
            return None, ""
        free, _ = torch.cuda.mem_get_info()
        return int(free), f"free on {torch.cuda.get_device_name()}"
    return _free_here(), "free on this machine"


def _free_here(root: Path = Path("/")) -> int | None:
    """Memory that programs may still take, the limit of a container included."""
    try:
        told = (root / "proc/meminfo").read_text()
        free = int(re.findall(r"^MemAvailable:\s+(\d+) kB", told, flags=re.MULTILINE)[0]) * 1024
    except (OSError, IndexError):
        return None
    try:
        group = root / "sys/fs/cgroup"
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return free
    return min(free, limit)


def _ways_out(config: Any, recipe: Plan, available: int) -> list[str]:
    """Changes, one upon the other, until it fits."""
    said: list[str] = []
    for words, change in _changes(recipe):
        recipe = dataclasses.replace(recipe, **change)
        memory, _, _ = step_memory(config, recipe)
        fits = memory.total <= available
        said.append(f"{'and ' if said else ''}{words}: {size(memory.total)}{', fits' if fits else ''}")
        if fits:
            return said
    return [*said, "a smaller model, more memory, or several devices"]


def _changes(recipe: Plan) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    if not recipe.gradient_checkpointing:
        found.append(("--gradient_checkpointing true", {"gradient_checkpointing": True}))
    if recipe.batch > 1:
        found.append(("--batch 1 (with gradient accumulation)", {"batch": 1}))
    if OPTIMIZERS[recipe.optim] > 3 and recipe.device == "cuda":
        found.append(("--optim adamw_bnb_8bit", {"optim": "adamw_bnb_8bit"}))
    if recipe.quantizer not in ("quip_sharp",) or (recipe.bits or 2) > 2:
        change = {"quantizer": "quip_sharp", "bits": 2, "group_size": None, "options": {}, "overrides": {}}
        found.append(("--quantizer quip_sharp --bits 2", change))
    if recipe.length is not None and recipe.length > 256:
        found.append((f"--length {recipe.length // 4}", {"length": recipe.length // 4}))
    return found


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check(recipe: Plan) -> None:
    for name in ("batch", "length"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value}; at least 1 is expected")
    if recipe.optim not in OPTIMIZERS:
        raise InputError(
            f"optim={recipe.optim!r} is not one whose state is known; {did_you_mean(recipe.optim, OPTIMIZERS)}"
        )
    if recipe.device not in (None, "cpu", "cuda"):
        raise InputError(f"device={recipe.device!r}; {did_you_mean(str(recipe.device), ('cpu', 'cuda'))}")
    if recipe.dtype not in (None, "bfloat16", "float16", "float32"):
        raise InputError(
            f"dtype={recipe.dtype!r}; {did_you_mean(str(recipe.dtype), ('bfloat16', 'float16', 'float32'))}"
        )
