"""Opening the models, adapters and plug-ins that the user names, with checks before anything is loaded."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import warnings
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..content import rows_content
from ..errors import InputError, first_line
from ..files import METADATA, RUN, read_info, read_json
from ..options import fits
from ..startup import libraries_loaded

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ..data.tasks import Task

log = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def open_model(
    name: str,
    *,
    adapter: str | None = None,
    load: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
    any_task: bool = False,
    allow_other_base: bool | None = False,
    offload: str | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a folder or hub name, dense or quantized, with the adapter on the model if one is named.

    With `verify` all bytes of both are compared with their checksums. Weights keep the type of the checkpoint, unless
    bitsandbytes quantizes them while loading (`load`: nf4 or int8). The model is moved to the GPU if there is one. With
    `offload` the weights stay there: "disk" or "cpu".

    Raises InputError for a model that is not a causal language model, unless `any_task`, and for one that is not the
    base model of the adapter, unless `allow_other_base` (None: checked before).
    """
    import torch

    from ..checkpoint.folder import load as load_checkpoint
    from ..model.adapter_files import check_adapter, open_adapter
    from ..model.offload import check_offload
    from .gguf_base import is_verified

    check_offload(offload, load=load)
    check_model(name)
    import_libraries()
    if adapter is not None:
        check_adapter(adapter)
    compared = verify and adapter is not None and is_verified(name, adapter)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "verify": verify and not compared}
    if load is not None:
        options["quantization_config"] = bitsandbytes_config(name, load)
    try:
        model, tokenizer = load_checkpoint(name, dtype="auto", offload=offload, **options)
    except ValueError as error:
        raise _unreadable(name, error) from error
    if not any_task:
        _refuse_without_head(model, name)
    if torch.cuda.is_available() and getattr(model, "hf_device_map", None) is None:
        model = model.to("cuda")
    if load == "nf4" and not torch.cuda.is_available():
        _disable_repacking(model)
        _replace_misread_layers(model)
    if adapter is not None:
        model = open_adapter(model, adapter, verify=verify, allow_other_base=allow_other_base)
    model.eval()
    return model, tokenizer


def open_recipe(recipe: Any) -> tuple[nn.Module, PreTrainedTokenizerBase, str, str | None]:
    """(model with its adapter, tokenizer, model's name, adapter's folder) by `AdaptedModelOptions` and a `load`."""
    name, adapter = model_and_adapter(recipe.model, recipe.adapter)
    quiet_libraries()
    import_plugins(recipe.plugin)
    model, tokenizer = open_model(
        name,
        adapter=adapter,
        load=loaded_as(recipe.load, name, adapter),
        trust_remote_code=recipe.trust_remote_code,
        verify=recipe.verify,
        allow_other_base=recipe.allow_other_base,
        offload=recipe.offload,
    )
    return model, tokenizer, name, adapter


def compute_fast(model: nn.Module, offload: str | None = None, device: str | None = None) -> None:
    """Has a model compute in float32 where the processor is faster in that than in the model's half precision, if there
    is memory for it; weights that stay in files stay as they are. device: of one on the meta device."""
    from ..nn.wide import widen

    if offload is None:
        widen(model, device)


def _refuse_without_head(model: Any, name: str) -> None:
    """Raises InputError for a classifier, an embedding model or an encoder-decoder, which `llmtools quantize` alone
    takes."""
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is a {kind}, an encoder-decoder; this command works on decoders (causal language "
                         "models). In Python llmtools.load opens it, and transformers generates with it")  # fmt: skip
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and not model.can_generate():
        raise InputError(f"{name} is a {kind}, which predicts no tokens; this command works on causal language "
                         "models. In Python llmtools.load opens it")  # fmt: skip


