"""Integrity checks when a checkpoint is opened: a damaged one raises an error instead of giving wrong numbers.

Before anything is built, `check_config` compares the counts and sizes that ``config.json`` asks for with the tensors in
the files, since a hundred thousand layers take hours to build even without weights. After loading, `check_surplus` and
`check_values` check names and values. `record_checksums` and `check_checksums` detect files that were changed since
they were written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError, InputError
from ..files import METADATA, RUN, read_json, safetensors_header, sha256, unpickled
from ..nn.packed import PackedWeight
from ..options import fits, type_name

log = logging.getLogger(__name__)

MAX_LAYERS, MAX_EXPERTS = 10_000, 100_000
"""Upper bounds where the files are not available to compare with; no model has as many."""
_LAYERS = re.compile(r"(?:^|_)(?:layers?|blocks|depths?)$")
_EXPERTS = re.compile(r"(?:^|_)(?:experts|labels)$")
_SIZES = re.compile(r"(?:_size|_dim|_heads|_rank)$")
_NOT_SIZES = ("window", "chunk", "image", "vocab")
_MIN_LAYERS, _MIN_EXPERTS, _MIN_SIZE = 512, 4096, 2**20
"""Bounds that are always allowed, since they build in seconds; loading then names what is missing."""


class Header(NamedTuple):
    """Entry of one tensor in the header of a safetensors file."""

    shape: list[int]
    """Shape of the tensor."""
    dtype: str
    """Dtype in safetensors' notation: F16, I32 …."""

    def mismatch(self, shape: Iterable[int], dtype: torch.dtype) -> str | None:
        """How it differs from this shape and dtype, as the end of a sentence; None where it does not."""
        if self.shape != list(shape):
            return f"has shape {self.shape}, expected {list(shape)}"
        if self.dtype != _STORED_AS.get(dtype, self.dtype):
            return f"is {self.dtype}, expected {_STORED_AS[dtype]}"
        return None


_STORED_AS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_headers(files: Iterable[str | Path] | None) -> dict[str, Header]:
    """Name → shape and dtype of the tensors in safetensors files. Raises CheckpointError for a damaged file."""
    headers: dict[str, Header] = {}
    for file in files or ():
        with reading(file), safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                part = tensors.get_slice(key)
                headers[key] = Header(list(part.get_shape()), str(part.get_dtype()))
    return headers


@contextmanager
def reading(file: str | Path) -> Iterator[None]:
    """Raises CheckpointError where safetensors cannot read the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); copy or download it again") from error


# ---- before a model is built -----------------------------------------------------------------------------------------


def check_config(config: Mapping[str, Any], headers: Mapping[str, Header] | None, name: str) -> None:
    """Raises CheckpointError where a config asks for more layers, experts or columns than its files can hold.

    config: ``config.json`` as it was read. headers: the tensors in the files, None where they are not downloaded yet.
    """
    _refuse_hub_kernels(config, name)
    layers = experts = largest = 0
    if headers:
        numbers = [int(part) for key in headers for part in key.split(".") if part.isascii() and part.isdigit()]
        layers = 1 + max(numbers, default=-1)
        experts = max([layers, *(size for header in headers.values() for size in header.shape)])
        largest = max(torch.Size(header.shape).numel() for header in headers.values())
    for key, value in integers(config):
        last = key.rpartition(".")[2]
        if _LAYERS.search(last):
            most, what = (max(layers, _MIN_LAYERS), f"{layers} layers") if headers else (MAX_LAYERS, "")
        elif _EXPERTS.search(last):
            most, what = (max(experts, _MIN_EXPERTS), f"at most {experts}") if headers else (MAX_EXPERTS, "")
        elif headers and _SIZES.search(last) and not any(word in last for word in _NOT_SIZES):
            most, what = max(largest, _MIN_SIZE), f"no tensor of more than {largest} numbers"
        else:
            continue
        if value > most:
            why = f"the files hold {what}" if what else f"no model has more than {most}"
            raise CheckpointError(f"{name}: config.json says {key}={value}, and {why}; they do not belong together")


def _refuse_hub_kernels(config: Mapping[str, Any], name: str) -> None:
    """Raises CheckpointError for ``owner/name`` as attention: transformers would run a kernel from the hub, code."""
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "quantization_config":
            _refuse_hub_kernels(value, name)
        elif ("implementation" in str(key) or "kernel" in str(key)) and isinstance(value, str) and "/" in value:
            raise CheckpointError(f"{name}: config.json says {key}={value!r}, code from the hub; it is not run")


def integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """(path, number) of each integer in a config, those in lists under the list's key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name != "quantization_config":
                yield from integers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from integers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


