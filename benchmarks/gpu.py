"""Everything that needs a GPU to be known, in one command: speed beside its limit, memory, graphs.

    python -m benchmarks.gpu                          all of it; half an hour or so on one GPU
    python -m benchmarks.gpu ops layers               some of it
    python -m benchmarks.gpu --device cpu --tiny      the same code on toy shapes: its figures mean nothing

Sections:
    ops        decoding rows and rotating, in GB/s beside a copy's; small-batch products (GEMV) beside the packed bytes
    crossing   up to how many tokens the fused products win: the `DEVICE_GEMV_TOKENS` of quant/materialize.py
    layers     forward and backward of one layer, 1 to 2048 tokens, beside bfloat16 and bitsandbytes
    graphs     the same bits from a CUDA graph and from torch.compile, no synchronisation with the host
    steps      a LoRA step and generation on LLaMA shapes of 160M and 1.1B, beside a bfloat16 base and bitsandbytes
    memory     peak bytes of a LoRA step on LLaMA 7B to 65B, batch 1 × 128, the packed weights drawn at random in place

Each figure is checked for correctness first. Times are medians of CUDA events. Work that is shorter than launching it
("device") is captured in a CUDA graph over several copies of its weights, so that they come from memory and not from
the L2 cache. Each result is a line of JSON with the device and the versions, appended to benchmarks/results/gpu.jsonl;
a section that fails becomes a line that says so, and the next one runs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import itertools
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llmtools
from llmtools.kernels.hadamard import hadamard, rule_for
from llmtools.kernels.hadamard import reference as hadamard_reference
from llmtools.nn import QuantizedLinear
from llmtools.nn.adapters import prepare_for_training
from llmtools.nn.swap import packed_bytes, set_module
from llmtools.quant import Quantizer
from llmtools.quant.materialize import gemv_tokens

from .llama import config

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
PEERS = ("torch", "triton", "transformers", "peft", "bitsandbytes", "gptqmodel", "hqq")

QUANTIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "affine 4": ("rtn", {"bits": 4, "group_size": 64}),
    "affine 3": ("rtn", {"bits": 3, "group_size": 64}),
    "affine 2": ("rtn", {"bits": 2, "group_size": 64}),
    "nf4": ("nf4", {"double_quantization": True}),
    "E8P 2": ("quip_sharp", {"bits": 2}),
    "E8P 3": ("quip_sharp", {"bits": 3}),
    "E8P 4": ("quip_sharp", {"bits": 4}),
}


class Bench:
    """A device, how to measure on it, and where results go."""

    def __init__(self, device: str, tiny: bool, output: Path | None) -> None:
        self.device, self.tiny, self.output = torch.device(device), tiny, output
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.cuda.set_device(self.device)
            self.device = torch.device("cuda", torch.cuda.current_device())

    def record(self, section: str, **result: Any) -> None:
        """Prints one result, and appends it to the file."""
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}
        print(section, *(f"{key}={value}" for key, value in rounded.items()), flush=True)
        if self.output:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with self.output.open("a") as file:
                file.write(json.dumps({"section": section, **rounded, **self.about}) + "\n")

    @functools.cached_property
    def about(self) -> Record:
        """The device, its ceilings, the versions, the commit."""
        versions = {}
        for name in PEERS:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        folder = Path(__file__).parent
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=folder)
        about: Record = {"device": "cpu", "tiny": self.tiny, **versions, "commit": git.stdout.strip() or None}
        if self.cuda:
            properties = torch.cuda.get_device_properties(self.device)
            about |= {
                "device": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "cuda": torch.version.cuda,
            }
        return about | {
            "copy_gb_per_second": round(self.copy_bandwidth / 1e9, 1),
            "matmul_tflop_per_second": round(self.matmul_speed / 1e12, 3),
            "time": time.strftime("%Y-%m-%d %H:%M"),
        }

    @functools.cached_property
    def copy_bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes, of a buffer many times the L2 cache."""
        source = torch.randn(2**12 if self.tiny else 2**29, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    @functools.cached_property
    def matmul_speed(self) -> float:
        """Operations a second of a bfloat16 product of random matrices of order 8192."""
        n = 64 if self.tiny else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * n**3 / self.seconds(lambda: a @ b)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int = 20) -> float:
        """The median time of `work`, launching included where that takes longer."""
        for _ in range(1 if self.tiny else 3):
            work()
        times = []
        for _ in range(2 if self.tiny else repeats):
            self.synchronize()
            if self.cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                work()
                end.record()
                self.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                work()
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def device_seconds(self, works: list[Callable[[], object]]) -> float:
        """The median time of one of `works`, run one after the other from a CUDA graph: without launching."""

        def all_of_them() -> None:
            for work in works:
                work()

        if not self.cuda:
            return self.seconds(all_of_them) / len(works)
        return self.seconds(self.captured(all_of_them).replay) / len(works)

    def captured(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """`work` as a graph. Kernels are compiled and tables made before, on a side stream as capturing wants it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph

    def copies(self, nbytes: int) -> int:
        """Weights of that size that together are many times any L2 cache."""
        return 2 if self.tiny else max(2, min(64, -(-(2**29) // nbytes)))

    def peak(self, work: Callable[[], object]) -> int:
        """Bytes in use at the peak of `work`, everything on the device included; 0 where that is unknown."""
        if not self.cuda:
            work()
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def drawn(layer: QuantizedLinear) -> QuantizedLinear:
    """Random packed tensors, in place: any integers are codes, and scales are small and positive."""
    for tensor in layer.packed.values():
        if tensor.is_floating_point():
            tensor.data.copy_(torch.empty(tensor.shape, device=tensor.device).uniform_(0.005, 0.015))
        elif tensor.numel():
            limits = torch.iinfo(tensor.dtype)
            tensor.data.random_(limits.min, limits.max)
    return layer


def layer_of(quantizer: Quantizer, out_features: int, in_features: int, device: torch.device) -> QuantizedLinear:
    return drawn(QuantizedLinear(in_features, out_features, quantizer, dtype=torch.bfloat16, device=device))


def quantizers() -> Iterator[tuple[str, Quantizer]]:
    for label, (name, options) in QUANTIZERS.items():
        yield label, llmtools.quantizer(name, **options)


def close(result: Tensor, truth: Tensor, tolerance: float = 2**-6) -> None:
    off = (result.double() - truth.double()).norm() / truth.double().norm()
    assert off <= tolerance, f"off by {off:.2g} of its norm"


# ---- sections ----


def ops(bench: Bench) -> None:
    shapes = [(64, 128)] if bench.tiny else [(4096, 4096), (5632, 2048), (11008, 4096)]
    for (label, quantizer), (rows, columns) in itertools.product(quantizers(), shapes):
        layers: Any = copies(bench, functools.partial(layer_of, quantizer, rows, columns, bench.device))
        first = layers[0]
        source: Any = getattr(quantizer, "grid", quantizer)  # without the rotations of activations
        packed_size = packed_bytes(first)
        sizes = {"op": label, "shape": [rows, columns], "packed_bytes": packed_size}
        host = {name: tensor.cpu() for name, tensor in first.packed.items()}
        for dtype in (torch.bfloat16, torch.float16):
            weight = source.dequantize(first.packed, dtype=dtype)
            assert torch.equal(weight.cpu(), source.dequantize(host, dtype=dtype)), "other bits than on the CPU"
            works = [functools.partial(source.dequantize, layer.packed, dtype=dtype) for layer in layers]
            seconds = bench.device_seconds(works)
            rate = (packed_size + weight.nbytes) / seconds
            bench.record(
                "ops", **sizes, work="decode", dtype=str(dtype), seconds=seconds, gb_per_second=rate / 1e9,
                of_limit=rate / bench.copy_bandwidth,
            )  # fmt: skip
        truth = source.dequantize(first.packed, dtype=torch.float32)
        for tokens, transposed in itertools.product((1, 4, 16), (False, True)):
            x = torch.randn(tokens, rows if transposed else columns, device=bench.device).bfloat16()
            product = source.multiply(x, first.packed, transposed)
            if product is None:
                continue
            close(product, x.float() @ (truth if transposed else truth.T))
            works = [functools.partial(source.multiply, x, layer.packed, transposed) for layer in layers]
            seconds = bench.device_seconds(works)
            rate = packed_size / seconds
            bench.record(
                "ops", **sizes, work="multiply transposed" if transposed else "multiply", tokens=tokens,
                seconds=seconds, gb_per_second=rate / 1e9, of_limit=rate / (bench.copy_bandwidth),
            )  # fmt: skip
        del layers, first
        bench.free()
    for n in [48] if bench.tiny else [2048, 4096, 5632, 11008, 13824, 22016, 28672]:
        rule = rule_for(n)
        for tokens in [3] if bench.tiny else [1, 128, 2048, 16384]:
            x = torch.randn(tokens, n, device=bench.device).bfloat16()
            close(hadamard(x, rule), hadamard_reference.hadamard(x.float(), rule), 2**-7)
            seconds = bench.device_seconds([functools.partial(hadamard, x, rule)] * 4)
            rate = 2 * x.nbytes / seconds
            bench.record(
                "ops", op="hadamard", rule=rule, n=n, tokens=tokens, seconds=seconds, gb_per_second=rate / 1e9,
                of_limit=rate / bench.copy_bandwidth,
            )  # fmt: skip


def crossing(bench: Bench) -> None:
    rows, columns = (64, 128) if bench.tiny else (11008, 4096)
    for label, quantizer in quantizers():
        layers = copies(bench, functools.partial(layer_of, quantizer, rows, columns, bench.device))
        won = {"forward": 0, "backward": 0}
        for tokens in (1, 2) if bench.tiny else (1, 2, 4, 8, 16, 32, 64):
            x = torch.randn(tokens, columns, device=bench.device).bfloat16().requires_grad_()
            grad = torch.randn(tokens, rows, device=bench.device).bfloat16()
            times: dict[tuple[str, int], float] = {}
            for limit in (0, tokens):
                with gemv_tokens(limit):
                    outputs = [layer(x) for layer in layers]  # each keeps the limit for its backward
                    with torch.no_grad():
                        works = [functools.partial(layer, x) for layer in layers]
                        times["forward", limit] = bench.device_seconds(works)
                    works = [functools.partial(torch.autograd.grad, y, x, grad, retain_graph=True) for y in outputs]
                    times["backward", limit] = bench.device_seconds(works)
            for way in won:
                if times[way, tokens] < times[way, 0]:
                    won[way] = tokens
                bench.record(
                    "crossing", op=label, way=way, tokens=tokens, fused_seconds=times[way, tokens],
                    decode_and_matmul_seconds=times[way, 0],
                )  # fmt: skip
        bench.record("crossing", op=label, fused_wins_up_to=won)
        del layers, outputs, works
        bench.free()


def copies(bench: Bench, make: Callable[[], nn.Module]) -> list[nn.Module]:
    """So many of a layer that their weights cannot all be in a cache."""
    first = make()
    nbytes = sum(parameter.nbytes for parameter in first.parameters())
    return [first] + [make() for _ in range(bench.copies(nbytes) - 1)]


def gradient(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, and the gradient in x."""
    return lambda: torch.autograd.grad(layer(x), x, grad)


def layers(bench: Bench) -> None:
    shapes = [(64, 128)] if bench.tiny else [(5632, 2048), (11008, 4096)]
    for rows, columns in shapes:

        def dense(rows: int = rows, columns: int = columns) -> nn.Module:
            return nn.Linear(columns, rows, bias=False, device=bench.device, dtype=torch.bfloat16).requires_grad_(False)

        makers: dict[str, Callable[[], Any]] = {"bf16 nn.Linear": dense}
        for label, quantizer in quantizers():
            makers[label] = functools.partial(layer_of, quantizer, rows, columns, bench.device)
        if bitsandbytes_linear(columns, rows, bench) is not None:
            makers["bitsandbytes nf4"] = functools.partial(bitsandbytes_linear, columns, rows, bench)
        candidates = {name: copies(bench, make) for name, make in makers.items()}
        for tokens in (1, 3) if bench.tiny else (1, 16, 128, 512, 2048):
            x = torch.randn(tokens, columns, device=bench.device).bfloat16().requires_grad_()
            grad = torch.randn(tokens, rows, device=bench.device).bfloat16()
            base = base_eager = 0.0
            for name, layers in candidates.items():
                if isinstance(layers[0], QuantizedLinear):
                    weight = layers[0].dequantize(dtype=torch.float32)
                    close(layers[0](x).detach(), F.linear(x.detach().float(), weight))
                    close(gradient(layers[0], x, grad)()[0], grad.float() @ weight)
                    del weight
                works = [gradient(layer, x, grad) for layer in layers]
                eager = bench.seconds(lambda works=works: [work() for work in works]) / len(works)  # type: ignore[misc]
                try:
                    seconds: float | None = bench.device_seconds(works)
                except RuntimeError as error:  # a baseline may not support capturing
                    print(f"# {name}: not captured ({str(error).splitlines()[0]})")
                    seconds = None
                    bench.free()
                if name == "bf16 nn.Linear":
                    base, base_eager = seconds or eager, eager
                bench.record(
                    "layers", layer=name, shape=[rows, columns], tokens=tokens, device_seconds=seconds,
                    eager_seconds=eager, device_ratio=seconds / base if seconds else None,
                    eager_ratio=eager / base_eager, limit_seconds=4 * tokens * rows * columns / bench.matmul_speed,
                )  # fmt: skip
        del candidates
        bench.free()


def bitsandbytes_linear(in_features: int, out_features: int, bench: Bench) -> nn.Module | None:
    try:
        import bitsandbytes

        layer: nn.Module = bitsandbytes.nn.Linear4bit(
            in_features, out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        layer = layer.to(torch.bfloat16).to(bench.device).requires_grad_(False)
        layer(torch.zeros(1, in_features, device=bench.device, dtype=torch.bfloat16))
        return layer
    except Exception as error:  # third-party code may raise anything
        print(f"# without bitsandbytes: {type(error).__name__}: {error}")
        return None


def graphs(bench: Bench) -> None:
    rows, columns = (64, 128) if bench.tiny else (5632, 2048)
    for label, quantizer in quantizers():
        layer = layer_of(quantizer, rows, columns, bench.device)
        for tokens in (1, 16, 128):
            x = torch.randn(tokens, columns, device=bench.device).bfloat16().requires_grad_()
            grad = torch.randn(tokens, rows, device=bench.device).bfloat16()
            work = gradient(layer, x, grad)
            done: Record = {"op": label, "tokens": tokens}
            if bench.cuda:
                work()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    work()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                kept: list[Tensor] = []
                graph = bench.captured(lambda work=work, kept=kept: kept.append(work()[0]))  # type: ignore[misc]
                with torch.no_grad():
                    x.copy_(torch.randn_like(x))
                    grad.copy_(torch.randn_like(grad))
                graph.replay()
                assert torch.equal(kept[-1], work()[0]), "other bits from a graph"
                done |= {"synchronises": False, "graph": "same bits"}
            compiled = torch.compile(layer, fullgraph=True, backend="inductor" if bench.cuda else "aot_eager")
            close(gradient(compiled, x, grad)()[0], work()[0], 2**-7)
            bench.record("graphs", **done, compiled="agrees")
        torch.compiler.reset()


def llama(name: str, quantizer: Quantizer | None, device: torch.device) -> Any:
    """A LLaMA of that size with random weights, made on the device: packed in its blocks, or all bfloat16."""
    from transformers import AutoModelForCausalLM

    settings = config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head" and quantizer is not None:
            set_module(model, path, layer_of(quantizer, module.out_features, module.in_features, device))
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                value.fill_(1.0) if parameter.ndim == 1 else value.normal_(std=0.02)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
    with device:  # its tables are buffers, computed anew
        model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    return model.eval()


def bitsandbytes_llama(name: str, bench: Bench) -> Any | None:
    model = llama(name, None, bench.device)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            layer = bitsandbytes_linear(module.in_features, module.out_features, bench)
            if layer is None:
                return None
            set_module(model, path, layer)
    model.is_loaded_in_4bit = True  # what PEFT looks for
    return model


def trained(model: Any, checkpointing: bool) -> tuple[Any, torch.optim.Optimizer]:
    """LoRA of rank 8 on every linear, float32 adapters, AdamW."""
    from peft import LoraConfig, get_peft_model

    prepare_for_training(model, gradient_checkpointing=checkpointing)
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    ).train()
    return adapted, torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)


