"""`llmtools push` uploads a folder, or shows the card that would go with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llmtools
from llmtools.cli.app import main
from tests.hub import Hub
from tests.models import tiny_model


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    model = tiny_model()
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    return llmtools.save(model, None, tmp_path / "tiny")


def test_a_folder_is_pushed_with_its_results(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"task": "perplexity", "measure": "perplexity", "value": 7.5, "details": {}}
    result |= {"model": str(quantized), "data": "/home/somebody/held_out.txt"}
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(result))
    hub = Hub(monkeypatch)
    words = ["push", str(quantized), "--repo", "me/tiny", "--results", str(scores)]
    assert main([*words, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "perplexity 7.5000 on perplexity (data held_out.txt)" in shown
    assert "| perplexity | perplexity | 7.5000 | data held_out.txt |" in shown
    assert "/home/somebody" not in shown
    assert hub.commits == []
    assert main([*words, "--private"]) == 0
    assert capsys.readouterr().out == "me/tiny: https://huggingface.co/me/tiny\n"
    assert hub.repos["me/tiny"]["private"] is True
    card, _, files = shown.partition("\nme/tiny would get: ")
    assert hub.files["README.md"].decode() == card
    assert files.splitlines() == [", ".join(sorted(hub.files))]


STAY = (".env", ".git/config", ".README.md.1a2b.partial", "notes.txt", "id_rsa", "train.jsonl", "pytorch_model.bin")
STAY += (
    "checkpoints/checkpoint-1/model.safetensors",
    "sub/config.json",
    "training_args.bin",
    "additional_chat_templates/x",
)
GO = (
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/tool.jinja",
    "LICENSE",
    "NOTICE.txt",
)
GO += ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "model-q4.gguf", "metrics.jsonl")


def test_what_is_no_part_of_a_model_stays_and_is_named(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (*STAY, *GO):
        (quantized / name).parent.mkdir(parents=True, exist_ok=True)
        (quantized / name).write_text("x")
    own = {path.name for path in quantized.iterdir() if path.is_file()} - {*STAY, *GO}
    outside = tmp_path / "secret"
    outside.write_text("SECRET")
    for link, target in {
        "merges.txt": outside,  # leaves the folder
        "vocab.json": Path("../secret"),
        "added_tokens.json": Path(".env"),  # a name that goes for one that does not
        "generation_config.json": Path("nowhere"),
        "tokenizer_config.json": Path("sub/config.json"),
        "special_tokens_map.json": Path("config.json"),  # its own
    }.items():
        (quantized / link).unlink(missing_ok=True)
        (quantized / link).symlink_to(target)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("SECRET")
    (tmp_path / "folder").symlink_to(quantized)
    hub = Hub(monkeypatch)
    for folder in (quantized, tmp_path / "folder"):  # the folder itself may be named by a link
        hub.commits.clear()
        llmtools.push_to_hub(folder, "me/tiny")
        assert set(hub.files) == {*own, *GO, "special_tokens_map.json"} - {"generation_config.json"}
        assert not any(b"SECRET" in each for each in hub.files.values())
    (line,) = {each for each in caplog.messages if "not uploaded" in each}
    for name in (".env", ".git/", "merges.txt", "checkpoints/", "id_rsa", "sub/", "additional_chat_templates/x"):
        assert name in line


def test_a_folder_of_links_is_not_followed(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("SECRET")
    (quantized / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    hub = Hub(monkeypatch)
    llmtools.push_to_hub(quantized, "me/tiny")
    assert not any("jinja" in name for name in hub.files)
    assert "additional_chat_templates/" in caplog.text


def test_the_hubs_own_cache_can_be_pushed(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are links to the blobs of the same repository; those of another one stay here."""
    home = tmp_path / "models--me--tiny"
    snapshot = home / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, path in enumerate(sorted(quantized.iterdir())):
        path.rename(home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    other = tmp_path / "models--you--private" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("SECRET")
    (snapshot / "vocab.json").symlink_to("../../../models--you--private/blobs/0")
    hub = Hub(monkeypatch)
    llmtools.push_to_hub(snapshot, "me/tiny")
    assert {"config.json", "model.safetensors", "llmtools.json"} <= set(hub.files)
    assert "vocab.json" not in hub.files


def test_a_run_that_was_written_with_a_token_goes_up_without(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"command": "quantize", "recipe": {"training": {"hub_token": "hf_SeCrEt", "seed": 1}}, "checksums": {}}
    (quantized / "run.json").write_text(json.dumps(run))
    before = (quantized / "run.json").read_bytes()
    hub = Hub(monkeypatch)
    llmtools.push_to_hub(quantized, "me/tiny")
    assert json.loads(hub.files["run.json"]) == {"command": "quantize", "recipe": {"training": {"seed": 1}}}
    assert "checksums" in json.loads(hub.files["llmtools.json"])  # which had no secret to leave out
    assert not any(b"hf_SeCrEt" in each for each in hub.files.values())
    assert (quantized / "run.json").read_bytes() == before
    assert main(["push", str(quantized), "--repo", "me/tiny", "--dry_run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == sorted(hub.files)


def test_mistakes_are_one_line(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"task": "t", "measure": "m", "value": 1, "model": "elsewhere"}')
    (tmp_path / "no.json").write_text('{"a": 1}')
    (tmp_path / "bad.json").write_text("no")
    (tmp_path / "empty").mkdir()
    for args, says in (
        ((quantized,), "missing: --repo"),
        ((quantized, "--repo", "a/b/c"), "owner/name"),
        ((quantized, "--repo", "tiny"), "'tiny': owner/name on the Hugging Face hub is expected, with the owner"),
        ((quantized, "--repo", "tiny", "--dry_run"), "owner/name"),
        ((quantized, "--repo", "/tiny"), "owner/name"),
        ((quantized, "--repo", "me/a--b"), "owner/name"),
        ((quantized, "--repo", "me/a--b", "--dry_run"), "owner/name"),
        ((tmp_path / "none", "--repo", "a/b"), "there is no folder"),
        ((tmp_path / "empty", "--repo", "a/b"), "neither a model"),
        ((quantized, "--repo", "a/b", "--results", tmp_path / "other.json"), "is an evaluation of elsewhere"),
        ((quantized, "--repo", "a/b", "--results", tmp_path / "no.json"), "it has a"),
        ((quantized, "--repo", "a/b", "--results", tmp_path / "bad.json"), "is not what"),
        ((quantized, "--repo", "a/b"), "offline"),  # the tests' environment says so to the hub's client
    ):
        assert main(["push", *map(str, args)]) == 2
        line = capsys.readouterr().err.strip()
        assert says in line, line
        assert "\n" not in line


def test_a_hub_that_cannot_be_reached_is_one_line(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # the port that discards
    assert main(["push", str(quantized), "--repo", "a/b"]) == 2
    line = capsys.readouterr().err.strip()
    assert "http://127.0.0.1:9 cannot be reached" in line and "\n" not in line
