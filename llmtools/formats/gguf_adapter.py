"""Export of adapters for llama.cpp: plain LoRA as a GGUF file.

The tensors are named after the base's (``blk.0.attn_q.weight.lora_a``). Where llama.cpp permutes the rows of a weight
(queries and keys of LLaMA), the rows of B are permuted, too. llama.cpp scales each module by one alpha over its rank;
other scalings of PEFT (rsLoRA, alpha_pattern) are multiplied into B. The factors of a layer's experts are one tensor
each, A [E, rank, in] and B [E, out, rank], with zeros for experts that have no adapter or a smaller rank.

What llama.cpp cannot apply is refused by name: more than LoRA, and an adapter on an output head that is tied to the
embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..files import partial_of, writing
from ..model.adapter_files import check_fits
from ..nn.experts import unfuse, unfuse_all
from .gguf import Target, base_names, finish, require_package
from .gguf_header import read_header
from .gguf_reading import SUFFIX, Naming, find, gguf_config
from .gguf_reading import skeleton as gguf_skeleton
from .lora import check_plain, read_adapter

FILE = f"adapter{SUFFIX}"


class _Base(NamedTuple):
    """The base model of an adapter in llama.cpp's terms."""

    architecture: str
    """Architecture by llama.cpp's name."""
    empty: Any
    """Model on the meta device."""
    target: Callable[[str], Target | None]
    """Function of a linear's path; None where llama.cpp has no such tensor."""


def export_gguf_adapter(
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    base: str,
    *,
    skeleton: Callable[[str], Any],
    overwrite: bool = False,
) -> Path:
    """Writes a PEFT adapter as a GGUF file: `out` if that ends in .gguf, else ``adapter.gguf`` in the folder `out`.

    base: the model that it was trained on, a GGUF file, a folder or a hub name. skeleton: builds that model on the meta
    device. Returns the file's path. Raises InputError for what llama.cpp cannot apply.
    """
    gguf, source = require_package(), Path(adapter).expanduser()
    config, tensors = read_adapter(source)
    check_plain(source, config, tensors)
    target = _base(gguf, base, skeleton)
    scales = check_fits(target.empty, source)
    alpha = float(config.get("lora_alpha") or 1)
    placed = dict(_placed(source, tensors, scales, alpha, target))

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, target.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in placed.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        finish(writer)

    if not str(out).endswith(SUFFIX):
        with writing(out, overwrite=overwrite) as folder:
            write(folder / FILE)
        return Path(out) / FILE
    return write_file(Path(out).expanduser(), write, overwrite)


def check_file_free(out: str | PathLike[str], *, overwrite: bool) -> None:
    """Raises InputError where a folder or a file that may not be replaced has this name."""
    path = Path(out).expanduser()
    if path.is_dir():
        raise InputError(f"{path} is a folder; use the name of a file, or of a folder that does not end in {SUFFIX}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; pass --overwrite (overwrite=True) to replace it, or another name")
    if path.exists() and path.open("rb").read(4) != b"GGUF":
        raise InputError(f"{path} is no GGUF file, so it is not replaced; use another name")


def write_file(path: Path, write: Callable[[Path], None], overwrite: bool) -> Path:
    """Writes a file atomically: under a temporary name, which is renamed at the end."""
    check_file_free(path, overwrite=overwrite)
    partial = partial_of(path.resolve())
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); nothing was kept") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _placed(
    source: Path, tensors: dict[str, Tensor], scales: dict[str, float], alpha: float, base: _Base
) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, tensor) of each A and B."""
    experts: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    count: dict[str, int] = {}
    for key in sorted(tensors):
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        found = base.target(path)
        if found is None:
            raise InputError(
                f"{source} adapts {path}, which llama.cpp cannot apply; merge the adapter with --format dense, or "
                "train one on other modules (lora.target_modules)"
            )
        a, b = tensors[key].float(), tensors[key.replace(".lora_A.", ".lora_B.")].float() * scales[path]
        if found.order is not None:
            b = b[torch.argsort(found.order)]
        if found.expert is not None:
            experts.setdefault(found.tensor, {})[found.expert] = a, b
            count[found.tensor] = base.empty.get_submodule(path.rsplit(".", 2)[0]).num_experts
            continue
        yield f"{found.tensor}.lora_a", a
        yield f"{found.tensor}.lora_b", b * (len(a) / alpha)
    for name, factors in experts.items():
        rank = max(len(a) for a, _ in factors.values())
        a, b = next(iter(factors.values()))
        all_a, all_b = a.new_zeros(count[name], rank, a.shape[1]), b.new_zeros(count[name], len(b), rank)
        for index, (a, b) in factors.items():
            all_a[index, : len(a)], all_b[index, :, : len(a)] = a, b * (rank / alpha)
        yield f"{name}.lora_a", all_a
        yield f"{name}.lora_b", all_b


def _base(gguf: Any, name: str, skeleton: Callable[[str], Any]) -> _Base:
    found = find(name, {})
    if found is None:
        empty = skeleton(name)
        unfuse_all(empty)
        architecture, names = base_names(empty.config)
        tied = _tied_head(empty)
        return _Base(architecture, empty, lambda path: None if path == tied else names(path))
    file = read_header(found.path)
    config = gguf_config(file)
    empty = gguf_skeleton(file, config)
    naming, tied = Naming(file, config, empty), _tied_head(empty)
    stored = {place: tensor for tensor, place in naming.names.items() if tensor in file.tensors}
    experts = {
        path: Target(tensor.name, expert=index)
        for tensor in file.tensors.values()
        for index, path in enumerate(naming.experts(tensor))
    }
    for path in naming.mixtures:
        unfuse(empty, path)

    def target(path: str) -> Target | None:
        if path in experts:
            return experts[path]
        tensor = file.tensors.get(stored.get(f"{path}.weight", ""))
        order = None if tensor is None or path == tied else naming.order(tensor)
        return None if tensor is None or order is None else Target(tensor.name, order)

    return _Base(file.architecture, empty, target)


def _tied_head(empty: Any) -> str | None:
    """The path of an output head that is tied to the embedding, to which llama.cpp applies no adapter."""
    head = empty.get_output_embeddings()
    if head is None or not empty.config.tie_word_embeddings:
        return None
    return next(str(path) for path, module in empty.named_modules() if module is head)
