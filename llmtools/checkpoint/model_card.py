"""The model card of a checkpoint or an adapter: a README.md that any way of sharing carries along.

A card is a function of a folder. It says what the files there say (``config.json``, ``llmtools.json``,
``adapter_config.json``) and what somebody measured, and calls the rest unknown. Paths of this machine stay out of it:
a folder is named by its last part, and only what looks like a name on the hub becomes ``base_model`` in the card's
head, which the hub checks.

Every save writes the card anew, as long as it carries `MARKER`; delete that line to keep your own words.
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
from .run_info import facts_of

CARD = "README.md"
LOSSES = "loss.png"
"""the picture of a run's losses"""
MARKER = "<!-- written by llmtools, and written anew with the next save; delete this line to keep your own words -->"
UNKNOWN = "unknown"
NO_DATA = "none: the quantizer saw no data"
_LOADED = {
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
    "int8": "load_in_8bit=True",
}
_PEFT_PLACEHOLDER = "[More Information Needed]"
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def write_card(folder: Path, *, name: str | None = None, former: Path | None = None) -> None:
    """Writes the card of what lies in `folder`, unless there is one in somebody's own words.

    name: what the card calls the thing; by default the folder's name.
    former: the folder that this one is going to replace. A card in somebody's own words is taken over from there.
    """
    path = folder / CARD
    if former is not None and (former / CARD).is_file() and not is_ours(former / CARD):
        shutil.copy(former / CARD, path)
    if is_ours(path):
        path.write_text(card(folder, name=name), encoding="utf-8")


def is_ours(path: Path) -> bool:
    """Whether a card may be written here: there is none, it is one of ours, or PEFT's empty form."""
    if not path.exists():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return MARKER in text or _PEFT_PLACEHOLDER in text


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

    Raises InputError where the folder holds neither, or a file in it is not JSON.
    """
    name = name or folder.resolve().name
    damaged = f"the card of {folder} cannot be written: what llmtools.json or a config says is damaged"
    with opening(damaged, error=InputError):
        if (folder / "adapter_config.json").exists():
            return _adapter_card(folder, name, base_name, results)
        if (folder / "config.json").exists():
            return _model_card(folder, name, base_name, results)
    raise InputError(f"{folder} holds neither a model (config.json) nor an adapter (adapter_config.json)")


def _model_card(folder: Path, name: str, base_name: str | None, results: Sequence[Mapping[str, Any]]) -> str:
    info = read_info(folder)
    base = base_name or info.get("base_model")
    quantizers = _quantizers(folder)
    head = _head("transformers", base, "quantized" if quantizers else None, [spec["name"] for spec in quantizers])
    use = f"""\
import llmtools{"  # teaches transformers to open this checkpoint" if quantizers else ""}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""
    rows = {"base model": _called(base)}
    if quantizers:
        rows |= {
            "quantizer": "; ".join(map(_spec, quantizers)),
            "bits per weight": _bits(info),
            "calibration data": _calibration(info),
            "errors of the quantized layers": _errors(info),
        }
    else:
        rows["weights"] = "dense, not quantized"
    rows |= {"adapters": "none in this folder", "measured quality": _quality(results), "made with": _versions(info)}
    what = "A language model with quantized linear layers." if quantizers else "A language model with dense weights."
    return _written(head, name, what, rows, use, results)


def _adapter_card(folder: Path, name: str, base_name: str | None, results: Sequence[Mapping[str, Any]]) -> str:
    config, info = read_json(folder / "adapter_config.json"), read_info(folder)
    base = base_name or config.get("base_model_name_or_path")
    under = Path(str(config.get("base_model_name_or_path") or "")).expanduser()  # the model here, if it is still here
    known = under.is_dir() and (under / "config.json").exists()
    load = facts_of(info).get("base", {}).get("loaded as")  # of which the base's own files know nothing
    quantizers = [{"name": load, "by": "bitsandbytes, while it loads"}] if load else _quantizers(under) if known else []
    base_info = read_info(under) if known and not load else {}
    dense = "none: its weights are dense" if known else UNKNOWN
    calibration = NO_DATA if load else _calibration(base_info) if quantizers else dense
    kind = str(config.get("peft_type") or "LoRA").lower()
    called = _hub_name(base) or (Path(base).name if base else "…")
    if load:
        use = f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

