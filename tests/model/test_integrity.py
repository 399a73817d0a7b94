"""What is checked on opening: counts before anything is built, unexpected tensors, numbers, checksums."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmtools
from llmtools import CheckpointError
from llmtools.model.integrity import Header, check_config
from tests.fuzz.seeds import _tokenizer
from tests.models import tiny_ids, tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of four kinds, not to be changed."""
    place, tokenizer = tmp_path_factory.mktemp("integrity"), _tokenizer()
    made = {}
    for name, options in {
        "rtn": {"bits": 4, "group_size": 32},
        "optq": {"bits": 3, "group_size": 32, "act_order": True},
        "awq": {"bits": 4, "group_size": 32},
        "nf4": {"double_quantization": True},
    }.items():
        model = tiny_model("qwen3" if name == "awq" else "llama")
        data = [tiny_ids(seed=1)] if llmtools.quantizers.get(name).needs_hessian else None
        llmtools.quantize(model, name, data, **options)
        made[name] = llmtools.save(model, tokenizer, place / name)
    made["dense"] = llmtools.save(tiny_model(), tokenizer, place / "dense")
    return made


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# ---- before anything is built ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtn", "dense"])
@pytest.mark.parametrize("key", ["num_hidden_layers", "head_dim", "intermediate_size"])
def test_a_config_that_asks_for_more_than_the_files_hold_is_refused(
    copy: Callable[[str], Path], name: str, key: str
) -> None:
    folder = copy(name)
    edit_config(folder, lambda config: config.update({key: 100_000_000}))
    with pytest.raises(CheckpointError, match=f"{key}=100000000"):
        llmtools.load(folder)


def test_counts_are_found_wherever_a_config_has_them() -> None:
    headers = {"model.layers.1.mlp.weight": Header([8, 4], "F32"), "model.experts.w": Header([16, 8, 4], "F32")}
    for config in (
        {"text_config": {"n_layer": 100_000}},
        {"vision_config": {"depths": [2, 100_000]}},
        {"num_local_experts": 1_000_000},
        {"encoder_layers": 10**6},
        {"num_labels": 10**9},
        {"text_config": {"hidden_size": 10**9}},
    ):
        with pytest.raises(CheckpointError, match="do not belong together"):
            check_config(config, headers, "here")
    check_config(
        {"num_hidden_layers": 2, "num_experts": 16, "vocab_size": 10**7, "sliding_window": 10**9}, headers, "here"
    )
    with pytest.raises(CheckpointError, match="no model has more"):
        check_config({"num_hidden_layers": 100_000}, None, "owner/name")


def test_an_attention_from_the_hub_is_code_and_refused() -> None:
    with pytest.raises(CheckpointError, match="code from the hub"):
        check_config({"text_config": {"_attn_implementation": "owner/kernel"}}, None, "here")


# ---- tensors and the model of config.json ----------------------------------------------------------------------------


def test_a_quantizer_that_is_said_to_store_less_than_the_file_holds_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("rtn")
    edit_config(folder, lambda config: config["quantization_config"]["quantizers"][0].update(symmetric=True))
    with pytest.raises(CheckpointError, match=r"qzeros is in the file and not in the layout"):
        llmtools.load(folder)


@pytest.mark.parametrize("name", ["rtn", "dense"])
def test_fewer_layers_than_the_files_hold_are_refused(copy: Callable[[str], Path], name: str) -> None:
    folder = copy(name)

    def one_layer(config: dict[str, Any]) -> None:
        config["num_hidden_layers"] = 1
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:1]
        for path in list(config.get("quantization_config", {}).get("modules", {})):
            if ".layers.1." in path:
                del config["quantization_config"]["modules"][path]

    edit_config(folder, one_layer)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..* not in the model"):
        llmtools.load(folder)


def test_whoever_asks_for_fewer_layers_gets_them(folders: dict[str, Path]) -> None:
    assert len(llmtools.load(folders["dense"], num_hidden_layers=1)[0].model.layers) == 1


