"""A walk shows every block, bit for bit, what it sees in the whole network, and leaves the network as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtools.errors import InputError
from llmtools.model.blocks import Block, find_blocks
from llmtools.model.walk import Calls, run_network, walk
from tests.models import FAMILIES, other_model, tiny_ids, tiny_model

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


def test_steps_are_reported() -> None:
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


def test_a_block_that_runs_for_some_batches_only_is_refused() -> None:
    model = Chain("sometimes")
    with pytest.raises(InputError, match=r"layers.1 runs for some batches and not for others"):
        walk(model, [torch.tensor([[1, 2, 3]]), torch.tensor([[1]])], lambda block, calls: None)
    assert not any("forward" in vars(layer) for layer in model.layers)


# ---- networks that are no plain chain ------------------------------------------------------------------------------


@dataclass
class Output:
    """What a block may return."""

    carry: Tensor | None
    hidden: Tensor


class Carrying(nn.Module):
    """A block that hands a second value to the next one, in one of many containers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.proj, self.kind = nn.Linear(16, 16), kind

    def forward(self, hidden_states: Tensor, carry: Any = None) -> Any:
        if carry is not None:
            hidden_states = hidden_states + (carry[0]["a"] if self.kind == "nested" else carry)
        out = torch.tanh(self.proj(hidden_states))
        hidden = hidden_states + out
        match self.kind:
            case "mapping":
                return {"hidden": hidden, "carry": out}
            case "dataclass":
                return Output(out, hidden)
            case "nested":
                return hidden, ({"a": out},)
            case "missing for one token":
                return hidden, out if hidden.shape[1] > 1 else None
            case "in place":
                return hidden_states.add_(out), out
            case _:
                return hidden, out


KINDS = ["tuple", "mapping", "dataclass", "nested", "missing for one token", "in place"]
WIRINGS = ["scaled", "scaled carry", "history", "first input", "shared", "loop", "twice", "written between"]


class Net(nn.Module):
    """Three blocks, and what is done with their outputs between them."""

    def __init__(self, kind: str = "tuple", wiring: str = "plain") -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(512, 16), nn.ModuleList(Carrying(kind) for _ in range(3))
        self.kind, self.wiring = kind, wiring
        if wiring == "shared":
            self.layers.append(self.layers[0])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Tensor:
        x = first = self.embed(input_ids)
        carry: Any = None
        history = []
        for layer in [*self.layers] * (2 if self.wiring == "loop" else 1):
            out = layer(x, carry=carry)
            x, carry = (
                (out.hidden, out.carry)
                if isinstance(out, Output)
                else tuple(out.values() if isinstance(out, dict) else out)
            )
            match self.wiring:
                case "scaled":
                    x = x * 0.5
                case "scaled carry":
                    carry = carry * 0.5
                case "history":
                    history.append(carry)
                    carry = torch.stack(history).sum(0)
                case "first input":
                    carry = first
                case "twice":
                    x, carry = layer(x, carry=carry)
                case "written between":
                    x.mul_(0.5)
        return x


def of_linears(model: nn.Module, run: Callable[[], None]) -> dict[str, list[Tensor]]:
    """What each linear is given while `run` runs."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        each.register_forward_pre_hook(lambda m, a, path=path: seen.setdefault(path, []).append(a[0].detach().clone()))
        for path, each in model.named_modules()
        if isinstance(each, nn.Linear)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def assert_walk_is_the_network(model: nn.Module, batches: list[Any], *, damage: float = 1.0) -> None:
    """What linears see in the walk, where each block's weights are scaled in turn, is what they see in the network."""

    def visit(block: Block, calls: Calls) -> None:
        named = {id(each): path for path, each in model.named_modules()}
        so_far = of_linears(model, lambda: [run_network(model, batch) for batch in batches] and None)
        for path, seen in of_linears(block.module, calls.run).items():
            name = named[id(block.module.get_submodule(path))]
            walked[name], whole[name] = seen, so_far[name]
        for parameter in block.module.parameters():
            parameter.mul_(damage)

    walked: dict[str, list[Tensor]] = {}
    whole: dict[str, list[Tensor]] = {}
    walk(model, batches, visit)
    assert walked.keys() == whole.keys() and walked
    for path, seen in whole.items():
        assert len(seen) == len(walked[path]), path
        assert all(torch.equal(one, other) for one, other in zip(seen, walked[path], strict=True)), path


@pytest.mark.parametrize("damage", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_blocks_return_reaches_the_next(kind: str, damage: float) -> None:
    assert_walk_is_the_network(Net(kind), BATCHES, damage=damage)


@pytest.mark.parametrize("damage", [1.0, 0.5])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_whatever_happens_between_blocks_is_followed(wiring: str, damage: float) -> None:
    assert_walk_is_the_network(Net(wiring=wiring), BATCHES, damage=damage)


@pytest.mark.parametrize("between", ["added", "twice"])
def test_chains_with_something_between_are_followed(between: str) -> None:
    assert_walk_is_the_network(Chain(between), [torch.tensor([[1, 2, 3]]), torch.tensor([[1]])])


def test_without_propagation_only_a_chain_can_be_walked() -> None:
    with pytest.raises(InputError, match="walked in 3 segments"):
        walk(Net(wiring="scaled"), BATCHES, lambda block, calls: None, propagate=False)


def test_without_propagation_second_values_are_the_original_ones_too() -> None:
    model = Net()
    whole = of_linears(model, lambda: [run_network(model, batch) for batch in BATCHES] and None)

    def damage(block: Block, calls: Calls) -> None:
        seen = of_linears(block.module, calls.run)["proj"]
        assert all(torch.equal(*pair) for pair in zip(seen, whole[f"{block.path}.proj"], strict=True))
        block.module.proj.weight.mul_(0.5)

    walk(model, BATCHES, damage, propagate=False)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_a_padded_batch_is_shown_as_the_model_sees_it(family: str) -> None:
    ids = tiny_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, :5] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}, tiny_ids(1, 9, seed=1)]
    assert_walk_is_the_network(tiny_model(family), batches)


@pytest.mark.parametrize("kind", ["t5", "bart", "bert", "xlm"])
def test_encoders_and_encoder_decoders_are_walked_in_all_their_blocks(kind: str) -> None:
    assert_walk_is_the_network(other_model(kind), [tiny_ids(2, 9), tiny_ids(1, 5, seed=1)], damage=0.5)


def test_no_batches_is_an_error() -> None:
    with pytest.raises(InputError, match="no batches"):
        walk(tiny_model("llama"), [], lambda block, calls: None)
