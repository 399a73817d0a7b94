"""``finetune --merge exact`` and `merge`: what was trained is what is written, in the base's own format and bits."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")

import peft

import llmtools
from llmtools.checkpoint.folder import load_model
from llmtools.errors import CheckpointError, InputError
from llmtools.model.adapter_files import merged_as, open_adapter
from llmtools.model.exact_lora import exact_layers, register
from llmtools.nn import quantized_linears
from llmtools.recipes.export import Export, export
from llmtools.recipes.finetune import Finetune, Lora, finetune
from llmtools.recipes.merge import Merge, merge
from llmtools.recipes.quantize import Quantize, quantize
from llmtools.train.adapters import fit_config, lora_config
from tests.formats import test_awq, test_compressed_tensors, test_gptq, test_hqq
from tests.formats.writers import write
from tests.models import tiny_ids, training_rows

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 2, "max_length": 48, "learning_rate": 2e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training_rows(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="module")
def base(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "q"
    quantize(Quantize(model=str(stories), out=str(out), quantizer="rtn", bits=3, group_size=32))
    return out


def recipe(base: Path, data: str, out: Path, **changes: Any) -> Finetune:
    options = {"training": TRAINING, "lora": Lora(r=4), "merge": "exact"} | changes
    return Finetune(model=str(base), data=data, out=str(out), **options)


@pytest.fixture(scope="module")
def trained(base: Path, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "a"
    finetune(recipe(base, data, out, merge_warmup=0.25))
    return out


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids() if ids is None else ids).logits


def adapter_on(base: str, folder: Path, **options: Any) -> torch.Tensor:
    """Writes an exact adapter of random numbers on a base; returns the logits of base and adapter."""
    model = load_model(base)
    adapted: Any = peft.get_peft_model(model, register(peft.LoraConfig(r=4, target_modules="all-linear", **options)))
    adapted.peft_config["default"].base_model_name_or_path = base
    with torch.no_grad():
        for layer in exact_layers(adapted).values():
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            b.copy_(torch.randn(b.shape))
            b *= 0.3 * layer.base_layer.dequantize().float().norm() / (layer.scaling["default"] * b @ a).norm()
    adapted.save_pretrained(folder)
    (folder / "llmtools.json").write_text(json.dumps({"merge": "exact"}))
    return logits(adapted.eval())


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_adapter_is_a_plain_peft_folder_that_knows_how_it_was_trained(trained: Path, base: Path) -> None:
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["peft_type"], config["lora_dropout"]) == ("LORA", 0.0)
    assert all(
        ".lora_A.weight" in name or ".lora_B.weight" in name
        for name in load_file(trained / "adapter_model.safetensors")
    )
    assert merged_as(trained) == "exact" and merged_as(base) is None
    for checkpoint in (trained / "checkpoints").glob("checkpoint-*"):
        assert merged_as(checkpoint) == "exact"
    assert "--merge exact" in (trained / "README.md").read_text()
    plain = peft.PeftModel.from_pretrained(load_model(base), str(trained))
    assert not torch.equal(logits(plain.eval()), logits(load_model(trained)))


def test_what_was_trained_is_what_is_merged(trained: Path, base: Path, tmp_path: Path, stories: Path) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text("One day Tom had a red ball. " * 60)
    result = merge(Merge(adapter=str(trained), out=str(tmp_path / "m"), data=str(text), max_length=64))
    assert result.how == "exact" and result.rounding_error is None
    found = result.comparison
    assert found is not None and found.kl == pytest.approx(0, abs=1e-6)
    assert found.values["merged"] == found.values["adapter"]
    merged, adapted = load_model(tmp_path / "m"), load_model(trained)
    assert torch.equal(logits(merged), logits(adapted))
    assert not torch.equal(logits(merged), logits(load_model(base)))
    before, after = quantized_linears(load_model(base)), quantized_linears(merged)
    assert {path: layer.quantizer for path, layer in before.items()} == {
        path: each.quantizer for path, each in after.items()
    }
    for path, layer in before.items():
        for name in ("scales", "qzeros"):
            assert torch.equal(layer.packed[name], after[path].packed[name])


def test_a_merged_folder_is_an_ordinary_checkpoint(trained: Path, data: str, tmp_path: Path) -> None:
    merge(Merge(adapter=str(trained), out=str(tmp_path / "m")))
    assert "rtn" in (tmp_path / "m" / "README.md").read_text()
    expected = logits(load_model(tmp_path / "m", verify=True))
    export(Export(model=str(tmp_path / "m"), format="gptq_v2", out=str(tmp_path / "g")))
    assert torch.equal(logits(load_model(tmp_path / "g")), expected)
    finetune(recipe(tmp_path / "m", data, tmp_path / "a2"))
    assert logits(load_model(tmp_path / "a2")).isfinite().all()
    with pytest.raises(CheckpointError, match=r"other weights|another"):  # the first adapter is of the former base
        open_adapter(load_model(tmp_path / "m"), trained)


def test_the_dense_export_is_of_the_trained_weight(trained: Path, tmp_path: Path) -> None:
    export(Export(adapter=str(trained), format="dense", out=str(tmp_path / "d"), dtype="float32"))
    torch.testing.assert_close(logits(load_model(tmp_path / "d")), logits(load_model(trained)), rtol=1e-4, atol=1e-4)


def test_a_plain_export_is_warned_of(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        export(Export(adapter=str(trained), format="lora", out=str(tmp_path / "l")))
    assert "trained with --merge exact" in caplog.text


def test_a_stopped_run_resumes_with_the_same_bits(trained: Path, base: Path, data: str, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    half = recipe(base, data, tmp_path / "a", merge_warmup=0.25)
    with pytest.raises(BaseException):  # noqa: B017
        finetune(half, callbacks=[Stop()])
    with pytest.raises(InputError, match="merge was 'exact'"):
        finetune(replace(half, resume=True, merge=None, merge_warmup=0.0))
    finetune(replace(half, resume=True))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "a", trained))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge": "exactly"}, "--merge exactly"),
        ({"merge_warmup": 1.0}, "merge_warmup=1.0"),
        ({"merge": None, "merge_warmup": 0.5}, "goes with --merge exact"),
        ({"lora": Lora(dropout=0.1)}, "dropout"),
        ({"lora": Lora(options={"use_dora": True})}, "use_dora"),
        ({"lora": Lora(options={"modules_to_save": ["lm_head"]})}, "modules_to_save"),
        ({"lora": Lora(options={"bias": "all"})}, "bias"),
        (
            {"lora": Lora(target_modules=["embed_tokens", "q_proj"])},
            "embed_tokens: --merge exact trains quantized linears",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_exact_is_refused(
    base: Path, data: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        finetune(recipe(base, data, tmp_path / "a", **changes))
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_not_quantized_is_refused(stories: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not quantized"):
        finetune(recipe(stories, data, tmp_path / "a"))


def test_a_quantizer_that_cannot_encode_is_refused_by_name(
    base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtools.quant import RTN

    monkeypatch.setattr(RTN, "requantizes", lambda self: False)
    with pytest.raises(InputError, match=r"q_proj is quantized by RTN.*requantize"):
        finetune(recipe(base, data, tmp_path / "a"))
    assert not list(tmp_path.iterdir())


def test_dense_linears_are_left_out(stories: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = llmtools.load(stories)
    llmtools.quantize(model, "rtn", bits=4, skip=["*down_proj", "lm_head"])
    config = lora_config(Lora(r=2), merge="exact")
    with caplog.at_level(logging.WARNING):
        fit_config(config, model, Lora(), merge="exact")
    assert "5 linears are not quantized and get no adapter" in caplog.text
    layers = exact_layers(peft.get_peft_model(model, config))
    assert len(layers) == 30 and not any("down_proj" in path for path in layers)


def test_ways_that_do_not_fit_the_training_are_refused(trained: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(trained, tmp_path / "plain")
    for file in (plain / "llmtools.json", plain / "run.json"):
        info = json.loads(file.read_text())
        info.pop("merge", None)
        file.write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"--how exact.*round.*requantize"):
        merge(Merge(adapter=str(plain), out=str(tmp_path / "m"), how="exact"))
    with pytest.raises(InputError, match="trained with --merge exact"):
        merge(Merge(adapter=str(trained), out=str(tmp_path / "m"), how="round"))
    assert not (tmp_path / "m").exists()


# ---- formats of other programs ---------------------------------------------------------------------------------------

EXTERNAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (test_gptq.writer(4), test_gptq.config(4)),
    "gptq act-order": (test_gptq.writer(3, act_order=True), test_gptq.config(3)),
    "gptq_p": (test_gptq.writer(3, version="gptq_p"), test_gptq.config(3, version="gptq_p")),
    "awq": (test_awq.gemm, test_awq.config()),
    "awq gemv": (test_awq.gemv, test_awq.config(version="gemv")),
    "compressed-tensors": (test_compressed_tensors.writer(4), test_compressed_tensors.config(4)),
    "hqq": (test_hqq.writer(2, 1), test_hqq.CONFIG),
    "hqq axis 0": (test_hqq.writer(4, 0), test_hqq.CONFIG),
}


@pytest.mark.parametrize("kind", EXTERNAL)
def test_a_third_party_base_is_written_back_in_its_own_format(kind: str, tmp_path: Path) -> None:
    writer, config = EXTERNAL[kind]
    write(tmp_path / "base", writer, config)
    expected = adapter_on(str(tmp_path / "base"), tmp_path / "a")
    merge(Merge(model=str(tmp_path / "base"), adapter=str(tmp_path / "a"), out=str(tmp_path / "m")))
    assert torch.equal(logits(load_model(tmp_path / "m")), expected)
    assert torch.equal(logits(load_model(tmp_path / "m", verify=True)), expected)
    method = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["quant_method"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "m"))
    if kind.startswith("hqq"):
        assert method == "llmtools"
        return
    assert (tmp_path / "m" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith((".qweight", ".weight_packed")) for name in changed)
    assert "quantizer" in (tmp_path / "m" / "README.md").read_text()


def test_a_gguf_file_is_written_back_with_its_other_bytes(tmp_path: Path) -> None:
    from llmtools.formats.gguf_header import read_header
    from tests.formats.test_gguf_reading import write_gguf

    pytest.importorskip("gguf")
    file = write_gguf(tmp_path)
    expected = adapter_on(str(file), tmp_path / "a")
    merge(Merge(model=str(file), adapter=str(tmp_path / "a"), out=str(tmp_path / "m")))
    merged = tmp_path / "m" / "m.gguf"
    assert torch.equal(logits(load_model(str(merged))), expected)
    before, after = file.read_bytes(), merged.read_bytes()
    header = read_header(file)
    inside = sorted(
        (each.start, each.start + each.size)
        for each in header.tensors.values()
        if ".attn_" in each.name or ".ffn_" in each.name
    )
    same, end = True, 0
    for start, stop in [each for each in inside if "norm" not in str(each)]:
        same, end = same and before[end:start] == after[end:start], stop
    assert len(before) == len(after) and before != after and same and before[end:] == after[end:]
    assert "GGUF" in (tmp_path / "m" / "README.md").read_text()
    assert (
        merge(
            Merge(model=str(merged), adapter=str(tmp_path / "a"), out=str(tmp_path / "n"), allow_other_base=True)
        ).modules
        == 14
    )


def test_a_gguf_type_that_has_no_encoder_is_refused_by_name(data: str, tmp_path: Path) -> None:
    from tests.formats.test_gguf_reading import write_gguf

    pytest.importorskip("gguf")
    file = write_gguf(tmp_path, kinds={"attn_q": "IQ3_S"})
    with pytest.raises(InputError, match=r"q_proj.*IQ3_S"):
        finetune(recipe(file, data, tmp_path / "a"))
