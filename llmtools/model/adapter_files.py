"""Opening a PEFT adapter on its base model: every tensor has to match, or an error is raised.

PEFT is lenient. A tensor that is missing in a file keeps its random initialisation, an unexpected one is ignored, and
both only give a warning; a file named ``adapter_model.bin`` is unpickled; regular expressions of the config are matched
against every module, however long that takes; one option imports a module by its name. Files are data here, so all this
is checked before PEFT loads the adapter, and the result afterwards.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, InputError, opening
from ..files import read_info, read_json, unpickled
from ..limits import PATTERN_SECONDS, matching
from ..options import fits
from .fingerprint import check_base
from .integrity import Header, check_checksums, integers, read_headers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXACT, ZEROS = "exact", "zeros"
"""Ways of training an adapter so that it can be merged into a quantized base without loss (`finetune --merge`): through
the rounding to the base's codes, and as plain LoRA that fits into the base's zero points."""
WAYS = (EXACT, ZEROS)
_RUNS_CODE = {"megatron_config": (None,), "megatron_core": (None, "megatron.core"), "tokenizer_kwargs": (None,)}
"""Options with which PEFT imports a module, or opens a tokenizer with custom code → their harmless values."""
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save")


def check_adapter(folder: str | PathLike[str]) -> dict[str, Any]:
    """An adapter's configuration. Raises InputError unless `folder` holds a PEFT adapter that is safe to open."""
    folder = Path(folder).expanduser()
    path = folder / CONFIG
    if not path.exists():
        what = f"holds no {CONFIG}" if folder.is_dir() else "does not exist"
        raise InputError(f"adapter {str(folder)!r} {what}; the folder that `llmtools finetune --out` wrote is expected")
    config = read_json(path, CheckpointError)
    for key, harmless in _RUNS_CODE.items():
        if config.get(key) not in harmless:
            raise CheckpointError(f"{path}: {key}={config[key]!r} would run code that the file names; it is not opened")
    for key, value in integers(config):
        if abs(value) >= 2**31:
            raise CheckpointError(f"{path}: {key}={value} is out of range")
    if not fits(config.get("alora_invocation_tokens"), list[int] | None):
        raise CheckpointError(f"{path}: alora_invocation_tokens is not a list of token ids")
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise CheckpointError(f"{path}: base_model_name_or_path={base!r}; a name is expected")
    return config


