"""A run is resumed with the recipe that it began with, whatever version wrote it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from llmtools.errors import InputError
from llmtools.train.options import Finetune
from llmtools.train.run_folder import _check_same


def test_a_recipe_with_former_names_of_options_is_the_same() -> None:
    recipe = Finetune("m", "d", "o", num_samples=3)
    written: dict[str, Any] = asdict(recipe)
    former = {key: value for key, value in written.items() if key != "num_samples"}
    inputs = {"inputs": {"training data": "sha256:x"}}
    for stored in (written, {**former, "limit": 3}):
        _check_same(recipe, {"recipe": stored, **inputs}, inputs)
    for stored in ({**written, "num_samples": 4}, {**former, "limit": 4}):
        with pytest.raises(InputError, match="num_samples was 4 and is 3"):
            _check_same(recipe, {"recipe": stored, **inputs}, inputs)
