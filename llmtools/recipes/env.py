"""Show the environment: versions, devices, compiler, threads, and how packed weights are multiplied."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from ..checkpoint.run_info import versions


@dataclass(frozen=True)
class Env:
    """Show versions, devices, compiler, threads, and how packed weights are multiplied, for a bug report."""

    measure: bool = False
    """Measure how bfloat16 activations and packed weights are multiplied fastest on this CPU, now; else it is measured
    by the first command that needs it."""


@dataclass(frozen=True)
class Environment:
    """Hardware, and installed software."""

    python: str
    """Version of Python."""
    platform: str
    """Operating system and architecture."""
    versions: dict[str, str]
    """Package → installed version."""
    devices: list[str]
    """Names of the devices."""
    compiler: str | None
    """Path of the C compiler that builds the CPU kernels; without one their torch reference runs."""
    threads: int
    """Number of torch's threads."""
    cores: int
    """Number of CPU cores."""
    products: dict[str, str]
    """Direction of the product of bfloat16 activations with a packed weight → how it is computed on this CPU."""
    measured: dict[str, dict[str, float]]
    """What was measured for that → way → milliseconds of CPU time; empty: nothing was."""
    missing: dict[str, str]
    """Use that is not possible → requirement to install for it."""

    def __str__(self) -> str:
        lines = {
            "python": self.python,
            "platform": self.platform,
            **self.versions,
            "devices": ", ".join(self.devices),
            "compiler": self.compiler or "none (the CPU kernels' torch reference is used)",
            "threads": f"{self.threads} of {self.cores} cores",
            **{f"product, {direction}": way for direction, way in self.products.items()},
            **{
                f"  {what}": "; ".join(f"{ms:.3g} ms {way}" for way, ms in times.items())
                for what, times in self.measured.items()
            },
            **{f"no {use}": f"pip install '{extra}'" for use, extra in self.missing.items()},
        }
        width = max(map(len, lines))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())


def env(recipe: Env | None = None) -> Environment:
    """The environment on this machine."""
    from importlib.util import find_spec

    import torch

    from ..quant.products import find

    found = find(torch.bfloat16, anew=(recipe or Env()).measure)
    uses: dict[str, tuple[tuple[str, ...], str]] = {
        "finetune": (("trl", "datasets"), "llmtools[train]"),
        "plots": (("matplotlib",), "llmtools[plot]"),
        "serve": (("fastapi", "uvicorn", "openai"), "llmtools[serve]"),
    }
    return Environment(
        python=sys.version.split()[0],
        platform=platform.platform(),
        versions=versions(),
        devices=_devices(torch),
        compiler=shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang"),
        threads=torch.get_num_threads(),
        cores=os.cpu_count() or 1,
        products={direction: str(way) for direction, way in found.choice._asdict().items()},
        measured=found.figures,
        missing={
            use: extra for use, (modules, extra) in uses.items() if any(find_spec(module) is None for module in modules)
        },
    )


def _devices(torch: Any) -> list[str]:
    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    return found
