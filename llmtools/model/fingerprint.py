"""The fingerprint of a base model, kept beside an adapter: an adapter means something on the base it was trained on.

On another base of the same shape (quantized in another way, dense, trained further) an adapter opens without an error
and the outputs are wrong. So `llmtools finetune` writes ``base_fingerprint.json`` into the adapter's folder, and
into each checkpoint: for each module with parameters its quantizer, its shape, and a sample of its values. Opening the
adapter compares. PEFT ignores the file; an adapter without one opens on any base, as PEFT opens it.

The fingerprint is a function of the tensors in memory. Names of folders, shards, devices and the file format do not
enter. A packed tensor is compared by a hash over elements at fixed indices. Floating-point parameters may be loaded in
another dtype than in training, so a few of their values are kept, and compared in the coarser dtype. The layers that
bitsandbytes quantized while they were loaded are compared by their scales, since its CPU and GPU kernels may round a
code differently. Tensors on the meta device (offloaded to the disk) have a shape only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import read_json
from ..nn.packed import PackedWeight
from ..options import fits

log = logging.getLogger(__name__)

FINGERPRINT = "base_fingerprint.json"
VERSION = 1
PACKED_SAMPLE, VALUES = 64, 8
"""Numbers of sampled elements of a packed tensor, and of kept values of a floating-point one."""
DENSE = {"name": "dense"}
_FINE = {"float64": 0, "float32": 1, "float16": 2, "bfloat16": 3}
_TOLERANCE = (0.0, 0.0, 2.0**-10, 2.0**-7)
"""Relative tolerance for each dtype of `_FINE`, where the two sides differ in dtype."""
_SUBNORMAL = 1e-7
"""Absolute tolerance for subnormal values in float16."""
_KERNELS = 1e-4
"""Relative tolerance for bitsandbytes' scales, which differ between devices."""


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """The fingerprint of a model without adapters, as JSON: ``{"version", "quantizers", "modules"}``.

    ``modules`` is path → ``{"quantizer": index, "shape", "dtype", "packed": hash or "values": base64 of float32}``.
    """
    quantizers: list[dict[str, Any]] = []
    modules = {}
    for path, module in model.named_modules():
        entry = _entry(module)
        if entry is None:
            continue
        spec = _spec(module)
        if spec not in quantizers:
            quantizers.append(spec)
        modules[path] = {"quantizer": quantizers.index(spec), **entry}
    return {"version": VERSION, "quantizers": quantizers, "modules": modules}


def as_text(found: Mapping[str, Any]) -> str:
    """A fingerprint as the text of its file."""
    return json.dumps(found, indent=0) + "\n"


def check_base(model: nn.Module, folder: str | PathLike[str], *, allow_other_base: bool = False) -> None:
    """Raises CheckpointError unless `model` is the base that the adapter of `folder` was trained on.

    An adapter without a fingerprint (llmtools did not train it) passes. With `allow_other_base` a difference is only
    logged as a warning.
    """
    folder = Path(folder).expanduser()
    former = read_fingerprint(folder)
    if former is None:
        log.info("adapter %s has no %s, so its base is not compared", folder, FINGERPRINT)
        return
    difference = compare(former, fingerprint(model))
    if difference is None:
        return
    if not allow_other_base:
        raise CheckpointError(
            f"adapter {str(folder)!r} {difference}; open it on the base that it was trained on, or, if this "
            "one holds the same weights in another format, pass --allow_other_base (allow_other_base=True)"
        )
    log.warning("adapter %s %s; opened anyway", folder, difference)


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """The base fingerprint in an adapter's folder; None where there is none.

    Raises CheckpointError for a damaged file.
    """
    path = folder / FINGERPRINT
    if not path.exists():
        return None
    found = read_json(path, CheckpointError)
    if found.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {str(found.get('version'))[:20]!r}, expected {VERSION}; update llmtools, or delete the "
            "file to open the adapter without comparing its base"
        )
    quantizers, modules = found.get("quantizers"), found.get("modules")
    if (
        not fits(quantizers, list[dict[str, Any]])
        or not fits(modules, dict[str, dict[str, Any]])
        or not all(_is_entry(entry, len(quantizers)) for entry in modules.values())  # type: ignore[arg-type,union-attr]
    ):
        raise CheckpointError(
            f"{path} is damaged; copy it again, or delete it to open the adapter without comparing its base"
        )
    return found


