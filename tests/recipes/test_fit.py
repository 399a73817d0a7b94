"""The widths that `quantize --fit` chooses are those of the planner, and what is written fits."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtools.cli.app import main
from llmtools.errors import InputError
from llmtools.recipes.estimate import Plan, plan
from llmtools.recipes.finetune import Lora
from llmtools.recipes.fit import bytes_of
from llmtools.recipes.quantize import Quantize, quantize
from llmtools.train.options import StepOptions
from tests.models import tiny_mixture

STEP = {"batch_size": 2, "max_length": 32, "device": "cpu", "lora": Lora(r=2)}
RTN: dict[str, Any] = {"quantizer": "rtn", "group_size": 32}


def planned(model: Path, **options: Any) -> Any:
    return plan(Plan(str(model), **STEP, **options))


def asked(model: Path, out: Path, memory: float, **options: Any) -> Quantize:
    step = StepOptions(**STEP | options.pop("step", {}))
    return Quantize(str(model), str(out), fit=f"{memory / 1e6:.6f}MB", fit_step=step, **RTN | options)


def test_the_widest_codes_that_fit_are_chosen_and_shown(
    stories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two, three, four = (planned(stories, bits=bits, **RTN).total for bits in (2, 3, 4))
    assert two < three < four
    with caplog.at_level(logging.INFO, "llmtools"):
        made = quantize(asked(stories, tmp_path / "q", (three + four) / 2))
    assert made.quantizer["bits"] == 3
    assert all(f"--bits {bits} (" in caplog.text for bits in (2, 3, 4, 8))
    assert planned(tmp_path / "q").total == three
    assert quantize(asked(stories, tmp_path / "all", 2 * four)).quantizer["bits"] == 8


def test_calibration_text_divides_what_is_left(stories: Path, tmp_path: Path) -> None:
    two, three = (planned(stories, bits=bits, **RTN).total for bits in (2, 3))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog. The dog liked to play in the park all day. " * 60)
    memory = two + (three - two) * 0.6
    made = quantize(asked(stories, tmp_path / "q", memory, calibration=str(text), num_samples=4, max_length=32))
    found = planned(tmp_path / "q")
    assert two < found.total <= memory
    assert memory - found.total < 0.4 * (three - two)
    assert (tmp_path / "q" / "allocation.yaml").exists() and made.bits_per_weight == found.bits_per_weight


def test_what_is_left_is_divided_among_the_experts_of_a_mixture_too(tmp_path: Path, stories: Path) -> None:
    model = tmp_path / "mixture"
    tiny_mixture("mixtral").to(torch.bfloat16).save_pretrained(model)  # type: ignore[arg-type]
    for file in stories.glob("tokenizer*"):
        shutil.copy(file, model)
    two, three = (planned(model, bits=bits, **RTN).total for bits in (2, 3))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog. The dog liked to play in the park all day. " * 60)
    memory = two + (three - two) * 0.6
    quantize(asked(model, tmp_path / "q", memory, calibration=str(text), num_samples=4, max_length=32))
    assert two < planned(tmp_path / "q").total <= memory


def test_weights_in_files_fit_at_any_width(stories: Path, tmp_path: Path) -> None:
    streamed = planned(stories, bits=2, offload="disk", **RTN)
    memory = streamed.total - streamed.in_files + 10
    with pytest.raises(InputError, match=r"no width fits.* at least .*--bits 2.*--fit_step\.offload disk"):
        quantize(asked(stories, tmp_path / "q", memory))
    assert not list(tmp_path.iterdir())
    made = quantize(asked(stories, tmp_path / "q", memory, step={"offload": "disk"}))
    assert made.quantizer["bits"] == 8
    with pytest.raises(InputError, match="smaller step"):
        quantize(asked(stories, tmp_path / "q2", memory / 2, step={"offload": "disk"}))


def test_a_width_that_is_given_is_checked(stories: Path, tmp_path: Path) -> None:
    four = planned(stories, bits=4, **RTN).total
    with pytest.raises(InputError, match=r"no width fits.*--bits 4"):
        quantize(asked(stories, tmp_path / "q", 0.999 * four, bits=4))
    assert quantize(asked(stories, tmp_path / "q", four + 1, bits=4)).quantizer["bits"] == 4


def test_the_sets_of_a_quality_have_their_own_quantizers(stories: Path, tmp_path: Path) -> None:
    made = quantize(asked(stories, tmp_path / "q", 1e9, quantizer=None, group_size=None, quality="fast"))
    assert (made.quantizer["name"], made.quantizer["bits"]) == ("rtn", 8)


@pytest.mark.parametrize("size, count", [("6GB", 6e9), ("0.5 GB", 5e8), (6, 6e9), ("800MiB", 800 * 2**20), ("7", 7e9)])
def test_sizes_are_read(size: Any, count: float) -> None:
    assert bytes_of(size) == count


@pytest.mark.parametrize("size", ["", "six", "-1GB", "0", "1 PB", "nan", "inf", "6GBx"])
def test_other_sizes_are_refused(size: str) -> None:
    with pytest.raises(InputError, match="such as 6GB"):
        bytes_of(size)


def test_mistakes_are_one_line(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "q")
    with pytest.raises(InputError, match="--bits_per_weight, not both"):
        quantize(Quantize(str(stories), out, fit="1GB", bits_per_weight=2.5, **RTN))
    with pytest.raises(InputError, match="pass --fit"):
        quantize(Quantize(str(stories), out, fit_step=StepOptions(batch_size=2), **RTN))
    words = ["quantize", "--model", str(stories), "--quantizer", "rtn", "--fit", "1kB", "--out", out]
    assert main([*words, "--fit_step.batch_size", "2"]) != 0
    assert "fit='1kB'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
