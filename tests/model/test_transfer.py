"""Weights in host memory: the order of copies and computation on a device that is as unkind as its queues allow."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmtools
from llmtools import InputError
from llmtools.checkpoint.folder import load_model
from llmtools.model import offload, transfer
from llmtools.model.blocks import linears
from llmtools.model.transfer import Buffers, Device, keep_on_host
from llmtools.nn.packed import PackedWeight
from llmtools.nn.swap import quantized_linears
from llmtools.quant import quantizer
from tests.formats.test_reading import KINDS
from tests.formats.writers import write
from tests.model.test_offload import QUANTIZERS, logits, trained
from tests.models import tiny_ids, tiny_model

POISON = 0xFF


class Unkind(Device):
    """A CPU whose copies begin as early as the events allow, and arrive as late.

    What is computed has been computed by the time that a function here is called, so the beginning of a copy shows at
    once: its target is poison until the computation waits for it. A copy that may begin before the last use of its
    target, `used`, is an error.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.clock = 0
        self.used: dict[int, int] = {}
        self.pending: list[tuple[int, Tensor, Tensor]] = []
        self.copies: list[int] = []

    def host_memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        self.clock += 1
        assert self.used.get(target.data_ptr(), -1) <= after, "the buffer is overwritten before its last use"
        target.fill_(POISON)
        self.pending.append((self.clock, target, source))
        self.copies.append(source.data_ptr())
        return self.clock

    def computed(self) -> Any:
        self.clock += 1
        return self.clock

    def wait(self, copied: Any) -> None:
        for each in [each for each in self.pending if each[0] <= copied]:  # one queue: in its order
            each[1].copy_(each[2])
            self.pending.remove(each)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Unkind]]:
    """The devices that models are opened on with offload="cpu", each use of a buffer noted."""
    made: list[Unkind] = []
    at = Buffers.at

    def device() -> Unkind:
        made.append(Unkind())
        return made[-1]

    def noted(self: Buffers, unit: int) -> int:
        number = at(self, unit)
        known: Any = self._device
        known.clock += 1
        known.used[self.memory(number).data_ptr()] = known.clock
        return number

    monkeypatch.setattr(offload, "has_gpu", lambda: True)
    monkeypatch.setattr("llmtools.checkpoint.folder.this_device", device)
    monkeypatch.setattr(Buffers, "at", noted)
    yield made


