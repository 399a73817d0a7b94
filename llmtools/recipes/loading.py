"""Opening what the user names: models, adapters, plug-ins. Mistakes are caught before anything is loaded."""

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

from ..errors import InputError, first_line
from ..files import read_json
from ..options import fits

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

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
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a folder or hub name, dense or quantized, with an adapter on the model if one is named.

    With `verify` all bytes of both are compared with the checksums beside them. Weights keep the type of the
    checkpoint, unless `load` has bitsandbytes quantize them: nf4 or int8. The model goes to the GPU if there is one.

    Raises InputError for a model that is no decoder with a language model head, unless `any_task`.
    """
    import torch

    from ..checkpoint.folder import load as load_checkpoint
    from ..model.adapter_files import check_adapter, open_adapter

    check_model(name)
    if adapter is not None:
        check_adapter(adapter)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "verify": verify}
    if load is not None:
        options["quantization_config"] = bitsandbytes_config(name, load)
    try:
        model, tokenizer = load_checkpoint(name, dtype="auto", **options)
    except ValueError as error:
        raise _unreadable(name, error) from error
    if not any_task:
        _refuse_without_head(model, name)
    if torch.cuda.is_available() and getattr(model, "hf_device_map", None) is None:
        model = model.to("cuda")
    if load == "nf4" and not torch.cuda.is_available():
        _use_plain_kernel(model)
        _decode_ourselves(model)
    if adapter is not None:
        model = open_adapter(model, adapter, verify=verify)
    model.eval()
    return model, tokenizer


def _refuse_without_head(model: Any, name: str) -> None:
    """Raises InputError for a classifier, an embedding model, an encoder-decoder: `llmtools quantize` alone takes
    those."""
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is a {kind}, an encoder-decoder; this command works on decoders (causal language "
                         "models). In Python llmtools.load opens it, and transformers generates with it")  # fmt: skip
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and not model.can_generate():
        raise InputError(f"{name} is a {kind}, which predicts no tokens; this command works on causal language "
                         "models. In Python llmtools.load opens it for use as what it is")  # fmt: skip


def bitsandbytes_config(name: str, kind: str) -> Any:
    """How transformers has bitsandbytes quantize a plain model: nf4 as in QLoRA (arXiv:2305.14314), its constants
    quantized, too, or int8 (LLM.int8(), arXiv:2208.07339)."""
    import torch
    from transformers import BitsAndBytesConfig

    if kind not in ("nf4", "int8"):
        raise InputError(f"--load {kind}: nf4 or int8 is expected")
    if find_spec("bitsandbytes") is None:
        raise InputError(f"--load {kind} is done by bitsandbytes: pip install 'llmtools[bitsandbytes]'")
    if _is_quantized(name):
        raise InputError(f"--load {kind}: {name} is quantized already; give the plain model")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    wide = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if wide else torch.float32,
    )


def _use_plain_kernel(model: Any) -> None:
    """Keeps bitsandbytes' 4-bit layers from repacking their weights for AVX-512 when they first infer.

    The repacked form takes only outputs in multiples of 32 (0.50), and here training goes on after an evaluation.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _decode_ourselves(model: Any) -> None:
    """Has our layers multiply where bitsandbytes' CPU kernel decodes other numbers than its GPU kernels and its files.

    As of 0.50 that restarts the blocks of 64 in every row, where rows are multiples of 16 and not of 64; in the format
    blocks run on over the ends of rows. The modules stay bitsandbytes', with the tensors that they save.
    """
    import torch
    from bitsandbytes.nn import Linear4bit

    from ..formats.bitsandbytes import BitsAndBytes
    from ..formats.tensors import Module
    from ..nn.swap import set_module

    class Decoded(Linear4bit):
        """A Linear4bit that multiplies by `QuantizedLinear`'s way, from a translation of its own bits."""

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
            "%d layers of bitsandbytes are multiplied by llmtools, with the same bits: its CPU kernel decodes rows of "
            "%s wrongly (such as %s)",
            len(misread),
            " or ".join(sorted({str(layer.in_features) for _, layer in misread})),
            misread[0][0],
        )


def loaded_as(load: str | None, name: str, adapter: str | None) -> str | None:
    """How to quantize a model while it loads: what the user says, else as under the adapter when it was trained.

    A model that is quantized already stays as it is.
    """
    trained = _recipe_of(adapter).get("load")
    if load is not None or trained is None or _is_quantized(name):
        return load
    log.info("the adapter was trained with --load %s, so %s is loaded like that, too", trained, name)
    return str(trained)


