"""Every export format passes the round trip, and the check can fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from llmtools.formats import Format, formats, laws
from llmtools.formats.base import affine
from llmtools.formats.gptq import GPTQ
from llmtools.formats.tensors import Module
from llmtools.formats.uniform import Uniform
from llmtools.quant import Packed, Quantizer

WRITTEN = [name for name in formats.names() if formats.known(name).limits is not None]


def test_there_is_a_format_for_each_file() -> None:
    assert {
        "awq",
        "bitsandbytes",
        "compressed-tensors",
        "exl3",
        "gguf",
        "gptq",
        "gptq_v2",
        "hqq",
        "qtip",
        "quip_sharp",
    } <= set(formats.names())
    assert {"compressed-tensors", "gptq", "gptq_v2"} <= set(WRITTEN)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_read_again(name: str) -> None:
    assert laws.check(formats.known(name)) >= 4


def test_the_law_sees_a_reader_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    read = GPTQ.read

    def wrong(self: GPTQ, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
        quantizer, packed = read(self, stored, out_features, in_features)
        return quantizer, packed | {"scales": packed["scales"] * 2}

    monkeypatch.setattr(GPTQ, "read", wrong)
    with pytest.raises(AssertionError, match="rows differ"):
        laws.check(GPTQ)


def test_the_law_sees_a_description_that_nothing_detects() -> None:
    class Lost(GPTQ):
        @classmethod
        def describe(cls, layers: Mapping[str, Uniform], dense: list[str]) -> dict[str, Any]:
            return {"quant_method": "lost"}

    Lost.name = "lost"
    with pytest.raises(AssertionError, match="no format detects"):
        laws.check(Lost)


def test_a_plugin_is_not_asked_about_methods_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed format cannot take over checkpoints that llmtools or transformers reads."""
    from llmtools.formats.reading import format_of

    class Greedy(Format):
        marker = "weight"

        @classmethod
        def detect(cls, config: Mapping[str, Any]) -> bool:
            return True

        def read(self, stored: Module, out_features: int, in_features: int) -> tuple[Quantizer, Packed]:
            zeros = torch.zeros(out_features, 1, dtype=torch.uint8)
            return affine(None, zeros, zeros, bits=8, group_size=-1, in_features=in_features)

    monkeypatch.setattr(formats, "_entries", dict(formats._entries))
    monkeypatch.setattr(formats, "_plugins_loaded", False)

    class Point:
        name, value, dist, load = "greedy", "somewhere:Greedy", None, staticmethod(lambda: Greedy)

    monkeypatch.setattr("llmtools.registry.entry_points", lambda group: [Point] if group == formats.group else [])
    assert format_of({"quant_method": "gptq", "bits": 4}) is GPTQ
    assert format_of({"quant_method": "quanto"}) is None
    assert format_of({"quant_method": "llmtools"}) is None
    assert format_of({"quant_method": "nobody's"}) is Greedy
