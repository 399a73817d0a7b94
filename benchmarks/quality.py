"""How good are the quantizers? The figures behind docs/results/toys.md, one JSON line a row.

    python -m benchmarks.quality mse                        the lattice codebooks on Gaussian numbers
    python -m benchmarks.quality layers                     proxy loss of every linear of the demo model
    python -m benchmarks.quality perplexity --models DIR …  held-out text, beside other libraries in the same run
    python -m benchmarks.quality finetune                   the same after a LoRA budget, on another kind of text
    python -m benchmarks.quality starts                     LoRA initialised with zero and from the quantization error
    python -m benchmarks.quality propagate --help           where a whole model loses its quality: diagnosis.py
    python -m benchmarks.quality encode                     one large layer through quip_sharp: seconds and memory
    python -m benchmarks.quality table                      docs/results/toys.md, from the rows

Rows are appended to benchmarks/results/quality.jsonl (``--out``) with versions, machine and settings; `table` takes the
newest row of each kind. Whatever is not registered or not installed is left out with a line, and a row that fails says
why: no figure is missing in silence. `--only` and `--bits` choose rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llmtools
from benchmarks import baselines
from benchmarks.baselines import Case, Made, Source
from llmtools.data.metrics import mean_nll
from llmtools.files import sha256
from llmtools.model.options import BlockTuning
from llmtools.quant import proxy_loss

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "demo" / "assets"
RESULTS = HERE / "results" / "quality.jsonl"
BITS = (2, 3, 4)
CONTEXT = 256
"""Tokens in a window, of calibration and of measurement: what the smallest of the models was made for."""
WINDOWS = 96
SAMPLES = 128

Row = dict[str, Any]
Only = Callable[[str], bool]
"""Whether a row of that label is wanted."""


# ---------------------------------------------------------------------------------------------------------------------
# mse: what the lattice codebooks make of Gaussian numbers

PUBLISHED = {2: ("E8P", 0.0913), 3: ("E8P + E81B", 0.02945), 4: ("E8P + E8P", 0.00957)}
"""Mean squared error per element on N(0, 1) at the scales of the published code (QuIP#, arXiv:2402.04396)."""


def mse(vectors: int, checked: int) -> Iterator[Row]:
    """Error of each codebook beside its published figure; the short encoder beside a search of all 65 536 points."""
    from llmtools.kernels.lattice import RESIDUAL_SCALE, SCALE, dequantize_lattice, encode_lattice

    generator = torch.Generator().manual_seed(0)
    for bits, (book, published) in PUBLISHED.items():
        errors = []
        for _ in range(math.ceil(vectors / 10_000)):
            x = torch.randn(10_000, 8, generator=generator)
            codes, residual = encode_lattice(x * SCALE[bits], bits)
            errors.append(
                (dequantize_lattice(codes, residual, RESIDUAL_SCALE[bits]) / SCALE[bits] - x).square().mean(1)
            )
        error = torch.cat(errors).double()
        value, sampling = float(error.mean()), float(error.std()) / len(error) ** 0.5
        yield {
            "codebook": book, "bits": bits, "mse": value, "standard_error": sampling, "published": published,
            "difference": value / published - 1, "vectors": len(error),
        }  # fmt: skip
    yield _encoder_row(checked, generator)


def _encoder_row(checked: int, generator: torch.Generator) -> Row:
    from llmtools.kernels.lattice import decode_e8p, e8p_table, encode_e8p

    points = e8p_table().double() / 4  # [65536, 8]
    rows = torch.cat([2 * points, -points.square().sum(-1, keepdim=True)], -1).T.contiguous().float()
    worse, largest = 0, 0.0
    for start in range(0, checked, 256):
        x = torch.randn(min(256, checked - start), 8, generator=generator)
        scores = torch.cat([x, torch.ones(len(x), 1)], -1) @ rows
        ours = (x.double() - decode_e8p(encode_e8p(x)).double()).square().sum(-1)
        best = (x.double() - points[scores.argmax(-1)]).square().sum(-1)
        worse += int((ours > best + 1e-5).sum())
        largest = max(largest, float((ours - best).max()))
    return {
        "codebook": "E8P", "distinct_values": len(points.unique(dim=0)), "encoder_checked": checked,
        "encoder_farther_than_brute_force": worse, "encoder_largest_excess": largest,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# layers: each linear by itself, under the second moment of its true inputs


def layers(only: Only, limit: int | None = None, bits: tuple[int, ...] = BITS) -> Iterator[Row]:
    """tr(E H Eᵀ) / tr(W H Wᵀ) of every quantizer on every linear of the demo model: a row each, then means."""
    from benchmarks.proxy import demo_model

    chosen = [case for width in bits for case in _layer_quantizers(width) if only(case[0])]
    rows = []
    for index, problem in enumerate(demo_model()):
        if index == limit:
            break
        whole = proxy_loss(problem.weight, torch.zeros_like(problem.weight), problem.hessian)
        losses, stored = {}, {}
        for label, quantizer in chosen:
            packed = quantizer.quantize(problem.weight, problem.hessian)
            losses[label] = proxy_loss(problem.weight, quantizer.dequantize(packed), problem.hessian) / whole
            stored[label] = 8 * sum(tensor.nbytes for tensor in packed.values()) / problem.weight.numel()
        rows.append((losses, stored))
        yield {"linear": problem.name, "shape": list(problem.weight.shape), "relative_proxy_loss": losses}
    yield {
        "linear": f"mean of {len(rows)}",
        "relative_proxy_loss": {label: sum(row[0][label] for row in rows) / len(rows) for label, _ in chosen},
        "bits_per_weight": {label: sum(row[1][label] for row in rows) / len(rows) for label, _ in chosen},
    }


def _layer_quantizers(bits: int) -> Iterator[tuple[str, llmtools.Quantizer]]:
    for name, options in _ours(bits):
        case = baselines.ours(name, options | {"bits": bits})
        width = {"bits": bits} if "bits" in _options(name) else {}
        yield case.label.removeprefix("llmtools "), llmtools.quantizer(name, **width, **options)


# ---------------------------------------------------------------------------------------------------------------------
# perplexity: whole models on held-out text


def perplexity(
    models: list[Path],
    bits: tuple[int, ...],
    group_sizes: tuple[int, ...],
    iterations: int,
    only: Only,
    seed: int,
) -> Iterator[Row]:
    """Every model through every quantizer, ours and others', from the same calibration windows."""
    for folder in models:
        source = _source(folder, seed)
        held_out = _windows(source, ASSETS / "tinystories" / "held_out.txt", WINDOWS)
        dense = window_nlls(source.model(), held_out)
        setting = {"model": folder.name, "text": "tinystories/held_out.txt", "seed": seed} | _setting(held_out)
        yield setting | {"by": "torch", "method": "float32", "bits": 32, "bits_per_weight": 32.0} | _measured(dense)
        for case in _cases(bits, group_sizes, iterations, only):
            yield setting | _row(case, source, lambda made: _measured(window_nlls(made.model, held_out)))  # noqa: B023


def _cases(bits: tuple[int, ...], group_sizes: tuple[int, ...], iterations: int, only: Only) -> Iterator[Case]:
    here = baselines.installed()
    for width in bits:
        seen = set()
        for group_size in group_sizes:
            found = [baselines.ours(name, options | {"bits": width}) for name, options in _ours(width, group_size)]
            found += _tuned(width, group_size)
            found += [case for case in baselines.cases(width, group_size, iterations) if case.by in here]
            for case in found:
                if case.label not in seen and only(case.label):
                    seen.add(case.label)  # those without groups come once
                    yield case


def _ours(bits: int, group_size: int = 64) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is registered, with options: the defaults, and the variants that the table is to compare."""
    table: list[tuple[str, dict[str, Any]]] = [
        ("rtn", {}),
        ("nf4", {}),
        ("nf4", {"double_quantization": True}),
        ("hqq", {}),
        ("awq", {}),
        ("optq", {"clip": False}),
        ("optq", {}),
        ("optq", {"act_order": True}),
        ("optq", {"act_order": True, "static_groups": True}),
        ("optq", {"act_order": True, "passes": 10}),
        ("signround", {}),
        ("quip", {}),
        ("quip", {"group_size": -1}),
        ("quip_sharp", {"passes": 0}),
        ("quip_sharp", {}),
    ]
    for name, options in table:
        if name not in llmtools.quantizers.names():
            note(f"{name} is not registered and left out")
        elif name != "nf4" or bits == 4:
            known = _options(name)
            yield name, {k: v for k, v in ({"group_size": group_size} | options).items() if k in known}


def _options(name: str) -> set[str]:
    import dataclasses

    return {field.name for field in dataclasses.fields(llmtools.quantizers.get(name))}  # type: ignore[arg-type]


def _tuned(bits: int, group_size: int) -> list[Case]:
    """Our best, with what is left of each block tuned on the original's outputs."""
    names = [name for name in ("optq", "signround", "quip", "quip_sharp") if name in llmtools.quantizers.names()]
    options = {"bits": bits, "group_size": group_size}
    return [baselines.ours(name, options, tuning=BlockTuning()) for name in names]


def _row(case: Case, source: Source, measure: Any) -> Row:
    """The row of one case; where it fails, with the reason."""
    started = time.perf_counter()
    row: Row = {
        "by": case.by, "method": case.method, "bits": case.bits, "group_size": case.group_size,
        "options": case.options, "label": case.label,
    }  # fmt: skip
    try:
        torch.manual_seed(0)
        with baselines.quiet():
            made = case.make(source)
        seconds = time.perf_counter() - started
        return row | {"bits_per_weight": made.bits_per_weight, "seconds": seconds} | measure(made)
    except Exception as error:  # a baseline may raise anything
        reason = str(error).strip().splitlines() or [""]
        return row | {"failed": f"{type(error).__name__}: {reason[-1][:160]}"}


def _source(folder: Path, seed: int, samples: int = SAMPLES) -> Source:
    bare = Source(folder, [])
    text = ASSETS / "tinystories" / "train.txt"
    windows = llmtools.calibration(text, bare.tokenizer(), samples=samples, tokens=CONTEXT, seed=seed)
    return Source(folder, windows)


def _windows(source: Source, file: Path, count: int) -> Tensor:
    """The first `count` windows of a text: int64 [count, CONTEXT]."""
    ids = source.tokenizer()(file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    count = min(count, len(ids) // CONTEXT)
    return ids[: count * CONTEXT].view(count, CONTEXT)


def window_nlls(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window [n, CONTEXT], as `llmtools.perplexity` averages it: float64 [n]."""
    model.eval()
    return torch.tensor([mean_nll(model, window[None]) for window in windows], dtype=torch.float64)


def _measured(nlls: Tensor) -> Row:
    return {"perplexity": math.exp(float(nlls.mean())), "nlls": [round(value, 4) for value in nlls.tolist()]}


def _setting(windows: Tensor) -> Row:
    return {
        "context": CONTEXT, "windows": len(windows),
        "calibration": f"tinystories/train.txt, {SAMPLES} windows of {CONTEXT} tokens",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# finetune: what adapters make good


def finetune(
    folder: Path, bits: tuple[int, ...], group_size: int, iterations: int, only: Only, steps: int, seed: int
) -> Iterator[Row]:
    """The models of `perplexity`, before and after the same LoRA training on a kind of text new to them."""
    source = _source(folder, seed)
    held_out = _windows(source, ASSETS / "wikitext2" / "test.txt", WINDOWS)
    text = _windows(source, ASSETS / "wikitext2" / "train.txt", 10_000)
    setting = {"model": folder.name, "text": "wikitext2/test.txt", "seed": seed} | _setting(held_out)
    setting |= {"training": f"wikitext2/train.txt, LoRA r 8, {steps} steps of 8 windows"}

    def measure(made: Made) -> Row:
        before = window_nlls(made.model, held_out)
        after = window_nlls(_finetuned(made.model, text, steps, seed), held_out)
        return {"perplexity_before": math.exp(float(before.mean()))} | _measured(after)

    dense = {"by": "torch", "method": "float32", "bits": 32, "bits_per_weight": 32.0}
    yield setting | dense | measure(Made(source.model(), 32.0))
    for case in _cases(bits, (group_size,), iterations, only):
        yield setting | _row(case, source, measure)


def _finetuned(model: nn.Module, text: Tensor, steps: int, seed: int) -> nn.Module:
    """LoRA as in the demo, text [n, CONTEXT]. On the dequantized weights: the same numbers as packed, and faster."""
    from llmtools.nn.adapters import dequantize

    return _trained(_adapted(dequantize(model, torch.float32), seed), text, steps, seed)


def _adapted(model: nn.Module, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=r".*layers.*_proj")
    return get_peft_model(model.requires_grad_(False), config)  # type: ignore[arg-type]


def _trained(adapted: Any, text: Tensor, steps: int, seed: int) -> nn.Module:
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    adapted.train()
    for _ in range(steps):
        batch = text[torch.randint(len(text), (8,), generator=generator)]
        adapted(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    trained: nn.Module = adapted.eval()
    return trained


# ---------------------------------------------------------------------------------------------------------------------
# starts: LoRA initialisation from the quantization error


def starts(folder: Path, bits: tuple[int, ...], group_size: int, only: Only, steps: int, seed: int) -> Iterator[Row]:
    """LoRA of rank 8, initialised with zero and from the error: before training, and after the same budget of it."""
    from llmtools.nn.lora_init import initialize_lora

    source = _source(folder, seed)
    held_out = _windows(source, ASSETS / "tinystories" / "held_out.txt", WINDOWS)
    text = _windows(source, ASSETS / "tinystories" / "train.txt", 10_000)
    setting = {"model": folder.name, "text": "tinystories/held_out.txt", "seed": seed} | _setting(held_out)
    setting |= {"training": f"tinystories/train.txt, LoRA r 8, {steps} steps of 8 windows"}
    for width in bits:
        for name in ("rtn", "optq", "quip_sharp"):
            options = {"bits": width} | ({"group_size": group_size} if "group_size" in _options(name) else {})
            label = f"llmtools {name} {width}-bit"
            if not only(label):
                continue
            for start in ("zero", "error"):
                model = source.model()
                report = llmtools.quantize(model, name, source.calibration, adapter_rank=8, **options)
                adapted = _adapted(model, seed)
                if start == "error":
                    initialize_lora(adapted, report.lora_init)
                before = window_nlls(adapted, held_out)
                after = window_nlls(_trained(adapted, text, steps, seed), held_out)
                yield setting | {
                    "by": "llmtools", "method": name, "bits": width, "options": options, "label": label,
                    "start": start, "bits_per_weight": report.bits_per_weight,
                    "perplexity_before": math.exp(float(before.mean())),
                } | _measured(after)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# encode: one large layer


def encode(size: int, threads: int) -> Row:
    """Seconds and peak memory of quip_sharp at 2 bits without tune passes, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.quality", "_encode", "--size", str(size)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=HERE.parent)
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row | {"threads": threads}


def _encode_here(size: int) -> Row:
    import resource

    options = {"passes": 0} if "passes" in _options("quip_sharp") else {}
    quantizer = llmtools.quantizer("quip_sharp", bits=2, **options)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size + size // 4, size, generator=generator)
    hessian = x.T @ x / len(x)
    del x
    weight = torch.randn(size, size, generator=generator)
    quantizer.quantize(weight[:64, :128], hessian[:128, :128])  # builds the kernels and the tables
    before = resident()
    reset_peak()
    started = time.perf_counter()
    packed = quantizer.quantize(weight, hessian)
    seconds = time.perf_counter() - started
    peak = resident("VmHWM") - before
    loss = proxy_loss(weight[:64], quantizer.dequantize(packed, slice(64)), hessian) / proxy_loss(
        weight[:64], torch.zeros(64, size), hessian
    )
    return {
        "quantizer": quantizer.spec(), "shape": [size, size], "seconds": seconds,
        "peak_bytes": peak, "peak_over_weight": peak / weight.nbytes,
        "maximum_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "relative_proxy_loss_of_64_rows": loss,
    }  # fmt: skip


def reset_peak() -> None:
    """The peak of this process' memory is counted from here."""
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")


def resident(field: str = "VmRSS") -> int:
    """A field of /proc/self/status, in bytes: VmRSS, or its peak VmHWM."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


# ---------------------------------------------------------------------------------------------------------------------
# Rows: written down, and made into tables


def append(row: Row, out: Path) -> None:
    """Appends a row to a file of JSON lines, with its origin: versions, commit, machine, time."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row | _origin()) + "\n")


def rows_of(file: Path) -> list[Row]:
    """The rows of a file of JSON lines; none where there is no file yet."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def hash_of_weights(model: str) -> str:
    """What tells the weights of a model's folder from others': 16 digits of the first file's SHA-256."""
    return sha256(next(iter(sorted(Path(model).glob("*.safetensors")))))[:16]


def record(section: str, row: Row, out: Path) -> None:
    """Appends a row with what it belongs to, and shows it."""
    append({"section": section, **row}, out)
    print(json.dumps({key: value for key, value in row.items() if key not in ("nlls", "options")}), flush=True)


def _origin() -> Row:
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, **baselines.installed()},
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


_noted: set[str] = set()


def note(text: str) -> None:
    if text not in _noted:
        _noted.add(text)
        print(f"# {text}", flush=True)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["propagate"]:
        from benchmarks import diagnosis

        return diagnosis.main(words[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("mse", "layers", "perplexity", "finetune", "starts", "encode", "table", "propagate", "_encode")
    parser.add_argument("section", choices=sections, metavar="{" + ",".join(sections[:-1]) + "}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file that rows are appended to")
    parser.add_argument("--models", type=Path, nargs="+", default=[ASSETS / "stories260K"], help="folders of models")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--group_sizes", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--only", default="", help="rows whose label holds this, or one of these parted by commas")
    parser.add_argument("--without", help="no rows whose label holds this, or one of these")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows and of the adapters")
    parser.add_argument("--iterations", type=int, default=200, help="auto-round's steps for a block")
    parser.add_argument("--steps", type=int, default=120, help="of finetuning")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="Gaussian vectors for the error of a codebook")
    parser.add_argument("--checked", type=int, default=100_000, help="vectors to compare with brute force")
    parser.add_argument("--limit", type=int, help="layers: only the first linears")
    parser.add_argument("--size", type=int, default=4096, help="encode: rows and columns")
    parser.add_argument("--threads", type=int, default=2, help="encode: threads")
    args = parser.parse_args(words)

    bits, groups = tuple(args.bits), tuple(args.group_sizes)
    wanted, unwanted = args.only.split(","), args.without.split(",") if args.without else []

    def only(label: str) -> bool:
        return any(part in label for part in wanted) and not any(part in label for part in unwanted)

    if args.section == "_encode":
        print(json.dumps(_encode_here(args.size)))
        return 0
    if args.section == "table":
        from benchmarks.quality_table import write

        print(write(args.out))
        return 0
    for name in baselines.PACKAGES.keys() - baselines.installed().keys():
        note(f"{name} is not installed and skipped")
    rows = {
        "mse": lambda: mse(args.vectors, args.checked),
        "layers": lambda: layers(only, args.limit, bits),
        "perplexity": lambda: perplexity(args.models, bits, groups, args.iterations, only, args.seed),
        "finetune": lambda: finetune(args.models[0], bits, groups[0], args.iterations, only, args.steps, args.seed),
        "starts": lambda: starts(args.models[0], bits, groups[0], only, args.steps, args.seed),
        "encode": lambda: iter([encode(args.size, args.threads)]),
    }[args.section]()
    for row in rows:
        record(args.section, row, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
