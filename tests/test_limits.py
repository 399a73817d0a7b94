"""Work that a file asks for ends: in time, and before the memory does."""

from __future__ import annotations

import re
import threading

import pytest

from llmtools.limits import bounded, match

HOSTILE, TEXT = "([a-z._0-9]+)+!", "model.layers.0.self_attn.q_proj.and.more"


def test_a_regular_expression_is_interrupted() -> None:
    with pytest.raises(TimeoutError):
        match(HOSTILE, TEXT, 0.2)
    assert match(r"model\..*q_proj", TEXT, 1) and not match("layers", TEXT, 1)
    with pytest.raises(re.error):
        match("(", TEXT, 1)


def test_so_it_is_in_another_thread() -> None:
    found: list[object] = []

    def work() -> None:
        try:
            found.append(match(r"(a|aa)+$", "a" * 60 + "b", 0.2))
        except TimeoutError as error:
            found.append(error)
        found.append(match(r"model\..*q_proj", TEXT, 1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert len(found) == 2 and found[1] is True


def test_memory_is_refused_within_and_free_again_after() -> None:
    with pytest.raises(MemoryError), bounded(5):
        bytearray(8 * 2**30)
    assert len(bytearray(2**20)) == 2**20


def test_a_loop_ends_and_what_is_quick_does_not_notice() -> None:
    with pytest.raises(TimeoutError), bounded(0.1):
        while True:
            pass
    with bounded(10):
        pass
