"""Adapters on GGUF files, from a disk or the hub: what their cards say, and how every byte of the base is compared."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("gguf")

import llmtools
from llmtools.checkpoint.inputs import content_of_model
from llmtools.checkpoint.model_card import card
from llmtools.checkpoint.upload import push_to_hub
from llmtools.cli.app import main
from llmtools.errors import CheckpointError, InputError
from tests.checkpoint.test_model_card import head, row
from tests.formats.test_gguf_reading import write_gguf
from tests.hub import Hub
from tests.models import tiny_ids

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_gguf(tmp_path_factory.mktemp("gguf"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("".join(json.dumps({"prompt": "the", "completion": f" w{n}"}) + "\n" for n in range(4)))
    return file


def train(out: Path, data: Path, *model: str) -> Path:
    words = ["--data", str(data), "--out", str(out), "--lora.r", "2", "--training.max_steps", "1"]
    assert main(["finetune", *model, *words, "--training.save_strategy", "no"]) == 0
    return out


@pytest.fixture(scope="module")
def adapter(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("adapter") / "a", data, "--model", str(base))


@pytest.fixture
def cached(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with the file as owner/name/sub/m.gguf, laid out as huggingface_hub does; returns the blob."""
    repo, sha = tmp_path / "hub" / "models--owner--name", "0123456789" * 4
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(sha)
    (repo / "snapshots" / sha / "sub").mkdir(parents=True)
    (repo / "blobs").mkdir()
    blob = repo / "blobs" / hashlib.sha256(base.read_bytes()).hexdigest()
    shutil.copy(base, blob)
    (repo / "snapshots" / sha / "sub" / "m.gguf").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return blob


def change_last_byte(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_the_card_names_the_file_and_both_ways_to_use_it(base: Path, adapter: Path) -> None:
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert row(text, "base model") == "a local file `m.gguf`"
    assert row(text, "SHA-256 of the base model's file") == f"`{hashlib.sha256(base.read_bytes()).hexdigest()}`"
    assert row(text, "quantizer of the base model") == "gguf (types Q2_K, Q4_1, Q4_K, Q5_0, Q6_K, Q8_0)"
    assert 4 < float(row(text, "bits per weight of the base model").split(",")[0]) < 9
    assert 'llmtools.load("m.gguf")' in text and f'from_pretrained(model, "{adapter.name}")' in text
    assert "llama-cli -m m.gguf --lora adapter.gguf" in text and str(base.parent) not in text
    assert "base_model" not in head(text) and "gguf" in head(text)["tags"]


def test_the_card_s_python_opens_the_adapter(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (adapter / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "m.gguf").symlink_to(base)
    (tmp_path / adapter.name).symlink_to(adapter)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    with torch.no_grad():
        expected = llmtools.load(adapter)[0](input_ids=tiny_ids()).logits
        assert torch.equal(names["model"].eval()(input_ids=tiny_ids()).logits, expected)


def test_an_adapter_without_a_record_has_a_card_of_the_same_use(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    for name in ("llmtools.json", "run.json"):
        (tmp_path / "a" / name).unlink()
    text = card(tmp_path / "a")
    assert row(text, "SHA-256 of the base model's file") == row(text, "bits per weight of the base model") == "unknown"
    assert "llmtools.load(" in text and "llama-cli" in text


def test_an_upload_names_the_file_on_the_hub(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    push_to_hub(adapter, "me/lora", base_name="owner/name")
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "owner/name/m.gguf"
    text = hub.files["README.md"].decode()
    assert row(text, "base model") == "`m.gguf` of [owner/name](https://huggingface.co/owner/name)"
    assert head(text)["base_model"] == "owner/name" and 'load("owner/name", gguf_file="m.gguf")' in text


def test_verify_compares_every_byte_of_both(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    shutil.copy(base, tmp_path / "m.gguf")
    model, own = tmp_path / "m.gguf", tmp_path / "a"

    def ran(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main([*words, "--model", str(model), "--adapter", str(own), "--verify"])
        return code, capsys.readouterr().err

    generate = ("generate", "--prompt", "the", "--max_new_tokens", "2")
    exports = ("export", "--format", "gguf", "--overwrite", "--out")
    assert ran(*generate)[0] == ran(*exports, str(tmp_path / "a.gguf"))[0] == 0
    change_last_byte(model)
    for words in (generate, (*exports, str(tmp_path / "b.gguf"))):
        code, said = ran(*words)
        assert code == 2 and f"{model} differs from the file that adapter '{own}' was trained on" in said
    shutil.copy(base, model)
    change_last_byte(own / "adapter_model.safetensors")
    for words in (generate, (*exports, str(tmp_path / "b.gguf"))):
        code, said = ran(*words)
        assert code == 2 and "adapter_model.safetensors was changed" in said
    assert not (tmp_path / "b.gguf").exists()


def test_an_adapter_s_folder_verifies_its_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    llmtools.load(adapter, verify=True)
    shutil.copytree(adapter, tmp_path / "a")
    shutil.copy(base, tmp_path / "m.gguf")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "m.gguf")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    change_last_byte(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="differs from the file that adapter"):
        llmtools.load(tmp_path / "a", verify=True)
    with pytest.raises(CheckpointError, match="no checksums to verify; the SHA-256 of a GGUF file is known from"):
        llmtools.load(base, verify=True)


def test_a_file_of_the_hub_is_a_model_by_either_name(
    base: Path, cached: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finetuned, evaluated, generated with, exported from and planned for, in the cache alone."""
    name = "owner/name/sub/m.gguf"
    for model in (["--model", name], ["--model", "owner/name", "--gguf_file", "sub/m.gguf"]):
        own = train(tmp_path / f"a{len(model)}", data, *model)
        assert json.loads((own / "adapter_config.json").read_text())["base_model_name_or_path"] == name
        assert main(["plan", *model, "--max_length", "16", "--device", "cpu"]) == 0
        assert main(["generate", *model, "--prompt", "the", "--max_new_tokens", "2", "--verify"]) == 0
    text = (own / "README.md").read_text(encoding="utf-8")
    assert 'llmtools.load("owner/name", gguf_file="sub/m.gguf")' in text and f"--model {name}" in text
    assert main(["evaluate", "--adapter", str(own), "--task", "text", "--data", str(data), "--num_samples", "2"]) == 0
    assert main(["export", "--adapter", str(own), "--format", "gguf", "--out", str(tmp_path / "a.gguf")]) == 0
    with torch.no_grad():
        model, _ = llmtools.load("owner/name", gguf_file="sub/m.gguf")
        assert torch.equal(model(input_ids=tiny_ids()).logits, llmtools.load(base)[0](input_ids=tiny_ids()).logits)
    assert content_of_model(name) == content_of_model(str(base))
    change_last_byte(cached)
    assert content_of_model(name) not in ({}, content_of_model(str(base)))
    with pytest.raises(CheckpointError, match="differs from the file on the hub"):
        llmtools.load("owner/name", gguf_file="sub/m.gguf", verify=True)
    capsys.readouterr()
    for words in (["--model", "owner/name/none.gguf"], ["--model", "owner/name", "--gguf_file", "none.gguf"]):
        assert main(["generate", *words, "--prompt", "x"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "owner/name/none.gguf is no file here" in line


def test_a_name_that_is_no_repository_s_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m.gguf", "./m.gguf", "../a/m.gguf", "owner/m.gguf"):
        with pytest.raises(InputError, match="there is no file"):
            llmtools.load(name)
