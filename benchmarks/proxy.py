"""Does the data pay? Proxy loss tr(E H Eᵀ) / tr(W H Wᵀ) of OPTQ beside round-to-nearest on the same grids.

    python -m benchmarks.proxy                          random problems, and every linear of the demo model
    python -m benchmarks.proxy --layers FILE.safetensors --json

Three kinds of problem: random weights with outlier rows and columns under correlated inputs, some of them dead; every
linear of the demo model under the second moment of its true inputs; and, with ``--layers``, the matrices of any
safetensors file under correlated random inputs. The last line of each kind counts where OPTQ is the better one. It
also rounds the random problems by the textbook column loop in float64 and compares the codes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import llmtools
from llmtools.quant import HessianSum, proxy_loss
from llmtools.quant.grids.affine import Affine
from llmtools.quant.rounding import Sequential

ASSETS = Path(__file__).resolve().parent.parent / "demo" / "assets"
BITS = (4, 3, 2)


class Problem(NamedTuple):
    kind: str
    name: str
    weight: Tensor  # [out, in]
    hessian: Tensor  # [in, in]


def random_problems(seed: int = 0) -> Iterator[Problem]:
    """Weights with outlier rows and columns; a few channels of the inputs are large, a few are dead."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(12):
        out, n = [(64, 128), (96, 172), (128, 256)][index % 3]
        weight = torch.randn(out, n, generator=generator)
        weight[torch.randint(out, (3,), generator=generator)] *= 6
        weight[:, torch.randint(n, (3,), generator=generator)] *= 6
        yield Problem("random", f"{index}: {out}x{n}", weight, inputs_moment(n, generator, dead=n // 32))


def inputs_moment(n: int, generator: torch.Generator, dead: int = 0) -> Tensor:
    """H of inputs with a falling spectrum, a few large channels and `dead` channels that are always zero: [n, n]."""
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    spread = torch.arange(1, n + 1).float() ** -0.5
    channels = torch.exp(0.5 * torch.randn(n, generator=generator))
    channels[torch.randint(n, (max(1, n // 64),), generator=generator)] *= 8
    channels[torch.randperm(n, generator=generator)[:dead]] = 0
    x = torch.randn(4 * n, n, generator=generator) @ (spread[:, None] * basis) * channels
    return x.T @ x / x.shape[0]


def matrices(file: Path) -> Iterator[Problem]:
    """Every matrix of a safetensors file, under drawn inputs."""
    from safetensors import safe_open

    generator = torch.Generator().manual_seed(0)
    with safe_open(file, framework="pt") as tensors:
        for name in sorted(tensors.keys()):
            weight = tensors.get_tensor(name)
            if weight.ndim == 2:
                yield Problem(file.name, name, weight.float(), inputs_moment(weight.shape[1], generator))


def demo_model() -> Iterator[Problem]:
    """Every linear of the demo model, H from 16 windows of 256 tokens of its training text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmtools.model.blocks import Block
    from llmtools.model.walk import Calls, walk

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "stories260K")
    text = llmtools.calibration(ASSETS / "tinystories" / "train.txt", tokenizer, samples=16, tokens=256)
    found: list[Problem] = []

    def linear(path: str) -> nn.Linear:
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        return module

    def visit(block: Block, calls: Calls) -> None:
        for group in block.groups:
            first = linear(group.paths[0])
            total = HessianSum(first.in_features)
            hook = first.register_forward_pre_hook(lambda module, args, total=total: total.add(args[0]))
            calls.run()
            hook.remove()
            for path in group.paths:
                found.append(Problem("stories260K", path, linear(path).weight.detach(), total.value()))

    walk(model, text, visit)
    yield from found


def compare(problem: Problem, group_size: int) -> dict[str, object]:
    """Relative proxy losses of both at each width, on the same grid."""
    whole = proxy_loss(problem.weight, torch.zeros_like(problem.weight), problem.hessian)
    row: dict[str, object] = {"kind": problem.kind, "name": problem.name, "group_size": group_size}
    for bits in BITS:
        for name in ("rtn", "optq"):
            quantizer = llmtools.quantizer(name, bits=bits, group_size=group_size)
            packed = quantizer.quantize(problem.weight, problem.hessian)
            row[f"{name}{bits}"] = proxy_loss(problem.weight, quantizer.dequantize(packed), problem.hessian) / whole
    return row


def column_loop(weight: Tensor, hessian: Tensor, grid: Affine, damping: float) -> Tensor:
    """GPTQ's algorithm as the paper prints it (arXiv:2210.17323, algorithm 1), one column at a time."""
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    weight, params = weight.clone(), grid.fit(weight)
    codes = torch.empty_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j : j + 1] = grid.quantize_values(weight[:, j : j + 1], params)
        error = (weight[:, j] - grid.dequantize_codes(codes[:, j : j + 1], params)[:, 0]) / inverse[j, j]
        weight[:, j:] -= error[:, None] * inverse[j, j:]
    return codes


def equal_codes() -> dict[str, object]:
    """Codes of our sweep and of the column loop that differ, in float64 without groups, over all random problems."""
    differing = total = 0
    for problem in random_problems():
        alive = problem.hessian.diagonal() > 0
        weight, hessian = problem.weight[:, alive].double(), problem.hessian[alive][:, alive].double()
        for bits in BITS:
            grid = Affine(bits)
            ours, _ = Sequential(0.01)(weight, hessian, grid)
            differing += int((ours != column_loop(weight, hessian, grid, 0.01)).sum())
            total += ours.numel()
    return {"kind": "codes against the column loop", "differing": differing, "of": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=Path, action="append", default=[], help="a safetensors file of matrices")
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="one JSON line a row")
    args = parser.parse_args()

    sources = [random_problems(), demo_model(), *[matrices(file) for file in args.layers]]
    for problems in sources:
        rows = [compare(problem, args.group_size) for problem in problems]
        for row in rows:
            print(json.dumps(row) if args.json else _line(row))
        print(json.dumps(_summary(rows)), flush=True)
    print(json.dumps(equal_codes()))


def _summary(rows: list[dict[str, object]]) -> dict[str, object]:
    summary: dict[str, object] = {"kind": rows[0]["kind"], "problems": len(rows)}
    for bits in BITS:
        ratios = torch.tensor([float(str(row[f"optq{bits}"])) / float(str(row[f"rtn{bits}"])) for row in rows])
        summary[f"optq/rtn at {bits} bits"] = {
            "mean": round(float(ratios.mean()), 3),
            "worst": round(float(ratios.max()), 3),
            "no larger in": int((ratios <= 1).sum()),
        }
    return summary


def _line(row: dict[str, object]) -> str:
    values = "  ".join(f"{key} {value:.5f}" for key, value in row.items() if isinstance(value, float))
    return f"{row['kind']} {row['name']!s:42} {values}"


if __name__ == "__main__":
    main()
