"""Peak memory of a finetuning step on LLaMA 7B to 65B shapes: as `llmtools plan` computes it, and as a CPU has it.

    python -m benchmarks.llama_memory                      the table, computed for a GPU: no weights, a few minutes
    python -m benchmarks.llama_memory --measure 7B         one real step on the CPU, beside what the plan says for it
    python -m benchmarks.gpu memory                        the same models on a GPU, measured

Batch 1, 128 tokens, rank 8, gradient checkpointing, AdamW with float32 states. The measured step runs in a process of
its own on packed weights drawn at random in place: nothing dense is ever made. Its peak is that of the process
(VmHWM), less what the process held before the model was built.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .llama import config

PUBLISHED = {"7B": 3.2, "13B": 5.4, "30B": 11.4, "65B": 21.8}
"""GB at 2 bits: ModuLoRA, arXiv:2309.16119, table of memory."""
AIMS = {"7B": 2.6, "13B": 4.4, "30B": 9.4, "65B": 18.5}
ALL, QV = "all-linear", ["q_proj", "v_proj"]
ROWS: list[tuple[str | None, dict[str, Any], Any, str]] = [
    ("quip_sharp", {"bits": 2}, QV, "adamw_torch"),
    ("quip_sharp", {"bits": 2}, ALL, "adamw_torch"),
    ("quip_sharp", {"bits": 2}, ALL, "adamw_bnb_8bit"),
    ("optq", {"bits": 2, "group_size": 128}, ALL, "adamw_torch"),
    ("optq", {"bits": 2, "group_size": 64}, ALL, "adamw_torch"),
    ("quip_sharp", {"bits": 3}, ALL, "adamw_torch"),
    ("optq", {"bits": 3, "group_size": 128}, ALL, "adamw_torch"),
    ("quip_sharp", {"bits": 4}, ALL, "adamw_torch"),
    ("optq", {"bits": 4, "group_size": 128}, ALL, "adamw_torch"),
    ("nf4", {"double_quantization": True}, ALL, "adamw_torch"),
]


def planned(
    size: str,
    quantizer: str | None,
    options: dict[str, Any],
    modules: Any,
    optim: str,
    device: str,
    *,
    tokens: int = 128,
    depth: int | None = None,
) -> Any:
    """(bytes, name, counts) of a step of so many tokens; without a quantizer that of 16-bit LoRA."""
    from llmtools.recipes.estimate import Plan, step_memory
    from llmtools.recipes.finetune import Lora

    return step_memory(
        config(size, depth=depth),
        Plan(
            model=size,
            quantizer=quantizer,
            options=options,
            lora=Lora(r=8, dropout=0.0, target_modules=modules),
            max_length=tokens,
            gradient_checkpointing=True,
            optim=optim,
            dtype="bfloat16",
            device=device,
        ),
        dense=quantizer is None,
    )


def table(sizes: list[str], as_json: bool) -> None:
    """One row a quantizer and adapter; GB (10⁹ bytes) by size."""
    if not as_json:
        print(f"{'GB at the peak of a step, computed for a GPU':<44}", *(f"{size:>8}" for size in sizes), sep="  ")
        print(f"{'published, 2 bits':<44}", *(f"{PUBLISHED[size]:8.1f}" for size in sizes), sep="  ")
        print(f"{'aim, 2 bits':<44}", *(f"{AIMS[size]:8.1f}" for size in sizes), sep="  ", flush=True)
    for quantizer, options, modules, optim in [*ROWS, (None, {}, ALL, "adamw_torch")]:
        totals = []
        for size in sizes:
            memory, _, facts = planned(size, quantizer, options, modules, optim, "cuda")
            totals.append(memory.total / 1e9)
            if as_json:
                made = {"quantizer": quantizer, "options": options, "modules": modules, "optim": optim}
                print(json.dumps({"model": size, **made, "total": memory.total, **vars(memory)}), flush=True)
        if not as_json:
            stored = f"{quantizer} {8 * memory.packed / facts['weights']:.2f} bits" if quantizer else "16-bit LoRA"
            where = "q and v" if modules == QV else "all linears"
            label = f"{stored}, {where}{', 8-bit AdamW' if optim != 'adamw_torch' else ''}"
            print(f"{label:<44}", *(f"{total:8.2f}" for total in totals), sep="  ", flush=True)


def measure(size: str, bits: int) -> dict[str, Any]:
    """One step of a model with random packed weights on this CPU, in this process."""
    import peft
    import torch
    from torch import nn

    import llmtools
    from llmtools.nn.adapters import prepare_for_training
    from llmtools.nn.loss import chunked_loss
    from llmtools.nn.swap import packed_bytes

    torch.manual_seed(0)
    shape = config(size)
    before = status("VmRSS")
    model = without_values(shape, llmtools.quantizer("rtn", bits=bits, group_size=128))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(drawn(parameter), requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(shape)
    prepare_for_training(model, gradient_checkpointing=True)
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    adapted = peft.get_peft_model(model, options).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for parameter in trained:  # a step of nothing, after which the optimizer's state is there
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ids = torch.randint(3, shape.vocab_size, (1, 128))
    built = status("VmRSS")
    began, began_cpu = time.perf_counter(), time.process_time()
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    loss = chunked_loss(hidden, model.lm_head, ids).sum / ids.numel()
    loss.backward()
    optimizer.step()
    return {
        "model": size,
        "bits": bits,
        "loss": loss.item(),
        "packed_bytes": packed_bytes(model),
        "before_bytes": before,
        "model_bytes": built - before,
        "peak_bytes": status("VmHWM") - before,
        "process_peak_bytes": status("VmHWM"),
        "step_seconds": time.perf_counter() - began,
        "step_cpu_seconds": time.process_time() - began_cpu,
        "threads": torch.get_num_threads(),
    }


def without_values(shape: Any, quantizer: Any) -> Any:
    """The model of a configuration on the meta device, all its linears but the head packed, those of experts too."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmtools.model.targets import Plan
    from llmtools.model.transformers_integration import empty_layer
    from llmtools.nn.experts import unfuse_all
    from llmtools.nn.swap import set_module

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        unfuse_all(model)
        for path, chosen in Plan.of(model, quantizer, {}, None).quantizers.items():
            set_module(model, path, empty_layer(model.get_submodule(path), chosen, path))
    return model


