"""A whole model: a LoRA training step, and a token of greedy generation, beside 16-bit LoRA and other libraries.

    python -m benchmarks.run step generate --json
    python -m benchmarks.level "4 bits" 160M 4 512 --checkpointing      the memory of one variant
    python -m benchmarks.level "4 bits" 160M 1 1 --profile              where the time of a token goes
    python -m benchmarks.level "4 bits" 160M 1 128 --against OTHER      a step here and in another checkout, by turns
    python -m benchmarks.run step --only "160M 4x512, all kept" --candidates "bf16,4 bits" --rounds 2

LLaMA shapes of 160M parameters (JackFram/llama-160m) and 1.1B (TinyLlama) with random weights, built here. Every
variant gets stock PEFT: rank 8 on all linears, float32 adapters. The baseline is what a user of transformers and PEFT
has: a bfloat16 base, the model's own loss. Ours is what `llmtools finetune` runs: bfloat16 autocast (`bf16` of the
training arguments) where the processor has such products, and the loss of `llmtools/nn/loss.py`. So that the gain from
these is separated from that of packed weights, the same is done to the 16-bit model in a row of its own.

Weights of `rtn` have the layout of `optq`, hence its speed. A peak of memory is measured in a process of its own that
does two steps: the most that was resident, and that less what was resident once the model with its adapters was
built. Bytes of weight are all parameters and buffers without the adapters.

The limit of a step is its products alone, at this machine's best speed: forward, and backward to the activations; that
of a generated token is reading each weight once, at the speed of a copy (which reads and writes).
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llmtools
from llmtools.kernels.build import has_bfloat16
from llmtools.nn import QuantizedLinear
from llmtools.nn.adapters import inputs_uncast, plain_lora
from llmtools.nn.loss import CausalLoss
from llmtools.nn.swap import set_module
from llmtools.train.heap import map_large_blocks

from .baselines import quiet
from .llama import config
from .run import Machine, Problem, Wanted, case

SHAPES = ("160M", "1.1B")
STEPS = (("160M", 1, 128), ("160M", 4, 512), ("1.1B", 1, 128), ("1.1B", 4, 512))
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "4 bits": ("rtn", {"bits": 4, "clip": False}),
    "3 bits": ("rtn", {"bits": 3, "clip": False}),
    "2 bits": ("rtn", {"bits": 2, "clip": False}),
    "nf4": ("nf4", {}),
    "quip_sharp 2 bits": ("quip_sharp", {"bits": 2}),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All that "all-linear" would find; by name, since it does not find other libraries' layers."""
BASE, LEAN = "bf16", "bf16 lean"
GENERATED, PROMPT = 16, 16


# --------------------------------------------------------------------------------------------------------------- models


def dense(shape: str, layers: int | None = None) -> nn.Module:
    """The model in bfloat16, random."""
    return copy.deepcopy(_dense(shape, layers))


@functools.cache
def _dense(shape: str, layers: int | None) -> nn.Module:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config(shape, depth=layers)).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with its linears, but the head, replaced."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            set_module(model, path, make(module))
    return model


def _our_layer(linear: nn.Linear, name: str, options: dict[str, Any]) -> nn.Module:
    quantizer = llmtools.quantizer(name, **options)
    if not quantizer.needs_hessian:
        return QuantizedLinear.from_linear(linear, quantizer)
    packed = {}  # a sweep over random weights would find nothing: random codes do
    for key, spec in quantizer.layout(linear.out_features, linear.in_features).items():
        if spec.dtype.is_floating_point:
            packed[key] = torch.full(spec.shape, 0.02 if key == "sv" else 1.0, dtype=spec.dtype)
        else:
            limits = torch.iinfo(spec.dtype)
            packed[key] = torch.randint(limits.min, limits.max, spec.shape, dtype=spec.dtype)
    return QuantizedLinear.from_packed(linear, quantizer, packed)