def test_other_tensors_of_a_dense_model_are_said_and_of_ours_refused(
    copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("dense", "rtn"):
        edit_tensors(folder := copy(name), lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))
        with caplog.at_level(logging.WARNING, "llmtools"):
            if name == "rtn":
                with pytest.raises(CheckpointError, match=r"model\.extra.*not in the model"):
                    llmtools.load(folder)
            else:
                llmtools.load(folder)
                assert "model.extra" in caplog.text


def test_misshapen_dense_tensors_are_named_with_both_shapes(copy: Callable[[str], Path]) -> None:
    edit_config(folder := copy("dense"), lambda config: config.update(vocab_size=511))
    with pytest.raises(CheckpointError, match=r"has shape \[512, 64\] in the files, expected \[511, 64\]"):
        llmtools.load(folder)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rtn", "scales"), ("optq", "scales"), ("awq", "input_scales"), ("nf4", "nested_scales"),
        ("nf4", "nested_offset"), ("rtn", "model.norm.weight"), ("dense", "embed_tokens.weight"),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_refused(copy: Callable[[str], Path], name: str, kind: str, value: float) -> None:
    folder = copy(name)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        key = sorted(key for key in tensors if key.endswith(kind))[-1]
        tensors[key].view(-1)[-1] = value

    edit_tensors(folder, damage)
    with pytest.raises(CheckpointError, match=rf"{kind.rpartition('.')[2]} holds NaN or infinite values"):
        llmtools.load(folder)


@pytest.mark.parametrize("value", [-1, 2**31 - 1, 64, "twice"], ids=str)
def test_a_permutation_that_is_none_is_refused(copy: Callable[[str], Path], value: Any) -> None:
    folder = copy("optq")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        perm = tensors["model.layers.1.self_attn.q_proj.perm"]
        perm[3] = perm[4] if value == "twice" else value

    edit_tensors(folder, damage)
    with pytest.raises(CheckpointError, match=r"q_proj\.perm is no permutation of 64 columns"):
        llmtools.load(folder)


# ---- checksums -------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_by_verifying_and_only_then(
    copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy("rtn")
    llmtools.load(folder, verify=True)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING, "llmtools"):
        llmtools.load(folder)
        assert not caplog.text
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
        llmtools.load(folder, verify=True)


def test_a_changed_config_is_said_whenever_it_is_opened(
    copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy("rtn")
    edit_config(folder, lambda config: config.update(rms_norm_eps=1e-3))
    with caplog.at_level(logging.WARNING, "llmtools"):
        llmtools.load(folder)
    assert "config.json was changed since llmtools wrote" in caplog.text
    with pytest.raises(CheckpointError, match=r"config\.json was changed"):
        llmtools.load(folder, verify=True)


def test_folders_without_checksums_cannot_be_verified(copy: Callable[[str], Path]) -> None:
    (folder := copy("dense")).joinpath("llmtools.json").unlink()
    llmtools.load(folder)
    with pytest.raises(CheckpointError, match="no checksums to verify"):
        llmtools.load(folder, verify=True)


# ---- templates and settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'a' * 99999999999 }}",
    ],
    ids=["time", "doubling", "memory"],
)
def test_a_chat_template_that_does_not_end_is_refused(
    template: str, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtools.checkpoint.folder.TEMPLATE_SECONDS", 0.5)
    (folder := copy("rtn")).joinpath("chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match="chat template does not terminate"):
        llmtools.load(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("generation_config.json", "eos_token_id", "x"),
        ("generation_config.json", "eos_token_id", 2**70),
        ("generation_config.json", "output_hidden_states", [1]),
        ("tokenizer_config.json", "model_max_length", "x"),
    ],
)
def test_settings_of_another_type_are_refused(copy: Callable[[str], Path], file: str, key: str, value: Any) -> None:
    folder = copy("rtn")
    config = json.loads((folder / file).read_text()) | {key: value}
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=key):
        llmtools.load(folder)
