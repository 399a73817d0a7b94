"""Blocks and the linears that read one tensor are found by looking and running, for every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmtools.errors import InputError
from llmtools.model.blocks import Block, find_blocks, find_stacks, linears, observe, unsupported_weights
from tests.models import FAMILIES, other_model, tiny_model

GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "bloom": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
}
GROUPS |= {family: GROUPS["llama"] for family in ("mistral", "qwen3", "gemma3")}


def last_names(block: Block) -> list[list[str]]:
    return [[path.rpartition(".")[2] for path in group.paths] for group in block.groups]


class Toy(nn.Module):
    """A block of three linears whose wiring a test chooses."""

    def __init__(self, forward: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.wiring = forward

    def forward(self, x: Tensor) -> Tensor:
        match self.wiring:
            case "freed":  # the inputs are short-lived and of equal size: the allocator reuses the address
                return self.c((self.b((self.a(x + 1).sum() + x) * 2).sum() + x) * 3)
            case "written in place":
                y = x.clone()
                z = self.a(y)
                y.add_(1)
                return self.b(y) + self.c(z)
            case "read twice":  # b reads the same as a, and more
                return self.a(x) + self.b(x) + self.b(x + 1) + self.c(x)
            case _:
                return self.b(self.a(x))


def observed(wiring: str) -> Block:
    block = Block("toy", Toy(wiring))
    x = torch.randn(2, 8)
    observe(block, (block.module(x) for _ in range(2)))
    return block


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_every_family_are_found(family: str) -> None:
    blocks = find_blocks(tiny_model(family))
    assert [block.path.rpartition(".")[2] for block in blocks] == ["0", "1"]
    assert all("lm_head" not in path for block in blocks for path, _ in linears(block.module, block.path))


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_linears_that_read_one_tensor_in_call_order(family: str) -> None:
    model = tiny_model(family)
    blocks = find_blocks(model)
    ids = torch.tensor([[3, 4, 5]])
    for block in blocks:
        observe(block, (model(ids) for _ in range(1)))
        assert last_names(block) == GROUPS[family]
        assert block.idle == []
        assert all(path.startswith(block.path + ".") for group in block.groups for path in group.paths)


def test_freed_memory_does_not_join_groups() -> None:
    assert last_names(observed("freed")) == [["a"], ["b"], ["c"]]


def test_a_tensor_written_in_place_is_another_input() -> None:
    assert last_names(observed("written in place")) == [["a"], ["b"], ["c"]]


def test_a_linear_that_reads_more_is_a_group_of_its_own() -> None:
    assert last_names(observed("read twice")) == [["a", "c"], ["b"]]


def test_a_linear_that_is_never_called_is_idle() -> None:
    block = observed("plain")
    assert last_names(block) == [["a"], ["b"]]
    assert block.idle == ["toy.c"]


def test_observing_leaves_no_hooks() -> None:
    block = observed("plain")
    assert not any(module._forward_pre_hooks for module in block.module.modules())


def test_the_outer_list_wins_over_lists_inside_its_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))])
    assert [block.path for block in find_blocks(model)] == ["layers.0"]


def test_a_list_of_lists_is_looked_into_and_one_block_counts_once() -> None:
    model = nn.Module()
    first, second = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    model.groups = nn.ModuleList([nn.ModuleList([first]), nn.ModuleList([second, first])])
    model.again = nn.ModuleList([second])
    assert [block.path for block in find_blocks(model)] == ["groups.0.0", "groups.1.0"]


@pytest.mark.parametrize(
    ("kind", "stacks"),
    [
        ("t5", ["encoder.block", "decoder.block"]),
        ("bart", ["model.encoder.layers", "model.decoder.layers"]),
        ("bert", ["bert.encoder.layer"]),
        ("xlm", ["transformer.attentions", "transformer.ffns"]),
        ("llava", ["model.language_model.layers"]),
    ],
)
def test_all_stacks_that_read_or_write_text_are_found(kind: str, stacks: list[str]) -> None:
    assert [stack.path for stack in find_stacks(other_model(kind))] == stacks


def test_gpt2_has_nothing_to_quantize_and_says_why() -> None:
    with pytest.raises(InputError, match=r"nothing to quantize in GPT2LMHeadModel.*Conv1D"):
        find_blocks(tiny_model("gpt2"))


def test_weights_outside_linears_are_listed() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.LayerNorm(4))])
    assert [(each.path, each.owner, each.shape) for each in unsupported_weights(model, find_blocks(model))] == [
        ("layers.0.1.weight", "Conv1d", (4, 4, 3))
    ]
