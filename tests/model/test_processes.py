"""Several processes quantize one model: the same bits in all of them, and those of one process up to sums.

Here they are threads, each with a model of its own; `tests/recipes/test_ranks.py` starts real ones.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmtools
from llmtools.errors import InputError
from llmtools.model.blocks import Group, merged_groups
from llmtools.model.options import BlockTuning
from llmtools.model.processes import Processes, Together
from llmtools.model.propagation import ErrorSum
from llmtools.nn.swap import quantized_linears
from llmtools.quant import HessianSum
from llmtools.signals import Stopped
from tests.models import tiny_ids, tiny_mixture, tiny_model


class Thread(Processes):
    """One of several threads, which exchange values on a board."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.count, self.board, self.barrier = rank, len(board), board, barrier

    def wait(self) -> None:
        self.gathered(None)

    def gathered(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(60)
        found = list(self.board)
        self.barrier.wait(60)
        return found

    def add_up(self, tensor: Tensor) -> None:
        tensor.copy_(sum(self.gathered(tensor.clone())))

    def sent(self, value: Any, source: int) -> Any:
        return self.gathered(value)[source]

    def copy_from(self, tensor: Tensor, source: int) -> None:
        tensor.copy_(self.gathered(tensor.clone())[source])


def in_threads(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What `work` returns in each of so many threads; the first error is raised."""
    barrier = threading.Barrier(count)
    group = [Thread(rank, [None] * count, barrier) for rank in range(count)]
    for each in group:
        each.board = group[0].board

    def guarded(each: Processes) -> Any:
        try:
            return work(each)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(guarded, each) for each in group]
    errors = [each.exception() for each in futures if each.exception() is not None]
    for error in sorted(errors, key=lambda each: isinstance(each, threading.BrokenBarrierError)):
        raise error  # type: ignore[misc]
    return [each.result() for each in futures]


class Experts(nn.Module):
    """A mixture that sends a sequence to one of its experts: a process may never run the other."""

    def __init__(self, *experts: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x[0, 0].sum() > 0)](x)


def quantized(processes: Processes | None, original: Any, name: str, text: Any, **options: Any) -> Any:
    model = copy.deepcopy(original)
    report = llmtools.quantize(model, name, text, processes=processes, **options)
    return model, report


def timeless(report: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in report.to_json()["modules"]]


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("llama", "optq", {}),
        ("llama", "optq", {"error_propagation": 0.5, "adapter_rank": 2}),
        ("llama", "optq", {"sequential": False, "skip": ()}),
        ("experts", "optq", {}),
        ("mixture", "optq", {}),
    ],
    ids=["optq", "propagated, adapters", "one stage, with the head", "experts", "fused experts"],
)
def test_processes_hold_the_same_bits_which_are_those_of_one(family: str, name: str, options: dict[str, Any]) -> None:
    original, text = tiny_model("llama"), [tiny_ids(1, 24, seed=seed) for seed in range(5)]
    if family == "mixture":
        original = tiny_mixture("qwen2_moe")
    if family == "experts":
        for layer in original.model.layers:
            layer.mlp = Experts(layer.mlp, tiny_model(seed=1).model.layers[0].mlp)
    (one, report), *both = [
        quantized(None, original, name, text, **options),
        *in_threads(2, lambda each: quantized(each, original, name, text, **options)),
    ]
    for model, found in both:
        assert [row.path for row in found.rows] == [row.path for row in report.rows]
        assert [row.tokens for row in found.rows] == [row.tokens for row in report.rows]
        ids = tiny_ids(1, 24, seed=9)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, one(ids).logits, rtol=2e-2, atol=2e-3)
    assert family != "experts" or {row.tokens for row in report.rows} == {5 * 24, 3 * 24, 2 * 24}
    (first, report), (second, other) = both
    assert timeless(report) == timeless(other) and report.lora_init.keys() == other.lora_init.keys()
    layers = quantized_linears(second)
    for path, layer in quantized_linears(first).items():
        assert layer.quantizer == layers[path].quantizer
        assert all(torch.equal(tensor, layers[path].packed[each]) for each, tensor in layer.packed.items())
    for path, each in report.lora_init.items():
        assert torch.equal(each.a, other.lora_init[path].a) and torch.equal(each.b, other.lora_init[path].b)


def test_linears_without_data_are_divided_and_not_changed_by_it() -> None:
    original = tiny_model()
    one, _ = quantized(None, original, "rtn", None)
    made: list[tuple[int, int]] = []
    for model, report in in_threads(3, lambda each: quantized(each, original, "rtn", None)):
        made.append((len(report.rows), len(quantized_linears(model))))
        for path, layer in quantized_linears(one).items():
            found = quantized_linears(model)[path].packed
            assert all(torch.equal(tensor, found[name]) for name, tensor in layer.packed.items())
    assert len(set(made)) == 1 and made[0][0] == made[0][1]


@pytest.mark.parametrize("kind", [HessianSum, ErrorSum])
def test_sums_over_tokens_are_those_of_all_processes(kind: Any) -> None:
    parts = [torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens)) for tokens in (5, 11)]

    def added(total: Any, x: Tensor) -> Any:
        total.add(*((x, x.round()) if kind is ErrorSum else (x,)))
        return total

    def result(total: Any) -> Tensor:
        return total.correction(torch.eye(8), 1.0) if kind is ErrorSum else total.value()

    def work(processes: Processes) -> Tensor:
        total = added(kind(8), parts[processes.rank])
        total.reduce(processes.add_up)
        return result(total)

    expected = result(added(kind(8), torch.cat(parts)))
    for found in in_threads(2, work):
        torch.testing.assert_close(found, expected)


def test_the_correction_is_left_out_everywhere_where_one_process_cannot_compare() -> None:
    def work(processes: Processes) -> Any:
        total = ErrorSum(4)
        total.add(torch.randn(3, 4), torch.randn(3 + processes.rank, 4))
        total.reduce(processes.add_up)
        return total.correction(torch.eye(4), 1.0)

    assert in_threads(2, work) == [None, None]


@pytest.mark.parametrize(
    ("costs", "count", "owners"),
    [([4, 1, 1], 2, [0, 1, 1]), ([1, 1, 4], 2, [1, 1, 0]), ([3, 3], 2, [0, 1]), ([5], 3, [0]), ([2, 1], 1, [0, 0])],
)
def test_the_largest_works_are_given_away_first(costs: Sequence[float], count: int, owners: list[int]) -> None:
    processes = Processes()
    processes.count = count  # type: ignore[misc]
    assert processes.owners(costs) == owners


def test_groups_are_those_of_the_first_process_and_what_only_others_reached() -> None:
    qkv, expert, more = Group(["q", "k"]), Group(["e0"]), Group(["e1", "e2"], calls=2)
    assert merged_groups([[qkv, expert], [qkv, more], [Group(["e0", "e3"])]]) == [qkv, expert, more, Group(["e3"])]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("optq", {}, "too few calibration sequences for 2 processes: 1; give more text, or start 1"),
        ("optq", {"tuning": BlockTuning(epochs=1)}, "needs all calibration text in one process, and this run has 2"),
        ("signround", {}, "needs all calibration text in one process, and this run has 2"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_changes(
    name: str, options: dict[str, Any], expected: str
) -> None:
    def work(processes: Processes) -> None:
        model = tiny_model()
        try:
            llmtools.quantize(model, name, tiny_ids(1, 24), processes=processes, **options)
        finally:
            assert not quantized_linears(model)

    with pytest.raises(InputError, match=expected):
        in_threads(2, work)


def test_a_stop_after_another_process_was_lost_is_not_the_cause() -> None:
    group = Together.__new__(Together)
    group.ended, group._cause = True, InputError("another process of this run ended")
    assert group.fail(Stopped()) is group._cause
