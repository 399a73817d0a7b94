"""The model card of a checkpoint or an adapter, its README.md.

A card is a function of a folder: it states the contents of ``config.json``, ``llmtools.json`` and
``adapter_config.json`` and the measures it is given, and calls everything else unknown. It holds no local paths: a
folder is named by its last part, and only a name on the hub becomes ``base_model`` in the card's front matter.

Every save overwrites the card as long as it has the line `MARKER`; delete that line to keep an edited card.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, opening
from ..files import read_info, read_json
from ..formats.gguf_reading import hub_base
from .run_info import facts_of

CARD = "README.md"
LOSSES = "loss.png"
"""Name of the plot of a run's losses."""
MARKER = "<!-- written by llmtools, overwritten by the next save; delete this line to keep your changes -->"
_ANY_MARKER = "<!-- written by llmtools"
"""Beginning of the marker, in cards of earlier versions, too."""
UNKNOWN = "unknown"
NO_DATA = "none: the quantizer uses no data"
_LOADED = {
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
    "int8": "load_in_8bit=True",
}
_PEFT_PLACEHOLDER = "[More Information Needed]"
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def write_card(folder: Path, *, name: str | None = None, former: Path | None = None) -> None:
    """Writes the card of `folder`, unless there is an edited one.

    name: name of the model or adapter; by default the folder's.
    former: the folder that this one will replace, from which an edited card is kept.
    """
    path = folder / CARD
    if former is not None and (former / CARD).is_file() and not is_ours(former / CARD):
        shutil.copy(former / CARD, path)
    if is_ours(path):
        path.write_text(card(folder, name=name), encoding="utf-8")


def is_ours(path: Path) -> bool:
    """Whether a card may be written here: there is none, llmtools wrote it, or it is PEFT's empty template."""
    if not path.exists():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return _ANY_MARKER in text or _PEFT_PLACEHOLDER in text