def _bitsandbytes(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
    return layer.to("cpu")  # type: ignore[no-any-return]


def _hqq(linear: nn.Linear, bits: int) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    HQQLinear.set_backend(__import__("hqq.core.quantize", fromlist=["HQQBackend"]).HQQBackend.PYTORCH)
    settings = BaseQuantizeConfig(nbits=bits, group_size=64)
    settings["weight_quant_params"]["optimize"] = False  # the data-free fit takes minutes and changes no speed
    return HQQLinear(linear, settings, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)  # type: ignore[no-any-return]


def _gptqmodel(linear: nn.Linear, bits: int) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    groups = linear.in_features // 64
    layer = TorchLinear(
        bits=bits, group_size=64, sym=True, desc_act=False, in_features=linear.in_features,
        out_features=linear.out_features, bias=False, register_buffers=True,
    )  # fmt: skip
    scales = torch.full((linear.out_features, groups), 0.02, dtype=torch.float16)
    zeros = torch.full((linear.out_features, groups), 2 ** (bits - 1), dtype=torch.int32)
    source = nn.Linear(linear.in_features, linear.out_features, bias=False)
    source.weight.data.copy_(linear.weight)
    layer.pack(source, scales, zeros, g_idx=torch.arange(linear.in_features, dtype=torch.int32) // 64)
    layer.post_init()
    return layer


PEERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bitsandbytes nf4": _bitsandbytes,
    "GPTQModel 4 bits": functools.partial(_gptqmodel, bits=4),
    "HQQ 4 bits": functools.partial(_hqq, bits=4),
    "HQQ 2 bits": functools.partial(_hqq, bits=2),
}


def build(variant: str, shape: str, layers: int | None = None) -> nn.Module:
    """The model of a variant, without adapters."""
    model = dense(shape, layers)
    if variant in OURS:
        name, options = OURS[variant]
        return replaced(model, lambda linear: _our_layer(linear, name, options))
    return replaced(model, PEERS[variant]) if variant in PEERS else model


def adapted(model: nn.Module, checkpointing: bool = False) -> nn.Module:
    """With PEFT's adapters, as PEFT makes them."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llmtools.prepare_for_training(model, gradient_checkpointing=checkpointing)
        adapters = peft.LoraConfig(r=8, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, adapters).train()


def lean(variant: str) -> bool:
    return variant in OURS or variant == LEAN


def step(variant: str, model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """Forward and backward; gradients are dropped."""
    ours = CausalLoss(model) if lean(variant) else None
    trained = [p for p in model.parameters() if p.requires_grad]
    autocast = ours is not None and has_bfloat16()
    layers = plain_lora(model) if autocast else []

    def run() -> Tensor:
        with inputs_uncast(layers):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = ours(model, {"input_ids": ids, "labels": ids}) if ours else None
                loss = model(input_ids=ids, labels=ids).loss if found is None else found.sum / found.tokens
            loss.backward()
        for p in trained:
            p.grad = None
        return loss.detach()

    return run


# ---------------------------------------------------------------------------------------------------------------- cases


@case("step")
def steps(machine: Machine) -> Iterator[Problem]:
    """A LoRA step, without and with gradient checkpointing."""
    for shape, batch, tokens in STEPS:
        for checkpointing in (False, True):
            label = f"{shape} {batch}x{tokens}{', checkpointing' if checkpointing else ', all kept'}"
            linears = _linears(shape)
            weights = sum(linear.weight.numel() for linear in linears.values())
            again = weights - linears["lm_head"].weight.numel() if checkpointing else 0
            yield Problem(
                label,
                functools.partial(_check, shape),
                {},
                {},
                (4 * weights + 2 * again) * batch * tokens / machine.best_matmul_speed,
                "the products with the weights",
                make=functools.partial(_step_candidates, shape, batch, tokens, checkpointing),
                about=functools.partial(_memory, shape, batch, tokens, checkpointing),
            )


def _step_candidates(
    shape: str, batch: int, tokens: int, checkpointing: bool, wanted: Wanted
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    ids = torch.randint(0, 32000, (batch, tokens), generator=torch.Generator().manual_seed(1))

    def ready(model: nn.Module) -> nn.Module:
        return adapted(model, checkpointing)

    ours, baselines = _candidates(shape, ready, wanted, (BASE, LEAN))
    return tuple({name: step(name, model, ids) for name, model in found.items()} for found in (ours, baselines))  # type: ignore[return-value]


def _candidates(
    shape: str, ready: Callable[[nn.Module], nn.Module], wanted: Wanted, dense: tuple[str, ...]
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """(ours, baselines); of other libraries those that are installed, and that work here."""
    baselines = {name: ready(build(name, shape)) for name in dense if wanted(name)}
    for name in filter(wanted, PEERS):
        try:
            with quiet():
                small, ids = ready(build(name, shape, layers=1)), torch.zeros(1, 4, dtype=torch.int64)
                loss = small(input_ids=ids, labels=ids).loss
                if small.training:
                    loss.backward()
                baselines[name] = ready(build(name, shape))
        except Exception as error:  # third-party code may raise anything
            print(f"without {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    return {name: ready(build(name, shape)) for name in filter(wanted, OURS)}, baselines


def _check(shape: str) -> None:
    """One layer: our loss and adapters' gradients are those of the dense model with the same weights."""
    ids = torch.randint(0, 32000, (2, 24), generator=torch.Generator().manual_seed(2))
    for variant in OURS:
        model = build(variant, shape, layers=1)
        twin = llmtools.dequantize(copy.deepcopy(model), dtype=torch.float32).float()
        results = []
        for each in (model, twin):
            torch.manual_seed(3)
            each = adapted(each)
            for name, p in each.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(4))
            if each.get_base_model() is model:
                with torch.autocast("cpu", torch.bfloat16):
                    found = CausalLoss(each)(each, {"input_ids": ids, "labels": ids})
                assert found is not None
                loss = found.sum / found.tokens
            else:
                loss = each(input_ids=ids, labels=ids).loss
            loss.backward()
            results.append((loss.detach(), [p.grad for p in each.parameters() if p.requires_grad]))
        (loss, grads), (true_loss, true_grads) = results
        assert abs(loss - true_loss) <= 0.02 * true_loss, (variant, loss, true_loss)
        for grad, truth in zip(grads, true_grads, strict=True):
            assert (grad - truth).norm() <= 0.05 * truth.norm(), (variant, grad.shape)


