"""What is written beside a result says what was run, and no secret."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtools.checkpoint.run_info import as_json, command, record, write_json
from llmtools.checkpoint.run_info import given as given_of
from llmtools.cli.app import main
from llmtools.recipes.finetune import Finetune, Lora
from llmtools.redaction import is_secret, redacted
from llmtools.sweep.runner import Sweep, as_yaml

SECRET = "hf_SeCrEt"
NAMES = ("hub_token", "token", "tokens", "HF_TOKEN", "hfToken", "push-to-hub-token", "api_key", "apiKey", "key", "keys")
NAMES += ("secret", "client_secret", "secret_value", "password", "db_passwd", "passphrase", "credentials")
PLAIN = (
    "eos_token",
    "pad_token",
    "tokenizer",
    "max_new_tokens",
    "k_proj",
    "keyboard",
    "trainable_token_indices",
    "*.key",
)
TRAINING = {"max_steps": 1, "hub_token": SECRET, "hub_private_repo": True, "a": [{"b": {"api_key": SECRET}}]}


def test_a_secret_is_told_by_its_name() -> None:
    assert all(map(is_secret, NAMES))
    assert not any(map(is_secret, PLAIN))


nested = st.recursive(
    st.dictionaries(st.sampled_from(NAMES), st.just(SECRET)),
    lambda inner: (
        st.dictionaries(st.text(max_size=3), inner) | st.lists(inner, max_size=3) | st.tuples(inner, st.none())
    ),
    max_leaves=8,
)


@given(nested)
def test_secrets_go_at_any_depth(value: object) -> None:
    assert SECRET not in as_json(value)
    assert SECRET not in repr(redacted(value))


def test_what_is_no_secret_stays() -> None:
    options = {"tokens": 512, "token": None, "hub_token": True, "eos_token": "</s>", "key": {"bits": 4}, "*.key": "rtn"}
    assert redacted(options) == options
    assert redacted({"password": 1234, "n": [{"tokens": ["a", "b"], "seed": 1}]}) == {"n": [{"seed": 1}]}


def test_records_settings_and_commands_hold_no_secret() -> None:
    recipe = Finetune("m", "d", "o", training=TRAINING, lora=Lora(options={"x_token": SECRET}), options={"key": SECRET})
    sweep = Sweep("m", {"t": {"finetune": {"training": TRAINING}}}, training=TRAINING, quantize={"token": SECRET})
    for text in (
        as_json(record("finetune", recipe, training=TRAINING)),
        as_json(given_of(recipe)),
        command("finetune", recipe),
        as_yaml(sweep),
        as_json(record("sweep", sweep)),
    ):
        assert SECRET not in text and "max_steps" in text
    assert record("finetune", recipe)["recipe"]["training"]["hub_private_repo"] is True
    without = replace(recipe, training={"max_steps": 1}, lora=Lora(), options={})
    assert command("finetune", without) == "llmtools finetune --model m --data d --out o --training.max_steps 1"


def test_a_name_that_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"out": "a\udcff"})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"out": "a\udcff"}


def test_a_printed_configuration_holds_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: m\ndata: d\nout: o\ntraining: {{hub_token: {SECRET}, seed: 1}}\n")
    words = ["--training.push_to_hub_token", SECRET, "--options.key", SECRET, "--print_config"]
    assert main(["finetune", "--config", str(tmp_path / "recipe.yaml"), *words]) == 0
    printed = capsys.readouterr().out
    assert SECRET not in printed and "seed: 1" in printed


def test_no_file_of_a_finetuned_adapter_holds_the_token(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("trl")
    data, out = tmp_path / "d.jsonl", tmp_path / "a"
    data.write_text('{"prompt": "Once upon", "completion": " a time"}\n')
    words = [
        "finetune",
        "--model",
        str(stories),
        "--data",
        str(data),
        "--out",
        str(out),
        "--training.hub_token",
        SECRET,
    ]
    assert main([*words, "--training.max_steps", "1"]) == 0
    assert main([*words, "--training.max_steps", "2", "--resume"]) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"llmtools.json", "README.md"} <= {path.name for path in files}
    told = {path.relative_to(out).as_posix() for path in files if SECRET.encode() in path.read_bytes()}
    assert not told
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err + caplog.text
