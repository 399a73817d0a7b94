"""Training that ends early: one line, and what was saved stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtools.errors import InputError
from llmtools.train.checkpoints import STATE
from llmtools.train.trainer import run_trainer

CLOSED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:5: Connection reset by peer."
)


def failing(error: BaseException, folder: Path) -> Any:
    def train(**_: Any) -> None:
        raise error

    return SimpleNamespace(args=SimpleNamespace(output_dir=str(folder)), train=train)


def test_a_process_that_ended_is_one_line_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = failing(RuntimeError(CLOSED), tmp_path)
    with pytest.raises(RuntimeError, match="Connection reset"):
        run_trainer(trainer, None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"another process of this run ended; .* no checkpoint was kept") as caught:
        run_trainer(trainer, None)
    assert "\n" not in str(caught.value)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / STATE).write_text("{}")
    with pytest.raises(InputError, match="--resume continues from the last intact one"):
        run_trainer(trainer, None)
    with pytest.raises(RuntimeError, match="another fault"):
        run_trainer(failing(RuntimeError("another fault"), tmp_path), None)
