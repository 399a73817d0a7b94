"""Options that commands share: what code may be imported, and how a model and its adapter are opened.

Recipes inherit them, so that they are flat on the command line and in a YAML: ``--verify``, ``--plugin``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """Code that is imported beside llmtools' own."""

    plugin: str | list[str] | None = None
    """Quantizer of your own to register, as module:Class, or a list of them."""
    trust_remote_code: bool = False
    """Permission to run Python code that comes with the model."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CodeOptions):
    """How a model is opened."""

    verify: bool = False
    """Comparison of every byte of the model's (and adapter's) files with their checksums before they are used."""


@dataclass(frozen=True, kw_only=True)
class OffloadOptions:
    """A model that does not fit into memory."""

    offload: str | None = None
    """Place of the weights of a model that does not fit into memory, read a block ahead of the computation: disk (in
    the checkpoint's own files, for a CPU) or cpu (the packed ones in host memory, for a GPU); by default in memory."""


@dataclass(frozen=True, kw_only=True)
class AdaptedModelOptions(ModelOptions):
    """A model, an adapter, or both."""

    model: str | None = None
    """Folder or hub name of the model, quantized or not; by default the base model that the adapter was trained on."""
    adapter: str | None = None
    """Folder of a LoRA adapter."""
    allow_other_base: bool = False
    """Permission to open the adapter on another base model than the one it was trained on, with a warning."""
