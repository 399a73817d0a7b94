"""Quantize a large language model to 4, 3 or 2 bits with any quantizer, and finetune LoRA adapters on top.

The packages: `llmtools.quant` (quantizers), `llmtools.nn` (a linear layer that
materialises its weight only while it multiplies: ModuLoRA, arXiv:2309.16119), `llmtools.model` (quantizing a network
block by block), `llmtools.formats` and `llmtools.checkpoint` (files), `llmtools.data`, `llmtools.recipes` and the
command line. Most programs need these names:

    model = AutoModelForCausalLM.from_pretrained(name)
    report = llmtools.quantize(model, "optq", llmtools.calibration(text, tokenizer), bits=3, group_size=64)
    llmtools.save(model, tokenizer, "model-3bit")
    model, tokenizer = llmtools.load("model-3bit")          # or AutoModelForCausalLM.from_pretrained("model-3bit")
    model = peft.get_peft_model(llmtools.prepare_for_training(model), peft.LoraConfig(target_modules="all-linear"))

Importing this package is light (no torch) and registers our checkpoints with transformers: see `llmtools._hook`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import _hook, _moved

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checkpoint.folder import load as load
    from .checkpoint.folder import save as save
    from .checkpoint.upload import push_to_hub as push_to_hub
    from .data.calibration import calibration as calibration
    from .data.metrics import perplexity as perplexity
    from .data.tasks import tasks as tasks
    from .errors import CheckpointError as CheckpointError
    from .errors import InputError as InputError
    from .model.quantize import quantize as quantize
    from .model.transformers_integration import LLMToolsConfig as LLMToolsConfig
    from .nn.adapters import dequantize as dequantize
    from .nn.adapters import merge as merge
    from .nn.adapters import prepare_for_training as prepare_for_training
    from .nn.linear import QuantizedLinear as QuantizedLinear
    from .nn.swap import count_parameters as count_parameters
    from .quant import Quantizer as Quantizer
    from .quant import quantizer as quantizer
    from .quant import quantizers as quantizers

_HOMES = {
    "CheckpointError": "errors",
    "InputError": "errors",
    "LLMToolsConfig": "model.transformers_integration",
    "QuantizedLinear": "nn.linear",
    "Quantizer": "quant",
    "calibration": "data.calibration",
    "count_parameters": "nn.swap",
    "dequantize": "nn.adapters",
    "load": "checkpoint.folder",
    "merge": "nn.adapters",
    "perplexity": "data.metrics",
    "prepare_for_training": "nn.adapters",
    "push_to_hub": "checkpoint.upload",
    "quantize": "model.quantize",
    "quantizer": "quant",
    "quantizers": "quant",
    "save": "checkpoint.folder",
    "tasks": "data.tasks",
}
"""Public name → its module, imported on first use."""

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


_hook.install()
_moved.install()