@case("generate")
def generate(machine: Machine) -> Iterator[Problem]:
    """Greedy tokens one by one; the time is of all of them, with that of the prompt or without."""
    for shape in SHAPES:
        smallest = _bytes("2 bits", shape)
        for context, way in ((f"after {PROMPT}", following), (f"and their prompt of {PROMPT}", greedy)):
            yield Problem(
                f"{shape} {GENERATED} tokens {context}",
                functools.partial(_check_generation, shape),
                {},
                {},
                GENERATED * smallest / machine.copy_bandwidth,
                "reading the 2-bit model's weights",
                make=functools.partial(_generators, shape, way),
            )


def _generators(
    shape: str, way: Callable[[nn.Module], Callable[[], Tensor]], wanted: Wanted
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    ours, baselines = _candidates(shape, lambda model: model.eval(), wanted, (BASE,))
    return tuple({name: way(model) for name, model in found.items()} for found in (ours, baselines))  # type: ignore[return-value]


def following(model: Any) -> Callable[[], Tensor]:
    """Token by token, with a cache that holds a prompt."""
    from transformers import DynamicCache

    ids, cache = torch.randint(0, 32000, (1, PROMPT)), DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)

    def run() -> Tensor:
        generated = [ids[:, :1]]
        with torch.no_grad():
            for _ in range(GENERATED):
                logits = model(input_ids=generated[-1], past_key_values=cache, use_cache=True).logits
                generated.append(logits[:, -1:].argmax(-1))
        cache.crop(-GENERATED)
        return torch.cat(generated, 1)

    return run


def greedy(model: nn.Module) -> Callable[[], Tensor]:
    """The prompt, and then token by token with a cache."""
    ids = torch.randint(0, 32000, (1, PROMPT), generator=torch.Generator().manual_seed(1))

    def run() -> Tensor:
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=torch.tensor([PROMPT - 1]))
            generated = [out.logits[:, -1:].argmax(-1)]
            for _ in range(GENERATED - 1):
                out = model(input_ids=generated[-1], past_key_values=out.past_key_values, use_cache=True)
                generated.append(out.logits[:, -1:].argmax(-1))
        return torch.cat(generated, 1)

    return run


def _check_generation(shape: str) -> None:
    """One layer: the logits are those of the dense model."""
    ids = torch.randint(0, 32000, (1, 1), generator=torch.Generator().manual_seed(2))
    for variant in OURS:
        model = build(variant, shape, layers=1).eval()
        twin = llmtools.dequantize(copy.deepcopy(model), dtype=torch.float32).float()
        with torch.no_grad():
            got, truth = model(input_ids=ids).logits.float(), twin(input_ids=ids).logits
        assert (got - truth).norm() <= 0.03 * truth.norm(), variant


# ------------------------------------------------------------------------------------------------------ bytes and peaks


def _linears(shape: str) -> dict[str, nn.Linear]:
    """All of them, the head included, without memory."""
    with torch.device("meta"):
        model = _dense.__wrapped__(shape, None)
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def _bytes(variant: str, shape: str) -> int:
    """Bytes of weight that a token reads."""
    name, options = OURS[variant]
    quantizer, total = llmtools.quantizer(name, **options), 0
    for path, linear in _linears(shape).items():
        layout = quantizer.layout(linear.out_features, linear.in_features).values()
        packed = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layout)
        total += linear.weight.nbytes if path == "lm_head" else packed
    return total


