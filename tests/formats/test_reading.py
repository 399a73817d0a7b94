"""What holds for every checkpoint of others: it opens like ours, trains, is saved as ours, and damage is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import llmtools
from llmtools import CheckpointError
from llmtools.checkpoint.folder import load_model
from llmtools.model.integrity import check_values
from tests.formats import test_awq, test_bitsandbytes, test_compressed_tensors, test_gptq, test_hqq
from tests.formats.writers import assert_planned, write
from tests.models import tiny_ids, tiny_model

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (test_gptq.writer(3, act_order=True), test_gptq.config(3)),
    "awq": (test_awq.gemm, test_awq.config()),
    "bitsandbytes": (test_bitsandbytes.writer("fp4", 64, "usual"), test_bitsandbytes.CONFIG),
    "hqq": (test_hqq.writer(2, 1), test_hqq.CONFIG),
    "hqq axis 0": (test_hqq.writer(4, 0), test_hqq.CONFIG),
    "compressed-tensors": (test_compressed_tensors.writer(4), test_compressed_tensors.config(4)),
}
WEIGHTS = "model.safetensors"


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    writer, config = KINDS[request.param]
    write(tmp_path / "external", writer, config | {"an_unknown_key": {"kept": [1, 2]}})
    return tmp_path / "external"


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    write(tmp_path / "external", *KINDS["gptq"])
    return tmp_path / "external"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits


def test_it_is_saved_as_ours_and_remembers_where_it_came_from(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = llmtools.load(folder)
    assert not model.training and model.name_or_path == str(folder)
    back, _ = llmtools.load(llmtools.save(model, tokenizer, tmp_path / "ours"))
    assert torch.equal(logits(back), logits(model))
    told = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "llmtools" and told["origin"]["an_unknown_key"] == {"kept": [1, 2]}


def test_a_step_on_it_is_planned(folder: Path) -> None:
    assert_planned(folder)


def test_adapters_train_on_it(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = llmtools.load(folder)
    adapted = get_peft_model(llmtools.prepare_for_training(model), LoraConfig(target_modules="all-linear", r=2))
    ids = tiny_ids()
    losses = []
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_type_of_the_model_can_be_chosen(folder: Path) -> None:
    model, _ = llmtools.load(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.isfinite(logits(model)).all()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Kind → folder and logits."""
    root = tmp_path_factory.mktemp("written")
    for kind in ("gptq", "awq"):
        write(root / kind, *KINDS[kind])
    return {kind: (root / kind, logits(load_model(root / kind))) for kind in ("gptq", "awq")}


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj"
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a tensor is missing": (lambda t: t.pop(f"{UP}.scales"), "scales is missing"),
    "a marker is missing": (lambda t: t.pop(f"{UP}.qweight"), "up_proj"),
    "a norm is missing": (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight are missing"),
    "wrong type": (
        lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()}),
        r"is torch\.float32, expected",
    ),
    "wrong shape": (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1].clone()}), "has shape"),
    "an unknown module": (
        lambda t: t.update({"model.layers.9.x.qweight": torch.zeros(1)}),
        r"no module model\.layers\.9",
    ),
    "a bias": (lambda t: t.update({f"{UP}.bias": torch.ones(96)}), "has a bias in the file"),
    "nothing packed": (
        lambda t: [t.pop(name) for name in list(t) if "qweight" in name],
        "no module has a tensor 'qweight'",
    ),
    "a norm of another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(7)}),
        "does not fit its config.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported(damage: str, gptq: Path) -> None:
    change, message = DAMAGE[damage]
    edit(gptq, change)
    with pytest.raises(CheckpointError, match=message):
        llmtools.load(gptq)


