"""A walk shows every block, bit for bit, what it sees in the whole network, and leaves the network as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtools.errors import InputError
from llmtools.model.blocks import Block, find_blocks
from llmtools.model.walk import Calls, walk
from tests.models import FAMILIES, tiny_ids, tiny_model

BATCHES = [tiny_ids(1, 17), tiny_ids(3, 33, seed=1), tiny_ids(1, 1, seed=2), tiny_ids(1, 17, seed=3)]

Seen = dict[str, list[tuple[Tensor, Tensor]]]


@contextmanager
def seen_by_blocks(model: nn.Module) -> Iterator[Seen]:
    """Inputs and outputs of each block, by path, batch after batch."""
    seen: Seen = {}

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            output = output if isinstance(output, Tensor) else output[0]
            seen.setdefault(path, []).append((args[0] if args else kwargs["hidden_states"], output))

        return note

    blocks = find_blocks(model)
    hooks = [each.module.register_forward_hook(hook(each.path), with_kwargs=True) for each in blocks]
    with torch.no_grad():
        yield seen
    for each in hooks:
        each.remove()


def run_whole(model: nn.Module) -> Seen:
    with seen_by_blocks(model) as seen:
        for ids in BATCHES:
            model(ids)
    return seen


@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_see_what_they_see_in_the_whole_network(family: str, propagate: bool) -> None:
    model = tiny_model(family)
    whole = run_whole(model)
    visited = []

    def visit(block: Block, calls: Calls) -> None:
        visited.append(block.path)
        for (read, written), hidden, output in zip(whole[block.path], calls.hidden, calls.outputs(), strict=True):
            assert torch.equal(read, hidden)
            assert torch.equal(written, output)

    walk(model, BATCHES, visit, propagate=propagate)
    assert visited == list(whole)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_masks_are_followed_too(implementation: str) -> None:
    model = tiny_model("gemma3", attn_implementation=implementation)
    whole = run_whole(model)

    def visit(block: Block, calls: Calls) -> None:
        assert all(
            torch.equal(written, output)
            for (_, written), output in zip(whole[block.path], calls.outputs(), strict=True)
        )

    walk(model, BATCHES, visit)


def test_a_changed_block_feeds_the_next() -> None:
    model = tiny_model("llama")

    def damage(block: Block, calls: Calls) -> None:
        if block.path.endswith(".0"):
            block.module.mlp.down_proj.weight.mul_(0.5)
        else:
            inputs.extend(calls.hidden)

    inputs: list[Tensor] = []
    walk(model, BATCHES, damage)
    changed = run_whole(model)["model.layers.1"]
    assert all(torch.equal(read, hidden) for (read, _), hidden in zip(changed, inputs, strict=True))


def test_without_propagation_a_change_stays_in_its_block() -> None:
    model = tiny_model("llama")
    before = run_whole(model)["model.layers.1"]

    def damage(block: Block, calls: Calls) -> None:
        if block.path.endswith(".0"):
            block.module.mlp.down_proj.weight.mul_(0.5)
        else:
            assert all(torch.equal(read, hidden) for (read, _), hidden in zip(before, calls.hidden, strict=True))

    walk(model, BATCHES, damage, propagate=False)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = tiny_model("llama")
    model.train()
    model.model.layers[1].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]

    def visit(block: Block, calls: Calls) -> None:
        assert not block.module.training
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            walk(model, BATCHES, visit)
    else:
        walk(model, BATCHES, visit)
    assert modes == [module.training for module in model.modules()]
    assert attributes == [sorted(vars(module)) for module in model.modules()]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_that_was_patched_before_is_put_back() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0]
    counted = []
    original = layer.forward
    patched = layer.forward = lambda *args, **kwargs: (counted.append(1), original(*args, **kwargs))[1]
    walk(model, BATCHES, lambda block, calls: None)
    assert layer.forward is patched
    assert counted


def test_no_gradients_are_recorded() -> None:
    def visit(block: Block, calls: Calls) -> None:
        assert not any(output.requires_grad for output in calls.outputs())

    walk(tiny_model("llama"), BATCHES, visit)


def test_equal_masks_and_rotary_tables_are_kept_once() -> None:
    tables: list[Tensor] = []

    def visit(block: Block, calls: Calls) -> None:
        tables.extend(call.kwargs["position_embeddings"][0] for call in calls._calls)

    walk(tiny_model("llama"), [tiny_ids(1, 17, seed=seed) for seed in range(5)], visit)
    assert len({id(table) for table in tables}) == 1


def test_steps_are_told() -> None:
    steps: list[tuple[int, int, str]] = []
    walk(tiny_model("llama"), BATCHES, lambda block, calls: None, on_step=lambda *step: steps.append(step))
    assert steps == [(1, 2, "model.layers.0"), (2, 2, "model.layers.1")]


def test_a_device_may_be_named() -> None:
    model = tiny_model("gemma3")
    whole = run_whole(model)

    def visit(block: Block, calls: Calls) -> None:
        assert all(
            torch.equal(written, output)
            for (_, written), output in zip(whole[block.path], calls.outputs(), strict=True)
        )

    walk(model, BATCHES, visit, device="cpu")


class Chain(nn.Module):
    """A network of two blocks, with what a test puts between them."""

    def __init__(self, between: str = "") -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.between = between

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        first, second = self.layers
        match self.between:
            case "added":
                return second(first(x) + 1)
            case "twice":
                return second(first(first(x)))
            case "sometimes":
                return second(first(x)) if input_ids.shape[1] > 2 else first(x)
            case "backwards":
                return first(second(x))
            case _:
                return second(first(x))


def test_blocks_are_visited_in_the_order_in_which_they_run() -> None:
    order: list[str] = []
    walk(Chain("backwards"), [torch.tensor([[1, 2]])], lambda block, calls: order.append(block.path))
    assert order == ["layers.1", "layers.0"]


@pytest.mark.parametrize(
    ("between", "message"),
    [
        ("added", "change between layers.0 and layers.1"),
        ("twice", "layers.0 runs more than once"),
        ("sometimes", "layers.1 runs for some batches and not for others"),
    ],
)
def test_a_network_that_cannot_be_streamed_is_refused(between: str, message: str) -> None:
    model = Chain(between)
    with pytest.raises(InputError, match=message):
        walk(model, [torch.tensor([[1, 2, 3]]), torch.tensor([[1]])], lambda block, calls: None)
    assert not any("forward" in vars(layer) for layer in model.layers)


def test_no_batches_is_an_error() -> None:
    with pytest.raises(InputError, match="no batches"):
        walk(tiny_model("llama"), [], lambda block, calls: None)