def open_adapter(
    model: Any, folder: str | PathLike[str], *, verify: bool = False, allow_other_base: bool | None = False
) -> Any:
    """The model with the adapter of `folder`, as `peft.PeftModel`, in eval mode.

    verify: compare all bytes with the recorded checksums; without it, small files and headers alone.
    allow_other_base: open it on another base than the one that it was trained on, with a warning (`fingerprint.py`);
    None: the base was compared before.

    Raises CheckpointError for a tensor that is missing, unexpected, of a wrong shape or not finite, and for another
    base.
    """
    from peft import PeftModel, get_peft_model_state_dict

    folder = Path(folder).expanduser()
    config, stored = check_adapter(folder), _headers(folder)
    _check_patterns(config, (name for name, _ in model.named_modules()), folder)
    check_checksums(folder, verify=verify)
    if allow_other_base is not None:
        check_base(model, folder, allow_other_base=allow_other_base)
    with (
        opening(f"adapter {str(folder)!r} does not fit the model", "was it trained on another one?"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # about missing and unexpected tensors: an error below
        adapted = PeftModel.from_pretrained(model, str(folder), config=_layers(folder))
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        known = set(adapted.state_dict())  # embeddings that were saved whole are under their own names
    _check_tensors(stored, expected, known, folder)
    _multiply_head_once(model)
    if merged_as(folder) == EXACT:
        from .exact_lora import exact_layers

        exact_layers(adapted)
    for name, tensor in expected.items():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{folder / WEIGHTS}: {name} holds NaN or infinite values; train the adapter again")
    return adapted


def _multiply_head_once(model: Any) -> None:
    """Has the head of a model read contiguous states.

    Of the states of a batch, transformers gives the head the last token's alone, a slice. torch.matmul multiplies such
    a tensor by a frozen weight, which an adapter's base has, one sequence at a time, with a copy of the weight for
    each.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(_contiguous)


def _contiguous(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if isinstance(value, torch.Tensor) else value for value in inputs)


def merged_as(folder: str | PathLike[str]) -> str | None:
    """How an adapter was trained to be merged, by its metadata: exact, zeros, or None."""
    how = read_info(Path(folder).expanduser(), CheckpointError).get("merge")
    if how is not None and how not in WAYS:
        raise CheckpointError(
            f"adapter {str(folder)!r} was trained with --merge {str(how)[:20]}, which this version does not know; "
            "update llmtools"
        )
    return how


def _layers(folder: Path) -> Any:
    """The adapter's PEFT configuration with the layers that it was trained with registered; None for PEFT's own."""
    if merged_as(folder) != EXACT:
        return None
    from peft import LoraConfig

    from .exact_lora import register

    return register(LoraConfig.from_pretrained(str(folder)))


def check_fits(skeleton: nn.Module, folder: str | PathLike[str]) -> dict[str, float]:
    """Raises CheckpointError unless the adapter's file has all tensors, and no other, for a model of this shape.

    skeleton: the base model, which is modified; its weights may be on the meta device.

    Returns PEFT's scaling of B A by the path of the module.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    folder = Path(folder).expanduser()
    config, stored = check_adapter(folder), _headers(folder)
    _check_patterns(config, (name for name, _ in skeleton.named_modules()), folder)
    with (
        opening(f"adapter {str(folder)!r} does not fit the model", "was it trained on another one?"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", ".*base_model_name_or_path")  # the base may lie elsewhere now
        asked: Any = PeftConfig.from_pretrained(str(folder))
        if hasattr(asked, "init_lora_weights"):
            asked.init_lora_weights = True  # the initialisation does not matter, and may need the weights
        asked.inference_mode = True
        adapted: Any = get_peft_model(skeleton, asked)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    _check_tensors(stored, expected, set(adapted.state_dict()), folder)
    return {
        path.removeprefix("base_model.model."): float(next(iter(module.scaling.values())))
        for path, module in adapted.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and module.scaling
    }


def _headers(folder: Path) -> dict[str, Header]:
    if not (folder / WEIGHTS).exists():
        if (folder / "adapter_model.bin").exists():
            raise unpickled(folder / "adapter_model.bin")
        raise CheckpointError(f"adapter {str(folder)!r} holds no {WEIGHTS}; copy or download it again")
    return read_headers([folder / WEIGHTS])


def _check_tensors(
    stored: Mapping[str, Header], expected: Mapping[str, torch.Tensor], known: set[str], folder: Path
) -> None:
    missing = sorted(expected.keys() - stored.keys())
    surplus = sorted(stored.keys() - expected.keys() - known)
    misshapen = [
        f"{name} has shape {stored[name].shape}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != list(tensor.shape)
    ]
    problems = [*(f"{name} is missing" for name in missing), *(f"{name} is unexpected" for name in surplus), *misshapen]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"adapter {str(folder)!r} does not fit the model: {problems[0]}{more}; open it on the model that it was "
            "trained on, or copy it again"
        )


def _check_patterns(config: Mapping[str, Any], names: Iterable[str], folder: Path) -> None:
    """Raises CheckpointError for an invalid regular expression in the config, or one that takes too long."""
    patterns = list(_patterns(config))
    if not patterns:
        return
    every = list(names)
    for pattern in patterns:
        try:
            matching(pattern, every, PATTERN_SECONDS)
        except (TimeoutError, MemoryError) as error:
            raise CheckpointError(
                f"{folder / CONFIG}: the pattern {pattern[:60]!r} takes too long to match; name the modules instead"
            ) from error
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{folder / CONFIG}: {pattern[:60]!r} is no regular expression ({error})") from error


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """The strings that PEFT matches as regular expressions: target modules, the keys of patterns."""
    for key in _PATTERNS:
        value = config.get(key)
        if isinstance(value, str) and key in ("target_modules", "exclude_modules"):
            yield value
        elif isinstance(value, Mapping):
            yield from (rf"(.*\.)?({name})$" for name in map(str, value))
        elif key == "layers_pattern" and value:
            for pattern in [value] if isinstance(value, str) else value:
                yield rf".*\.{pattern}\.(\d+)\.module$"
