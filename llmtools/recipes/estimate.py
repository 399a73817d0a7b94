"""Estimate the memory of a finetuning step, before anything is downloaded, quantized or loaded."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..checkpoint.options import CodeOptions
from ..errors import InputError, did_you_mean, opening
from ..model.options import OPTIMIZERS
from ..pages import free_memory
from ..train.options import Lora, StepOptions  # noqa: F401  jsonargparse looks for the types of inherited fields here
from .quantize import QuantizerOptions, resolve_quantizer

PROGRAM_BYTES = 390_000_000
"""Anonymous memory of `llmtools finetune` before the first step, without the model and its adapters, on Linux
(`python -m benchmarks.plan_memory`)."""
LAYER_BYTES = 20_000
"""Anonymous memory of a quantized linear beside its tensors, which counts where there are 20,000 of them: Python's and
torch's objects for it, and its node in the graph of a forward (`python -m benchmarks.offload Qwen3-30B-A3B`, of 8 and
of 48 blocks)."""
KERNEL_BYTES = 45_000_000
"""Memory of the kernels that torch's library for half precision (oneDNN) compiles and keeps for the numbers of tokens
that a mixture's experts see, on a CPU: half a megabyte for each number and shape (`quant.materialize.MULTIPLE`)."""
NOT_COUNTED = (
    "what a kernel allocates within itself, what the allocator rounds up or caches, pages of the libraries' files (on "
    "a GPU the CUDA context, some 0.5 GB)"
)


@dataclass(frozen=True)
class Plan(QuantizerOptions, CodeOptions, StepOptions):
    """Estimate the memory of a finetuning step, beside 16-bit LoRA's and what is free; no weights are loaded."""

    model: str
    """Folder, hub name or config.json of the model."""
    quantizer: str | dict[str, Any] | None = field(default=None, kw_only=True)
    """Quantizer, as in quantize; by default that of the checkpoint, or optq."""
    eval_batch_size: int | None = None
    """Number of sequences in a validation batch (per_device_eval_batch_size); by default validation is not counted: in
    batches of the same size it holds less than a step."""
    chunked_loss: bool = True
    """Whether the loss is computed in chunks, without all logits at once; false for trainers that make them."""
    dtype: str | None = None
    """Type of what is not quantized: bfloat16 | float16 | float32; by default the checkpoint's."""
    memory: float | None = None
    """Memory that may be used, in GB (10⁹ bytes); by default what is free on this machine."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one finetuning step at its peak."""

    packed: int
    """Quantized weights with their scales."""
    linears: int
    """Linear layers of the blocks that stay dense."""
    embeddings: int
    """Embeddings and output head."""
    others: int
    """Norms, biases, tables."""
    adapters: int
    """Adapters, in float32."""
    gradients: int
    """Gradients of the adapters."""
    optimizer: int
    """State of the optimizer."""
    activations: int
    """Activations that the forward keeps for the backward."""
    loss: int
    """Logits and what is computed from them, if they are live at the peak."""
    work: int
    """Scratch memory of one block, if that is the peak: recomputed activations, gradients, dequantized rows."""
    program: int = 0
    """The program with its libraries, where they share the memory: on a CPU."""
    heap: int = 0
    """Holes of the heap that are let be (`train/heap.py`), on a CPU."""
    objects: int = 0
    """Objects of the quantized linears in Python and torch, and kernels compiled for a mixture, on a CPU."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def weights(self) -> int:
        """What the checkpoint's files hold."""
        return self.packed + self.linears + self.embeddings + self.others