def step_of(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def steps(bench: Bench) -> None:
    sizes = ["tiny"] if bench.tiny else ["160M", "1.1B"]
    makers: dict[str, Callable[[str], Any]] = {"bf16": lambda size: llama(size, None, bench.device)}
    for label, quantizer in quantizers():
        makers[label] = functools.partial(
            lambda size, quantizer: llama(size, quantizer, bench.device), quantizer=quantizer
        )
    makers["bitsandbytes nf4"] = lambda size: bitsandbytes_llama(size, bench)
    for size in sizes:
        base: dict[Any, float] = {}
        for name, make in makers.items():
            bench.free()
            model = make(size)
            if model is None:
                continue
            speed = tokens_per_second(bench, model)
            base.setdefault("generate", speed)
            bench.record(
                "steps", model=size, base=name, work="generate", tokens_per_second=speed,
                ratio=base["generate"] / speed, packed_bytes=packed_bytes(model),
            )  # fmt: skip
            del model
            for batch, length in [(1, 8)] if bench.tiny else [(1, 128), (4, 512)]:
                for checkpointing in (False, True):
                    bench.free()
                    model, optimizer = trained(make(size), checkpointing)
                    vocabulary = model.config.vocab_size
                    ids = torch.randint(3, vocabulary, (batch, length), device=bench.device)
                    work = step_of(model, optimizer, ids)
                    work()
                    peak, seconds = bench.peak(work), bench.seconds(work)
                    problem = (batch, length, checkpointing)
                    base.setdefault(problem, seconds)
                    bench.record(
                        "steps", model=size, base=name, work="step", batch=batch, length=length,
                        checkpointing=checkpointing, seconds=seconds, ratio=seconds / base[problem], peak_bytes=peak,
                    )  # fmt: skip
                    del model, optimizer, work


@torch.no_grad()
def tokens_per_second(bench: Bench, model: Any) -> float:
    """Greedy generation, batch 1, by transformers' own loop."""
    prompt = torch.randint(3, model.config.vocab_size, (1, 8), device=bench.device)
    count = 4 if bench.tiny else 128

    def generate() -> None:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    return count / bench.seconds(generate, repeats=3)


def memory(bench: Bench) -> None:
    kinds = {"E8P": ("quip_sharp", {}), "affine g128": ("rtn", {"group_size": 128})}
    for size in ["tiny"] if bench.tiny else ["7B", "13B", "30B", "65B"]:
        for (kind, (name, options)), bits in itertools.product(kinds.items(), (2, 3, 4)):
            bench.free()
            result: Record = {"model": size, "base": kind, "bits": bits, "batch": 1, "length": 128}
            try:
                started = time.perf_counter()
                model, optimizer = trained(
                    llama(size, llmtools.quantizer(name, bits=bits, **options), bench.device), checkpointing=True
                )
                ids = torch.randint(3, model.config.vocab_size, (1, 8 if bench.tiny else 128), device=bench.device)
                work = step_of(model, optimizer, ids)
                result["build_seconds"] = time.perf_counter() - started
                work()  # the optimiser's state appears
                result |= {"peak_bytes": bench.peak(work), "packed_bytes": packed_bytes(model)}
                result |= {"peak_gb": result["peak_bytes"] / 1e9, "step_seconds": bench.seconds(work, repeats=3)}
                del model, optimizer, work
            except torch.cuda.OutOfMemoryError as error:
                result["failed"] = str(error).splitlines()[0]
            bench.record("memory", **result)


SECTIONS = {
    "ops": ops,
    "crossing": crossing,
    "layers": layers,
    "graphs": graphs,
    "steps": steps,
    "memory": memory,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--device", default=None, help="cuda, cuda:1, …; cpu to try the code")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try the code; nothing is appended")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="where results are appended")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if (args.device or "cuda").startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here, so nothing is measured; --device cpu --tiny tries the code without one")
        return 0 if args.device is None else 1
    torch.manual_seed(0)
    bench = Bench(args.device or "cuda", args.tiny, None if args.tiny else args.output)
    print(*(f"{key}: {value}" for key, value in bench.about.items()), sep="\n")
    bench.free()
    failed = 0
    for name in args.sections or SECTIONS:
        try:
            SECTIONS[name](bench)
        except Exception as error:
            failed += 1
            traceback.print_exc()
            bench.record(name, failed=f"{type(error).__name__}: {error}"[:300])
        bench.free()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