def assert_same_bits(folder: str | Path, checkpointing: tuple[bool, ...] = (False,)) -> None:
    """Logits, and training with or without checkpointing, are those of resident weights."""
    resident = load_model(folder)
    for again in checkpointing:
        opened = load_model(folder, offload="cpu")
        assert any(layer.fetch is not None for layer in opened.modules() if isinstance(layer, PackedWeight))
        assert torch.equal(logits(opened), logits(resident))
        expected, found = trained(copy.deepcopy(resident), again, steps=2), trained(opened, again, steps=2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_our_checkpoints_have_the_bits_of_resident_weights(devices: list[Unkind], tmp_path: Path) -> None:
    """All quantizers in one model, each in several linears."""
    model = tiny_model(num_hidden_layers=4)
    specs = itertools.cycle(quantizer(name, **options).spec() for name, options in QUANTIZERS)
    overrides = {path: next(specs) for path, _ in linears(model) if path != "lm_head"}
    llmtools.quantize(model, "rtn", [tiny_ids()], overrides=overrides)
    assert {layer.quantizer.name for layer in quantized_linears(model).values()} == {name for name, _ in QUANTIZERS}
    assert_same_bits(llmtools.save(model, None, tmp_path / "m"), (False, True))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_others_have_the_bits_of_resident_weights(
    kind: str, devices: list[Unkind], tmp_path: Path
) -> None:
    write(tmp_path / "external", *KINDS[kind])
    assert_same_bits(tmp_path / "external")


@pytest.mark.filterwarnings("ignore")
def test_gguf_files_have_the_bits_of_resident_weights(devices: list[Unkind], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.formats.test_gguf_reading import write_gguf

    changes: dict[str, Any] = {"qwen3": {"tie_word_embeddings": True, "head_dim": 128}}
    for family in ("llama", "qwen3"):
        (tmp_path / family).mkdir()
        assert_same_bits(write_gguf(tmp_path / family, family, **changes.get(family, {})))


# --------------------------------------------------------------------------------------------------------------- order


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, quantized."""
    model = tiny_model(num_hidden_layers=4)
    llmtools.quantize(model, "rtn", bits=3, group_size=32)
    return llmtools.save(model, None, tmp_path_factory.mktemp("transfer") / "packed")


def order_of(model: Any, device: Unkind) -> Callable[[], list[int]]:
    """Says which blocks were copied since it was called last, in order."""
    layers = [block.self_attn.q_proj for block in model.model.layers]
    number = {min(each.data_ptr() for each in layer.stored.values()): n for n, layer in enumerate(layers)}

    def copied() -> list[int]:
        found = [number[source] for source in device.copies]
        device.copies.clear()
        return found

    return copied


@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_a_buffer_has_is_not_copied_again(checkpointing: bool, packed: Path, devices: list[Unkind]) -> None:
    model = load_model(packed, offload="cpu")
    copied = order_of(model, devices[0])
    trained(model, checkpointing, steps=1)
    assert copied() == [0, 1, 2, 3, 1, 0]  # backwards from what forwards left in the buffers
    model = load_model(packed, offload="cpu")
    copied = order_of(model, devices[1])
    trained(model, checkpointing, steps=3)
    assert copied() == [0, 1, 2, 3, 1, 0, 2, 3, 1, 0, 2, 3, 1, 0]


def test_the_next_block_is_copied_while_one_computes(packed: Path, devices: list[Unkind]) -> None:
    model = load_model(packed, offload="cpu")
    queued: list[list[int]] = []
    copied = order_of(model, devices[0])
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_hook(lambda *_: queued.append(copied()))
    for _ in range(3):
        logits(model)
    assert queued[:4] == [[0, 1], [2], [3], []]
    assert queued[4:8] == [[0], [1, 2], [3], [0]]  # what follows the last one, and what follows that, is known by now
    assert queued[8:] == [[1], [2], [3], [0]]


@pytest.mark.parametrize("units", [1, 2, 3, 5])
def test_in_any_order_a_block_has_its_own_values(units: int) -> None:
    generator = torch.Generator().manual_seed(units)
    memory = [torch.full((16 + number,), number, dtype=torch.uint8) for number in range(units)]
    buffers = Buffers(memory, Unkind())
    for unit in torch.randint(units, (200,), generator=generator).tolist():
        assert torch.equal(buffers.memory(buffers.at(unit))[: 16 + unit], memory[unit])


def test_computation_that_does_not_wait_would_be_seen(packed: Path, devices: list[Unkind]) -> None:
    model, expected = load_model(packed, offload="cpu"), logits(load_model(packed))
    devices[0].wait = lambda copied: None  # type: ignore[method-assign]
    assert not torch.equal(logits(model), expected)


def test_a_copy_that_does_not_wait_would_be_seen(packed: Path, devices: list[Unkind]) -> None:
    model = load_model(packed, offload="cpu")
    devices[0].computed = lambda: 0  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="before its last use"):
        logits(model)


def test_a_tensor_that_was_not_saved_by_its_place_is_an_error_in_the_backward(
    packed: Path, devices: list[Unkind], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_save_places", lambda *_: None)
    model = load_model(packed, offload="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained(model, checkpointing=False)


def test_what_autograd_keeps_has_no_history_by_which_an_operation_would_keep_itself() -> None:
    buffers = Buffers([torch.zeros(16, dtype=torch.uint8)], Unkind())
    result = torch.ones(3, requires_grad=True).exp()
    kept: Any = buffers.saved(result)
    assert kept.grad_fn is None and kept.data_ptr() == result.data_ptr()


# ------------------------------------------------------------------------------------------------- what a model does


def test_the_packed_weights_stay_when_the_model_moves_and_are_saved_as_they_are(
    packed: Path, devices: list[Unkind], tmp_path: Path
) -> None:
    model = load_model(packed, offload="cpu")
    layer = model.model.layers[0].mlp.up_proj
    before = {name: each.data_ptr() for name, each in layer.stored.items()}
    model.to(torch.float64)
    model.to("meta")
    assert {name: each.data_ptr() for name, each in layer.stored.items()} == before
    assert model.lm_head.weight.is_meta and layer.dtype == torch.float64
    again = llmtools.save(load_model(packed, offload="cpu"), None, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()


def test_a_layer_that_is_packed_anew_has_its_new_values(packed: Path, devices: list[Unkind]) -> None:
    streamed, resident = load_model(packed, offload="cpu"), load_model(packed)
    logits(streamed)
    for model in (streamed, resident):
        layer = model.model.layers[1].mlp.up_proj
        layer.pack_({name: each.flip(0) for name, each in layer.packed.items()})
    assert torch.equal(logits(streamed), logits(resident))


def test_a_copy_of_a_layer_is_without_the_buffers(packed: Path, devices: list[Unkind]) -> None:
    layer = load_model(packed, offload="cpu").model.layers[0].mlp.up_proj
    copied = copy.deepcopy(layer)
    assert copied.fetch is None and torch.equal(copied.dequantize(), layer.dequantize())


def test_it_is_refused_in_one_line(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is none; leave it out"):
        load_model(packed, offload="cpu")
    monkeypatch.setattr(offload, "has_gpu", lambda: True)
    tiny_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="quantize it first"):
        keep_on_host(load_model(tmp_path / "dense"), Unkind())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process, and this run has 2"):
        load_model(packed, offload="cpu")