@dataclass(frozen=True)
class PlanResult:
    """The memory of a step, beside that of 16-bit LoRA, and whether it fits."""

    model: str
    """Folder, hub name or config.json of the model."""
    quantizer: str
    """Name of the quantizer, with its bits."""
    modules: int
    """Number of quantized linear layers."""
    weights: int
    """Number of weights in them."""
    bits_per_weight: float
    """Packed bits per quantized weight, scales included."""
    trainable: int
    """Number of trainable parameters."""
    step: str
    """Description of the step: batch size, sequence length, device, what else was assumed."""
    memory: Memory
    """Bytes of the step by what they are for."""
    total: int
    """Bytes of the step."""
    lora_16_bit: Memory
    """Bytes of the same step of 16-bit LoRA."""
    total_16_bit: int
    """Bytes of the same step of 16-bit LoRA, in all."""
    available: int | None
    """Bytes that may be used, None where they are not known."""
    available_where: str
    """Source of `available`."""
    fits: bool | None
    """Whether step and validation fit into `available`, None where that is not known."""
    remedies: list[str]
    """Changes, each on top of the former, until it fits, with the total after each; empty where it fits."""
    validation: int | None = None
    """Bytes at the peak of a validation batch, where its size was given."""
    validation_16_bit: int | None = None
    """Bytes at the peak of a validation batch of 16-bit LoRA."""
    eval_batch_size: int | None = None
    """Number of sequences in a validation batch."""
    in_files: int = 0
    """Bytes of the total that stay in files and need no memory (--offload disk)."""
    on_host: int = 0
    """Bytes of packed weights that stay in host memory (--offload cpu)."""
    buffers: int = 0
    """Bytes of the device's buffers for them."""
    not_counted: str = NOT_COUNTED
    """Memory that the estimate leaves out."""

    def __str__(self) -> str:
        names = {
            "packed": f"packed weights ({self.bits_per_weight:.2f} bits per weight)",
            "linears": "dense linears of the blocks",
            "embeddings": "embeddings and output head",
            "others": "norms, biases, tables",
            "adapters": f"adapters ({self.trainable / 1e6:.2f} million parameters)",
            "gradients": "gradients of the adapters",
            "optimizer": "optimizer state",
            "activations": "activations for the backward",
            "loss": "logits and loss",
            "work": "scratch memory of one block",
            "program": "program and libraries",
            "heap": "holes of the heap",
            "objects": "objects of the layers, compiled kernels",
        }
        width = max(map(len, names.values()))
        column = max(len(self.quantizer), 10)

        def line(label: str, quantized: str, dense: str) -> str:
            return f"{label:<{width}}  {quantized:>{column}}  {dense:>11}"

        head = line("", self.quantizer, "16-bit LoRA")
        pairs = {key: (getattr(self.memory, key), getattr(self.lora_16_bit, key)) for key in names}
        rows = [line(names[key], *(size(n) if n else "–" for n in pair)) for key, pair in pairs.items() if any(pair)]
        total = line("total", size(self.total), size(self.total_16_bit))
        lines = [f"{self.model}: a finetuning step, {self.step}", head, *rows, total]
        if self.validation is not None and self.validation_16_bit is not None:
            label = f"validation, batches of {self.eval_batch_size}"
            lines.append(line(label, size(self.validation), size(self.validation_16_bit)))
        if self.in_files:
            lines.append(f"of it in files, read as they are needed: {size(self.in_files)}")
            lines.append(f"in memory: {size(max(self.total, self.validation or 0) - self.in_files)}")
        if self.on_host:
            on_device = max(self.total, self.validation or 0) - self.on_host + self.buffers
            lines.append(f"of it in host memory, copied as it is needed: {size(self.on_host)}")
            lines.append(f"on the device, with two buffers ({size(self.buffers)}): {size(on_device)}")
        if self.available is not None:
            verdict = "it fits" if self.fits else "it does not fit"
            lines.append(f"{self.available_where}: {size(self.available)}, so {verdict}")
        lines += [f"  {way}" for way in self.remedies]
        return "\n".join([*lines, f"not counted: {self.not_counted}"])


def plan(recipe: Plan) -> PlanResult:
    """Estimates the memory of a finetuning step of the recipe's model."""
    from ..checkpoint.loading import import_plugins, quiet_libraries

    import_plugins(recipe.plugin)
    quiet_libraries()
    return plan_for(read_config(recipe), recipe)


