"""The GGUF file that an adapter was trained on: what the adapter's metadata say of it, and its check by them.

A GGUF file has no checksums. The metadata of an adapter that llmtools trained on one hold the SHA-256 of the file, and
the hub's cache names a file after it, so that ``--verify`` can compare every byte.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..files import read_info, sha256
from ..formats.gguf_reading import GGUFModel, find
from ..nn.swap import packed_layers, stored_bits
from .run_info import facts_of

_BLOB = re.compile(r"^[0-9a-f]{64}$")


def facts_of_base(name: str, model: nn.Module) -> dict[str, Any]:
    """Facts about a base model that is a GGUF file, see `run_info.facts_of`; {} for another one.

    name: the name that `model` was opened by.
    """
    found = find(name, {})
    if found is None:
        return {}
    types = sorted({str(layer.quantizer.spec()["type"]) for layer in packed_layers(model).values()})
    known = {"file": found.path.name, "sha256": sha256(found.path)}
    bits = stored_bits(model)
    return known if bits is None else known | {"types": types, "bits per weight": bits}


def is_verified(name: str, adapter: str | PathLike[str] | None = None) -> bool:
    """Whether a model's name is that of a GGUF file whose every byte was compared, here, with a known SHA-256.

    The hash is that of the adapter's training, or of the hub. Raises CheckpointError where the file differs.
    """
    found = find(name, {})
    expected, source = (None, "") if found is None else _expected(found, adapter)
    if found is None or expected is None:
        return False
    if sha256(found.path) != expected:
        raise CheckpointError(f"{name} differs from the file {source}; copy or download it again")
    return True


def _expected(found: GGUFModel, adapter: str | PathLike[str] | None) -> tuple[str | None, str]:
    """(a file's known SHA-256, where it is from)."""
    facts = {} if adapter is None else facts_of(read_info(Path(adapter).expanduser())).get("base", {})
    if (trained := facts.get("sha256")) is not None:
        return str(trained), f"that adapter {str(adapter)!r} was trained on"
    blob = found.path.resolve()
    return (blob.name, "on the hub") if blob.parent.name == "blobs" and _BLOB.match(blob.name) else (None, "")
