"""Outputs: one writer at a time, whole or not at all, and nothing replaced that is not ours."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtools import InputError, files
from llmtools.files import (
    METADATA,
    NameTaken,
    check_free,
    claim,
    partial_of,
    remove,
    safetensors_header,
    unknown_files,
    unpickled,
    write_whole,
    writing,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, text: str = "new", overwrite: bool = False) -> None:
    with writing(folder, overwrite=overwrite) as partial:
        (partial / "config.json").write_text(text)


@contextmanager
def another_run(folder: Path, host: str = socket.gethostname()) -> Iterator[None]:
    """Its lock, as another process holds it."""
    file = folder.with_name(f".{folder.name}.lock")
    with file.open("w") as stream:
        stream.write(f"4242 {host}\n")
        stream.flush()
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------------------------ what may be replaced


def test_an_output_lists_its_files_and_may_be_replaced(tmp_path: Path) -> None:
    with writing(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "weights").touch()
        (partial / METADATA).write_text('{"versions": {}}')
    assert json.loads((tmp_path / "out" / METADATA).read_text()) == {"versions": {}, "files": [METADATA, "sub/weights"]}
    write(tmp_path / "out", "again", overwrite=True)
    assert names(tmp_path / "out") == ["config.json", METADATA]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("place", ["thesis.tex", "sub/thesis.tex", ".hidden"])
def test_files_of_other_programs_are_named_and_kept(place: str, tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / "sub").mkdir()  # an empty folder alone is no loss
    check_free(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / place).write_text("years of work")
    with pytest.raises(InputError, match=rf"holds {place}, which llmtools did not write"):
        write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / place).read_text() == "years of work"
    (tmp_path / "out" / place).unlink()
    (tmp_path / "out" / "link").symlink_to(tmp_path)  # to a folder
    with pytest.raises(InputError, match="holds link"):
        write(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("present", [["config.json", "model.safetensors"], ["run.json"], [METADATA], ["x/y"]], ids=str)
def test_a_folder_that_is_not_ours_is_never_replaced(present: list[str], tmp_path: Path) -> None:
    for name in present:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text('{"name": "somebody\'s"}')
    with pytest.raises(InputError, match="is no output of llmtools"):
        write(tmp_path / "out", overwrite=True)
    assert all((tmp_path / "out" / name).exists() for name in present)


@pytest.mark.parametrize("mark", ['{"versions": {"torch": "2"}}', None], ids=["checkpoint", "adapter"])
def test_outputs_of_earlier_versions_are_known_by_the_names_of_their_files(mark: str | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    if mark:
        (out / METADATA).write_text(mark)
    (out / "run.json").write_text('{"command": "finetune", "recipe": {}}')
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "checkpoints/checkpoint-2/a.pt"):
        (out / name).touch()
    assert unknown_files(out) == []
    (out / "scores.csv").touch()
    assert unknown_files(out) == ["scores.csv"]
    (out / "scores.csv").unlink()
    write(out, overwrite=True)
    assert names(out) == ["config.json", METADATA]


def test_an_input_is_never_replaced_by_whatever_way_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out)
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(out / "config.json")
    monkeypatch.chdir(tmp_path)
    for read in (out, "out", "link", "out/config.json", out / ".." / "out", "model"):
        with pytest.raises(InputError, match="input of this run"), claim(out, overwrite=True, reads=[None, read]):
            raise AssertionError("must not begin")
    with claim(out, overwrite=True, reads=[None, "owner/name", "no\0file", "x" * 5000, "~nobody/x"]):
        pass


def test_a_sweep_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / METADATA).write_text('{"command": "sweep", "versions": {}}')
    with pytest.raises(InputError, match="holds a sweep"):
        write(tmp_path / "s", overwrite=True)


# ----------------------------------------------------------------------------------------------------- one at a time


def test_a_second_run_is_refused_by_name(tmp_path: Path) -> None:
    with another_run(tmp_path / "out"), pytest.raises(InputError, match=r"another run \(pid 4242\) writes to .*out;"):
        write(tmp_path / "out")
    with another_run(tmp_path / "out", "elsewhere"), pytest.raises(InputError, match=r"\(pid 4242 on elsewhere\)"):
        write(tmp_path / "out")
    assert names(tmp_path) == [".out.lock"]
    write(tmp_path / "out")  # what is left of a lock holds nobody up
    assert names(tmp_path) == ["out"]


def test_a_claim_is_the_runs_own_and_nobody_elses(tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def other_thread() -> None:
        try:
            write(tmp_path / "out")
        except InputError as error:
            refused.append(error)

    (tmp_path / "link").symlink_to(tmp_path / "out")
    with claim(tmp_path / "out"):
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        assert len(refused) == 1 and f"pid {os.getpid()}" in str(refused[0])
        write(tmp_path / "other")  # another output is free
        with claim(tmp_path / "link", adding=True):  # the same one by another name
            write(tmp_path / "out")
    assert names(tmp_path) == ["link", "other", "out"]


def test_a_claim_that_comes_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claim(tmp_path / "deep" / "er" / "out"):
        assert names(tmp_path / "deep" / "er") == [".out.lock"]
        raise KeyError
    assert names(tmp_path) == []


def test_the_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("here")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        write(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "here"


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    living = partial_of(tmp_path / "out")
    living.mkdir()
    write(tmp_path / "out")
    assert names(tmp_path) == sorted([living.name, "out"])  # whose run may be alive


# --------------------------------------------------------------------------------------------------- what kills leave


def test_what_a_killed_run_left_is_cleared_away_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = partial_of(tmp_path / "out")
    older, elsewhere = tmp_path / ".out.0123abcd.partial", tmp_path / ".out.ffffff-77-0123.partial"
    other_output = partial_of(tmp_path / "out.x")
    for folder in (ours, older, elsewhere, other_output, tmp_path / ".out.mine.partial"):
        (folder / "half").mkdir(parents=True)
    write(tmp_path / "out")
    kept = {elsewhere.name, other_output.name, ".out.mine.partial", "out"}
    assert {*names(tmp_path)} == kept
    assert f"{elsewhere.name} belongs to a run on another machine" in caplog.text


def test_a_folder_that_lost_its_name_gets_it_back(tmp_path: Path) -> None:
    write(tmp_path / "out", "former")
    partial = partial_of(tmp_path / "out")
    (tmp_path / "out").rename(partial.with_name(f"{partial.name}.former"))  # killed between the two renames
    partial.mkdir()
    with pytest.raises(InputError, match="out exists"):
        write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "former"
    shutil.copytree(tmp_path / "out", partial.with_name(f"{partial.name}.former"))  # killed after both
    write(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_removing_takes_the_name_away_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.training" / "sub").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill in the midst of it
    remove(tmp_path / "out.training", of=tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out.training").exists() and len(names(tmp_path)) == 1
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_an_interrupted_replacement_leaves_one_of_the_two(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "former")
    if not exchange:
        monkeypatch.setattr(files, "_swapped", lambda *_: False)
    steps = 0
    rename, rmtree = Path.rename, shutil.rmtree

    def interrupted(step: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal steps
            steps += 1
            if steps == stop:
                raise KeyboardInterrupt
            return step(*args, **kwargs)  # type: ignore[operator]

        return call

    for stop in range(1, 6):
        steps = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", interrupted(rename))
            patch.setattr(shutil, "rmtree", interrupted(rmtree))
            with suppress(KeyboardInterrupt):
                write(tmp_path / "out", f"new {stop}", overwrite=True)
        found = (tmp_path / "out" / "config.json").read_text()
        assert found in ("former", *(f"new {number}" for number in range(1, stop + 1)))
    write(tmp_path / "out", "last", overwrite=True)
    assert names(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------- finished work stays


@pytest.mark.parametrize("what", ["folder", "file", "empty folder", "thesis in it"])
def test_finished_work_is_kept_under_another_name(what: str, tmp_path: Path) -> None:
    out, overwrite = tmp_path / "out", what == "thesis in it"
    if overwrite:
        write(out, "former")
    (tmp_path / "out.1").mkdir()
    said = r"out (appeared|changed) while this ran.*kept as .*out\.2"
    with pytest.raises(NameTaken, match=said), writing(out, overwrite=overwrite) as partial:
        (partial / "config.json").write_text("hours of work")
        if what == "file":
            out.write_text("theirs")
        else:
            out.mkdir(exist_ok=True)
            if what != "empty folder":
                (out / "thesis.tex").write_text("theirs")
    assert (tmp_path / "out.2" / "config.json").read_text() == "hours of work"
    assert names(tmp_path) == ["out", "out.1", "out.2"]
    theirs = out if what == "file" else out / "thesis.tex"
    assert what == "empty folder" or theirs.read_text() == "theirs"
    if overwrite:
        assert (out / "config.json").read_text() == "former"


def test_work_that_was_claimed_early_is_kept_as_well(tmp_path: Path) -> None:
    with pytest.raises(NameTaken), claim(tmp_path / "out"):
        (tmp_path / "out").mkdir()  # in the hours before anything is written
        (tmp_path / "out" / "thesis.tex").touch()
        write(tmp_path / "out", "hours of work")
    assert (tmp_path / "out.1" / "config.json").read_text() == "hours of work"
    assert names(tmp_path / "out") == ["thesis.tex"]


def test_a_file_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    write_whole(tmp_path / "file", "one")
    assert synced == [(tmp_path / "file").stat().st_ino]  # on the disk before it had its name
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", "two")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "one"


# ------------------------------------------------------------------------------------------------------ the same bytes


def test_the_metadata_of_weights_are_written_in_order(tmp_path: Path) -> None:
    """The safetensors library writes them in the order of a hash table with a seed of its own."""
    tensors = {f"t{n}": torch.randn(n + 1, 3) for n in range(4)}
    metadata = {key: key * 3 for key in ("format", "llmtools", "über", 'quo"te', "line\n", "z")}
    written = set()
    for attempt in range(4):
        with writing(tmp_path / f"out{attempt}") as partial:
            save_file(tensors, partial / "model.safetensors", metadata)
            before = (partial / "model.safetensors").read_bytes()
        file = tmp_path / f"out{attempt}" / "model.safetensors"
        written.add(file.read_bytes())
        (length,) = struct.unpack("<Q", before[:8])
        header = json.loads(file.read_bytes()[8 : 8 + length])
        assert list(header["__metadata__"]) == sorted(metadata) and header["__metadata__"] == metadata
        assert file.read_bytes()[8 + length :] == before[8 + length :]
        back = load_file(file)
        assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert len(written) == 1


@pytest.mark.parametrize("damage", [b"", b"\x02", b"\xff" * 8 + b"{}", (5).to_bytes(8, "little") + b"{}", bytes(8)])
def test_the_header_of_a_safetensors_file_is_read_whole_or_not_at_all(damage: bytes, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors", metadata={"b": "1"})
    with (tmp_path / "x.safetensors").open("rb") as stream:
        header = json.loads(safetensors_header(stream))
        assert header["a"]["shape"] == [3] and header["__metadata__"] == {"b": "1"}
        assert stream.read() == torch.ones(3).numpy().tobytes()
    with pytest.raises(ValueError, match="safetensors"):
        safetensors_header(io.BytesIO(damage))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("qmodel.pt", "save_to_safetensors"), ("adapter_model.bin", "peft"), ("x.bin", "AutoModelForCausalLM")],
)
def test_a_pickle_is_named_with_the_way_out_of_its_writer(name: str, remedy: str, tmp_path: Path) -> None:
    said = str(unpickled(tmp_path / name))
    assert f"holds {name}, which is a pickle" in said and remedy in said and "\n" not in said