def plan_for(config: Any, recipe: Plan) -> PlanResult:
    """The same for a configuration of transformers, such as ``LlamaConfig(hidden_size=…)``.

    Raises InputError for sizes, types and names that cannot be, and for sequences longer than the model's positions.
    """
    recipe = resolved(config, recipe)
    quantized, name, facts = step_memory(config, recipe)
    dense, _, dense_facts = step_memory(config, recipe, dense=True)
    available, where = _available(recipe)
    fits = None if available is None else needed(quantized, facts, recipe) <= available
    checkpointed = "with checkpointing" if recipe.gradient_checkpointing else "without checkpointing"
    where_it_runs = f"on {'a GPU' if recipe.device == 'cuda' else 'the CPU'}"
    return PlanResult(
        model=recipe.model,
        quantizer=name,
        modules=facts["modules"],
        weights=facts["weights"],
        bits_per_weight=8 * quantized.packed / facts["weights"],
        trainable=facts["trainable"],
        step=", ".join(
            [f"{recipe.batch_size} × {recipe.max_length} tokens", checkpointed, where_it_runs, recipe.optim]
        ),
        memory=quantized,
        total=quantized.total,
        lora_16_bit=dense,
        total_16_bit=dense.total,
        available=available,
        available_where=where,
        fits=fits,
        remedies=_remedies(config, recipe, available) if available is not None and not fits else [],
        validation=facts["validation"] or None,
        validation_16_bit=dense_facts["validation"] or None,
        eval_batch_size=recipe.eval_batch_size,
        in_files=quantized.weights if recipe.offload == "disk" else 0,
        on_host=facts["movable"] if recipe.offload == "cpu" else 0,
        buffers=facts["buffers"] if recipe.offload == "cpu" else 0,
    )


def resolved(config: Any, recipe: Plan) -> Plan:
    """The recipe with its device, length and checkpointing as they are where it leaves them open; checked as in
    `plan_for`."""
    from ..data.metrics import model_positions

    _check(recipe)
    device = recipe.device or _best_device()
    shown: Any = SimpleNamespace(config=config)
    positions = model_positions(shown)
    length = recipe.max_length if recipe.max_length is not None else min(1024, positions or 1024)
    if positions is not None and length > positions:
        raise InputError(
            f"max_length={length} is longer than the model's {positions} positions; use at most {positions}"
        )
    checkpointing = device == "cuda" if recipe.gradient_checkpointing is None else recipe.gradient_checkpointing
    return dataclasses.replace(recipe, device=device, max_length=length, gradient_checkpointing=checkpointing)


def read_config(recipe: Plan) -> Any:
    """The model's configuration, from a folder, a file or the hub."""
    from transformers import AutoConfig, PreTrainedConfig

    from ..checkpoint.loading import check_model
    from ..files import read_json
    from ..formats.gguf_reading import described, find
    from ..formats.reading import described as external_config
    from ..formats.reading import detect
    from ..model.integrity import check_config

    path = Path(recipe.model).expanduser()
    if (found := find(recipe.model, {})) is not None:
        return described(found)
    if path.is_file():
        with opening(f"{path} is no config.json of a model that transformers knows", error=InputError):
            values = read_json(path)
            check_config(values, None, str(path))
            return AutoConfig.for_model(**values)
    check_model(recipe.model)
    if path.is_dir() and recipe.quantizer is None and (external := detect(str(path), {})) is not None:
        return external_config(external, trust_remote_code=recipe.trust_remote_code)
    name = str(path) if path.is_dir() else recipe.model
    with opening(f"{recipe.model}: its configuration cannot be loaded", error=InputError):
        check_config(PreTrainedConfig.get_config_dict(name)[0], None, name)
        return AutoConfig.from_pretrained(name, trust_remote_code=recipe.trust_remote_code)