def _memory(shape: str, batch: int, tokens: int, checkpointing: bool, variant: str) -> dict[str, Any]:
    """Weight bytes and peaks of one variant, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.level", variant, shape, str(batch), str(tokens)]
    done = subprocess.run(
        [*command, *(["--checkpointing"] if checkpointing else [])],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {"failed": done.stderr.strip()[-300:]}
    return {key: value for key, value in found.items() if key.endswith("_bytes") or key == "failed"}


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _profile(variant: str, shape: str) -> None:
    """CPU milliseconds of a generated token, whole and with one kind of module put out of work at a time."""
    from transformers import DynamicCache

    model: Any = build(variant, shape).eval()
    ids = torch.randint(0, 32000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    head, linears = model.lm_head, {name: module for name, module in model.named_modules() if name.endswith("_proj")}

    def milliseconds() -> float:
        times = []
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            for _ in range(40):
                started = time.process_time()
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
                times.append(time.process_time() - started)
        return 1000 * statistics.median(times)

    record = {"whole": milliseconds()}
    model.lm_head = Idle(head)
    record["without the head"] = milliseconds()
    model.lm_head = head
    for name, linear in linears.items():
        set_module(model, name, Idle(linear))
    record["without the blocks' linears"] = milliseconds()
    print(json.dumps({"case": "profile", "problem": f"{shape} one token", "candidate": variant} | record), flush=True)


_TURNS = """
import sys, time, torch
from benchmarks.level import adapted, build, following, step
variant, shape, batch, tokens = *sys.argv[1:3], *map(int, sys.argv[3:])
if tokens == 1:
    run = following(build(variant, shape).eval())
else:
    run = step(variant, adapted(build(variant, shape)), torch.randint(0, 32000, (batch, tokens)))
run()
for _ in sys.stdin:
    started = time.process_time()
    run()
    print(time.process_time() - started, flush=True)
"""


def _compare(other: Path, rounds: int, *arguments: str) -> dict[str, float]:
    """Median CPU seconds of a step, or of GENERATED tokens where there is one, in this checkout and another."""
    processes = {}
    for name, checkout in (("here", Path(__file__).parent.parent), ("there", other.resolve())):
        processes[name] = subprocess.Popen(
            [sys.executable, "-c", _TURNS, *arguments],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    times: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(rounds):
        for name, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            print(file=process.stdin, flush=True)
            times[name].append(float(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    medians = {f"{name}_cpu_seconds": statistics.median(found) for name, found in times.items()}
    return medians | {"ratio": medians["here_cpu_seconds"] / medians["there_cpu_seconds"]}


class Idle(nn.Module):
    """Gives zeros of a linear's shape, and computes nothing."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.out_features = linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def main(argv: list[str] | None = None) -> int:
    """Prints the memory of one variant's step, or where its time goes; without arguments, runs the shortest cases."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        from . import run

        return run.main(["step", "generate", "--only", "160M 1", "--rounds", "3"])
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("variant", choices=[BASE, LEAN, *OURS, *PEERS])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("batch", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="one token of generation instead, by what it runs")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="time a step, or 16 tokens, here and there")
    parser.add_argument("--rounds", type=int, default=5, help="of --against")
    args = parser.parse_args(argv)
    if args.against:
        found = _compare(args.against, args.rounds, args.variant, args.shape, str(args.batch), str(args.tokens))
        print(json.dumps({"case": "against", "candidate": args.variant, "tokens": args.tokens} | found), flush=True)
        return 0
    if args.profile:
        _profile(args.variant, args.shape)
        return 0
    base = build(args.variant, args.shape)
    _dense.cache_clear()
    weights = sum(t.nbytes for t in (*base.parameters(), *base.buffers()))
    model = adapted(base, args.checkpointing)
    ids = torch.randint(0, 32000, (args.batch, args.tokens))
    gc.collect()
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    if lean(args.variant):
        map_large_blocks()
    run = step(args.variant, model, ids)
    for _ in range(2):
        run()
    peak = _resident("VmHWM")
    about = {"weight_bytes": weights, "peak_bytes": peak, "peak_growth_bytes": peak - before}
    kept = ", checkpointing" if args.checkpointing else ", all kept"
    record = {"case": "peak", "problem": f"{args.shape} {args.batch}x{args.tokens}{kept}", "candidate": args.variant}
    print(json.dumps(record | about | {"torch": torch.__version__}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
