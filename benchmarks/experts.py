"""Mixtures of experts: a step and a token beside transformers' own in bfloat16, and what few tokens cost an expert.

    python -m benchmarks.experts speed                     a step and a token, all variants in turn, in one run
    python -m benchmarks.experts layer                     the experts of one layer alone, in float32 and CPU seconds
    python -m benchmarks.experts overhead                  microseconds of Python for each expert that is hit
    python -m benchmarks.experts calibration --text FILE   held-out error of a small mixture by PSEUDO_TOKENS
    python -m benchmarks.experts speed --layers 4          a part of the model

The shape is that of Qwen3-MoE, 1.5 billion weights in 14 layers: 64 experts of which a token visits 8, hidden size
1,024, 512 features in an expert. The baseline is what a user of transformers and PEFT has: bfloat16 weights and the
experts' implementation that transformers chooses (``grouped_mm``). Adapters are on the attention, rank 8, in all
variants. Weights are random; those of `rtn` have the layout of `optq`, hence its speed. Rows are appended to
benchmarks/results/experts.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import llmtools
from llmtools.nn.experts import experts_forward, unfuse_all

from .quality import HERE, record

RESULTS = HERE / "results" / "experts.jsonl"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
VARIANTS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "bf16": None,
    "4 bits": ("rtn", {"bits": 4, "group_size": 64}),
    "2 bits": ("rtn", {"bits": 2, "group_size": 64}),
    "quip_sharp 2 bits": ("quip_sharp", {"bits": 2}),
}


def shape(layers: int) -> Any:
    """The configuration of that many layers of the mixture."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=32000, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4,
        head_dim=128, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=512, intermediate_size=2048,
        norm_topk_prob=True, max_position_embeddings=4096, dtype="bfloat16", pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


def model_of(layers: int, variant: tuple[str, dict[str, Any]] | None) -> Any:
    """A random model with LoRA on its attention; packed weights are drawn as they are stored."""
    import peft
    from transformers import AutoModelForCausalLM

    from .llama_memory import drawn, without_values

    torch.manual_seed(0)
    config = shape(layers)
    if variant is not None:
        model: Any = without_values(config, llmtools.quantizer(variant[0], **variant[1]))
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(drawn(parameter), requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    llmtools.prepare_for_training(model, gradient_checkpointing=False)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION))


class Seconds(NamedTuple):
    """What a run took, or a part of it."""

    wall: float
    """Seconds by the clock."""
    cpu: float
    """Seconds of the processor, of all threads."""

    @classmethod
    def now(cls) -> Seconds:
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def since(cls, began: Seconds, times: int = 1) -> Seconds:
        """Those of each of so many repetitions since `began`."""
        return cls(*((now - before) / times for now, before in zip(cls.now(), began, strict=True)))


def step(model: Any, tokens: int) -> Callable[[], Seconds]:
    """Forward and backward of one sequence."""
    ids = torch.randint(3, 32000, (1, tokens), generator=torch.Generator().manual_seed(0))

    def run() -> Seconds:
        model.train()
        began = Seconds.now()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return Seconds.since(began)

    return run