# ---- after loading ----- ---------------------------------------------------------------------------------------------


def check_surplus(model: nn.Module, surplus: Iterable[str], name: str, *, strict: bool) -> None:
    """Raises CheckpointError for unexpected tensors in the files, if the model would differ without them.

    strict: for all of them, as in a checkpoint of llmtools. Else for those of layers that the model does not have; the
    others are logged as a warning.
    """
    unexpected = sorted(surplus)
    if not unexpected:
        return
    beyond = next((key for key in unexpected if _beyond_last_layer(model, key)), None)
    if strict or beyond:
        raise CheckpointError(
            f"{name}: {beyond or unexpected[0]} is in the files and not in the model of config.json"
            f"{f' (nor are {len(unexpected) - 1} more)' if len(unexpected) > 1 else ''}; they do not belong together"
        )
    log.warning(
        "%s: %d tensors of the files are not in %s and are ignored: %s%s",
        name,
        len(unexpected),
        type(model).__name__,
        ", ".join(unexpected[:3]),
        ", …" if len(unexpected) > 3 else "",
    )


def _beyond_last_layer(model: nn.Module, key: str) -> bool:
    """Whether a tensor belongs to a layer beyond the last one of a list of layers."""
    module: nn.Module | None = model
    for part in key.split("."):
        if isinstance(module, nn.ModuleList) and part.isascii() and part.isdigit():
            if int(part) >= len(module):
                return True
            module = module[int(part)]
        else:
            module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return False
    return False