config = BitsAndBytesConfig({_LOADED.get(load, "…")})  # as when the adapter was trained
model = AutoModelForCausalLM.from_pretrained("{called}", quantization_config=config)  # the base model
model = PeftModel.from_pretrained(model, "{name}")"""
    else:
        use = f"""\
import llmtools  # teaches transformers to open the quantized base model
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{called}")  # the base model
model = PeftModel.from_pretrained(model, "{name}")"""
    rows = {
        "base model": _called(base),
        "quantizer of the base model": "; ".join(map(_spec, quantizers)) or dense,
        "bits per weight of the base model": _bits(base_info) if quantizers else dense,
        "calibration data of the base model": calibration,
        "adapters": _adapter(config),
        "trained on": _training(info),
        "losses": _losses(info),
        "measured quality": _quality(results),
        "made with": _versions(info),
    }
    head = _head("peft", base, "adapter", [kind, *(spec["name"] for spec in quantizers)])
    what = "An adapter for a language model; the base model is not in here."
    picture = f"\n![training and validation loss over the steps]({LOSSES})\n" * (folder / LOSSES).exists()
    return _written(head, name, what, rows, use, results, picture)


# ------------------------------------------------------------------------------------------------------ the page itself


def _head(library: str, base: str | None, relation: str | None, tags: Sequence[str]) -> dict[str, Any]:
    head: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if hub := _hub_name(base):
        head["base_model"] = hub
        if relation:
            head["base_model_relation"] = relation
    return head | {"tags": list(dict.fromkeys(["llmtools", *tags]))}


def _written(
    head: Mapping[str, Any],
    name: str,
    what: str,
    rows: Mapping[str, str],
    use: str,
    results: Sequence[Mapping[str, Any]],
    picture: str = "",
) -> str:
    table = "\n".join(f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items())
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())  # JSON is YAML
    return f"""\
---
{front}
---
{MARKER}

# {name}

{what} Made with `llmtools`. What this page calls unknown was not recorded.

| | |
|---|---|
{table}

```python
{use}
```
{picture}{_measures(results)}
The licence is that of the base model and of the data it was made with; this page does not know it.
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
    told = {**({"data": data} if (data := _data(result)) else {}), **(result.get("details") or {})}
    details = {key: value for key, value in told.items() if key != result["measure"]}
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in details.items()
             if isinstance(value, str | int | float)]  # fmt: skip
    return ", ".join(shown) or UNKNOWN


# ------------------------------------------------------------------------------------------------ what the files say


def _quantizers(folder: Path) -> list[dict[str, Any]]:
    """The quantizers that ``config.json`` lists: the truth about the weights, whoever wrote them."""
    told = read_json(folder / "config.json").get("quantization_config") or {}
    if told.get("quant_method") not in (None, "llmtools"):
        return [{"name": str(told["quant_method"]), **({"bits": told["bits"]} if "bits" in told else {})}]
    return [dict(spec) for spec in told.get("quantizers") or ()]


def _spec(spec: Mapping[str, Any]) -> str:
    """``optq (bits 3, group_size 64, …)``: the options that a reader compares, of all that there are."""
    options = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "name" and value is not None)
    return f"{spec['name']} ({options})" if options else str(spec["name"])


def _bits(info: Mapping[str, Any]) -> str:
    bits = info.get("bits_per_weight")
    if bits is None:
        return UNKNOWN
    size = _totals(info).get("packed_bytes")
    stored = "" if size is None else f"; {size / 2**20:.2f} MiB of packed weights"
    return f"{bits:.2f}, with scales and everything else that is stored{stored}"


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
    return f"relative to what was there, mean over layers: weights {totals['relative_error']:.4f}{of_outputs}"


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
    """What a measure was taken on; of a file or folder the last part alone, like all that is on this machine."""
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
    """A base model as a reader elsewhere can understand it."""
    if not base:
        return UNKNOWN
    if hub := _hub_name(base):
        return f"[{hub}](https://huggingface.co/{hub})"
    return f"a folder called `{Path(base).name}` on the machine of whoever made this"


def _hub_name(base: str | None) -> str | None:
    """`base` if it is a name on the hub, and not a folder here."""
    return base if base and _HUB_NAME.match(base) and not Path(base).exists() else None