def test_truncated_files_and_pickles_are_refused(gptq: Path) -> None:
    content = (gptq / WEIGHTS).read_bytes()
    (gptq / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        llmtools.load(gptq)
    (gptq / WEIGHTS).rename(gptq / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="unpickle nothing"):
        llmtools.load(gptq)
    (gptq / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no .*safetensors file"):
        llmtools.load(gptq)


def test_old_names_of_the_file_and_shards_are_found(gptq: Path, tmp_path: Path) -> None:
    expected = logits(llmtools.load(gptq)[0])
    (gptq / WEIGHTS).rename(gptq / "gptq_model-3bit-32g.safetensors")
    assert torch.equal(logits(llmtools.load(gptq)[0]), expected)

    tensors = load_file(gptq / "gptq_model-3bit-32g.safetensors")
    (gptq / "gptq_model-3bit-32g.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, gptq / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (gptq / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(llmtools.load(gptq)[0]), expected)
    (gptq / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors of the index is missing"):
        llmtools.load(gptq)


def test_methods_that_nobody_knows_are_refused(gptq: Path) -> None:
    config = json.loads((gptq / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "squeezed"
    (gptq / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized by 'squeezed', which neither"):
        llmtools.load(gptq)


def told(folder: Path, quantization: Any) -> None:
    """Makes a folder's config.json say this about its quantization; None takes it out."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(
        json.dumps(config | ({"quantization_config": quantization} if quantization else {}))
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", sorted(set(AUTO_QUANTIZATION_CONFIG_MAPPING) - {"llmtools"}))
def test_every_method_of_transformers_opens_or_is_named_in_one_line_with_a_way_out(method: str, dense: Path) -> None:
    """The tensors are a dense model's, which a method that packs cannot open, wherever its package is installed."""
    told(dense, {"quant_method": method})
    try:
        load_model(dense)
    except CheckpointError as error:
        assert method in str(error) and "\n" not in str(error)
        ours = method in ("awq", "gptq", "hqq", "mxfp4")
        assert ("no module has a tensor" if ours else "give the dense model") in str(error)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", WEIGHTS])
def test_torchao_is_refused_by_name_however_it_was_saved(weights: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / weights)
    told(tmp_path, {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}})
    with pytest.raises(CheckpointError, match="is quantized by torchao, which llmtools does not read; give the dense"):
        llmtools.load(tmp_path)


def test_weights_in_eight_bits_of_another_library_are_not_taken_for_damage(tmp_path: Path) -> None:
    model: Any = tiny_model()
    model.extra = torch.nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
    check_values(model, "a folder")
    model.model.norm.weight.data[0] = float("inf")
    with pytest.raises(CheckpointError, match="infinite"):
        check_values(model, "a folder")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_whose_config_is_silent_opens_by_its_tensors_or_is_refused(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "external", *KINDS[kind])
    expected = logits(load_model(tmp_path / "external"))
    told(tmp_path / "external", None)
    if kind.partition(" ")[0] in ("hqq", "bitsandbytes"):
        assert torch.equal(logits(load_model(tmp_path / "external")), expected)
        return
    writers = "AWQ or GPTQ" if kind in ("gptq", "awq") else "CompressedTensors"
    with pytest.raises(CheckpointError, match=f"quantized weight, as {writers} writes it, and neither config"):
        load_model(tmp_path / "external")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("hqq")])
def test_a_config_without_its_method_is_told_by_its_options(kind: str, tmp_path: Path) -> None:
    writer, config = KINDS[kind]
    write(tmp_path / "external", writer, config)
    expected = logits(load_model(tmp_path / "external"))
    told(tmp_path / "external", {key: value for key, value in config.items() if key != "quant_method"})
    assert torch.equal(logits(load_model(tmp_path / "external")), expected)


@pytest.mark.parametrize("value", ["4", 4.5, True, None, [3], {"a": 1}, "", -3, 0, 99, "absent"], ids=str)
@pytest.mark.parametrize("key", ["bits", "group_size", "quant_method", "desc_act", "checkpoint_format", "pack_dtype"])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_options_of_another_type_open_alike_or_are_one_line(
    kind: str, key: str, value: Any, written: dict[str, tuple[Path, torch.Tensor]]
) -> None:
    config = KINDS[kind][1] | ({} if value == "absent" else {key: value})
    if value == "absent":
        config.pop(key, None)
    folder, expected = written[kind]
    told(folder, config)
    try:
        model = load_model(folder)
    except CheckpointError as error:
        assert "\n" not in str(error) and "Error:" not in str(error)
    else:
        assert torch.equal(logits(model), expected)


SCALE_OF = {
    "gptq": "scales",
    "awq": "scales",
    "bitsandbytes": "weight.nested_absmax",
    "hqq": "zero",
    "hqq axis 0": "scale",
    "compressed-tensors": "weight_scale",
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_and_tensors_too_many_are_refused(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "external", *KINDS[kind])
    tensors = load_file(tmp_path / "external" / WEIGHTS)
    path = "model.layers.1.mlp.down_proj"
    scales = tensors[f"{path}.{SCALE_OF[kind]}"].clone()
    scales.view(-1)[-1] = float("nan")
    for changed, message in (
        ({f"{path}.{SCALE_OF[kind]}": scales}, "NaN or infinite"),
        ({f"{path}.more": torch.zeros(2)}, r"down_proj\.more is in the file"),
    ):
        save_file(tensors | changed, tmp_path / "external" / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            llmtools.load(tmp_path / "external")


@pytest.mark.parametrize(
    "damage",
    [
        5, [], "gptq", {"quant_method": ["gptq"]}, {"quant_method": "nobody"},
        {"quant_method": "gptq", "bits": 3, "dynamic": {"model.*": 5}}, {"quant_method": "gptq", "bits": "x"},
        {"quant_method": "gptq", "bits": 3, "dynamic": [1]}, {"quant_method": "awq", "bits": 4, "version": 5},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": 5}},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"weights": [4]}}},
        {"quant_method": "quip_sharp", "codebook": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_quantization_config_is_one_line(damage: Any, gptq: Path) -> None:
    config = json.loads((gptq / "config.json").read_text()) | {"quantization_config": damage}
    (gptq / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as said:
        llmtools.load(gptq)
    assert "\n" not in str(said.value)
