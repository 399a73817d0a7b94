"""Where does a quantized model lose its quality? The figures behind docs/results/diagnosis.md, one JSON line a row.

    python -m benchmarks.quality propagate --model FOLDER --calibration c4=c4.jsonl.gz wikitext2=train.txt \
        --text wikitext2=test.txt --quantizers "quip_sharp 2" "optq 3"
    python -m benchmarks.quality propagate --table          docs/results/diagnosis.md, from the rows

Measured is the KL divergence of the quantized model from the original on held-out text, in nats per token:

    prefix       blocks 0 … k quantized, the others in 16 bits: how errors add up through the depth
    kind         one kind of module quantized (only v_proj, only up_proj, …), and all but that one
    calibration  all quantized, from more or less calibration text, and from other text
    option       all quantized, with one option changed: order, damping, clip, passes
    embedding    the embedding alone rounded to 4 bits, and how far it lies from a 4-bit grid as it is

A model is quantized once a variant; prefixes and kinds swap its weights into the dense model. All is computed in
float32 from dequantized weights. Rows are appended to benchmarks/results/diagnosis.jsonl; those that are there are not
made again, so the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import llmtools
from benchmarks.baselines import Source, shown
from benchmarks.quality import Row, _options, append, hash_of_weights, rows_of
from benchmarks.quality_table import fill
from benchmarks.real import documents, spread_windows
from llmtools.document import markdown_table
from llmtools.model.blocks import find_blocks
from llmtools.model.recover import Targets, mean_kl_divergence
from llmtools.nn.swap import own_linears
from llmtools.quant import GGMLBlocks, quantizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "diagnosis.jsonl"
PAGE = HERE.parent / "docs" / "results" / "diagnosis.md"
KEPT = 256
"""Most probable tokens of the original that are kept at each position; the divergence counts the others as one."""
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "optq": [{"damping": 0.001}, {"damping": 0.05}, {"clip": False}, {"act_order": True}, {"passes": 2}],
    "quip_sharp": [{"damping": 0.001}, {"damping": 0.05}, {"passes": 0}, {"passes": 10}],
}
"""Quantizer → options that are changed, one at a time."""

Weights = Mapping[str, Tensor]
"""Path of a linear → its weight [out, in] float32."""


class Variant(NamedTuple):
    """A way of quantizing the model."""

    name: str
    """Name of the quantizer."""
    bits: int
    """Bits per code."""
    options: tuple[tuple[str, Any], ...] = ()
    """Other options of the quantizer."""
    text: str = ""
    """Name of the calibration text; by default the first."""
    samples: int = 0
    """Calibration sequences; by default those of the command."""
    sequential: bool = True
    """Whether a group's Hessian is measured with the block's earlier groups quantized."""

    @property
    def label(self) -> str:
        return f"{self.name} {self.bits}-bit{shown(dict(self.options))}{'' if self.sequential else ', not sequential'}"


class Study:
    """The original model, its distributions on the held-out text, and what quantizing makes of it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.calibrations = dict(each.split("=", 1) for each in args.calibration)
        self.text, _, self.held_out = args.text.partition("=")
        self.source = Source(Path(args.model), [])
        self.kept = dict(each.split("=", 1) for each in args.checkpoints)
        self.weights = lru_cache(maxsize=1)(self._weights)

    @cached_property
    def model(self) -> Any:
        return self.source.model()

    @cached_property
    def windows(self) -> list[Tensor]:
        text = documents(Path(self.held_out), held_out=True)
        return list(spread_windows(self.source.tokenizer(), text, self.args.windows, self.args.context).split(1))

    @cached_property
    def targets(self) -> Targets:
        return Targets.of(self.model, self.windows, self.folder, KEPT)

    @cached_property
    def depth(self) -> dict[str, int]:
        """Path of each linear in a block → number of the block."""
        blocks = {f"{block.path}.": index for index, block in enumerate(find_blocks(self.model))}
        paths = [path for path, each in self.model.named_modules() if isinstance(each, torch.nn.Linear)]
        return {path: index for path in paths for start, index in blocks.items() if path.startswith(start)}

    def calibration(self, variant: Variant) -> list[Tensor]:
        file = self.calibrations[variant.text or next(iter(self.calibrations))]
        text = documents(Path(file), held_out=False)
        count = variant.samples or self.args.samples
        tokenizer = self.source.tokenizer()
        return llmtools.calibration(text, tokenizer, samples=count, tokens=self.args.tokens, seed=self.args.seed)

    def _weights(self, variant: Variant) -> Weights:
        """The quantized weights, from a finished checkpoint if there is one."""
        if self.is_kept(variant):
            model, _ = llmtools.load(self.kept[variant.label], dtype=torch.float32)
        else:
            model = self.source.model()
            llmtools.quantize(
                model,
                variant.name,
                self.calibration(variant),
                sequential=variant.sequential,
                **_grouped(variant, self.args.group_size),
            )
        return {path: layer.dequantize(dtype=torch.float32) for path, layer in own_linears(model).items()}

    def is_kept(self, variant: Variant) -> bool:
        """Whether there is a finished checkpoint of it: of the label alone, whose calibration is its own."""
        return variant.label in self.kept and not variant.text and not variant.samples

    def kl(self, weights: Weights) -> Row:
        """The divergence of the original with these weights in place."""
        targets = self.targets  # of the original, hence before the weights are swapped in
        with swapped(self.model, weights):
            return {"kl": mean_kl_divergence(self.model, self.windows, targets), "modules": len(weights)}


