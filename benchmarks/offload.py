"""One LoRA step with weights in files (`--offload disk`) and with weights in memory: time, anonymous and file pages.

    python -m benchmarks.offload 1.1B                           both, on random packed weights that are made first
    python -m benchmarks.offload 65B --ways disk --cold         from the disk: the page cache is emptied of the files
    python -m benchmarks.offload 7B --folder DIR --keep         the model stays in DIR for another run
    python -m benchmarks.offload Qwen3-30B-A3B --tokens 512 --ways disk     a mixture of experts
    python -m benchmarks.offload --table                        the rows as Markdown

The model is LLaMA's shape, `rtn` in groups of 128 with adapters on all linears, or a mixture's, `quip_sharp` with
adapters on the attention; its checkpoint is written a block at a time, so that nothing dense and no whole model is ever
in memory. Each way runs in a process of its own: batch 1, 128 tokens, rank 8, gradient checkpointing, AdamW, loss in
chunks. RssAnon is what the process needs, RssFile what it has mapped of files and may lose again; their peaks are
sampled every 10 ms, from after the imports (which are the first figure) to the end of the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .llama import LLAMA, MIXTURES, config
from .llama_memory import ALL, drawn, planned, status, without_values
from .quality import HERE, append, rows_of

RESULTS = HERE / "results" / "offload.jsonl"
WAYS = ("memory", "disk")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def setting(size: str, bits: int) -> tuple[str, dict[str, Any], Any]:
    """The quantizer's name, its options, and the modules with adapters."""
    if size in MIXTURES:
        return "quip_sharp", {"bits": bits}, ATTENTION
    return "rtn", {"bits": bits, "group_size": 128}, ALL


def make(size: str, bits: int, folder: Path, depth: int | None = None) -> int:
    """Writes a checkpoint of random packed weights, a file a block; returns the bytes of its tensors."""
    import torch
    from safetensors.torch import save_file

    import llmtools
    from llmtools.model.offload import units_of
    from llmtools.model.transformers_integration import LLMToolsConfig
    from llmtools.nn.experts import unfused_experts
    from llmtools.nn.swap import quantized_linears

    torch.manual_seed(0)
    name, options, _ = setting(size, bits)
    shape = config(size, depth=depth)
    model = without_values(shape, llmtools.quantizer(name, **options))
    layers = quantized_linears(model)
    experts = tuple(f"{path}." for path in unfused_experts(model))
    marked = [path for path in layers if not path.startswith(experts)]
    parts = [*(f"{unit.path}." for unit in units_of(model)[1:]), ""]
    left = dict(model.named_parameters())
    places, total = {}, 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts, 1):
        names = [name for name in left if name.startswith(part)]
        tensors = {name: drawn(left.pop(name)) for name in names}
        total += sum(tensor.nbytes for tensor in tensors.values())
        tensors |= {f"{path}.weight": torch.empty(0) for path in marked if part and path.startswith(part)}
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shape.architectures, shape.dtype = [type(model).__name__], "bfloat16"
    shape.quantization_config = LLMToolsConfig.of({path: layer.quantizer for path, layer in layers.items()}).to_dict()
    shape.save_pretrained(folder)
    return total


def measure(folder: Path, way: str, steps: int, tokens: int, modules: Any = ALL) -> dict[str, Any]:
    """So many steps on the model of a folder with adapters on `modules`, in this process."""
    import peft
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401 (imported before memory is counted)
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401

    from llmtools.checkpoint.folder import load_model
    from llmtools.nn.adapters import prepare_for_training
    from llmtools.nn.loss import chunked_loss
    from llmtools.train.heap import guard_heap, map_large_blocks

    map_large_blocks()  # as finetune does
    before = status("RssAnon")
    with peaks() as found:
        began = time.perf_counter()
        model = load_model(folder, dtype="auto", offload="disk" if way == "disk" else None)
        if way == "memory":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        loaded = time.perf_counter() - began
        torch.manual_seed(0)
        prepare_for_training(model, gradient_checkpointing=True)
        options = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=modules)
        adapted = peft.get_peft_model(model, options).train()
        guard_heap(adapted)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        losses, wall, cpu = [], [], []
        for _ in range(steps):
            ids = torch.randint(3, model.config.vocab_size, (1, tokens))
            began, began_cpu = time.perf_counter(), time.process_time()
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            loss = chunked_loss(hidden, model.lm_head, ids).sum / ids.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            wall.append(time.perf_counter() - began)
            cpu.append(time.process_time() - began_cpu)
    return {
        "imports_anon_bytes": before,
        "peak_anon_bytes": found["RssAnon"],
        "peak_file_bytes": found["RssFile"],
        "load_seconds": loaded,
        "step_seconds": wall,
        "step_cpu_seconds": cpu,
        "losses": losses,
        "threads": torch.get_num_threads(),
    }


