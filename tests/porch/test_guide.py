"""The guide for people who come from the published releases names every word that is accepted, and what it became."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtools.cli.legacy import ALIASES, GONE, OLD


def test_the_guide_names_every_old_word(repository: Path) -> None:
    text = (repository / "docs" / "coming-from-llmtools.md").read_text(encoding="utf-8").replace("-", "_")
    for word in {word for table in OLD.values() for word in table} - set(ALIASES) | set(GONE):
        assert f"__{word}`" in text, word


@pytest.mark.parametrize("verb", OLD)
def test_the_guide_names_what_it_became(verb: str, repository: Path) -> None:
    text = (repository / "docs" / "coming-from-llmtools.md").read_text(encoding="utf-8")
    for new in {today for word, today in OLD[verb].items() if word not in ALIASES}:
        option, _, value = new.partition("=")
        if option and not option.startswith("training."):
            assert f"--{option}{f' {value}' if value else ''}" in text, new
