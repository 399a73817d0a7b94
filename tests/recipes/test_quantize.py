"""`quantize` as a run: what it replaces, what it leaves when it is ended, and that it gives the same bytes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from llmtools.cli.app import read_recipe
from llmtools.errors import InputError
from llmtools.files import unknown_files
from llmtools.model import quantize as walked
from llmtools.recipes.quantize import Quantize, quantize
from llmtools.signals import Stopped


@pytest.fixture(scope="module")
def packed(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "q"
    quantize(Quantize(model=str(stories), out=str(out), quantizer="rtn", bits=4))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Of the files that do not say how long it took."""
    timed = ("llmtools.json",)
    return {path.name: b"" if path.name in timed else path.read_bytes() for path in folder.iterdir()}


def test_the_same_command_gives_the_same_bytes(packed: Path, stories: Path, tmp_path: Path) -> None:
    for _ in range(3):
        quantize(Quantize(model=str(stories), out=str(tmp_path / "q"), quantizer="rtn", bits=4, overwrite=True))
        assert contents(tmp_path / "q") == contents(packed)


def test_inputs_are_never_replaced(packed: Path, tinystories: Path, tmp_path: Path) -> None:
    (packed / "text.txt").write_text((tinystories / "held_out.txt").read_text()[:2000])
    before = contents(packed)
    asked = Quantize(model=str(packed), out=str(packed), quantizer="rtn", overwrite=True)
    with pytest.raises(InputError, match="is an input of this run"):
        quantize(asked)
    with pytest.raises(InputError, match="which is an input of this run"):
        quantize(replace(asked, out=str(packed.parent)))
    with pytest.raises(InputError, match=r"text\.txt, which is an input of this run"):
        quantize(replace(asked, model="owner/name", quantizer="optq", calibration=str(packed / "text.txt")))
    assert contents(packed) == before
    (packed / "text.txt").unlink()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_that_is_ended_leaves_nothing(
    number: int, packed: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_one, done = walked.quantize, []

    def ended(*args: object, **kwargs: object) -> object:
        done.append(sorted(path.name for path in (tmp_path / "deep").iterdir()))
        os.kill(os.getpid(), number)
        return quantize_one(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(walked, "quantize", ended)
    with pytest.raises(KeyboardInterrupt) as stopped:
        quantize(Quantize(model=str(stories), out=str(tmp_path / "deep" / "q"), quantizer="rtn"))
    assert done == [[".q.lock", "q.quantizing"]]
    assert isinstance(stopped.value, Stopped) == (number == signal.SIGTERM)
    assert not any(tmp_path.iterdir())


def test_bits_are_divided_and_the_choice_can_be_edited(stories: Path, tinystories: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((tinystories / "train.txt").read_text()[:20_000])
    asked = Quantize(
        model=str(stories), out=str(tmp_path / "mixed"), quantizer="rtn", group_size=32, calibration=str(text),
        num_samples=4, max_length=64, bits_per_weight=3.1,
    )  # fmt: skip
    result = quantize(asked)
    assert 2.9 < result.bits_per_weight <= 3.1
    assert unknown_files(tmp_path / "mixed") == []  # the same command with --overwrite replaces it
    chosen = tmp_path / "mixed" / "allocation.yaml"
    words = ["--config", str(chosen), "--model", str(stories), "--out", str(tmp_path / "again"), "--quantizer", "rtn"]
    again = read_recipe("llmtools quantize", Quantize, [*words, "--group_size", "32"])
    assert again is not None and len(again.overrides) == result.modules
    assert quantize(again).bits_per_weight == result.bits_per_weight
    with pytest.raises(InputError, match="pass it or --bits, not both"):
        quantize(replace(asked, out=str(tmp_path / "least"), bits=3))
    with pytest.raises(InputError, match="--bits_per_weight needs calibration text"):
        quantize(replace(asked, out=str(tmp_path / "least"), calibration=None))
    with pytest.raises(InputError, match=r"rtn needs at least \d"):
        quantize(replace(asked, out=str(tmp_path / "least"), bits_per_weight=1.0))
    assert not (tmp_path / "least").exists()
