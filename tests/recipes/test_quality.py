"""`--quality`: every set is one that quantize takes, what is given wins, and what was chosen is recorded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import llmtools
from llmtools.cli.app import main, read_recipe
from llmtools.errors import InputError
from llmtools.model.options import NO_RECOVERY, NO_TUNING, RECOVERY, BlockTuning, Recovery
from llmtools.nn import quantized_linears
from llmtools.recipes.quality import BUNDLES, bundle_of, described, expanded, with_quality
from llmtools.recipes.quantize import Quantize, checked_quantizer, quantize


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text((tinystories / "train.txt").read_text()[:20_000])
    return file


def asked(**options: Any) -> Quantize:
    return Quantize(model="m", out="o", **options)


def read(*words: str) -> Quantize:
    recipe = read_recipe("quantize", Quantize, ["--model", "m", "--out", "o", *words])
    assert isinstance(recipe, Quantize)
    return recipe


@pytest.mark.parametrize(
    ("quality", "bits"), [("balanced", 5), *((quality, bits) for quality, sets in BUNDLES.items() for bits in sets)]
)
def test_every_set_is_one_that_quantize_takes(quality: str, bits: int, text: Path) -> None:
    recipe = asked(quality=quality, bits=bits, calibration=str(text))
    quantizer, filled = checked_quantizer(recipe), with_quality(recipe)
    assert getattr(quantizer, "bits", 4) == bits  # nf4 has 4 alone
    options = bundle_of(quality, bits).options
    assert quantizer.name == options["quantizer"]
    assert {key: getattr(quantizer, key) for key in options.get("options", {})} == options.get("options", {})
    assert filled.recover.steps == options.get("recover", {}).get("steps", 0)
    assert filled.finetune_blocks.epochs == options.get("finetune_blocks", {}).get("epochs", 0)
    assert with_quality(filled) == filled
    if quality == "fast" or bits == 8:
        assert checked_quantizer(asked(quality=quality, bits=bits)) == quantizer  # without text


def test_sets_name_options_that_there_are() -> None:
    known = asdict(asked())
    for sets in BUNDLES.values():
        for bundle in sets.values():
            assert bundle.options.keys() <= known.keys() and "quantizer" in bundle.options
            assert bundle.options.get("recover", {}).keys() <= asdict(Recovery()).keys()
            assert bundle.options.get("finetune_blocks", {}).keys() <= asdict(BlockTuning()).keys()


def test_without_either_it_is_balanced_and_a_quantizer_alone_is_itself() -> None:
    assert with_quality(asked()).quality == "balanced"
    assert with_quality(asked(bits=2)) == with_quality(asked(bits=2, quality="balanced"))
    plain = with_quality(asked(quantizer="optq"))
    assert plain.quality is None and plain.options == {} and plain.group_size is None and plain.num_samples == 128
    assert plain.recover == NO_RECOVERY and plain.finetune_blocks == NO_TUNING


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--num_samples", "128"], "num_samples", 128),  # what a quantizer alone would have
        (["--max_length", "64"], "max_length", 64),
        (["--options.state_bits", "9"], "options", {"state_bits": 9}),
        (["--recover.steps", "0"], "recover", NO_RECOVERY),
        (["--recover"], "recover", RECOVERY),
        (["--finetune_blocks.epochs", "0"], "finetune_blocks", NO_TUNING),
        (["--recover.batch", "2"], "recover", Recovery(steps=240, batch=2)),
        (["--bits", "3"], "bits", 3),
        (["--quantizer", "optq"], "quantizer", "optq"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_what_is_given_wins(words: list[str], field: str, value: Any) -> None:
    filled = with_quality(read("--quality", "best", *words))
    assert getattr(filled, field) == value
    others = asdict(with_quality(read("--quality", "best"))) | {field: None}
    if field not in ("bits", "quantizer"):
        assert asdict(filled) | {field: None} == others


def test_another_quantizer_keeps_what_is_not_of_the_first() -> None:
    filled = with_quality(asked(quality="best", quantizer={"name": "optq", "bits": 3, "group_size": 32}))
    assert filled.options == {} and filled.group_size is None and filled.recover.steps == 240
    own = with_quality(asked(quality="fast", bits=3, quantizer={"name": "rtn", "group_size": 16}))
    assert own.group_size is None  # its own wins
    assert with_quality(asked(quality="fast", bits=3, quantizer="rtn")).group_size == 64


def test_what_cannot_be_is_said(text: Path) -> None:
    with pytest.raises(InputError, match=r"quality='ballanced'; did you mean 'balanced'"):
        checked_quantizer(asked(quality="ballanced"))
    with pytest.raises(InputError, match=r"qtip \(--quality balanced\) needs calibration text.*--quality fast"):
        checked_quantizer(asked(bits=4))
    with pytest.raises(InputError, match=r"group_size.*balanced chose qtip; --quantizer NAME chooses another"):
        checked_quantizer(asked(bits=4, group_size=64, calibration=str(text)))
    with pytest.raises(InputError, match="bits"):
        checked_quantizer(asked(bits=1, quality="fast"))


def test_what_was_chosen_is_recorded(stories: Path, text: Path, tmp_path: Path) -> None:
    recipe = Quantize(
        model=str(stories), out=str(tmp_path / "q"), bits=2, calibration=str(text), num_samples=4, max_length=48,
        recover=Recovery(steps=None, batch=1),
    )  # fmt: skip
    short = Recovery(steps=2, batch=1, evaluations=1)
    result = quantize(Quantize(**{**recipe.__dict__, "recover": short}))
    assert result.recovery and result.recovery["steps"] == 2 and result.quantizer["passes"] == 0
    info = json.loads((tmp_path / "q" / "llmtools.json").read_text())
    filled = with_quality(recipe)
    assert info["recipe"]["quality"] == info["quality"]["name"] == "balanced"
    assert info["recipe"]["quantizer"] == filled.quantizer and info["recipe"]["num_samples"] == 4
    words = "qtip --bits 2 --num_samples 4 --max_length 48"
    assert info["quality"]["options"].startswith(words)
    assert f"balanced: `{words}" in (tmp_path / "q" / "README.md").read_text()
    again = read("--quantizer", *info["quality"]["options"].split())  # the command that makes it again
    assert (again.options, again.recover.steps) == ({}, 2)
    assert {layer.quantizer.name for layer in quantized_linears(llmtools.load(tmp_path / "q")[0]).values()} == {"qtip"}
    assert "--recover.steps 60" in expanded(filled)


@pytest.mark.parametrize("words", [["quantize", "--help"], ["list"], ["list", "balanced"]], ids=" ".join)
def test_the_sets_are_shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "balanced" in shown
    if words != ["list"]:
        for line in described("balanced").splitlines():
            assert line in shown