@contextmanager
def peaks(seconds: float = 0.01) -> Iterator[dict[str, int]]:
    """The largest RssAnon and RssFile of this process meanwhile, in bytes, sampled so often."""
    found = dict.fromkeys(("RssAnon", "RssFile"), 0)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(seconds):
            found.update({key: max(value, status(key)) for key, value in found.items()})

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def empty_cache(folder: Path) -> None:
    """Has the page cache forget the files of a folder."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_cache(folder: Path) -> None:
    """Reads the files of a folder once."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def run(args: argparse.Namespace, folder: Path) -> None:
    if not (folder / "config.json").exists():
        total = make(args.size, args.bits, folder, args.depth)
        print(f"{folder}: {total / 1e9:.2f} GB of random packed weights", flush=True)
    plan, _, _ = planned(
        args.size, *setting(args.size, args.bits), "adamw_torch", "cpu", tokens=args.tokens, depth=args.depth
    )
    resident = plan.packed + plan.linears + plan.embeddings + plan.others
    for way in args.ways:
        (empty_cache if args.cold else warm_cache)(folder)
        inside = [
            args.size,
            "--inside",
            way,
            "--folder",
            str(folder),
            "--steps",
            str(args.steps),
            "--tokens",
            str(args.tokens),
        ]
        command = [sys.executable, "-m", "benchmarks.offload", *inside]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = {
            "model": args.size if args.depth is None else f"{args.size}, {args.depth} blocks",
            "bits": args.bits,
            "weights": way,
            "cache": "cold" if args.cold else "warm",
            "tokens": args.tokens,
            "weight_bytes": resident,
            "planned_anon_bytes": plan.total - plan.program - (resident if way == "disk" else 0),
            **json.loads(done.stdout.splitlines()[-1]),
        }
        append(row, args.out)
        print(shown(row), flush=True)


def shown(row: dict[str, Any]) -> str:
    """A row in one line; GB are 10⁹ bytes."""
    grown = row["peak_anon_bytes"] - row["imports_anon_bytes"]
    seconds = ", ".join(
        f"{wall:.1f} ({cpu:.1f})" for wall, cpu in zip(row["step_seconds"], row["step_cpu_seconds"], strict=True)
    )
    return (
        f"{row['model']} {row['bits']} bits, weights: {row['weights']}, {row['cache']} cache: RssAnon "
        f"{row['peak_anon_bytes'] / 1e9:.2f} GB ({grown / 1e9:.2f} above imports, "
        f"{row['planned_anon_bytes'] / 1e9:.2f} planned), RssFile {row['peak_file_bytes'] / 1e9:.2f} GB, loading "
        f"{row['load_seconds']:.1f} s, steps {seconds} wall (CPU) s, loss {row['losses'][0]:.6f}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, the newest of each setting."""
    from llmtools.document import markdown_table

    newest = {(row["model"], row["bits"], row["weights"], row["cache"], row["tokens"]): row for row in rows}
    head = ["model", "weights", "GB of weights", "cache", "RssAnon", "above imports", "planned", "RssFile", "wall s",
            "CPU s"]  # fmt: skip
    body = [
        [
            f"{row['model']}, {row['bits']} bits",
            row["weights"],
            f"{row['weight_bytes'] / 1e9:.2f}",
            row["cache"],
            f"{row['peak_anon_bytes'] / 1e9:.2f}",
            f"{(row['peak_anon_bytes'] - row['imports_anon_bytes']) / 1e9:.2f}",
            f"{row['planned_anon_bytes'] / 1e9:.2f}",
            f"{row['peak_file_bytes'] / 1e9:.2f}",
            ", ".join(f"{value:.1f}" for value in row["step_seconds"]),
            ", ".join(f"{value:.1f}" for value in row["step_cpu_seconds"]),
        ]
        for row in newest.values()
    ]
    return markdown_table(head, body)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload")
    parser.add_argument("size", nargs="?", choices=[*LLAMA, *MIXTURES])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--depth", type=int, help="a model of so many blocks")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="where the weights are")
    parser.add_argument("--cold", action="store_true", help="start with none of the files in the page cache")
    parser.add_argument("--folder", type=Path, help="folder of the model, made if it is not there")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown")
    parser.add_argument("--inside", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.table:
        print(table(rows_of(args.out)))
    elif args.inside:
        print(json.dumps(measure(args.folder, args.inside, args.steps, args.tokens, setting(args.size, args.bits)[2])))
    elif args.size is None:
        parser.error("give the size of a model, or --table")
    else:
        folder = args.folder or Path(tempfile.mkdtemp(prefix="offload-"))
        try:
            run(args, folder)
        finally:
            if not args.keep:
                shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
