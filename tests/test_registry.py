"""A registry answers by name, in either way of asking, and says what it has when there is no such name."""

from __future__ import annotations

import pytest

import llmtools
from llmtools.errors import InputError


def test_square_brackets_ask_as_get_does() -> None:
    assert llmtools.quantizers["optq"] is llmtools.quantizers.get("optq")
    assert llmtools.tasks["text"] is llmtools.tasks.get("text")
    assert llmtools.quantizers["llmtools.quant.presets:RTN"].name == "rtn"


@pytest.mark.parametrize("registry", [llmtools.quantizers, llmtools.tasks], ids=lambda registry: registry.kind)
def test_an_unknown_name_is_the_same_error_in_both_ways(registry: llmtools.registry.Registry) -> None:
    said = []
    for ask in (registry.get, registry.__getitem__):
        with pytest.raises(InputError, match=f"{registry.kind} 'optqq' is not known") as error:
            ask("optqq")
        said.append(str(error.value))
    assert said[0] == said[1]
    assert registry.names()[0] in said[0]
