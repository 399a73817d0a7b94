"""A card says what the folder's files say, calls the rest unknown, and goes up with the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import llmtools
from llmtools.checkpoint.model_card import MARKER, card, write_card
from llmtools.checkpoint.upload import push_to_hub
from llmtools.errors import InputError
from tests.hub import Hub
from tests.models import tiny_ids, tiny_model

RESULT = {"task": "perplexity", "measure": "perplexity", "value": 4.2, "details": {"perplexity": 4.2, "context": 512}}


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    model = tiny_model()
    report = llmtools.quantize(model, "optq", [tiny_ids()], bits=3, group_size=32)
    return llmtools.save(model, None, tmp_path / "tiny-3bit", report=report)


@pytest.fixture
def adapter(quantized: Path, tmp_path: Path) -> Path:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quantized)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "tiny-lora")
    return tmp_path / "tiny-lora"


def head(text: str) -> dict[str, Any]:
    """The card's head, which the hub reads."""
    _, front, _ = text.split("---\n", 2)
    return dict(yaml.safe_load(front))


def row(text: str, key: str) -> str:
    """The value beside `key` in the card's table."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {key} |")]
    return line.split("|")[2].strip()


def test_a_saved_model_carries_its_card(quantized: Path) -> None:
    text = (quantized / "README.md").read_text(encoding="utf-8")
    note = json.loads((quantized / "llmtools.json").read_text())
    assert head(text)["tags"] == ["llmtools", "optq"]
    assert head(text)["library_name"] == "transformers"
    assert "# tiny-3bit\n" in text
    assert "import llmtools" in text
    assert "optq (" in row(text, "quantizer")
    assert "bits 3" in row(text, "quantizer")
    assert row(text, "bits per weight").startswith(f"{note['bits_per_weight']:.2f}, with scales")
    assert row(text, "calibration data") == "48 tokens of a text that was not recorded"
    assert f"weights {note['report']['totals']['relative_error']:.4f}" in row(text, "errors of the quantized layers")
    assert row(text, "measured quality").startswith("unknown")


def test_what_is_not_recorded_is_unknown_or_none(tmp_path: Path) -> None:
    """No report, no calibration, no base model's name; and a dense model is called dense."""
    model = tiny_model()
    dense = card(llmtools.save(model, None, tmp_path / "dense"))
    assert row(dense, "weights") == "dense, not quantized"
    assert "base_model" not in head(dense)
    assert row(dense, "base model") == "unknown"
    report = llmtools.quantize(model, "rtn", bits=4, group_size=32)
    with_report = card(llmtools.save(model, None, tmp_path / "a", report=report))
    assert row(with_report, "calibration data") == "none: the quantizer saw no data"
    without = card(llmtools.save(model, None, tmp_path / "b"))
    assert row(without, "calibration data") == "unknown"
    assert row(without, "errors of the quantized layers") == "unknown"
    with pytest.raises(InputError, match="neither a model"):
        card(tmp_path)


def test_the_base_model_is_a_hub_name_or_no_address(quantized: Path) -> None:
    note = json.loads((quantized / "llmtools.json").read_text())
    for base, called, in_head in (
        ("/home/somebody/models/llama", "a folder called `llama` on the machine of whoever made this", None),
        ("meta-llama/Llama-2-7b-hf", "[meta-llama/Llama-2-7b-hf](https://huggingface.co/meta-llama/Llama-2-7b-hf)",
         "meta-llama/Llama-2-7b-hf"),
    ):  # fmt: skip
        (quantized / "llmtools.json").write_text(json.dumps(note | {"base_model": base}))
        text = card(quantized)
        assert row(text, "base model") == called
        assert head(text).get("base_model") == in_head
        assert "/home/somebody" not in text
    assert head(card(quantized, base_name="a/b"))["base_model"] == "a/b"


def test_measures_and_training_are_told(adapter: Path) -> None:
    run = {
        "command": "finetune",
        "recipe": {"data": "/home/somebody/samsum.jsonl", "task": "samsum", "seed": 3},
        "result": {"examples": 100, "steps": 350, "train_loss": 1.25, "validation_loss": None},
        "versions": {"llmtools": "0.1.0"},
    }
    (adapter / "run.json").write_text(json.dumps(run))
    text = card(adapter, results=[RESULT])
    assert head(text)["library_name"] == "peft"
    assert row(text, "trained on") == "samsum.jsonl (task samsum), examples 100, steps 350, seed 3"
    assert row(text, "losses") == "training 1.2500"
    assert row(text, "adapters") == "LORA, rank 4, alpha 8, dropout 0.0, on q_proj"
    assert "bits 3" in row(text, "quantizer of the base model")
    assert row(text, "measured quality") == "perplexity 4.2000 on perplexity"
    assert "| perplexity | perplexity | 4.2000 | context 512 |" in text
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "owner/base"}))
    assert row(card(adapter), "quantizer of the base model") == "unknown"


def test_a_base_that_was_quantized_for_the_training_alone_is_not_called_dense(adapter: Path, tmp_path: Path) -> None:
    plain = llmtools.save(tiny_model(), None, tmp_path / "plain")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(plain)}))
    assert row(card(adapter), "quantizer of the base model") == "none: its weights are dense"
    for load, asked in (("nf4", 'bnb_4bit_quant_type="nf4"'), ("int8", "load_in_8bit=True")):
        (adapter / "run.json").write_text(json.dumps({"command": "finetune", "recipe": {"load": load}}))
        text = card(adapter)
        assert row(text, "quantizer of the base model") == f"{load} (by bitsandbytes, while it loads)"
        assert row(text, "bits per weight of the base model") == "unknown"
        assert row(text, "calibration data of the base model") == "none: the quantizer saw no data"
        assert load in head(text)["tags"]
        assert asked in text and "dense" not in text


def test_a_card_in_your_own_words_stays(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = quantized / "README.md"
    own.write_text(own.read_text(encoding="utf-8").replace(MARKER, "Mine."), encoding="utf-8")
    mine = own.read_bytes()
    write_card(quantized)
    assert own.read_bytes() == mine
    hub = Hub(monkeypatch)
    push_to_hub(quantized, "me/tiny")
    assert hub.files["README.md"] == mine
    with pytest.raises(InputError, match="your own words"):
        push_to_hub(quantized, "me/tiny", results=[RESULT])


def test_an_upload_holds_the_folder_and_says_what_the_world_should_read(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (adapter / "checkpoints" / "checkpoint-9").mkdir(parents=True)
    (adapter / "checkpoints" / "checkpoint-9" / "optimizer.pt").write_bytes(b"state")
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    hub = Hub(monkeypatch)
    assert push_to_hub(adapter, "me/lora", base_name="me/tiny-3bit") == "https://huggingface.co/me/lora"
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "me/tiny-3bit"
    text = hub.files["README.md"].decode()
    assert (head(text)["base_model"], head(text)["base_model_relation"]) == ("me/tiny-3bit", "adapter")
    assert 'from_pretrained(model, "me/lora")' in text
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before
    push_to_hub(adapter, "me/lora")
    assert "path of this machine" in caplog.text


def test_a_model_in_memory_goes_up_with_adapters_alone_if_it_has_some(
    quantized: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quantized)
    hub = Hub(monkeypatch)
    llmtools.push_to_hub(model, "me/tiny")
    assert "model.safetensors" in hub.files
    hub.commits.clear()
    llmtools.push_to_hub(peft.PeftModel.from_pretrained(model, adapter), "me/lora", base_name="me/tiny")
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(InputError, match="no folder"):
        llmtools.push_to_hub(quantized / "nowhere", "me/tiny")
