"""Damaged folders by the hundred: each is refused in one line, opens as it was, or says what was changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.mutations import mutate
from tests.fuzz.seeds import make_seeds
from tests.fuzz.server import Outcome, Seed, run, summary

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each damaged folder is opened in a fork")

NAMES = ("rtn", "gptq", "optq", "quip_sharp", "nf4", "dense", "adapter")
EACH = 45


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Seed]]:
    yield make_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("name", NAMES)
def test_no_damage_ends_in_a_traceback_a_hang_or_a_silent_change(seeds: dict[str, Seed], name: str) -> None:
    outcomes = run(seeds[name], name, range(EACH))
    assert not [each for each in outcomes if each.kind in ("traceback", "hang", "signal")], summary(outcomes)
    assert {each.kind for each in outcomes} >= {"refused", "equal"}, "damage that is never seen tests nothing"
    if seeds[name].checksums:
        assert not [each for each in outcomes if _is_silent(each)]


def _is_silent(outcome: Outcome) -> bool:
    """Whether something else than tensor data changed without a word. What is gone altogether cannot tell."""
    gone = outcome.damage.startswith(("run.json", "llmtools.json")) and outcome.damage.endswith(": gone")
    return outcome.kind == "changed" and not outcome.data_only and not gone


def test_the_same_number_is_the_same_damage(seeds: dict[str, Seed], tmp_path: Path) -> None:
    import shutil

    for number in range(5):
        made = [Path(shutil.copytree(seeds["rtn"].folder, tmp_path / f"{number}.{copy}")) for copy in range(2)]
        assert mutate(made[0], Random(f"rtn {number}")) == mutate(made[1], Random(f"rtn {number}"))
        files = [sorted(path.name for path in folder.iterdir()) for folder in made]
        assert files[0] == files[1]
        kept = [name for name in files[0] if (made[0] / name).is_file()]
        assert all((made[0] / name).read_bytes() == (made[1] / name).read_bytes() for name in kept)
