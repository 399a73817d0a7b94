"""`llmtools serve` answers requests from a quantized checkpoint, and `llmtools chat` talks to it."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmtools
from llmtools.cli.app import main
from llmtools.cli.passthrough import NEEDS

served = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in NEEDS["serve"]),
    reason="needs pip install 'llmtools[serve]'",
)
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def checkpoint(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = TEMPLATE
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    return llmtools.save(model, tokenizer, tmp_path_factory.mktemp("serve") / "stories-4bit")


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    """A server on the loopback address, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = checkpoint.parent / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "llmtools", *words], stdout=output, stderr=output, env=os.environ | _local()
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                LOCAL.open(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start: {log.read_text()}")
        yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _local() -> dict[str, str]:
    return {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with LOCAL.open(request, timeout=120) as answer:
        return dict(json.loads(answer.read()))


@served
def test_a_quantized_checkpoint_answers_over_http(checkpoint: Path, address: str) -> None:
    body = {"model": str(checkpoint), "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    answer = ask(f"{address}/v1/completions", body)
    model, tokenizer = llmtools.load(checkpoint)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert answer["choices"][0]["text"].strip() == tokenizer.decode(written, skip_special_tokens=True).strip()
    assert answer["usage"]["completion_tokens"] == 8
    with LOCAL.open(f"{address}/v1/models", timeout=60) as listed:
        assert json.loads(listed.read())["object"] == "list"
    chat = {"model": str(checkpoint), "messages": [{"role": "user", "content": "Once upon"}], "max_tokens": 8}
    assert ask(f"{address}/v1/chat/completions", chat)["choices"][0]["message"]["role"] == "assistant"


@served
def test_chat_talks_to_the_server(checkpoint: Path, address: str) -> None:
    command = [sys.executable, "-m", "llmtools", "chat", str(checkpoint), address, "max_new_tokens=8"]
    done = subprocess.run(
        [*command, "--user", "me"], input="Once upon a time\nn\n!exit\n", capture_output=True, text=True, timeout=120,
        check=False,
        env=os.environ | _local() | {"HF_HUB_OFFLINE": "0"},  # it asks through the hub's client, whatever the address
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{checkpoint.name}>:" in done.stdout.replace("\n", "")  # the model's turn


def test_mistakes_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["chat", str(tmp_path)]) == 2
    assert "is an adapter" in capsys.readouterr().err
    assert main(["chat", "--no-such-option"]) == 2
    assert main(["serv"]) == 2
    assert "did you mean 'serve'" in capsys.readouterr().err
    monkeypatch.setitem(NEEDS, "serve", ("no_such_module",))
    assert main(["serve"]) == 2
    assert "serve needs no_such_module: pip install 'llmtools[serve]'" in capsys.readouterr().err


def test_the_model_to_serve_is_looked_at_first(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And a relative folder is handed on as it was typed: requests name it so."""
    asked: list[list[str]] = []
    monkeypatch.setitem(NEEDS, "serve", ())
    monkeypatch.setattr(
        "llmtools.cli.passthrough._app", lambda command: lambda args, prog_name: asked.append(list(args))
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.chdir(checkpoint.parent)
    for name in (checkpoint.name, f"./{checkpoint.name}", "owner/name"):
        assert main(["serve", name, "--port", "1"]) == 0
    assert [args[1] for args in asked] == [checkpoint.name, f"./{checkpoint.name}", "owner/name"]
    assert (tmp_path / "home" / "hub").is_dir()  # /v1/models lists it, and failed without
    (tmp_path / "empty").mkdir()
    (tmp_path / "model@2").mkdir()
    (tmp_path / "model@2" / "config.json").write_text("{}")
    for name, says in (
        ("./nowhere", "there is no folder ./nowhere"),
        (str(tmp_path / "nowhere"), "there is no folder"),
        (str(tmp_path / "empty"), "holds no config.json"),
        (str(tmp_path / "model@2"), "rename the folder"),
    ):
        capsys.readouterr()
        assert main(["serve", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert len(asked) == 3


def test_what_is_missing_or_not_running_is_said_in_our_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, says in (
        (ModuleNotFoundError("No module named 'opentelemetry'", name="opentelemetry"), "pip install 'llmtools[serve]'"),
        (ValueError("No server. Please run `transformers serve` in a shell."), "run `llmtools serve MODEL` in"),
    ):

        def app(args: list[str], prog_name: str, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("llmtools.cli.passthrough._app", lambda command, app=app: app)
        assert main(["chat", "model"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


def test_a_transformers_without_the_command_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.cli.transformers", None)  # importing it fails
    hook = sys.excepthook
    assert main(["chat", "model"]) == 2
    assert "has no command 'chat' to pass on to" in capsys.readouterr().err
    monkeypatch.setattr("llmtools.cli.passthrough.find_spec", lambda name: None if "cli" in name else object())
    assert main(["chat", "model"]) == 2
    assert "has no command 'chat'" in capsys.readouterr().err
    assert sys.excepthook is hook