def token(model: Any, count: int) -> Callable[[], Seconds]:
    """Greedy decoding of so many tokens after 16, each."""
    ids = torch.randint(3, 32000, (1, 16), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run() -> Seconds:
        model.eval()
        out = model(input_ids=ids, use_cache=True)
        began = Seconds.now()
        for _ in range(count):
            following = out.logits[:, -1:].argmax(dim=-1)
            out = model(input_ids=following, past_key_values=out.past_key_values, use_cache=True)
        return Seconds.since(began, count)

    return run


def speed(layers: int, tokens: int, rounds: int, only: list[str] | None, out: Path) -> None:
    """A step and a token of each variant, in turn."""
    wanted = {name: variant for name, variant in VARIANTS.items() if not only or name in only}
    models = {name: model_of(layers, variant) for name, variant in wanted.items()}
    runs = {name: {"step": step(model, tokens), "token": token(model, 8)} for name, model in models.items()}
    seen: dict[str, dict[str, list[Seconds]]] = {name: {"step": [], "token": []} for name in models}
    for turn in range(rounds + 1):
        for name, kinds in runs.items():
            for kind, run in kinds.items():
                seconds = run()
                if turn:
                    seen[name][kind].append(seconds)
            gc.collect()
    for name, kinds in seen.items():
        row: dict[str, Any] = {"variant": name, "layers": layers, "tokens": tokens, "threads": torch.get_num_threads()}
        for kind, values in kinds.items():
            wall, cpu = ([each[part] for each in values] for part in (0, 1))
            row |= {f"{kind}_best": min(wall), f"{kind}_median": statistics.median(wall), f"{kind}_cpu_best": min(cpu)}
            if "bf16" in seen:
                row[f"{kind}_of_bf16"] = min(wall) / min(each.wall for each in seen["bf16"][kind])
                row[f"{kind}_cpu_of_bf16"] = min(cpu) / min(each.cpu for each in seen["bf16"][kind])
        record("speed", row, out)
        print(name, {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}, flush=True)


def layer(tokens: int, rounds: int, only: list[str] | None, out: Path) -> None:
    """The experts of one layer, forward and backward, and a token, in seconds of the processor, the variants in turn.

    For processors without products of bfloat16 matrices, on which a step of the baseline takes minutes: activations and
    the baseline's weights are float32.
    """
    from transformers import AutoModelForCausalLM

    from .llama_memory import drawn, without_values

    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(64, generator=generator)[:8] for _ in range(tokens)])
    weights, x = torch.rand(tokens, 8, generator=generator), torch.randn(tokens, 1024, generator=generator)
    modules: dict[str, Any] = {}
    for name, variant in {"float32": None, **VARIANTS}.items():
        if name == "bf16" or (only and name not in only):
            continue
        with torch.device("meta"):
            made: Any = AutoModelForCausalLM.from_config(shape(1), dtype=torch.float32) if variant is None else None
        made = made or without_values(shape(1), llmtools.quantizer(variant[0], **variant[1]))  # type: ignore[index]
        modules[name] = made.model.layers[0].mlp.experts
        for module in modules[name].modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(drawn(parameter), requires_grad=False)

    def step(module: Any) -> None:
        module(x.clone().requires_grad_(), ids, weights).sum().backward()

    @torch.no_grad()
    def token(module: Any) -> None:
        for _ in range(8):
            module(x[:1], ids[:1], weights[:1])

    seen: dict[str, dict[str, list[float]]] = {name: {"step": [], "token": []} for name in modules}
    for turn in range(rounds + 1):
        for name, module in modules.items():
            for kind, run, times in (("step", step, 1), ("token", token, 8)):
                began = time.process_time()
                run(module)
                if turn:
                    seen[name][kind].append((time.process_time() - began) / times)
    for name, kinds in seen.items():
        row: dict[str, Any] = {"variant": name, "tokens": tokens, "threads": torch.get_num_threads()}
        for kind, values in kinds.items():
            row[f"{kind}_cpu_best"] = min(values)
            if "float32" in seen:
                row[f"{kind}_of_float32"] = min(values) / min(seen["float32"][kind])
        record("layer", row, out)
        print(name, {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}, flush=True)


def overhead(out: Path, calls: int = 200) -> None:
    """Python's part: experts so small that their products cost nothing, one token to 8 of 64."""
    from transformers import AutoModelForCausalLM

    config = shape(1)
    config.hidden_size = config.moe_intermediate_size = 64
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    x, weights = torch.randn(1, 64), torch.full((1, 8), 0.125)
    ids = torch.arange(8)[None]
    row: dict[str, Any] = {}
    module = model.model.layers[0].mlp.experts
    for name in ("grouped_mm", "linears", "packed"):
        if name == "linears":
            unfuse_all(model)
        if name == "packed":
            llmtools.quantize(model, "rtn", bits=4, group_size=32)
            module = model.model.layers[0].mlp.experts
        with torch.no_grad():
            if name == "grouped_mm":
                model.config._experts_implementation = "grouped_mm"
            times = []
            for _ in range(calls):
                began = time.perf_counter()
                module(x, ids, weights) if name == "grouped_mm" else experts_forward(module, x, ids, weights)
                times.append(time.perf_counter() - began)
        row[f"{name}_microseconds_per_expert"] = 1e6 * statistics.median(times) / 8
    record("overhead", row, out)
    print(row)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


