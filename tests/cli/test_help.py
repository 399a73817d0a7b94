"""Help: the options that most people need, then all, each with its default."""

from __future__ import annotations

import re

import pytest

from llmtools.cli.app import _names, main
from llmtools.cli.verbs import VERBS

COMMON = {"config", "json", "help", "help_all"}


def options_in(text: str) -> list[str]:
    """The long options that a help text lists."""
    return re.findall(r"^  (?:-h, )?--([\w.]+)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_short_and_help_all_is_whole(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = _names(VERBS[verb].recipe())
    assert main([verb, "--help"]) == 0
    shown = options_in(capsys.readouterr().out)
    first = VERBS[verb].first
    if not first:
        assert set(names) <= set(shown)
        return
    assert set(shown) == {*first, *COMMON}
    assert len(first) <= 10
    assert set(first) <= set(names)
    assert main([verb, "--help_all"]) == 0
    text = capsys.readouterr().out
    assert set(names) <= set(options_in(text))
    assert "examples:" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_its_default_or_that_it_is_required(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help_all" if VERBS[verb].first else "--help"]) == 0
    text = capsys.readouterr().out
    entries = re.split(r"^  (?=--)", text.partition("examples:")[0], flags=re.MULTILINE)[1:]
    names = set(_names(VERBS[verb].recipe()))
    for entry in entries:
        name = re.match(r"--([\w.]+)", entry)
        assert name is not None
        if name[1] in names:
            assert re.search(r"\bdefault:|required", " ".join(entry.split())), entry