def bitsandbytes_config(name: str, kind: str) -> Any:
    """The BitsAndBytesConfig for a dense model: nf4 with double quantization as in QLoRA (arXiv:2305.14314), or int8
    (LLM.int8(), arXiv:2208.07339).

    Raises InputError for another kind, a model that is quantized already, or without bitsandbytes.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if kind not in ("nf4", "int8"):
        raise InputError(f"--load {kind}: nf4 or int8 is expected")
    if find_spec("bitsandbytes") is None:
        raise InputError(f"--load {kind} needs bitsandbytes: pip install 'llmtools[bitsandbytes]'")
    if is_quantized(name):
        raise InputError(f"--load {kind}: {name} is quantized already; give the dense model")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    wide = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if wide else torch.float32,
    )


def _disable_repacking(model: Any) -> None:
    """Keeps bitsandbytes' 4-bit layers from repacking their weights for AVX-512 at the first inference.

    The repacked layout supports only multiples of 32 outputs (0.50), and training may continue after an evaluation.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _replace_misread_layers(model: Any) -> None:
    """Computes with llmtools the layers that bitsandbytes' CPU kernel decodes differently from its GPU kernels.

    As of 0.50 that kernel restarts the blocks of 64 in every row where the row length is a multiple of 16 and not of
    64; in the format, blocks continue across rows. The modules stay Linear4bit, with the tensors that they save.
    """
    import torch
    from bitsandbytes.nn import Linear4bit

    from ..formats.bitsandbytes import BitsAndBytes
    from ..formats.tensors import Module
    from ..nn.swap import set_module

    class Decoded(Linear4bit):
        """A Linear4bit whose forward is that of `QuantizedLinear`, on a translation of its packed weight."""

        def forward(self, x: Any) -> Any:
            y = self.quantizer.linear(x, self.translated)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    misread = [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, Linear4bit) and layer.in_features % 64 and not layer.in_features % 16
    ]
    for path, layer in misread:
        stored = {f"{path}.{name}": tensor for name, tensor in layer.state_dict().items()}
        with torch.device("meta"):
            decoded = Decoded(layer.in_features, layer.out_features, bias=False, quant_type=layer.weight.quant_type)
        decoded.weight, decoded.bias, decoded.quant_state = layer.weight, layer.bias, layer.quant_state
        shape = layer.out_features, layer.in_features
        decoded.quantizer, decoded.translated = BitsAndBytes({}).read(Module(stored, path), *shape)
        set_module(model, path, decoded.train(layer.training))
    if misread:
        log.warning(
            "%d layers of bitsandbytes are computed by llmtools, on the same packed weights: its CPU kernel decodes "
            "rows of %s features wrongly (such as %s)",
            len(misread),
            " or ".join(sorted({str(layer.in_features) for _, layer in misread})),
            misread[0][0],
        )


def loaded_as(load: str | None, name: str, adapter: str | None) -> str | None:
    """Quantization while loading: the user's choice, else that of the adapter's training, unless quantized already."""
    trained = _recipe_of(adapter).get("load")
    if load is not None or trained is None or is_quantized(name):
        return load
    log.info("the adapter was trained with --load %s, so %s is loaded with it, too", trained, name)
    return str(trained)


def is_quantized(name: str) -> bool:
    """Whether the configuration of a folder or hub name has a quantization config, or its files are of a format that
    needs none."""
    from transformers import PreTrainedConfig

    from ..formats.reading import quantization_config

    folder = Path(name).expanduser()
    if name.endswith(".gguf") and not folder.is_dir():
        return True
    if folder.is_dir():
        return bool(quantization_config(read_json(folder / "config.json"), folder))
    with suppress(OSError):  # opening the model reports it
        return bool(quantization_config(PreTrainedConfig.get_config_dict(name)[0]))
    return False


def check_model(name: str) -> None:
    """Raises InputError unless `name` is a folder with a checkpoint, or may be a name on the hub."""
    folder = Path(name).expanduser()
    if name.endswith(".gguf") and not folder.is_dir():
        from ..formats.gguf_reading import check_name

        return check_name(name)
    if folder.is_file():
        raise InputError(f"model {name!r} is a file; the folder of a Hugging Face checkpoint, or a .gguf, is expected")
    if folder.is_dir():
        if not (folder / "config.json").exists():
            hint = "; it is an adapter, pass it with --adapter" if (folder / "adapter_config.json").exists() else ""
            raise InputError(f"{name} is not a checkpoint: it holds no config.json{hint}")
        return
    if name.startswith((".", "/", "~")) or not _HUB_NAME.match(name):
        raise InputError(f"there is no folder {name} (looked in {Path.cwd()})")


def model_and_adapter(model: str | None, adapter: str | None) -> tuple[str, str | None]:
    """(model, adapter), with the adapter's base model where the user gave no model. Raises InputError for neither."""
    from ..model.adapter_files import check_adapter

    if adapter is not None and model is None:
        base = check_adapter(adapter).get("base_model_name_or_path")
        if not base:
            raise InputError(f"adapter {adapter!r} does not name its base model; pass --model, too")
        return str(base), adapter
    if model is None:
        raise InputError("no model: pass --model (a folder or a hub name), or --adapter with an adapter folder")
    return model, adapter


def prompt_format_of(adapter: str | None) -> dict[str, Any]:
    """The prompt format that an adapter was trained with; {} if it is not recorded.

    ``{"record_format": "prompt", "template": {"prompt": …, "completion": …}}``; for chats ``"system_prompt"`` where all
    had the same one, or none, and ``"chat_template"``, a hash. Raises InputError for a damaged record.
    """
    info = _info_of(adapter)
    found = info.get("prompt_format", info.get("words")) or {}
    if not fits(found, dict[str, Any]) or not fits(found.get("template"), dict[str, str] | None):
        raise _damaged_info(adapter, "prompt_format", found)
    return {_EARLIER_KEYS.get(key, key): value for key, value in found.items()}