def _grouped(variant: Variant, group_size: int) -> dict[str, Any]:
    groups = {"group_size": group_size} if "group_size" in _options(variant.name) else {}
    return {"bits": variant.bits, **groups, **dict(variant.options)}


@contextmanager
def swapped(model: torch.nn.Module, weights: Weights) -> Iterator[None]:
    """These weights in the dense model for the length of the context."""
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in weights}
    former = {path: module.weight.data for path, module in modules.items()}
    for path, module in modules.items():
        module.weight.data = weights[path].to(former[path])
    try:
        yield
    finally:
        for path, module in modules.items():
            module.weight.data = former[path]


# ---------------------------------------------------------------------------------------------------------------------
# What is measured: a row's identity, and the function that measures it


def measurements(study: Study) -> Iterator[tuple[Row, Callable[[], Row]]]:
    for asked in study.args.quantizers:
        name, bits = asked.split()
        plain = Variant(name, int(bits))
        base = plain._replace(options=(("passes", 2),)) if name == "quip_sharp" else plain
        yield from _prefixes(study, base)
        yield from _kinds(study, base)
        yield from _calibrations(study, base)
        changed = [
            plain._replace(options=tuple({**dict(base.options), **each}.items())) for each in OPTIONS.get(name, [])
        ]
        for variant in [base._replace(sequential=False), *changed]:
            yield _whole(study, "option", variant, {})
    yield {"experiment": "embedding"}, lambda: _embedding(study)


def _prefixes(study: Study, variant: Variant) -> Iterator[tuple[Row, Callable[[], Row]]]:
    last = max(study.depth.values())
    for block in sorted({*range(0, last, study.args.every), last}):

        def measure(block: int = block) -> Row:
            weights = study.weights(variant)
            return study.kl({path: weights[path] for path in weights if study.depth[path] <= block})

        yield {"experiment": "prefix", "label": variant.label, "block": block}, measure


def _kinds(study: Study, variant: Variant) -> Iterator[tuple[Row, Callable[[], Row]]]:
    for kind in dict.fromkeys(path.rpartition(".")[2] for path in study.depth):
        for only in (True, False):

            def measure(kind: str = kind, only: bool = only) -> Row:
                weights = study.weights(variant)
                chosen = {path: each for path, each in weights.items() if (path.rpartition(".")[2] == kind) == only}
                return study.kl(chosen) | {"parameters": sum(each.numel() for each in chosen.values())}

            yield {"experiment": "kind", "label": variant.label, "kind": kind, "only": only}, measure


def _calibrations(study: Study, variant: Variant) -> Iterator[tuple[Row, Callable[[], Row]]]:
    first, *others = study.calibrations
    for samples in study.args.sizes:
        known = samples == study.args.samples and not study.is_kept(variant)  # quantized already
        sized = variant if known else variant._replace(samples=samples)
        yield _whole(study, "calibration", sized, {"text": first, "samples": samples})
    for text in others:
        yield _whole(study, "calibration", variant._replace(text=text), {"text": text, "samples": study.args.samples})


def _whole(study: Study, experiment: str, variant: Variant, more: Row) -> tuple[Row, Callable[[], Row]]:
    return {"experiment": experiment, "label": variant.label, **more}, lambda: study.kl(study.weights(variant))


def _embedding(study: Study) -> Row:
    """Of the embedding [tokens, features]: relative error of 4-bit types of ggml's, and what rounding it costs."""
    embedding = study.model.get_input_embeddings()
    weight, errors = embedding.weight.detach(), {}
    for kind in ("Q4_0", "Q4_1", "Q5_1", "Q8_0"):
        grid = GGMLBlocks(kind)
        rounded = grid.dequantize(grid.quantize(weight))
        errors[kind] = float((rounded - weight).norm() / weight.norm())
    rtn = quantizer("rtn", bits=4, group_size=study.args.group_size)
    path = next(path for path, each in study.model.named_modules() if each is embedding)
    return study.kl({path: rtn.dequantize(rtn.quantize(weight))}) | {"relative_error": errors}


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def _setting(args: argparse.Namespace) -> Row:
    return {
        "model": Path(args.model).name,
        "weights": hash_of_weights(args.model),
        "windows": f"{args.windows} × {args.context} tokens of {args.text.partition('=')[0]}",
        "calibration": f"{args.calibration[0].partition('=')[0]}, {args.samples} × {args.tokens} tokens",
        "group_size": args.group_size,
        "seed": args.seed,
    }  # fmt: skip


IDENTITY = (
    "experiment", "label", "block", "kind", "only", "text", "samples", "model", "weights", "windows", "calibration",
    "group_size", "seed",
)  # fmt: skip