def _is_quantized(name: str) -> bool:
    """Whether the configuration of a folder or hub name says so."""
    from transformers import PreTrainedConfig

    folder = Path(name).expanduser()
    if name.endswith(".gguf"):
        return True
    if folder.is_dir():
        return bool(read_json(folder / "config.json").get("quantization_config"))
    with suppress(OSError):  # what cannot be had is said when it is opened
        return bool(PreTrainedConfig.get_config_dict(name)[0].get("quantization_config"))
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
            raise InputError(f"{name} is no checkpoint: it holds no config.json{hint}")
        return
    if name.startswith((".", "/", "~")) or not _HUB_NAME.match(name):
        raise InputError(f"there is no folder {name} (looked in {Path.cwd()})")


def model_and_adapter(model: str | None, adapter: str | None) -> tuple[str, str | None]:
    """The two as the user gave them; a missing model is the one that the adapter was trained on."""
    from ..model.adapter_files import check_adapter

    if adapter is not None and model is None:
        base = check_adapter(adapter).get("base_model_name_or_path")
        if not base:
            raise InputError(f"adapter {adapter!r} does not say what it was trained on; pass --model, too")
        return str(base), adapter
    if model is None:
        raise InputError("no model: pass --model (a folder or a hub name), or --adapter with an adapter folder")
    return model, adapter


def words_of(adapter: str | None) -> dict[str, Any]:
    """The prompt template that an adapter was trained with, by its run.json; {} if it has none.

    ``{"form": "prompt", "template": {"prompt": …, "completion": …}}``. Raises InputError for anything else.
    """
    words = _run_of(adapter).get("words") or {}
    if not fits(words, dict[str, Any]) or not fits(words.get("template"), dict[str, str] | None):
        raise _damaged_run(adapter, "words", words)
    return dict(words)


def options_of(adapter: str | None, task: str) -> dict[str, Any]:
    """The options of `task` that an adapter was trained with; {} where it was trained on another one."""
    recipe = _recipe_of(adapter)
    return without_data(recipe.get("options") or {}) if recipe.get("task") == task else {}


def without_data(options: dict[str, Any]) -> dict[str, Any]:
    """A task's options but for where its data lie."""
    return {key: value for key, value in options.items() if key not in ("data", "validation_data")}


def _recipe_of(adapter: str | None) -> dict[str, Any]:
    recipe = _run_of(adapter).get("recipe") or {}
    if not fits(recipe, dict[str, Any]) or not fits(recipe.get("options"), dict[str, Any] | None):
        raise _damaged_run(adapter, "recipe", recipe)
    return dict(recipe)


def _run_of(adapter: str | None) -> dict[str, Any]:
    """How an adapter was trained, by its run.json; {} where there is none. Raises InputError for a damaged one."""
    return {} if adapter is None else read_json(Path(adapter).expanduser() / "run.json")


def _damaged_run(adapter: str | None, key: str, value: Any) -> InputError:
    return InputError(
        f"{Path(str(adapter)) / 'run.json'} is damaged: {key} is {str(value)[:60]!r}; copy it again, or delete it to "
        "go on without the prompt template and the options that the adapter was trained with"
    )


def import_plugins(plugin: str | list[str] | None) -> None:
    """Imports ``module:Class`` of the user's own quantizers, from the current folder too, so that their name works."""
    from ..quant import quantizers

    for name in [plugin] if isinstance(plugin, str) else plugin or []:
        if ":" not in name:
            raise InputError(f"plugin {name!r}: module:Class is expected, such as mypackage:MyQuantizer")
        with_current_folder()
        quantizers.get(name)


def with_current_folder() -> None:
    """Lets a ``module:Class`` that the user typed be a file in the current folder, as ``python -m`` would."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
        importlib.invalidate_caches()


def quiet_libraries() -> None:
    """Turns off the progress bars and hints of the libraries that we call; our own log says what matters."""
    import transformers

    if os.environ.get("LLMTOOLS_DEBUG"):
        return
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each product of int8 layers
    warnings.filterwarnings("ignore", message=r"Could not find a config file in .*\.gguf")  # by PEFT, at each save


def _unreadable(name: str, error: ValueError) -> InputError:
    if not Path(name).expanduser().exists():
        return InputError(f"there is no folder {name}, and no such model could be had from the hub ({error})")
    if isinstance(error, InputError):
        return error
    return InputError(f"{name} cannot be opened as a language model: {first_line(error)}")