def small_mixture(text: Tensor, steps: int, seed: int) -> Any:
    """A mixture of 16 experts, two of them a token, trained on token ids [n, t] for so many steps."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=int(text.max()) + 1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=64,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - number / steps)
        batch = text[torch.randint(len(text), (16,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def calibration(file: Path, steps: int, seeds: int, out: Path) -> None:
    """Output error of each expert on held-out tokens that its router sends there, by PSEUDO_TOKENS.

    Each linear of each expert is rounded by `optq` at 2 bits with the Hessian of few calibration tokens; the error is
    tr(E H Eᵀ) / tr(W H Wᵀ) with the Hessian of the held-out tokens. A row is a mean over the linears whose experts saw
    so many tokens, as a share of their inputs.
    """
    from llmtools.model import mixtures
    from llmtools.nn.experts import route_all
    from llmtools.quant import proxy_loss

    data = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).long()
    windows = data[: len(data) // 128 * 128].view(-1, 128)
    held, learned = windows[::8], windows[[index for index in range(len(windows)) if index % 8]]
    quantizer = llmtools.quantizer("optq", bits=2, group_size=32)
    errors: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        model = small_mixture(learned, steps, seed)
        unfuse_all(model)
        truth = moments(model, held)
        for count in (2, 8, 32):
            text = learned[seed * 32 : seed * 32 + count]
            sums = moments(model, text)
            with route_all():
                everything = moments(model, text)
            pools = {
                kind: mixtures.pool([each for path, each in sums.items() if _kind(path) == kind])
                for kind in map(_kind, sums)
            }
            for path, own in sums.items():
                weight = model.get_submodule(path).weight.detach()
                if not truth[path].measured:
                    continue
                measure = truth[path].value()
                signal = proxy_loss(weight, torch.zeros_like(weight), measure)
                share = own.tokens / weight.shape[1]
                bin_ = next(name for name, most in BINS.items() if share <= most)
                row = errors.setdefault(bin_, {})
                for strength in STRENGTHS:
                    mixtures.PSEUDO_TOKENS = strength
                    hessian = mixtures.PooledSum(own, pools[_kind(path)]).value()
                    packed = quantizer.quantize(weight, hessian)
                    error = proxy_loss(weight, quantizer.dequantize(packed), measure) / signal
                    row.setdefault(f"{strength:g}", []).append(error)
                packed = quantizer.quantize(weight, everything[path].value())
                error = proxy_loss(weight, quantizer.dequantize(packed), measure) / signal
                row.setdefault("route_all", []).append(error)
    for name in BINS:
        if name in errors:
            means = {key: sum(values) / len(values) for key, values in errors[name].items()}
            record("calibration", {"tokens_per_input": name, "linears": len(errors[name]["0"]), **means}, out)
            print(name, {key: round(value, 4) for key, value in means.items()}, flush=True)


STRENGTHS = (0.0, 0.0625, 0.25, 1.0, 4.0, 1e9)
BINS = {"none": 0.0, "to 1/8": 0.125, "to 1/2": 0.5, "to 2": 2.0, "to 8": 8.0, "more": float("inf")}
"""Name → most tokens of an expert, for each input feature."""


def _kind(path: str) -> str:
    """The layer and projection of an expert's linear, without the expert; gate and up read the same."""
    layer, _, rest = path.partition(".experts.")
    return f"{layer} {rest.rpartition('.')[2] == 'w_down'}"


@torch.no_grad()
def moments(model: Any, text: Tensor) -> dict[str, Any]:
    """Second moments of the inputs of experts' up and down projections over token ids [n, t], by path."""
    from llmtools.model.quantize import accumulating

    paths = [path for path, _ in model.named_modules() if path.endswith((".w_up", ".w_down"))]
    with accumulating(model, [[path] for path in paths]) as sums:
        for part in text.split(16):
            model(input_ids=part)
    return dict(zip(paths, sums, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "layer", "overhead", "calibration"])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="variants")
    parser.add_argument("--text", type=Path, help="text for calibration, by bytes")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    if given.what == "speed":
        speed(given.layers, given.tokens, given.rounds, given.only, given.out)
    elif given.what == "layer":
        layer(given.tokens, given.rounds, given.only, given.out)
    elif given.what == "overhead":
        overhead(given.out)
    else:
        calibration(given.text, given.steps, given.seeds, given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