def identity(row: Row) -> str:
    return json.dumps([row.get(key) for key in IDENTITY])


def rows(file: Path) -> list[Row]:
    """The rows of the file, the newest of each kind."""
    return list({identity(row): row for row in rows_of(file)}.values())


def run(args: argparse.Namespace) -> None:
    setting, done = _setting(args), {identity(row) for row in rows(args.out)}
    with tempfile.TemporaryDirectory(prefix="llmtools-") as folder:
        study = Study(args, Path(folder))
        for what, measure in measurements(study):
            row = setting | what
            if identity(row) in done:
                continue
            began = time.perf_counter()
            row |= measure() | {"seconds": time.perf_counter() - began}
            if row["experiment"] in ("prefix", "kind") and row["label"] in study.kept:
                row["checkpoint"] = True
            append(row, args.out)
            print(json.dumps(what | {"kl": row["kl"]}), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def tables(found: list[Row]) -> dict[str, str]:
    """Name → Markdown."""
    by = {name: [row for row in found if row["experiment"] == name] for name in (
        "prefix", "kind", "calibration", "option", "embedding",
    )}  # fmt: skip
    made = {
        "prefix": _prefix_table(by["prefix"]),
        "kind": _kind_table(by["kind"]),
        "calibration": _list_table(by["calibration"], calibrations=True),
        "option": _list_table(by["option"]),
        "embedding": _embedding_table(by["embedding"]),
        "setting": _setting_of(found),
    }  # fmt: skip
    return {name: table for name, table in made.items() if table}


def _prefix_table(found: list[Row]) -> str:
    labels = list(dict.fromkeys(row["label"] for row in found))
    cells = {(row["block"], row["label"]): row["kl"] for row in found}
    blocks = sorted({block for block, _ in cells})
    lines = [[f"0 … {block}", *(_figure(cells.get((block, label))) for label in labels)] for block in blocks]
    return markdown_table(["quantized blocks", *labels], lines) if lines else ""


def _kind_table(found: list[Row]) -> str:
    lines = []
    for label in dict.fromkeys(row["label"] for row in found):
        here = {(row["kind"], row["only"]): row for row in found if row["label"] == label}
        kinds = [kind for kind, only in here if only]
        total = sum(here[kind, True]["parameters"] for kind in kinds)
        for kind in sorted(kinds, key=lambda kind: -here[kind, True]["kl"]):
            alone, without = here[kind, True], here.get((kind, False), {})
            share = alone["parameters"] / total
            lines.append([label, kind, f"{100 * share:.0f} %", _figure(alone["kl"]), _figure(without.get("kl"))])
    return markdown_table(["", "kind", "of the weights", "only it", "all but it"], lines) if lines else ""


def _list_table(found: list[Row], calibrations: bool = False) -> str:
    order = list(dict.fromkeys(row["label"].partition(",")[0] for row in found))
    lines = []
    for row in sorted(found, key=lambda row: order.index(row["label"].partition(",")[0])):
        text = [f"{row['text']}, {row['samples']} sequences"] if calibrations else []
        lines.append([row["label"], *text, _figure(row["kl"]), f"{row['seconds']:.0f}"])
    return markdown_table(["", *(["calibration"] if calibrations else []), "KL", "seconds"], lines) if lines else ""


def _embedding_table(found: list[Row]) -> str:
    if not found:
        return ""
    errors = "; ".join(f"{kind} {100 * error:.3g} %" for kind, error in found[-1]["relative_error"].items())
    return f"KL {_figure(found[-1]['kl'])}; relative error of ggml's types on it as it is: {errors}."


def _setting_of(found: list[Row]) -> str:
    if not found:
        return ""
    last = found[-1]
    text = f"{last['model']}; {last['windows']}; calibration {last['calibration']}, seed {last['seed']}"
    return f"{text}, groups of {last['group_size']}."


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality propagate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", help="folder of the model in 16 bits")
    parser.add_argument("--calibration", nargs="+", default=[], metavar="NAME=FILE", help="texts, the first by default")
    parser.add_argument("--text", default="", metavar="NAME=FILE", help="held-out text")
    parser.add_argument("--quantizers", nargs="+", default=["quip_sharp 2", "optq 3"], metavar='"NAME BITS"')
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="LABEL=FOLDER", help="finished, by label")
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a calibration sequence")
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 8, 32, 128, 512], help="numbers of sequences")
    parser.add_argument("--windows", type=int, default=8, help="windows of held-out text")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window")
    parser.add_argument("--every", type=int, default=1, help="measure each such block of a prefix, and the last")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration sequences")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that rows are appended to")
    parser.add_argument("--table", action="store_true", help="write the page")
    parser.add_argument("--page", type=Path, default=PAGE, help="page whose tables are replaced")
    args = parser.parse_args(argv)
    if args.table:
        names = fill(args.page, tables(rows(args.out)))
        print(f"{args.page}: {len(names)} tables")
        return 0
    if not (args.model and args.calibration and args.text):
        parser.error("--model, --calibration and --text are needed")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
