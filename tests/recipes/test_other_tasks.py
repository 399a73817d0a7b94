"""Models that are no decoders on the command line: quantized as what they are, refused in one line by the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmtools.checkpoint.folder import load, save
from llmtools.errors import InputError
from llmtools.model.options import Recovery
from llmtools.recipes.evaluate import Evaluate, evaluate
from llmtools.recipes.generate import Generate, generate
from llmtools.recipes.quantize import Quantize, quantize
from tests.models import other_model, tiny_ids


@pytest.fixture(scope="module", params=["bert", "t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Path:
    from transformers import AutoTokenizer

    place = tmp_path_factory.mktemp("other") / str(request.param)
    return save(other_model(request.param), AutoTokenizer.from_pretrained(stories), place)


@pytest.mark.parametrize("quantizer", ["rtn", "optq"])
def test_they_are_quantized(folder: Path, quantizer: str, tinystories: Path, tmp_path: Path) -> None:
    recipe = Quantize(
        model=str(folder),
        out=str(tmp_path / "out"),
        quantizer=quantizer,
        bits=4,
        group_size=16,
        calibration=str(tinystories / "held_out.txt"),
        num_samples=2,
        max_length=32,
    )
    assert quantize(recipe).modules > 0
    dense, _ = load(folder)
    again, _ = load(tmp_path / "out")
    assert type(again) is type(dense)
    ids = tiny_ids()
    extra = {"decoder_input_ids": ids} if dense.config.is_encoder_decoder else {}
    with torch.no_grad():
        before, after = (each(input_ids=ids, **extra).logits for each in (dense, again))
    assert 0 < (after - before).norm() < 0.7 * before.norm()


@pytest.mark.parametrize("kind", ["bert", "t5", "bart", "embedding"])
@pytest.mark.parametrize("bits", [2, 4])
def test_they_are_quantized_by_the_options_that_are_chosen_where_none_are_given(
    kind: str, bits: int, stories: Path, tinystories: Path, tmp_path: Path
) -> None:
    """Two-sided rounding and recovery go by the logits, and are left out where there are none."""
    from transformers import AutoTokenizer

    save(other_model(kind), AutoTokenizer.from_pretrained(stories), tmp_path / "model")
    asked = Quantize(
        model=str(tmp_path / "model"), out=str(tmp_path / "out"), bits=bits, num_samples=8, max_length=32,
        calibration=str(tinystories / "held_out.txt"), options={"state_bits": 8},
    )  # fmt: skip
    result = quantize(asked)
    assert result.modules > 0
    assert (result.recovery is not None) == (bits == 2 and kind != "embedding")
    if kind == "embedding":
        for wanted in ({"rounding": "two_sided"}, {"recover": Recovery(steps=1)}):
            with pytest.raises(InputError, match="LlamaModel gives no logits"):
                quantize(replace(asked, **wanted, overwrite=True))  # type: ignore[arg-type]


def test_what_needs_a_language_model_says_so(folder: Path, tinystories: Path) -> None:
    for run in (
        lambda: evaluate(Evaluate(model=str(folder), data=str(tinystories / "held_out.txt"))),
        lambda: generate(Generate(model=str(folder), prompt="Once")),
    ):
        with pytest.raises(InputError, match=r"is a (BertForSequenceClassification|T5ForConditionalGen\w+), ") as told:
            run()
        assert "\n" not in str(told.value)
