"""Show the environment: versions, devices, compiler, threads."""

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
    """Show versions, devices, compiler and threads, for a bug report."""


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
            **{f"no {use}": f"pip install '{extra}'" for use, extra in self.missing.items()},
        }
        width = max(map(len, lines))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())


def env(recipe: Env | None = None) -> Environment:
    """The environment on this machine."""
    from importlib.util import find_spec

    import torch

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
