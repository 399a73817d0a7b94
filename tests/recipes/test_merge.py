"""`merge`: the adapter lands in the base's own codes, and the report says what that lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtools
from llmtools.errors import InputError
from llmtools.nn import quantized_linears
from llmtools.nn.adapters import merge as merge_dense
from llmtools.nn.adapters import merge_into_packed
from llmtools.recipes.evaluate import Evaluate, evaluate
from llmtools.recipes.finetune import Finetune, Lora, finetune
from llmtools.recipes.merge import Merge, merge
from llmtools.recipes.quantize import Quantize, quantize
from tests.models import ENCODABLE, tiny_ids, tiny_model


@pytest.fixture(scope="module")
def trained(stories: Path, wikitext2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base at 4 bits and an adapter of a few steps on articles."""
    base, adapter = (tmp_path_factory.mktemp(name) / name for name in ("base", "adapter"))
    quantize(Quantize(model=str(stories), out=str(base), quantizer="rtn", bits=4, group_size=32))
    training = {"max_steps": 20, "per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 5e-3}
    lora = Lora(r=8, alpha=16, dropout=0.0)
    finetune(
        Finetune(model=str(base), data=str(wikitext2 / "train.txt"), out=str(adapter), lora=lora, training=training)
    )
    return base, adapter


@pytest.fixture
def asked(trained: tuple[Path, Path], wikitext2: Path, tmp_path: Path) -> Merge:
    base, adapter = trained
    text = tmp_path / "held_out.txt"
    text.write_text((wikitext2 / "test.txt").read_text()[:20_000])
    return Merge(
        model=str(base), adapter=str(adapter), out=str(tmp_path / "out" / "merged"), data=str(text), max_length=128,
        num_samples=8, windows=8,
    )  # fmt: skip


def specs(folder: str | Path) -> dict[str, dict[str, Any]]:
    return {path: layer.quantizer.spec() for path, layer in quantized_linears(llmtools.load(folder)[0]).items()}


def test_rounding_keeps_scales_and_gives_codes_within_a_step(asked: Merge, trained: tuple[Path, Path]) -> None:
    result = merge(asked)
    base, merged = llmtools.load(trained[0])[0], llmtools.load(asked.out)[0]
    target = merge_dense(llmtools.load(trained[1])[0], torch.float32)
    assert specs(asked.out) == specs(trained[0])
    changed = 0
    for path, layer in quantized_linears(merged).items():
        former = quantized_linears(base)[path]
        for name in ("scales", "qzeros"):
            assert torch.equal(layer.packed[name], former.packed[name])
        wanted = target.get_submodule(path).weight
        scales = layer.packed["scales"].float().repeat_interleave(32, 1)[:, : wanted.shape[1]]
        low, high = (layer.dequantize(dtype=torch.float32) - wanted).aminmax()
        inside = (layer.dequantize(dtype=torch.float32) - wanted).abs() <= 1.0001 * scales
        assert inside.float().mean() > 0.95, (path, float(low), float(high))  # the rest is cut off at a group's ends
        changed += int((layer.packed["qweight"] != former.packed["qweight"]).sum())
    assert changed > 0
    assert result.rounding_error is not None and result.rounding_error > 0


def test_weights_in_files_and_in_host_memory_are_merged_to_the_same_bytes(
    asked: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtools.model import offload
    from tests.model.test_transfer import Unkind

    monkeypatch.setattr(offload, "SMALLEST", 1)
    asked = replace(asked, data=None)
    merge(asked)
    merge(replace(asked, out=str(tmp_path / "files"), offload="disk"))
    monkeypatch.setattr(offload, "has_gpu", lambda: True)
    monkeypatch.setattr("llmtools.checkpoint.folder.this_device", Unkind)
    merge(replace(asked, out=str(tmp_path / "host"), offload="cpu"))
    folders = (asked.out, tmp_path / "files", tmp_path / "host")
    written = [(Path(folder) / "model.safetensors").read_bytes() for folder in folders]
    assert written[0] == written[1] == written[2]
    with pytest.raises(InputError, match="--offload disk does not go with --how requantize"):
        merge(replace(asked, offload="disk", how="requantize", calibration=asked.model))


def test_the_report_is_of_the_models_that_are_written(asked: Merge, trained: tuple[Path, Path]) -> None:
    result = merge(asked)
    found = result.comparison
    assert found is not None and found.recovered is not None and found.kl is not None
    for name, folder in (("base", trained[0]), ("adapter", trained[1]), ("merged", asked.out)):
        model, tokenizer = llmtools.load(folder)
        ids = tokenizer(Path(str(asked.data)).read_text(), return_tensors="pt").input_ids[0][: 8 * 128]
        assert llmtools.perplexity(model, ids, context=128).value == pytest.approx(found.values[name], rel=1e-4)
    logs = {name: torch.tensor(value).log().item() for name, value in found.values.items()}
    share = (logs["base"] - logs["merged"]) / (logs["base"] - logs["adapter"])
    assert found.recovered == pytest.approx(share, abs=1e-4)


def test_a_task_is_scored_as_evaluate_scores_it(asked: Merge, trained: tuple[Path, Path]) -> None:
    found = merge(replace(asked, task="perplexity", batch_size=1)).comparison
    assert found is not None and found.measure == "perplexity" and found.kl is None
    alone = {"base": (trained[0], None), "adapter": (trained[0], str(trained[1])), "merged": (asked.out, None)}
    for name, (model, adapter) in alone.items():
        done = evaluate(Evaluate(model=str(model), adapter=adapter, task="perplexity", data=asked.data))
        assert found.values[name] == pytest.approx(done.value, rel=1e-3), name
    logs = {name: -torch.tensor(value).log().item() for name, value in found.values.items()}
    assert found.recovered == pytest.approx(
        (logs["merged"] - logs["base"]) / (logs["adapter"] - logs["base"]), abs=1e-3
    )


def test_a_dense_merge_is_the_16_bit_model(asked: Merge, trained: tuple[Path, Path]) -> None:
    found = merge(replace(asked, how="dense")).comparison
    assert found is not None and found.recovered == pytest.approx(1, abs=0.02)
    made, expected = llmtools.load(asked.out)[0], merge_dense(llmtools.load(trained[1])[0])
    assert not quantized_linears(made)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name


def test_requantizing_keeps_the_quantizers(asked: Merge, trained: tuple[Path, Path], wikitext2: Path) -> None:
    merge(replace(asked, how="requantize", calibration=str(wikitext2 / "train.txt"), data=None))
    assert specs(asked.out) == specs(trained[0])


@pytest.mark.parametrize(("name", "options"), ENCODABLE, ids=str)
def test_an_adapter_of_nothing_changes_nothing(name: str, options: dict[str, Any]) -> None:
    """B is zero at the start: dithered values stay in the cells of their codes."""
    import peft

    model, ids = tiny_model("llama"), tiny_ids()
    llmtools.quantize(model, name, [ids], **options)
    with torch.no_grad():
        before = model(ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))  # type: ignore[arg-type]
    merged, lost = merge_into_packed(adapted)
    assert set(lost) == {path for path in quantized_linears(merged)}
    assert not any(hasattr(module, "base_layer") for module in merged.modules())
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"how": "exactly"}, "--how exactly"),
        ({"how": "requantize"}, "needs calibration text"),
        ({"adapter": None}, "no adapter"),
        ({"task": "jsn"}, "did you mean 'json'"),
        ({"task": "json", "data": None}, "needs held-out examples"),
        ({"data": "nowhere.txt"}, r"nowhere\.txt"),
        ({"max_length": 100_000}, "fewer than one window"),
    ],
)
def test_what_cannot_be_merged_is_refused(asked: Merge, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge(replace(asked, **changes))
    assert not Path(asked.out).parent.exists()