def compare(former: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How a base differs from the former one, as the end of a sentence about an adapter; None where it does not."""
    before, after = former["modules"], now["modules"]
    differing = {
        path: why
        for path in dict.fromkeys([*before, *after])
        if (why := _difference(before.get(path), after.get(path), former["quantizers"], now["quantizers"]))
    }
    if not differing:
        return None
    path, why = next(((path, why) for path, why in differing.items() if _THIS in why), next(iter(differing.items())))
    others = len(differing) - 1
    more = f" and {others} more module{'s' * (others != 1)} differ" if others else " differs"
    return f"was trained on a base with {why} ({path}{more})"


_THIS = ", this is "


def _difference(
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    quantizers: list[dict[str, Any]],
    others: list[dict[str, Any]],
) -> str | None:
    """How one module differs from the former base's; None where it does not."""
    if before is None or after is None:
        return "other modules"
    spec, other = quantizers[before["quantizer"]], others[after["quantizer"]]
    if any(spec[key] != other[key] for key in spec.keys() & other.keys()):  # a later version may know more options
        return _THIS.join(_labels(spec, other))
    if before["shape"] != after["shape"]:
        return f"a weight of shape {before['shape']}{_THIS}{after['shape']}"
    same = before.get("packed") == after.get("packed") or None in (before.get("packed"), after.get("packed"))
    same = same and _close(before, after, _KERNELS if spec["name"].startswith("bitsandbytes") else 0.0)
    return None if same else "other weights"


def _labels(spec: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str]:
    """Two quantizers by name and bits, and by the options that differ where these are the same."""

    def label(one: Mapping[str, Any]) -> str:
        return f"{one['name']} {one['bits']} bits" if "bits" in one else str(one["name"])

    if label(spec) != label(other):
        return label(spec), label(other)
    keys = sorted(key for key in spec.keys() & other.keys() if spec[key] != other[key])
    first, second = (", ".join(f"{key}={one[key]!r}" for key in keys) for one in (spec, other))
    return f"{label(spec)} with {first}", f"{label(other)} with {second}"


def _close(before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float) -> bool:
    first, second = (_values(entry.get("values")) for entry in (before, after))
    if first is None or second is None:
        return True
    if len(first) != len(second):
        return False
    absolute = 0.0
    if before["dtype"] != after["dtype"]:
        coarser = max(_FINE.get(str(entry["dtype"]), 0) for entry in (before, after))
        tolerance, absolute = max(tolerance, _TOLERANCE[coarser]), _SUBNORMAL
    return all(
        a == b or abs(a - b) <= tolerance * max(abs(a), abs(b)) + absolute for a, b in zip(first, second, strict=True)
    )


def _values(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    stored = base64.b64decode(text, validate=True)
    return struct.unpack(f"<{len(stored) // 4}f", stored)


def _is_entry(entry: Mapping[str, Any], quantizers: int) -> bool:
    """Whether a module's entry in a file has the right types."""
    hints = {"quantizer": int, "shape": list[int], "dtype": str | None, "packed": str | None, "values": str | None}
    if not all(fits(entry.get(key), hint) for key, hint in hints.items()):
        return False
    try:
        return 0 <= entry["quantizer"] < quantizers and (_values(entry.get("values")) is None or True)
    except (binascii.Error, ValueError, struct.error):
        return False


# ------------------------------------------------------------------------------------------------ of a module in memory


def _spec(module: nn.Module) -> dict[str, Any]:
    """The spec of the module's quantizer: ours, another library's, or dense."""
    if isinstance(module, PackedWeight):
        return dict(json.loads(json.dumps(module.quantizer.spec(), default=str)))
    weight = module._parameters.get("weight")
    if (state := getattr(weight, "quant_state", None)) is not None:
        return {"name": f"bitsandbytes {state.quant_type}"}
    return {"name": "bitsandbytes int8"} if _int8_scales(module) is not None else DENSE


def _entry(module: nn.Module) -> dict[str, Any] | None:
    """Shape, dtype and sampled values of a module's own parameters; None where it has none."""
    if isinstance(module, PackedWeight):
        bias = [] if (own := module._parameters.get("bias")) is None else [own]
        return {"shape": list(module.shape), "dtype": _name(bias), **_packed(module.packed), **_sampled(bias)}
    parameters = [each for each in module._parameters.values() if each is not None]
    if not parameters:
        return None
    weight: Any = module._parameters.get("weight")
    if (state := getattr(weight, "quant_state", None)) is not None:
        return {"shape": list(state.shape), "dtype": None, **_sampled(list(_nf4_scales(state)))}
    if (scales := _int8_scales(module)) is not None:
        return {"shape": list(weight.shape), "dtype": None, **_sampled([scales])}
    shape = list((parameters[0] if weight is None else weight).shape)
    return {"shape": shape, "dtype": _name(parameters), **_sampled(parameters)}


def _name(tensors: list[Any]) -> str | None:
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else None


def _nf4_scales(state: Any) -> Iterator[Tensor]:
    """The scales of a 4-bit weight; where these are quantized, their mean and their own scales."""
    if state.state2 is None:
        yield state.absmax
    else:
        yield from (state.offset, state.state2.absmax)


def _int8_scales(module: nn.Module) -> Tensor | None:
    scales = getattr(module._parameters.get("weight"), "SCB", None)
    if scales is None:  # after the first forward it is in the state
        scales = getattr(getattr(module, "state", None), "SCB", None)
    return scales if isinstance(scales, Tensor) else None


def _packed(packed: Mapping[str, Tensor]) -> dict[str, str]:
    """A hash over dtypes, shapes and sampled elements of packed tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(packed.items()):
        if tensor.is_meta:
            return {}
        found.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\n".encode())
        found.update(_picked(tensor, PACKED_SAMPLE).contiguous().view(torch.uint8).numpy().tobytes())
    return {"packed": found.hexdigest()[:16]}


def _sampled(tensors: list[Any]) -> dict[str, str]:
    """A few values of each tensor, as base64 of float32, little-endian; {} for tensor subclasses."""
    if not tensors or any(tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return {}
    values = [value for tensor in tensors for value in _picked(tensor, VALUES).float().tolist()]
    return {"values": base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()}


@torch.no_grad()
def _picked(tensor: Tensor, most: int) -> Tensor:
    """Evenly spaced elements, including the first and the last, on the CPU."""
    flat = tensor.detach().reshape(-1)
    count = min(most, flat.numel())
    indices = [index * (flat.numel() - 1) // max(count - 1, 1) for index in range(count)]
    return flat[torch.tensor(indices, dtype=torch.long, device=flat.device)].cpu()