def size(count: float) -> str:
    """Bytes for printing, in powers of ten, as papers report them: ``"1.85 GB"``."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count:.0f} bytes"


# ------------------------------------------------------------------------------------------------------------ counting


def step_memory(config: Any, recipe: Plan, dense: bool = False) -> tuple[Memory, str, dict[str, int]]:
    """(bytes, the quantizer's name, counts) of a step of the model, quantized or dense.

    The recipe's device, max_length and gradient_checkpointing are set.

    Among the counts are the bytes at the peak of a validation batch, 0 where its size was not given: weights, adapters,
    the optimizer's state and the forward's tensors, without gradients.
    """
    from ..model.memory import peak, tensors
    from ..nn.experts import unfused_experts
    from ..train.arguments import autocasts_on_cpu
    from ..train.heap import LEAST, SLACK

    assert recipe.max_length is not None
    model, name, modules = _model(config, recipe, dense)
    held = tensors(model)
    how: dict[str, Any] = {
        "device": str(recipe.device),
        "autocast": recipe.device == "cuda" or autocasts_on_cpu(model),
        "chunked_loss": recipe.chunked_loss,
    }
    transient = peak(model, recipe.batch_size, recipe.max_length, **how)
    memory = Memory(
        packed=held.packed,
        linears=held.linears,
        embeddings=held.embeddings,
        others=held.others,
        adapters=held.adapters,
        gradients=held.adapters,
        optimizer=int(OPTIMIZERS[recipe.optim] * held.trainable),
        activations=transient.activations,
        loss=transient.loss,
        work=transient.work,
    )
    if recipe.device == "cpu":
        objects = 0 if dense else LAYER_BYTES * modules + KERNEL_BYTES * bool(unfused_experts(model))
        moving = memory.total - memory.weights + PROGRAM_BYTES + objects
        heap = max(LEAST, int(SLACK * moving))
        memory = dataclasses.replace(memory, program=PROGRAM_BYTES, heap=heap, objects=objects)
    validation = 0
    if recipe.eval_batch_size is not None:
        forward = peak(model, recipe.eval_batch_size, recipe.max_length, training=False, **how)
        stays = held.frozen + held.adapters + memory.optimizer
        validation = stays + forward.total + memory.program + memory.heap + memory.objects
    movable, buffers = _movable(model)
    facts = {"modules": modules, "weights": held.quantized_weights, "trainable": held.trainable}
    return memory, name, {**facts, "validation": validation, "movable": movable, "buffers": buffers}


def _movable(model: Any) -> tuple[int, int]:
    """(bytes of the blocks' packed weights, of two buffers for the largest): those that --offload cpu has on the host
    and on the device."""
    from ..model.transfer import packed_blocks

    base = model.get_base_model()
    sizes = [sum(each.nbytes for layer in layers for each in layer.stored.values()) for layers in packed_blocks(base)]
    return sum(sizes), min(2, len(sizes)) * max(sizes, default=0)


def _share_fused(model: Any, quantizers: dict[str, Any]) -> None:
    """Has the parts of a matrix that QuIP# fused hold its codes once, in place, as its folders are opened."""
    from ..quant.external import FusedLattice

    known: dict[tuple[Any, ...], Any] = {}
    for path, quantizer in quantizers.items():
        if isinstance(quantizer, FusedLattice):
            layer, parent = model.get_submodule(path), path.rpartition(".")[0]
            for name, tensor in layer.packed.items():
                if name != "sv":  # the part's own
                    layer._parameters[name] = known.setdefault((parent, name, tensor.shape), layer._parameters[name])


def _model(config: Any, recipe: Plan, dense: bool) -> tuple[Any, str, int]:
    """(the model on the meta device, adapted as finetune trains it; quantizer's name; number of quantized linears)"""
    import torch
    from peft import get_peft_model

    from ..checkpoint.loading import compute_fast
    from ..model.memory import planning_attention
    from ..model.transformers_integration import empty_layer, tie_heads
    from ..nn.adapters import prepare_for_training
    from ..nn.experts import unfuse_all, unfused_within
    from ..nn.swap import set_module
    from ..train.adapters import fit_config, lora_config

    with torch.device("meta"), planning_attention() as attention:
        model = empty_model(config, recipe, attention)
        # A dense mixture stays unfused, so that its experts get the same adapters; nor does torch's grouped_mm take
        # float32 tensors without values.
        with nullcontext(unfuse_all(model)) if dense else unfused_within(model):
            quantizers, name = _quantizers(model, config, recipe)
            if not dense:
                for path, quantizer in quantizers.items():
                    set_module(model, path, empty_layer(model.get_submodule(path), quantizer, path))
                _share_fused(model, quantizers)
                tie_heads(model)
        compute_fast(model, recipe.offload, recipe.device)
        prepare_for_training(model, gradient_checkpointing=bool(recipe.gradient_checkpointing))
        try:
            config = lora_config(recipe.lora)
            fit_config(config, model, recipe.lora)
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"lora: {error}") from error
        return adapted.train(), name, len(quantizers)


def empty_model(config: Any, recipe: Plan, attention: str = "sdpa") -> Any:
    """The model on the meta device, with the attention implementation for planning where its family allows a choice."""
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
    """(path → quantizer, their name for printing): the checkpoint's, or those that quantize would choose."""
    from ..model.targets import Plan as Choice
    from ..quant import from_spec

    stored = getattr(config, "quantization_config", None)
    if stored is not None and recipe.quantizer is None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        if stored.get("quant_method") != "llmtools":
            raise InputError(
                f"{recipe.model} was quantized by {stored.get('quant_method')}; give the folder of the whole "
                "checkpoint, if llmtools reads it, or pass --quantizer to plan for one of llmtools'"
            )
        made = [from_spec(spec) for spec in stored["quantizers"]]
        chosen = {path: made[index] for path, index in stored["modules"].items()}
        return chosen, _shown_name(made[0] if len(made) == 1 else None)
    base = resolve_quantizer(recipe)
    return Choice.of(model, base, recipe.overrides, recipe.skip).quantizers, _shown_name(base)


def _shown_name(quantizer: Any) -> str:
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
    return free_memory(), "free on this machine"


def _remedies(config: Any, recipe: Plan, available: int) -> list[str]:
    """Changes of options, each on top of the former, until it fits."""
    remedies: list[str] = []
    for flags, change in _changes(recipe):
        recipe = dataclasses.replace(recipe, **change)
        memory, _, facts = step_memory(config, recipe)
        count = needed(memory, facts, recipe)
        fits = count <= available
        remedies.append(f"{'and ' if remedies else ''}{flags}: {size(count)}{', fits' if fits else ''}")
        if fits:
            return remedies
    return [*remedies, "a smaller model, more memory, or several devices"]


def needed(memory: Memory, facts: dict[str, int], recipe: Plan) -> int:
    """Bytes of memory of a step, and of validation, on its device: those that do not stay elsewhere."""
    elsewhere = {None: 0, "disk": memory.weights, "cpu": facts["movable"] - facts["buffers"]}
    return max(memory.total, facts["validation"]) - elsewhere[recipe.offload]


def _changes(recipe: Plan) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    if recipe.eval_batch_size is not None and recipe.eval_batch_size > recipe.batch_size:
        found.append((f"--eval_batch_size {recipe.batch_size}", {"eval_batch_size": recipe.batch_size}))
    if not recipe.gradient_checkpointing:
        found.append(("--gradient_checkpointing true", {"gradient_checkpointing": True}))
    if recipe.batch_size > 1:
        smaller = {"batch_size": 1, "eval_batch_size": recipe.eval_batch_size and 1}
        flags = "--batch_size 1 --eval_batch_size 1" if recipe.eval_batch_size else "--batch_size 1"
        found.append((f"{flags} (with gradient accumulation)", smaller))
    if recipe.offload is None:
        place = "disk" if recipe.device == "cpu" else "cpu"
        found.append((f"--offload {place}", {"offload": place}))
    if OPTIMIZERS[recipe.optim] > 3 and recipe.device == "cuda":
        found.append(("--optim adamw_bnb_8bit", {"optim": "adamw_bnb_8bit"}))
    if recipe.quantizer not in ("quip_sharp",) or (recipe.bits or 2) > 2:
        change = {"quantizer": "quip_sharp", "bits": 2, "group_size": None, "options": {}, "overrides": {}}
        found.append(("--quantizer quip_sharp --bits 2", change))
    if recipe.max_length is not None and recipe.max_length > 256:
        found.append((f"--max_length {recipe.max_length // 4}", {"max_length": recipe.max_length // 4}))
    return found


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check(recipe: Plan) -> None:
    if recipe.offload is not None:
        from ..model.offload import check_place

        check_place(recipe.offload)
        device = recipe.device or _best_device()
        if recipe.offload == "disk" and device != "cpu":
            raise InputError("--offload disk computes on the CPU; pass --device cpu, or --offload cpu")
        if recipe.offload == "cpu" and device == "cpu":
            raise InputError(
                "--offload cpu keeps weights in host memory for a GPU; pass --device cuda, or leave it out"
            )
    for name in ("batch_size", "eval_batch_size", "max_length"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value}; at least 1 is expected")
    if recipe.optim not in OPTIMIZERS:
        raise InputError(
            f"optim={recipe.optim!r} is no optimizer whose state is known; {did_you_mean(recipe.optim, OPTIMIZERS)}"
        )
    if recipe.device not in (None, "cpu", "cuda"):
        raise InputError(f"device={recipe.device!r}; {did_you_mean(str(recipe.device), ('cpu', 'cuda'))}")
    if recipe.dtype not in (None, "bfloat16", "float16", "float32"):
        raise InputError(
            f"dtype={recipe.dtype!r}; {did_you_mean(str(recipe.dtype), ('bfloat16', 'float16', 'float32'))}"
        )
