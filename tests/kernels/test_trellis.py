"""Trellis codes: values as published, circular paths, a search as good as trying all of them, C decides alike."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from llmtools.errors import InputError
from llmtools.kernels import trellis
from llmtools.kernels.trellis import (
    CODES,
    SCALE,
    decode_states,
    dequantize_trellis,
    encode_trellis,
    multiply_trellis,
    native,
    reference,
)

WIDTHS = range(1, 9)


def drawn(out: int, blocks: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, (out, blocks * bits), generator=generator).to(torch.int16)


def read(packed: Tensor, bits: int, state_bits: int, code: str, order: str = "rows") -> Tensor:
    """The weight by the definition: a tile is a string of bits, in Python's integers; state i begins at bit k·i.

    In EXL3's order eight weights in a row are those of one thread in a fragment of a tensor core: two by two inputs
    (columns), eight apart, of two outputs, eight apart.
    """
    out, blocks = len(packed), packed.shape[1] // bits
    value, weight = decode_states(code, state_bits).tolist(), torch.empty(out, 16 * blocks)
    for top, block in product(range(0, out, 16), range(blocks)):
        words = packed[top : top + 16, block * bits : (block + 1) * bits].flatten().tolist()
        string = "".join(f"{word & 0xFFFF:016b}" for word in words)
        for i in range(len(string) // bits):
            state = int((string + string)[i * bits : i * bits + state_bits], 2)
            row, column = i // 16, i % 16
            if order == "exl3":
                thread, element = divmod(i, 8)
                row, column = thread // 4 + (0, 8)[element // 4], thread % 4 * 2 + (0, 1, 8, 9)[element % 4]
            weight[top + row, 16 * block + column] = value[state]
    return weight


def half(bits: int) -> float:
    return torch.tensor([bits - (bits >> 15 << 16)], dtype=torch.int16).view(torch.float16).item()


# ---- codes -----------------------------------------------------------------------------------------------------------


def test_the_codes_are_the_published_functions_of_the_state() -> None:
    mad, inst = decode_states("1mad", 16), decode_states("3inst", 16)
    for state in (0, 1, 2, 777, 4095, 40_000, 65_535):
        word = (34038481 * state + 76625530) % 2**32
        assert mad[state].item() == pytest.approx((sum(word.to_bytes(4, "big")) - 510) / 147.800537109375, rel=1e-6)
        word = ((89226354 * state + 64248484) % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
        assert inst[state].item() == torch.tensor(half(word >> 16) + half(word & 0xFFFF)).half().item()
    assert inst.std().item() == pytest.approx(1.2437, abs=1e-3)  # as published
    assert mad.std().item() == pytest.approx(1, abs=0.01) and abs(mad.mean().item()) < 0.01


@pytest.mark.parametrize("code", CODES)
def test_fewer_bits_of_state_are_the_first_states(code: str) -> None:
    assert torch.equal(decode_states(code, 9), decode_states(code, 16)[:512])


# ---- codes to values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_bits", [8, 11, 16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("out", [1, 16, 37])
def test_weights_are_cut_from_the_circle_of_their_tile(out: int, bits: int, state_bits: int) -> None:
    packed = drawn(out, 3, bits)
    for code in CODES:
        expected = read(packed, bits, state_bits, code)
        for module in (native, reference):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                got = module.dequantize_trellis(packed, bits, state_bits, code, "rows", 0, out, dtype)
                assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("order", ["rows", "exl3"])
def test_every_width_and_order_is_read_by_the_definition(order: str, bits: int) -> None:
    out = 37 if order == "rows" else 48
    packed = drawn(out, 3, bits, seed=bits)
    for code, state_bits in (("mul1", 16), ("mcg", 12)):
        expected = read(packed, bits, state_bits, code, order)
        for module in (native, reference):
            got = module.dequantize_trellis(packed, bits, state_bits, code, order, 0, out, torch.float32)
            assert torch.equal(got, expected)
            part = module.dequantize_trellis(packed, bits, state_bits, code, order, 7, 27, torch.float16)
            assert torch.equal(part, expected[7:27].half())
    x = torch.randn(2, 48)
    product = multiply_trellis(x, packed, bits, 16, "mul1", order=order)
    weight = dequantize_trellis(packed, bits, 16, "mul1", order=order)
    assert torch.allclose(product, x @ weight.T, atol=1e-4)
    assert torch.allclose(
        multiply_trellis(product, packed, bits, 16, "mul1", True, order=order), product @ weight, atol=1e-3
    )


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_an_order_changes_where_weights_are_and_not_how_well_they_are_found(bits: int) -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(9))
    packed = encode_trellis(weight, bits, 12, "mul1", "exl3")
    assert torch.equal(packed, reference.encode_trellis(trellis._sequences(weight, "exl3"), bits, 12, "mul1"))
    error = (dequantize_trellis(packed, bits, 12, "mul1", order="exl3") - weight).square().mean()
    assert 4.0**-bits < error < 4.0**-bits * (1.6 if bits < 5 else 16)  # the code's range limits more bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_exact_slices(bits: int) -> None:
    packed = drawn(37, 5, bits)
    whole = dequantize_trellis(packed, bits, 12, "3inst")
    for start, stop in ((0, 1), (15, 16), (15, 17), (16, 32), (31, 37), (36, 37), (5, 5)):
        assert torch.equal(dequantize_trellis(packed, bits, 12, "3inst", start, stop), whole[start:stop])
        assert torch.equal(
            reference.dequantize_trellis(packed, bits, 12, "3inst", "rows", start, stop, torch.float32),
            whole[start:stop],
        )


def test_strided_tensors_are_read_rightly() -> None:
    packed, x = drawn(24, 8, 2), torch.randn(6, 20).T[:3]
    weight = dequantize_trellis(packed.T.contiguous(), 2, 10, "1mad")
    assert torch.equal(dequantize_trellis(packed.T, 2, 10, "1mad"), weight)
    x = torch.randn(weight.shape[1], 3).T
    assert torch.allclose(multiply_trellis(x, packed.T, 2, 10, "1mad"), x @ weight.T, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("out", "blocks"), [(1, 1), (19, 3), (33, 40)])
def test_products_equal_the_dense_ones_whatever_the_number_of_threads(out: int, blocks: int, tokens: int) -> None:
    packed = drawn(out, blocks, 2)
    weight = dequantize_trellis(packed, 2, 12, "3inst")
    for transposed in (False, True):
        x = torch.randn(tokens, out if transposed else 16 * blocks)
        truth = x.double() @ (weight if transposed else weight.T).double()
        found = []
        for threads in (1, 3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(native, "_threads", lambda weights, threads=threads: threads)
                found.append(multiply_trellis(x, packed, 2, 12, "3inst", transposed))
        assert torch.equal(*found)
        assert found[0].shape == truth.shape and torch.allclose(found[0].double(), truth, atol=1e-4)


# ---- values to codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("out", "blocks", "state_bits"), [(21, 2, 8), (3, 1, 9), (16, 1, 10)])
def test_c_and_torch_find_the_same_codes(out: int, blocks: int, state_bits: int, bits: int, code: str) -> None:
    weight = torch.randn(out, 16 * blocks, generator=torch.Generator().manual_seed(1))
    state_bits = max(state_bits, bits + 4)
    assert torch.equal(
        encode_trellis(weight, bits, state_bits, code), reference.encode_trellis(weight, bits, state_bits, code)
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_ties_are_broken_alike(bits: int) -> None:
    """Of few values, so that many paths cost the same; and of zeros."""
    weight = torch.randint(-1, 2, (20, 32), generator=torch.Generator().manual_seed(2)).float()
    options = bits, max(8, bits + 4), "1mad"
    for each in (weight, torch.zeros(20, 16)):
        assert torch.equal(encode_trellis(each, *options), reference.encode_trellis(each, *options))


def test_the_search_finds_the_best_free_path() -> None:
    """Of all paths of five weights, by trying them."""
    table, x = decode_states("3inst", 8), torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    paths = torch.arange(2 ** (8 + 4))[:, None] >> torch.arange(4, -1, -1) & 255  # all strings of 12 bits
    path = reference._walk(x, table, 1, None)
    assert ((path[:, 1:] >> 1) == (path[:, :-1] & 127)).all()
    for row, found in zip(x, path, strict=True):
        best = (table[paths] - row).square().sum(1).min()
        assert (table[found] - row).square().sum() == pytest.approx(best.item(), rel=1e-5)


def test_the_search_finds_the_best_circle_with_the_joint_that_it_is_held_to() -> None:
    table, x = decode_states("3inst", 8), torch.randn(3, 10, generator=torch.Generator().manual_seed(4))
    joint = torch.tensor([3, 64, 127])
    path = reference._walk(x, table, 1, joint)
    assert torch.equal(path[:, 0] >> 1, joint) and torch.equal(path[:, -1] & 127, joint)
    string = torch.arange(2**10)
    doubled = string << 10 | string
    paths = doubled[:, None] >> torch.arange(12, 2, -1) & 255  # state i: 8 bits from bit i of the circle
    for row, found, held in zip(x, path, joint, strict=True):
        own = paths[paths[:, 0] >> 1 == held]
        assert (table[found] - row).square().sum() == pytest.approx(
            (table[own] - row).square().sum(1).min().item(), rel=1e-5
        )


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_on_gaussian_weights_is_near_the_bound(bits: int) -> None:
    """Above the rate-distortion bound 4⁻ᵏ, and not far with 2^10 to 2^14 states; a tile of fewer rows is no worse."""
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(5))
    options = bits, 10 if bits < 5 else bits + 6, "3inst"
    scale = SCALE[bits] * decode_states("3inst", options[1]).std()
    values = dequantize_trellis(encode_trellis(weight * scale, *options), *options) / scale
    error = (values - weight).square()
    for rows in (slice(32), slice(32, 40)):
        assert 4.0**-bits < error[rows].mean() < 4.0**-bits * (1.55 if bits < 4 else 1.95)


def test_more_states_have_less_error() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(6)) * 1.18
    errors = [
        (dequantize_trellis(encode_trellis(weight, 2, bits, "3inst"), 2, bits, "3inst") - weight).square().mean()
        for bits in (8, 10, 12)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_tiles_are_coded_by_themselves_whatever_the_number_of_threads() -> None:
    weight = torch.randn(35, 48, generator=torch.Generator().manual_seed(7))
    whole, threads = encode_trellis(weight, 3, 9, "3inst"), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(encode_trellis(weight, 3, 9, "3inst"), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(encode_trellis(weight[16:32, 16:32], 3, 9, "3inst"), whole[16:32, 3:6])
    assert torch.equal(encode_trellis(weight[32:, :16], 3, 9, "3inst"), whole[32:, :3])


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_wrong_tensors_and_options_are_refused() -> None:
    packed = drawn(2, 3, 2)
    for options, message in (
        ((9, 12, "3inst"), "bits=9"),
        ((2, 17, "3inst"), "state_bits=17"),
        ((2, 12, "hyb"), "hyb"),
    ):
        with pytest.raises(InputError, match=message):
            dequantize_trellis(packed, *options)
        with pytest.raises(InputError, match=message):
            encode_trellis(torch.zeros(2, 16), *options)
    with pytest.raises(InputError, match="order='qtip'"):
        dequantize_trellis(packed, 2, 12, "3inst", order="qtip")
    for refused in (
        lambda: dequantize_trellis(packed, 2, 12, "3inst", order="exl3"),
        lambda: encode_trellis(torch.zeros(2, 16), 2, 12, "3inst", "exl3"),
    ):
        with pytest.raises(InputError, match="2 rows in the order exl3"):
            refused()
    with pytest.raises(InputError, match="state_bits=11 with bits=8"):
        dequantize_trellis(drawn(2, 1, 8), 8, 11, "3inst")
    with pytest.raises(InputError, match="int32"):
        dequantize_trellis(packed.int(), 2, 12, "3inst")
    with pytest.raises(InputError, match="4 bits"):
        dequantize_trellis(packed, 4, 12, "3inst")
    with pytest.raises(InputError, match="rows 1 to 3"):
        dequantize_trellis(packed, 2, 12, "3inst", 1, 3)
    with pytest.raises(InputError, match="16·b"):
        encode_trellis(torch.zeros(2, 15), 2, 12, "3inst")
    with pytest.raises(InputError, match="do not fit"):
        multiply_trellis(torch.zeros(1, 47), packed, 2, 12, "3inst")
