"""An adapter is opened whole, on a model that it fits, or not at all; and its files never run code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmtools
from llmtools import CheckpointError
from llmtools.checkpoint.folder import skeleton
from llmtools.model.adapter_files import check_fits, open_adapter
from tests.fuzz.seeds import make_seeds
from tests.models import tiny_ids, tiny_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`rtn`, a quantized model, and `adapter`, trained on it; not to be changed."""
    place = tmp_path_factory.mktemp("adapters")
    make_seeds(place)
    return place


@pytest.fixture
def adapter(seeds: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(seeds / "adapter", tmp_path / "adapter"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


def test_an_adapter_opens_as_stock_peft_opens_it(seeds: Path) -> None:
    from peft import PeftModel

    ours = open_adapter(llmtools.load(seeds / "rtn")[0], seeds / "adapter")
    stock = PeftModel.from_pretrained(llmtools.load(seeds / "rtn")[0], str(seeds / "adapter"))
    alone, _ = llmtools.load(seeds / "rtn")
    by_its_folder = llmtools.checkpoint.folder.load_model(seeds / "adapter")
    with torch.no_grad():
        ids = tiny_ids()
        logits = [model(input_ids=ids).logits for model in (ours, stock, by_its_folder, alone)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[3])


def test_the_head_multiplies_the_last_tokens_of_a_batch_at_once(seeds: Path) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                found.append(tuple(out.shape))
            return out

    found: list[tuple[int, ...]] = []
    model = llmtools.checkpoint.folder.load_model(seeds / "adapter")
    ids = torch.cat([tiny_ids()] * 3)
    with torch.no_grad(), Shapes():
        logits = model(input_ids=ids, logits_to_keep=1).logits
        assert logits.shape[:2] == (len(ids), 1)
        assert (len(ids), logits.shape[-1]) in found  # one product, not one for each sequence
        assert (len(ids), 1, logits.shape[-1]) not in found
        torch.testing.assert_close(logits, model(input_ids=ids).logits[:, -1:])


LOST: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "a layer": lambda t: {k: v for k, v in t.items() if ".layers.1." not in k},
    "half of the pairs": lambda t: {k: v for k, v in t.items() if "up_proj.lora_A" not in k},
    "all": lambda t: {},
    "other names": lambda t: {k.replace("base_model.model.", "base_model.model._orig_mod."): v for k, v in t.items()},
    "another wrapper": lambda t: {k.replace("model.layers", "model.language_model.layers"): v for k, v in t.items()},
    "one more": lambda t: {**t, "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(2, 64)},
    "another rank": lambda t: {k: v[:1] if "lora_A" in k else v for k, v in t.items()},
    "a number": lambda t: {k: v * float("nan") if "layers.0.mlp.up_proj.lora_B" in k else v for k, v in t.items()},
}  # fmt: skip


@pytest.mark.parametrize("lost", LOST)
def test_an_adapter_that_is_not_whole_is_refused(seeds: Path, adapter: Path, lost: str) -> None:
    edit(adapter, LOST[lost])
    with pytest.raises(CheckpointError, match="adapter"):
        open_adapter(llmtools.load(seeds / "rtn")[0], adapter)
    if lost != "a number":
        with pytest.raises(CheckpointError, match="adapter"):
            check_fits(skeleton(seeds / "rtn"), adapter)


def test_a_whole_adapter_fits_the_shape_of_its_base_and_not_another(seeds: Path) -> None:
    check_fits(skeleton(seeds / "rtn"), seeds / "adapter")
    with pytest.raises(CheckpointError, match="does not fit"):
        check_fits(tiny_model("llama", num_hidden_layers=1), seeds / "adapter")
    with pytest.raises(CheckpointError, match="does not fit"):
        check_fits(tiny_model("opt"), seeds / "adapter")


@pytest.mark.parametrize("kind", ["whole", "hostile"])
def test_a_pickled_adapter_is_refused(seeds: Path, adapter: Path, kind: str) -> None:
    ran = adapter / "ran"
    if kind == "whole":
        torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    else:
        (adapter / "adapter_model.bin").write_bytes(b'cos\nsystem\n(S"touch ' + str(ran).encode() + b'"\ntR.')
    (adapter / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, which is a pickle"):
        open_adapter(llmtools.load(seeds / "rtn")[0], adapter)
    assert not ran.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "([a-z._0-9]+)+!"},
        {"rank_pattern": {"([a-z._0-9]+)+!": 4}},
        {"exclude_modules": "([a-z._0-9]+)+!"},
        {"target_modules": "("},
    ],
    ids=str,
)
def test_patterns_that_do_not_end_are_refused(
    seeds: Path, adapter: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtools.model.adapter_files.PATTERN_SECONDS", 0.3)
    configure(adapter, **changes)
    with pytest.raises(CheckpointError, match=r"pattern|regular expression"):
        open_adapter(llmtools.load(seeds / "rtn")[0], adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"megatron_config": {}, "megatron_core": "antigravity"},
        {"megatron_core": "some.module"},
        {"tokenizer_kwargs": {"trust_remote_code": True}},
    ],
    ids=str,
)
def test_options_that_run_code_are_refused(seeds: Path, adapter: Path, changes: dict[str, Any]) -> None:
    configure(adapter, **changes)
    with pytest.raises(CheckpointError, match="would run code"):
        open_adapter(llmtools.load(seeds / "rtn")[0], adapter)


def test_an_adapters_bits_are_verified(seeds: Path, adapter: Path) -> None:
    model, _ = llmtools.load(seeds / "rtn")
    data = bytearray((adapter / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (adapter / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} was changed"):
        open_adapter(model, adapter, verify=True)
    open_adapter(model, adapter)


@pytest.mark.parametrize(
    "run",
    [
        {"words": 5},
        {"words": {"template": 5}},
        {"words": {"template": {"prompt": 1}}},
        {"recipe": "x"},
        {"recipe": {"options": 3}},
        [],
    ],
    ids=str,
)
def test_a_damaged_run_json_is_named(adapter: Path, run: Any) -> None:
    from llmtools import InputError
    from llmtools.checkpoint.loading import options_of, prompt_format_of

    (adapter / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"run\.json"):
        prompt_format_of(str(adapter)), options_of(str(adapter), "text")


@pytest.mark.parametrize("template", ["{x", "{x.__class__}", "{x:>99999999999}", "{x!r}", "{}", "{x[0]}"])
def test_a_template_of_a_file_only_fills_in_names(template: str) -> None:
    from llmtools import InputError
    from llmtools.data.tasks.base import Template

    with pytest.raises(InputError, match="template"):
        Template(template, "").fill({"x": "1"})
    assert Template("{{x}} {x}", "").fill({"x": "1"})["prompt"] == "{x} 1"
