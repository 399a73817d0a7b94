"""Memory of one layer: dense tensors kept for backward, and the peak of a forward and backward, beside baselines.

    python -m benchmarks.memory [--size 4096] [--tokens 16] [--budget_mib 8] [--json]

Every layer has the same shape, [size, size], frozen, and is given `tokens` rows in bfloat16. Columns: bytes of weight
that autograd keeps between forward and backward (beyond the layer's own tensors and its input and output, seen by a
saved-tensors hook), and the growth of allocated memory at its peak, from the allocator's own events. The limit is the
activations (x, y and their gradients) plus the budget for materialised rows; a dense weight would be 2 · size² bytes
more. Peers that are not installed are left out with a line.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

import llmtools
from llmtools.nn import QuantizedLinear
from llmtools.quant import materialize_budget
from llmtools.sweep.memory import most_allocated

MIB = 2**20


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward of ``layer(x)``, without the layer's own tensors, x and y."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.update(storages(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    own = {pointer for t in [*layer.parameters(), *layer.buffers(), x, y] for pointer in storages(t)}
    return sum(size for pointer, size in kept.items() if pointer not in own)


def storages(tensor: Tensor) -> dict[int, int]:
    """Address and bytes of what a tensor lies in; of its parts, where it is a wrapper around other tensors."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return {k: v for name in names for k, v in storages(getattr(tensor, name)).items()}
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}


def peak_growth(work: Callable[[], object]) -> int:
    """The most bytes that `work` has allocated at once on the CPU, from the profiler's record of the allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    return most_allocated(profile)


def ours(linear: nn.Linear) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for name, options in [("rtn", {"bits": 4}), ("rtn", {"bits": 3}), ("rtn", {"bits": 2}), ("nf4", {})]:
        quantizer = llmtools.quantizer(name, **options | ({"clip": False} if name == "rtn" else {}))
        layers[f"llmtools {name} {options.get('bits', 4)} bit"] = QuantizedLinear.from_linear(linear, quantizer)
    return layers


def baselines(linear: nn.Linear) -> dict[str, nn.Module]:
    """Layers of other libraries with the same weight, as far as they are installed."""
    found: dict[str, nn.Module] = {}
    for name, make in (
        ("torchao int8", _torchao),
        ("bitsandbytes nf4", _bitsandbytes),
        ("gptqmodel 4 bit", _gptqmodel),
    ):
        try:
            found[name] = make(linear)
        except Exception as error:  # a baseline may raise anything; report it and continue
            print(
                f"# {name}: not measured ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            )
    return found


def _torchao(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16))
    model[0].weight.data.copy_(linear.weight.data)
    quantize_(model, Int8WeightOnlyConfig())
    return model.requires_grad_(False)


def _bitsandbytes(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.load_state_dict({"weight": linear.weight.data})
    return layer.to("cpu").requires_grad_(False)


def _gptqmodel(linear: nn.Linear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = TorchLinear(
        bits=4, group_size=64, sym=True, desc_act=False,
        in_features=linear.in_features, out_features=linear.out_features, bias=False, register_buffers=True,
    )  # fmt: skip
    groups = linear.in_features // 64
    scales = torch.full((linear.out_features, groups), 0.01, dtype=torch.float16)
    zeros = torch.full((linear.out_features, groups), 8, dtype=torch.int32)
    index = torch.arange(linear.in_features, dtype=torch.int32) // 64
    layer.pack(copy.deepcopy(linear).float(), scales, zeros, g_idx=index)
    layer.post_init()
    return layer


def measure(layer: nn.Module, size: int, tokens: int) -> dict[str, float]:
    x = torch.randn(tokens, size, dtype=torch.bfloat16, requires_grad=True)

    def work() -> None:
        layer(x).sum().backward()

    work()  # one-time allocations, such as x.grad and tables
    x.grad = None
    return {"kept for backward MiB": saved_bytes(layer, x) / MIB, "peak growth MiB": peak_growth(work) / MIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--budget_mib", type=float, default=8)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    linear = nn.Linear(args.size, args.size, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    activations = 4 * args.tokens * args.size * 2 / MIB
    limit = {
        "activations MiB": activations,
        "activations + budget MiB": activations + args.budget_mib,
        "dense weight MiB": 2 * args.size**2 / MIB,
    }
    print(json.dumps({"size": args.size, "tokens": args.tokens, **{k: round(v, 2) for k, v in limit.items()}}))
    with materialize_budget(int(args.budget_mib * MIB)):
        for name, layer in {"torch bfloat16": linear, **ours(linear), **baselines(linear)}.items():
            try:
                row = {"layer": name, **{k: round(v, 2) for k, v in measure(layer, args.size, args.tokens).items()}}
            except Exception as error:
                row = {"layer": name, "failed": f"{type(error).__name__}: {str(error)[:100]}"}
            print(json.dumps(row) if args.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