def drawn(like: Any) -> Any:
    """Random values of a meta tensor's shape: any integers are codes, scales are small and positive."""
    import torch

    value = torch.empty(like.shape, dtype=like.dtype)
    if not like.is_floating_point():
        return value.random_(torch.iinfo(like.dtype).min, torch.iinfo(like.dtype).max)
    if like.dtype == torch.float16:  # scales
        return value.uniform_(0.005, 0.015)
    return value.fill_(1.0) if like.ndim == 1 else value.normal_(std=0.02)


def status(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama_memory")
    parser.add_argument("--sizes", nargs="*", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", metavar="SIZE", choices=list(PUBLISHED), help="run a step of that size on the CPU")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inside:
        print(json.dumps(measure(args.measure, args.bits)))
    elif args.measure:
        command = [sys.executable, "-m", "benchmarks.llama_memory", "--measure", args.measure, "--inside"]
        done = subprocess.run([*command, "--bits", str(args.bits)], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        options = {"bits": args.bits, "group_size": 128}
        made, _, _ = planned(args.measure, "rtn", options, ALL, "adamw_torch", "cpu")
        assert made.packed == found["packed_bytes"], "the plan's packed bytes are exact"
        planned_bytes = made.total - made.program  # what the process grows by
        print(
            json.dumps(found | {"planned_bytes": planned_bytes, "ratio": found["peak_bytes"] / planned_bytes}, indent=2)
        )
    else:
        table(args.sizes, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
