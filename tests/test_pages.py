"""Pages of files in memory are found, hints change no contents, and no hint is needed."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

from llmtools import pages
from llmtools.pages import FilePages, Span, ask_for, file_pages, free_memory, joined, let_go

MAPS = """\
7f0000000000-7f0000002000 rw-p 00000000 fe:00 12 /some where/model.safetensors
7f0000002000-7f0000003000 rw-p 00002000 fe:00 13 /some where/other (deleted)
7f0000003000-7f0000004000 rw-p 00000000 00:00 0
7f0000005000-7f0000006000 rw-s 00000000 00:05 7 /dev/zero (deleted)
7f0000007000-7f0000008000 rw-p 00000000 00:00 0 [heap]
"""
BASE = 0x7F0000000000


@pytest.mark.parametrize(
    ("start", "stop", "held"),
    [
        (0, 0x2000, True),
        (0x10, 0x20, True),
        (0x1FFF, 0x2001, True),  # across two files
        (0x2FFF, 0x3001, False),
        (0x3000, 0x3010, False),
        (0x5000, 0x5010, False),
        (0x7000, 0x7010, False),
        (-0x10, 0x10, False),
    ],
)
def test_a_span_is_of_files_where_all_of_it_is(start: int, stop: int, held: bool) -> None:
    assert FilePages(MAPS).hold(Span(BASE + start, BASE + stop)) is held


def test_spans_with_small_gaps_are_advised_as_one() -> None:
    spans = [Span(50, 60), Span(0, 10), Span(5, 8), Span(12, 20)]
    assert joined(spans, gap=2) == [Span(0, 20), Span(50, 60)]
    assert joined(spans, gap=0) == [Span(0, 10), Span(12, 20), Span(50, 60)]
    assert joined([]) == []


@pytest.fixture
def mapping(tmp_path: Path) -> mmap.mmap:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 64)
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def span_of(mapping: mmap.mmap) -> Span:
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    return Span(start, start + len(mapping))


def test_hints_change_no_contents_of_a_private_mapping(mapping: mmap.mmap) -> None:
    mapping[100:104] = b"mine"
    expected = bytes(mapping)
    part = Span(span_of(mapping).start + 33, span_of(mapping).stop - 7)
    for hint in (ask_for, let_go, ask_for):
        hint([part])
        assert bytes(mapping) == expected


def test_a_mapped_file_is_found(mapping: mmap.mmap) -> None:
    found = file_pages()
    if found is None:
        pytest.skip("the system does not list its mappings")
    assert found.hold(span_of(mapping))
    buffer = ctypes.create_string_buffer(64)
    assert not found.hold(Span(ctypes.addressof(buffer), ctypes.addressof(buffer) + 64))


def test_without_madvise_nothing_is_said(mapping: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bytes(mapping)
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    ask_for([span_of(mapping)])
    let_go([span_of(mapping)])
    assert bytes(mapping) == before


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4 kB\n")
    assert free_memory(tmp_path) == 4096
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("3000\n")
    (group / "memory.current").write_text("1000\n")
    assert free_memory(tmp_path) == 2000
    (group / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 4096
