"""Weights in files: the bits of resident ones, no memory of the process, a schedule that is learned from the run."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llmtools
from benchmarks.tiny import tiny_model as tiny_family
from llmtools import CheckpointError, InputError, pages
from llmtools.checkpoint.folder import load_model
from llmtools.model import offload
from llmtools.model.offload import Schedule, Spill, Watch, bytes_in_files, keep_in_files, units_of
from llmtools.nn.embedding import TiedLinear
from llmtools.nn.experts import unfused_experts
from llmtools.pages import Span, file_pages
from tests.formats.test_reading import KINDS
from tests.formats.writers import write
from tests.models import tiny_ids, tiny_model

peft = pytest.importorskip("peft")

LISTED = file_pages() is not None
QUANTIZERS: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"bits": 2, "group_size": 16}),
    ("optq", {"bits": 3, "act_order": True}),
    ("nf4", {"double_quantization": True}),
    ("hqq", {"bits": 4}),
    ("awq", {"bits": 4}),
    ("quip", {"bits": 4}),
    ("quip_sharp", {"bits": 2}),
    ("signround", {"bits": 4, "iterations": 2}),
]


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tensors of tiny models are moved, too."""
    monkeypatch.setattr(offload, "SMALLEST", 1)
    monkeypatch.setattr(offload, "cache_home", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, quantized, in several files, with an embedding that the head is not tied to."""
    model = tiny_model(num_hidden_layers=3)
    llmtools.quantize(model, "rtn", bits=3, group_size=32)
    return llmtools.save(model, None, tmp_path_factory.mktemp("offload") / "packed", max_shard_size="100KB")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits


def trained(model: Any, checkpointing: bool, steps: int = 3) -> list[torch.Tensor]:
    """Losses and adapters of a few steps of LoRA."""
    torch.manual_seed(1)
    prepared = llmtools.prepare_for_training(model, gradient_checkpointing=checkpointing)
    adapted = peft.get_peft_model(prepared, peft.LoraConfig(target_modules="all-linear", r=2)).train()
    adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for step in range(steps):
        ids = tiny_ids(seed=step)
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses + [parameter.detach() for parameter in adapters]


def assert_same_bits(folder: str | Path, checkpointing: bool = True, **options: Any) -> Any:
    """Logits and training are those of resident weights, and all weights are in files; returns a model."""
    resident, streamed = load_model(folder, **options), load_model(folder, offload="disk", **options)
    assert torch.equal(logits(streamed), logits(resident))
    inside, whole = bytes_in_files(streamed)
    assert inside == (whole if LISTED else 0) and whole > 0
    found, expected = trained(streamed, checkpointing), trained(resident, checkpointing)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return load_model(folder, offload="disk", **options)


@pytest.mark.parametrize(("name", "options"), QUANTIZERS, ids=[name for name, _ in QUANTIZERS])
def test_our_checkpoints_have_the_bits_of_resident_weights(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model()
    llmtools.quantize(model, name, [tiny_ids()], **options)
    assert_same_bits(llmtools.save(model, None, tmp_path / "m"))
    assert not (tmp_path / "cache").exists()  # nothing was repacked


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_others_have_the_bits_of_resident_weights(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "external", *KINDS[kind])
    assert_same_bits(tmp_path / "external")


@pytest.mark.filterwarnings("ignore")
def test_gguf_files_have_the_bits_of_resident_weights(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.formats.test_gguf_reading import write_gguf

    changes: dict[str, Any] = {"qwen3": {"tie_word_embeddings": True, "head_dim": 128}}
    for family in ("llama", "qwen3"):  # rows of queries and keys in another order; all as they lie in the file
        (tmp_path / family).mkdir()
        assert_same_bits(write_gguf(tmp_path / family, family, **changes.get(family, {})))


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "opt"])
def test_tied_weights_stay_tied(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    llmtools.quantize(model, "rtn", bits=4, group_size=32)
    streamed = assert_same_bits(llmtools.save(model, None, tmp_path / "m"))
    head, embedding = streamed.get_output_embeddings(), streamed.get_input_embeddings()
    assert isinstance(head, TiedLinear) or head.weight is embedding.weight


@pytest.mark.parametrize("checkpointing", [False, True])
def test_another_type_of_the_dense_weights_is_kept_in_a_file(packed: Path, checkpointing: bool) -> None:
    assert_same_bits(packed, checkpointing, dtype=torch.bfloat16)


def test_a_dense_model_stays_in_its_files(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "dense")
    assert_same_bits(tmp_path / "dense")


def test_without_lists_and_hints_of_the_system_it_works(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(load_model(packed))
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    monkeypatch.setattr(offload, "file_pages", lambda: None)
    monkeypatch.setattr(offload, "free_memory", lambda: None)
    for platform in ("darwin", "win32"):  # mapped by safetensors; read by transformers
        monkeypatch.setattr(offload.sys, "platform", platform)
        assert torch.equal(logits(load_model(packed, offload="disk")), expected)


# ------------------------------------------------------------------------------------------------------------- schedule


class Hints:
    """The hints that a schedule of so many units gives, unit by unit."""

    def __init__(self, units: int, **options: Any) -> None:
        self.asked: list[int] = []
        self.let_go: list[int] = []
        spans = [[Span(10 * unit, 10 * unit + 5)] for unit in range(units)]
        self.schedule = Schedule(
            spans, ask=self.noting(self.asked), let=self.noting(self.let_go), **{"release": True, **options}
        )

    @staticmethod
    def noting(where: list[int]) -> Callable[[Iterable[Span]], None]:
        return lambda spans: where.extend(span.start // 10 for span in spans)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_each_block_of_a_learned_step_was_asked_for_before_its_turn(ahead: int) -> None:
    step = [0, 1, 2, 3, 4, 0, 4, 4, 3, 3, 2, 2, 1, 1]  # forward, head and loss, backward with recomputation
    events: list[tuple[str, int]] = []

    def noting(what: str) -> Callable[[Iterable[Span]], None]:
        return lambda spans: events.extend((what, span.start // 10) for span in spans)

    spans = [[Span(10 * unit, 10 * unit + 5)] for unit in range(5)]
    schedule = Schedule(spans, release=True, ahead=ahead, ask=noting("ask"), let=noting("let"))
    there = set[int]()
    for number, unit in enumerate(step * 3):
        if number >= 2 * len(step):
            assert unit in there
        schedule.at(unit)
        for what, which in events:
            there = there | {which} if what == "ask" else there - {which}
        events.clear()
        assert len(there) <= ahead + 1


def test_units_behind_are_let_go_and_those_ahead_are_not() -> None:
    hints = Hints(8)
    for unit in [*range(8), *reversed(range(8))] * 2:
        hints.schedule.at(unit)
        assert {unit, *hints.schedule.upcoming()} == hints.schedule._asked
    hints.asked.clear()
    hints.let_go.clear()
    for unit in [*range(8), *reversed(range(8))]:
        hints.schedule.at(unit)
        assert unit not in hints.let_go[-1:]
    assert set(hints.let_go) == set(hints.asked) == set(range(8))


def test_nothing_is_let_go_where_the_page_cache_holds_the_model() -> None:
    hints = Hints(5, release=False)
    for unit in [*range(5), *reversed(range(5))] * 2:
        hints.schedule.at(unit)
    assert hints.let_go == [] and set(hints.asked) == set(range(5))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_blocks_report_in_the_order_of_the_run(
    checkpointing: bool, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    at = Schedule.at

    def noted(self: Schedule, unit: int) -> None:
        seen.extend([unit] if seen[-1:] != [unit] else [])
        at(self, unit)

    monkeypatch.setattr(Schedule, "at", noted)
    model = load_model(packed, offload="disk")
    trained(model, checkpointing, steps=1)
    assert seen == [0, 1, 2, 3, 0, 3, 2, 1]
    seen.clear()
    logits(model)
    assert seen == [0, 1, 2, 3, 0]


def test_units_hold_each_module_with_weights_once(packed: Path) -> None:
    model = load_model(packed)
    units = units_of(model)
    assert [unit.path for unit in units] == ["", "model.layers.0", "model.layers.1", "model.layers.2"]
    modules = [id(module) for unit in units for module in unit.modules]
    assert len(modules) == len(set(modules))
    assert {id(p) for unit in units for module in unit.modules for p in module.parameters(recurse=False)} == {
        id(p) for p in model.parameters()
    }


def test_a_mixture_reports_for_its_experts(tmp_path: Path) -> None:
    model = tiny_family("mixtral")
    llmtools.quantize(model, "rtn", bits=4, group_size=16)
    folder = llmtools.save(model, None, tmp_path / "packed")
    resident, streamed = load_model(folder), load_model(folder, offload="disk")
    assert torch.equal(logits(streamed), logits(resident))
    units = units_of(streamed)
    for path, module in unfused_experts(streamed).items():
        assert module._forward_pre_hooks and not any(
            each._forward_pre_hooks for each in module.get_submodule("0").children()
        )
        assert any(path.startswith(f"{unit.path}.") and module in unit.modules for unit in units[1:])


def test_without_a_list_of_blocks_each_module_is_a_unit() -> None:
    units = units_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2))))
    assert [unit.path for unit in units] == ["", "0", "2.0"] and units[0].modules == []


# ----------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 7), "truncated or damaged"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b"\xff" * 9), "truncated or damaged"),
    ],
)
def test_a_damaged_file_is_told_when_it_is_opened(change: Any, said: str, packed: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(packed, tmp_path / "damaged"))
    change(sorted(folder.glob("*.safetensors"))[1])
    with pytest.raises(CheckpointError, match=said):
        load_model(folder, offload="disk")


def test_a_file_that_changes_while_it_is_used_ends_the_run(packed: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(packed, tmp_path / "changing"))
    model = load_model(folder, offload="disk")
    expected = logits(model)
    file = sorted(folder.glob("*.safetensors"))[0]
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size - 1)
        stream.write(b"\x01")
    os.utime(file, ns=(1, 1))  # a file system may have coarse times
    with pytest.raises(CheckpointError, match="was changed while its weights were in use"):
        logits(model)
    whole = Path(shutil.copytree(packed, tmp_path / "replaced"))
    model = load_model(whole, offload="disk")
    for file in whole.glob("*.safetensors"):
        file.unlink()
    assert torch.equal(logits(model), expected)


def test_a_file_that_grows_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1234")
    watch = Watch([file])
    watch()
    file.write_bytes(b"12345")
    with pytest.raises(CheckpointError, match="file was changed"):
        watch()


@pytest.mark.parametrize("refusal", [errno.ENOSPC, errno.EROFS])
def test_a_disk_without_room_is_one_line(refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError(refusal, os.strerror(refusal))

    write(tmp_path / "external", *KINDS["gptq"])
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(CheckpointError, match="LLMTOOLS_CACHE") as caught:
        load_model(tmp_path / "external", offload="disk")
    assert "\n" not in str(caught.value) and str(tmp_path / "cache") in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offload": "disc"}, "did you mean 'disk'"),
        ({"offload": "disk", "device_map": "auto"}, "device_map"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], said: str, packed: Path) -> None:
    with pytest.raises(InputError, match=said):
        load_model(packed, **options)


def test_a_gpu_is_told_about(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        load_model(packed, offload="disk")


# ---------------------------------------------------------------------------------------------------------------- spill


def test_tensors_are_moved_whatever_their_type_and_shape(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    kinds = (torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool)
    tensors = {str(kind): torch.randint(0, 2, (5, 7)).to(kind) for kind in kinds}
    tensors |= {"transposed": torch.randn(3, 4).T, "scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    kept = spill(tensors)
    assert list(kept) == list(tensors)
    for name, tensor in tensors.items():
        assert kept[name].dtype == tensor.dtype and torch.equal(kept[name], tensor)
        if LISTED and tensor.numel():
            assert (backed := file_pages()) is not None and backed.hold(offload._span(kept[name]))
    assert list(tmp_path.iterdir()) == []  # the file has no name
    again = spill(kept)
    assert all(again[name].data_ptr() == kept[name].data_ptr() for name in kept) or not LISTED


def test_tensors_that_share_memory_share_it_afterwards(tmp_path: Path) -> None:
    codes = torch.randint(9, (8, 4))
    spill = Spill(tmp_path)
    kept = spill({"a": codes, "b": codes, "c": codes.clone()})
    assert kept["a"].data_ptr() == kept["b"].data_ptr() != kept["c"].data_ptr()

    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    expected = first.weight.detach().clone()
    keep_in_files(nn.ModuleList([first, second]), spill)
    assert first.weight is second.weight and torch.equal(first.weight, expected)
    assert (bytes_in_files(first)[0] > 0) is LISTED