_EARLIER_KEYS = {"form": "record_format", "system": "system_prompt"}
"""Key in files of earlier versions → key."""


def with_former_keys(prompt_format: dict[str, Any]) -> dict[str, Any]:
    """The prompt format by the keys of earlier versions, for scripts that read their run.json."""
    former = {key: name for name, key in _EARLIER_KEYS.items()}
    return {former.get(key, key): value for key, value in prompt_format.items()}


def content_of_template(chat_template: Any) -> str:
    """Hash of a tokenizer's chat template, to compare it with that of an adapter's training."""
    return rows_content([chat_template])


def template_of(task: Any) -> dict[str, str] | None:
    """The prompt template of a task, its own or from its options; None where it has none."""
    if task.template is not None:
        return dict(task.template._asdict())
    parts = {key: getattr(task, key, None) for key in ("prompt", "completion")}
    return parts if task.name == "text" and parts["prompt"] is not None else None  # type: ignore[return-value]


def options_of(adapter: str | None, task: str) -> dict[str, Any]:
    """The options of `task` that an adapter was trained with; {} for an adapter of another task."""
    recipe = _recipe_of(adapter)
    return without_data(recipe.get("options") or {}) if recipe.get("task") == task else {}


def without_data(options: dict[str, Any]) -> dict[str, Any]:
    """A task's options without those that name data."""
    return {key: value for key, value in options.items() if key not in ("data", "validation_data")}


def _recipe_of(adapter: str | None) -> dict[str, Any]:
    recipe = _info_of(adapter).get("recipe") or {}
    if not fits(recipe, dict[str, Any]) or not fits(recipe.get("options"), dict[str, Any] | None):
        raise _damaged_info(adapter, "recipe", recipe)
    return dict(recipe)


def _info_of(adapter: str | None) -> dict[str, Any]:
    """An adapter's metadata; {} where there is none. Raises InputError for a damaged file."""
    return {} if adapter is None else read_info(Path(adapter).expanduser())


def _damaged_info(adapter: str | None, key: str, value: Any) -> InputError:
    folder = Path(str(adapter)).expanduser()
    file = next((folder / name for name in (RUN, METADATA) if (folder / name).exists()), folder / METADATA)
    return InputError(
        f"{file} is damaged: {key} is {str(value)[:60]!r}; copy it again, or delete it to continue without the "
        "prompt template and the options of the adapter's training"
    )


def import_plugins(plugin: str | list[str] | None) -> None:
    """Imports user-defined quantizers, ``module:Class``, also from the current folder, which registers their names.

    Raises InputError for another syntax, or a class that cannot be imported.
    """
    from ..quant import quantizers

    for name in [plugin] if isinstance(plugin, str) else plugin or []:
        if ":" not in name:
            raise InputError(f"plugin {name!r}: module:Class is expected, such as mypackage:MyQuantizer")
        with_current_folder()
        quantizers.get(name)


def task_class(name: str) -> type[Task]:
    """The class of a registered task, or of a ``module:Class``. Raises InputError where there is none."""
    from ..data.tasks import Task, tasks

    if ":" in name:
        with_current_folder()
    cls = tasks.get(name)
    if not issubclass(cls, Task):
        raise InputError(f"task {name!r}: {cls!r} is not a subclass of llmtools.data.Task")
    return cls


def with_current_folder() -> None:
    """Adds the current folder to the import path, as ``python -m`` does, for ``module:Class`` names."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
        importlib.invalidate_caches()


def import_libraries() -> None:
    """Imports what opening a model imports, before it is opened: nothing of the model is put aside by the collector."""
    import transformers.modeling_utils  # noqa: F401

    libraries_loaded()


def quiet_libraries() -> None:
    """Turns off the progress bars and warnings of transformers and bitsandbytes, unless LLMTOOLS_DEBUG is set."""
    import transformers

    if os.environ.get("LLMTOOLS_DEBUG"):
        return
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each matmul of int8 layers
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # weights that are to stay on the disk
    warnings.filterwarnings("ignore", message=r"Could not find a config file in .*\.gguf")  # by PEFT, at each save


def _unreadable(name: str, error: ValueError) -> InputError:
    if not Path(name).expanduser().exists():
        return InputError(f"there is no folder {name}, and no such model could be read from the hub ({error})")
    if isinstance(error, InputError):
        return error
    return InputError(f"{name} cannot be opened as a language model: {first_line(error)}")