def card(
    folder: Path,
    *,
    name: str | None = None,
    base_name: str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card of a folder with a model or an adapter, as Markdown.

    base_name: the base model's name on the hub, where the files know only a folder.
    results: measures, each as ``llmtools evaluate --json`` prints it.

    Raises InputError where the folder holds neither, or one of its JSON files is damaged.
    """
    name = name or folder.resolve().name
    damaged = f"the card of {folder} cannot be written: llmtools.json or a config is damaged"
    with opening(damaged, error=InputError):
        if (folder / "adapter_config.json").exists():
            return _adapter_card(folder, name, base_name, results)
        if (folder / "config.json").exists():
            return _model_card(folder, name, base_name, results)
        if files := sorted(folder.glob("*.gguf")):
            return _gguf_card(folder, name, files[0].name, results)
    raise InputError(f"{folder} holds neither a model (config.json) nor an adapter (adapter_config.json)")


def _model_card(folder: Path, name: str, base_name: str | None, results: Sequence[Mapping[str, Any]]) -> str:
    info = read_info(folder)
    base = base_name or info.get("base_model")
    quantizers = _quantizers(folder)
    head = _head("transformers", base, "quantized" if quantizers else None, [spec["name"] for spec in quantizers])
    use = f"""\
import llmtools{"  # registers the quantization method with transformers" if quantizers else ""}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""
    rows = {"base model": _called(base)}
    if quantizers:
        rows |= {
            "quantizer": "; ".join(map(_spec, quantizers)),
            **_chosen(info),
            "bits per weight": _bits(info),
            "calibration data": _calibration(info),
            "errors of the quantized layers": _errors(info),
        }
    else:
        rows["weights"] = "dense, not quantized"
    rows |= {"adapters": _beside(folder), "measured quality": _quality(results), "made with": _versions(info)}
    what = "A language model with quantized linear layers." if quantizers else "A language model with dense weights."
    return _page(head, name, what, rows, use, results)


def _chosen(info: Mapping[str, Any]) -> dict[str, str]:
    """The row of a quality, with the options that it stood for; {} where none was chosen."""
    quality = info.get("quality")
    return {"quality": f"{quality['name']}: `{quality['options']}`"} if isinstance(quality, Mapping) else {}


def _beside(folder: Path) -> str:
    """The adapter in a model's folder."""
    recovered = (folder / "adapter").exists()
    return "`adapter`, trained on the original's distributions" if recovered else "none in this folder"


def _gguf_card(folder: Path, name: str, file: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The card of a folder with a model as one GGUF file, into which an adapter was merged, or that was recovered."""
    info = read_info(folder)
    base = str(info.get("base_model") or "")
    merged = info.get("merged") or {}
    types = sorted({str(spec.get("type")) for spec in info.get("quantizers") or ()})
    repo = _hub_repo(base)
    rows = {
        "base model": f"[{repo}](https://huggingface.co/{repo})"
        if repo
        else f"a local file `{Path(base or file).name}`",
        "quantizer": f"gguf (types {', '.join(types)})" if types else UNKNOWN,
        "bits per weight": _bits(info),
        "adapters": f"merged by {merged.get('how', UNKNOWN)}" if merged else _beside(folder),
        "measured quality": _quality(results),
        "made with": _versions(info),
    }
    use = f"""\
import llmtools

model, tokenizer = llmtools.load("{name}", gguf_file="{file}")  # its weights stay in their blocks"""
    head = _head("gguf", repo, "quantized", ["gguf"])
    commands = f'llama-cli -m {file} -p "…"   # llama.cpp'
    return _page(head, name, "A language model as a GGUF file.", rows, use, results, commands=commands)


def _adapter_card(folder: Path, name: str, base_name: str | None, results: Sequence[Mapping[str, Any]]) -> str:
    config, info = read_json(folder / "adapter_config.json"), read_info(folder)
    base = hub_base(base_name, config) or config.get("base_model_name_or_path")
    if str(base or "").endswith(".gguf"):
        return _gguf_adapter_card(folder, name, str(base), results)
    local = Path(str(config.get("base_model_name_or_path") or "")).expanduser()  # the base model, if it is still there
    known = local.is_dir() and (local / "config.json").exists()
    load = facts_of(info).get("base", {}).get("loaded as")  # which the base model's own files do not say
    quantizers = [{"name": load, "by": "bitsandbytes, while loading"}] if load else _quantizers(local) if known else []
    base_info = read_info(local) if known and not load else {}
    dense = "none: its weights are dense" if known else UNKNOWN
    calibration = NO_DATA if load else _calibration(base_info) if quantizers else dense
    kind = str(config.get("peft_type") or "LoRA").lower()
    base_id = _hub_name(base) or (Path(base).name if base else "…")
    if load:
        use = f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

config = BitsAndBytesConfig({_LOADED.get(load, "…")})  # as when the adapter was trained
model = AutoModelForCausalLM.from_pretrained("{base_id}", quantization_config=config)  # the base model
model = PeftModel.from_pretrained(model, "{name}")"""
    else:
        use = f"""\
import llmtools  # registers the base model's quantization method with transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base_id}")  # the base model
model = PeftModel.from_pretrained(model, "{name}")"""
    if info.get("merge") == "exact":
        use = _exact_use(name)
    rows = {
        "base model": _called(base),
        "quantizer of the base model": "; ".join(map(_spec, quantizers)) or dense,
        "bits per weight of the base model": _bits(base_info) if quantizers else dense,
        "calibration data of the base model": calibration,
        **_trained(config, info, results),
    }
    head = _head("peft", base, "adapter", [kind, *(spec["name"] for spec in quantizers)])
    return _page(head, name, _ADAPTER, rows, use, results, _plot(folder))


_MERGES = {
    "exact": "; trained through the rounding to the base's codes (`--merge exact`)",
    "zeros": "; constant in each quantization group, `llmtools merge` puts it into zero points (`--merge zeros`)",
}
_ADAPTER = "An adapter for a language model; the base model is not included."


def _gguf_adapter_card(folder: Path, name: str, base: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The card of an adapter on a GGUF file. base: the file's path, or ``owner/name/FILE.gguf``."""
    config, info = read_json(folder / "adapter_config.json"), read_info(folder)
    known, file = facts_of(info).get("base", {}), Path(base).name
    repo = _hub_repo(base)
    inside = base.removeprefix(f"{repo}/")
    opened = f'"{repo}", gguf_file="{inside}"' if repo else f'"{file}"'
    model = base if repo else file
    use = f"""\
import llmtools
from peft import PeftModel

model, tokenizer = llmtools.load({opened})  # the base model, whose weights stay in their blocks
model = PeftModel.from_pretrained(model, "{name}")"""
    if info.get("merge") == "exact":
        use = _exact_use(name)
    commands = f"""\
llmtools generate --model {model} --adapter {folder.name} --prompt "…"
llmtools export --model {model} --adapter {folder.name} --format gguf --out adapter.gguf
llama-cli -m {file} --lora adapter.gguf -p "…"   # llama.cpp, on the same file"""
    if info.get("merge") == "exact":
        commands = f"""\
llmtools merge --model {model} --adapter {folder.name} --out MERGED
llama-cli -m MERGED/{file} -p "…"   # llama.cpp, on the merged file"""
    bits = known.get("bits per weight")
    rows = {
        "base model": f"`{inside}` of [{repo}](https://huggingface.co/{repo})" if repo else f"a local file `{file}`",
        "SHA-256 of the base model's file": f"`{known['sha256']}`" if "sha256" in known else UNKNOWN,
        "quantizer of the base model": f"gguf (types {', '.join(known['types'])})" if "types" in known else "gguf",
        "bits per weight of the base model": UNKNOWN if bits is None else f"{bits:.2f}, including scales",
        "calibration data of the base model": UNKNOWN,
        **_trained(config, info, results),
    }
    head = _head("peft", repo, "adapter", [str(config.get("peft_type") or "LoRA").lower(), "gguf"])
    return _page(head, name, _ADAPTER, rows, use, results, _plot(folder), commands)


def _exact_use(name: str) -> str:
    return f"""\
import llmtools  # PEFT alone would open it as a plain LoRA, which is not what was trained

model, tokenizer = llmtools.load("{name}")  # base and adapter, rounded to the base's own codes
# llmtools merge --adapter {name} --out MERGED   writes these codes as an ordinary checkpoint"""


def _trained(
    config: Mapping[str, Any], info: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """The rows about an adapter and its training."""
    return {
        "adapters": _adapter(config) + _MERGES.get(str(info.get("merge")), ""),
        "trained on": _training(info),
        "losses": _losses(info),
        "measured quality": _quality(results),
        "made with": _versions(info),
    }


def _plot(folder: Path) -> str:
    return f"\n![training and validation loss over the steps]({LOSSES})\n" * (folder / LOSSES).exists()


# ------------------------------------------------------------------------------------------------------ the page itself


def _head(library: str, base: str | None, relation: str | None, tags: Sequence[str]) -> dict[str, Any]:
    head: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if hub := _hub_name(base):
        head["base_model"] = hub
        if relation:
            head["base_model_relation"] = relation
    return head | {"tags": list(dict.fromkeys(["llmtools", *tags]))}


def _page(
    head: Mapping[str, Any],
    name: str,
    what: str,
    rows: Mapping[str, str],
    use: str,
    results: Sequence[Mapping[str, Any]],
    plot: str = "",
    commands: str = "",
) -> str:
    table = "\n".join(f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items())
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())  # JSON is YAML
    shell = f"\n```sh\n{commands}\n```\n" if commands else ""
    return f"""\
---
{front}
---
{MARKER}

# {name}

{what} Made with `llmtools`. "Unknown" means not recorded.

| | |
|---|---|
{table}

```python
{use}
```
{shell}{plot}{_measures(results)}
The licences of the base model and of the data apply; they are not recorded here.
"""


def _measures(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return ""
    lines = [
        f"| {result['task']} | {result['measure']} | {float(result['value']):.4f} | {_details(result)} |"
        for result in results
    ]
    return "\n" + "\n".join(["| task | measure | value | measured on |", "|---|---|---|---|", *lines]) + "\n"


def _details(result: Mapping[str, Any]) -> str:
    known = {**({"data": data} if (data := _data(result)) else {}), **(result.get("details") or {})}
    details = {key: value for key, value in known.items() if key != result["measure"]}
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in details.items()
             if isinstance(value, str | int | float)]  # fmt: skip
    return ", ".join(shown) or UNKNOWN


# ---------------------------------------------------------------------------------------------- contents of the files


def _quantizers(folder: Path) -> list[dict[str, Any]]:
    """The quantizers in the quantization config of ``config.json``, of llmtools or of another method."""
    config = read_json(folder / "config.json").get("quantization_config") or {}
    if config.get("quant_method") not in (None, "llmtools"):
        return [{"name": str(config["quant_method"]), **({"bits": config["bits"]} if "bits" in config else {})}]
    return [dict(spec) for spec in config.get("quantizers") or ()]


def _spec(spec: Mapping[str, Any]) -> str:
    """``optq (bits 3, group_size 64, …)``."""
    options = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "name" and value is not None)
    return f"{spec['name']} ({options})" if options else str(spec["name"])


def _bits(info: Mapping[str, Any]) -> str:
    bits = info.get("bits_per_weight")
    if bits is None:
        return UNKNOWN
    size = _totals(info).get("packed_bytes")
    stored = "" if size is None else f"; {size / 2**20:.2f} MiB of packed weights"
    return f"{bits:.2f}, including scales and all other stored tensors{stored}"


def _calibration(info: Mapping[str, Any]) -> str:
    known = facts_of(info).get("calibration")
    tokens = {row.get("tokens") for row in (info.get("report") or {}).get("modules") or ()}
    if known:
        seen = f", {max(t or 0 for t in tokens)} tokens" if tokens - {None} else ""
        windows, seed = known.get("windows", "?"), known.get("seed", "?")
        return f"{Path(str(known['text'])).name}: {windows} windows{seen}, seed {seed}"
    if tokens and tokens <= {None}:
        return NO_DATA
    if tokens:
        return f"{max(t or 0 for t in tokens)} tokens of a text that was not recorded"
    return UNKNOWN


def _errors(info: Mapping[str, Any]) -> str:
    totals = _totals(info)
    if totals.get("relative_error") is None:
        return UNKNOWN
    outputs = totals.get("relative_proxy_loss")
    of_outputs = "" if outputs is None else f", squared error of the outputs {outputs:.4f}"
    return f"relative to the dense layers, mean: weights {totals['relative_error']:.4f}{of_outputs}"


def _totals(info: Mapping[str, Any]) -> dict[str, Any]:
    return dict((info.get("report") or {}).get("totals") or {})


def _quality(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return f"{UNKNOWN}: no measurement was recorded"
    return "; ".join(
        f"{result['measure']} {float(result['value']):.4f} on {result['task']}"
        f"{f' (data {data})' if (data := _data(result)) else ''}"
        for result in results
    )


def _data(result: Mapping[str, Any]) -> str | None:
    """The data that a measure was taken on; only the last part of a local path."""
    return Path(str(result["data"])).name if result.get("data") else None


def _adapter(config: Mapping[str, Any]) -> str:
    targets = config.get("target_modules")
    where = ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets or UNKNOWN)
    return (
        f"{config.get('peft_type', 'LORA')}, rank {config.get('r', '?')}, alpha {config.get('lora_alpha', '?')}, "
        f"dropout {config.get('lora_dropout', '?')}, on {where}"
    )


def _training(info: Mapping[str, Any]) -> str:
    known = facts_of(info).get("training")
    if not known:
        return UNKNOWN
    source = Path(str(known["data"])).name if known.get("data") else UNKNOWN
    shown = f", examples {known['examples']}, steps {known['steps']}" if "steps" in known else ""
    return f"{source} (task {known.get('task', UNKNOWN)}){shown}, seed {known.get('seed', UNKNOWN)}"


def _losses(info: Mapping[str, Any]) -> str:
    known = facts_of(info).get("training", {})
    losses = {"training": known.get("training loss"), "validation": known.get("validation loss")}
    return ", ".join(f"{key} {value:.4f}" for key, value in losses.items() if value is not None) or UNKNOWN


def _versions(written: Mapping[str, Any]) -> str:
    versions = written.get("versions") or {}
    used = [f"{key} {versions[key]}" for key in ("llmtools", "torch", "transformers", "peft") if versions.get(key)]
    return ", ".join(used) or UNKNOWN


def _called(base: str | None) -> str:
    """A base model as a link to the hub, or without its local path."""
    if not base:
        return UNKNOWN
    if hub := _hub_name(base):
        return f"[{hub}](https://huggingface.co/{hub})"
    return f"a local folder `{Path(base).name}`"


def _hub_repo(base: str) -> str | None:
    """The repository of ``owner/name/FILE.gguf``; None for a local path."""
    repo = "/".join(base.split("/")[:2])
    return _hub_name(repo) if base.count("/") > 1 and not Path(base).exists() else None


def _hub_name(base: str | None) -> str | None:
    """`base` if it is a name on the hub, not a local folder."""
    return base if base and _HUB_NAME.match(base) and not Path(base).exists() else None