_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Floating dtypes whose values are checked; those of 8 bits and less are packed weights of other libraries."""


def check_values(model: nn.Module, name: str) -> None:
    """Raises CheckpointError for invalid values: NaN, infinity, an invalid permutation.

    Tensors on the meta device are not checked.
    """
    problems: list[str] = []
    packed: set[int] = set()
    for path, layer in model.named_modules():
        if not isinstance(layer, PackedWeight):
            continue
        packed |= {id(tensor) for tensor in layer.packed.values()}
        if any(tensor.is_meta for tensor in layer.packed.values()):
            continue
        try:
            layer.quantizer.check(layer.packed)
        except InputError as error:
            problems.append(f"{path}.{error}")
    problems += [
        f"{path} holds NaN or infinite values"
        for path, tensor in model.named_parameters()
        if id(tensor) not in packed and tensor.dtype in _CHECKED and not tensor.is_meta and tensor.numel()
        if not all(bool(torch.isfinite(end)) for end in tensor.detach().aminmax())
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{name} is damaged: {problems[0]}{more}; copy it again, or quantize again")


def check_generation(model: Any, tokenizer: Any, name: str) -> None:
    """Raises CheckpointError for generation settings of a wrong type, which would fail only when text is generated."""
    config = getattr(model, "generation_config", None)
    if config is not None:
        defaults = type(config)().to_dict()
        for key, value in config.to_dict().items():
            hint: Any = int | list[int] | None if key.endswith("token_id") else None
            if isinstance(defaults.get(key), bool) or key.startswith(("output_", "return_", "use_", "do_")):
                hint = bool | None
            elif hint is None and isinstance(defaults.get(key), int | float):
                hint = float | None
            if hint is not None and not fits(value, hint):
                raise CheckpointError(f"{name}: generation config: {key}={value!r}; {type_name(hint)} is expected")
            if key.endswith("token_id") and value is not None:
                _check_token_ids(value, f"{name}: generation config: {key}")
    longest = getattr(tokenizer, "model_max_length", None)
    if not fits(longest, float | None):
        raise CheckpointError(f"{name}: tokenizer_config.json: model_max_length={longest!r}; a number is expected")


def _check_token_ids(value: int | list[int], what: str) -> None:
    for number in value if isinstance(value, list) else [value]:
        if not -1 <= number < 2**31:
            raise CheckpointError(f"{what}={number}; a token id is expected")


# ---- files that were changed since -----------------------------------------------------------------------------------


def record_checksums(folder: Path, info: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """File → {"sha256", and for safetensors "header"}, for `check_checksums`. Names are sorted.

    info: the contents of the JSON file that will hold them under "checksums"; its own checksum is under "".
    """
    files = {file.name: _checksum(file) for file in sorted(folder.iterdir()) if _has_checksum(file)}
    return files | {"": {"sha256": _sha256_of(info)}}


def check_checksums(folder: Path, *, verify: bool = False) -> None:
    """Compares a folder's files with the checksums of `record_checksums` in its ``llmtools.json``.

    Small files and the headers of tensors are always compared, and a difference is logged as a warning: people edit
    config.json. With `verify` all bytes are read, and a difference raises CheckpointError; so does a folder without
    checksums.
    """
    metadata = {name: read_json(folder / name, CheckpointError) for name in (METADATA, RUN)}
    holder = next((name for name, info in metadata.items() if info.get("checksums")), METADATA)
    info = metadata[holder]
    recorded = info.get("checksums") or {}
    if not fits(recorded, dict[str, dict[str, str]]) or any(Path(name).name != name for name in recorded):
        raise CheckpointError(f"{folder / holder}: its checksums are damaged; remove them, or copy the folder again")
    if not recorded:
        if verify:
            raise CheckpointError(f"{folder} has no checksums to verify; they come with folders that llmtools writes")
        return
    changed = []
    for name, sums in recorded.items():
        file = folder / name
        if not name:
            changed += [f"{holder} was changed"] * (_sha256_of(info) != sums.get("sha256"))
        elif not file.is_file():
            changed.append(f"{name} is missing")
        elif verify or "header" not in sums:
            changed += [f"{name} was changed"] * (sha256(file) != sums.get("sha256"))
        else:
            changed += [f"the header of {name} was changed"] * (_header_sha256(file) != sums.get("header"))
    if not changed:
        return
    difference = f"{', '.join(changed)} since llmtools wrote {folder}"
    if verify:
        raise CheckpointError(f"{difference}; copy or download the folder again")
    log.warning("%s; if that was not you, copy the folder again (--verify compares every byte)", difference)


def _sha256_of(info: Mapping[str, Any]) -> str:
    """SHA-256 of the contents of a JSON file without its checksums."""
    rest = {key: value for key, value in info.items() if key != "checksums"}
    text = json.dumps(json.loads(json.dumps(rest, default=str)), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def _has_checksum(file: Path) -> bool:
    """Whether a file determines the model's outputs: tensors, configuration or tokenizer."""
    kept = (".safetensors", ".json", ".jinja", ".txt", ".model")
    metadata = (METADATA, RUN, "README.md")
    return file.is_file() and file.suffix in kept and file.name not in metadata and not file.name.startswith(".")


def _checksum(file: Path) -> dict[str, str]:
    sums = {"sha256": sha256(file)}
    return sums | {"header": _header_sha256(file)} if file.suffix == ".safetensors" else sums


def _header_sha256(file: Path) -> str:
    """SHA-256 of the header of a safetensors file; "" where it has none."""
    with file.open("rb") as stream, suppress(ValueError):
        text = safetensors_header(stream)
        return hashlib.sha256(len(text).to_bytes(8, "little") + text).hexdigest()
    return ""


def config_of(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder. Raises CheckpointError where it is no JSON object."""
    return read_json(folder / "config.json", CheckpointError)


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder, by its index if it has one; [] where there are none.

    Raises CheckpointError for a damaged index, or one that names a file that is missing or outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(
                f"{index} is damaged: its weight_map is no mapping of names; copy or download it again"
            )
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name or len(name) > 255 or "\0" in name]
        if outside:
            raise CheckpointError(f"{index} names {json.dumps(outside[0][:60])}, which is no file of this folder")
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder}: {', '.join(missing[:4])} of the index is missing; copy or download it")
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(("adapter_", "lora_")))


def refuse_pickles(folder: Path) -> None:
    """Raises CheckpointError for a folder without safetensors, naming the pickle in it, if there is one."""
    if shards_of(folder):
        return
    kinds = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
    found = [path for kind in kinds for path in sorted(folder.glob(kind)) if path.name != "training_args.bin"]
    if found:
        raise unpickled(found[0])
    raise CheckpointError(f"{folder}: it has no model.safetensors, nor any other safetensors file")
