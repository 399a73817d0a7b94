"""Peak memory of `llmtools quantize`, block by block against the whole model in memory.

    python -m benchmarks.quantize_memory --model DIR --calibration train.txt
    python -m benchmarks.quantize_memory --made 8 16 --hidden 1024            random models of so many layers

Each run is a process of its own; a thread reads RssAnon and RssFile from /proc every 5 ms. Anonymous memory is what a
process must have; that of mapped files is page cache, which the system takes back when it needs it. The peaks are less
what the process held when the libraries were imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WAYS = ("in memory", "block by block")


def resident_bytes() -> dict[str, int]:
    """RssAnon and RssFile of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssFile"))
    }


def run(way: str, options: dict[str, Any]) -> dict[str, float]:
    """Quantizes in this process; peaks in bytes above the libraries, and seconds."""
    from llmtools.checkpoint import folder, streaming  # noqa: F401 (imported before the measurement begins)
    from llmtools.recipes import quantize as recipes

    if way == "in memory":
        recipes._why_resident = lambda recipe: "it is measured"
    before, peaks, ended = resident_bytes(), {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            for name, value in resident_bytes().items():
                peaks[name] = max(peaks[name], value - before[name])

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    recipes.quantize(recipes.Quantize(**options))
    seconds = time.monotonic() - began
    ended.set()
    watcher.join()
    return {**peaks, "seconds": seconds}


def made(layers: int, hidden: int, folder: Path) -> Path:
    """A random model of the LLaMA family in bfloat16, in shards, with the tokenizer of the demo's model."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=int(2.75 * hidden) // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=512,
    )  # fmt: skip
    target = folder / f"{layers} layers"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(target, max_shard_size="200MB")
    assets = Path(__file__).resolve().parent.parent / "demo" / "assets"
    for file in (assets / "stories260K").glob("tokenizer*"):
        shutil.copy(file, target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--made", type=int, nargs="*", default=[])
    parser.add_argument("--hidden", type=int, default=1024)
    assets = Path(__file__).resolve().parent.parent / "demo" / "assets"
    parser.add_argument("--calibration", default=str(assets / "wikitext2" / "train.txt"))
    parser.add_argument("--quantizers", nargs="*", default=["rtn", "optq"])
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--hidden_states", type=float, default=4.0)
    parser.add_argument("--child", nargs=2)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(run(asked.child[0], json.loads(asked.child[1]))))
        return
    print(f"{'model':<16} {'quantizer':<12} {'way':<16} {'RssAnon MB':>11} {'RssFile MB':>11} {'seconds':>8}")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        models = [asked.model] if asked.model else [made(layers, asked.hidden, Path(place)) for layers in asked.made]
        for model in models:
            for quantizer in asked.quantizers:
                for way in WAYS:
                    options = {"model": str(model), "out": f"{place}/out", "quantizer": quantizer, "overwrite": True}
                    options |= {"calibration": None if quantizer in ("rtn", "nf4") else asked.calibration}
                    options |= {"num_samples": asked.num_samples, "max_length": asked.max_length}
                    options |= {"hidden_states": asked.hidden_states}
                    command = [sys.executable, "-m", "benchmarks.quantize_memory", "--child", way, json.dumps(options)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    peak = json.loads(done.stdout.splitlines()[-1])
                    figures = f"{peak['RssAnon'] / 1e6:11.0f} {peak['RssFile'] / 1e6:11.0f} {peak['seconds']:8.1f}"
                    print(f"{model.name:<16} {quantizer:<12} {way:<16} {figures}", flush=True)


if __name__ == "__main__":
    main()
