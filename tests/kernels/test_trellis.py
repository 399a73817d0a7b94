"""Trellis codes: values as published, circular paths, a search as good as trying all of them, C decides alike.

The hybrid code, with two weights a state from a table, is held to the same definition."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from llmtools.errors import InputError
from llmtools.kernels import trellis
from llmtools.kernels.trellis import (
    CODES,
    PAIRS,
    SCALE,
    decode_states,
    dequantize_trellis,
    encode_trellis,
    fitted_table,
    multiply_trellis,
    native,
    reference,
)

WIDTHS = range(1, 9)
COMPUTED = [code for code in CODES if code != "hyb"]
HYBRID = [(1, 8), (2, 8), (3, 8), (4, 9), (2, 9), (3, 10), (4, 12)]
"""Bits of a weight and of a state; some with fewer sets of states than a register has lanes."""


def drawn(out: int, blocks: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, (out, blocks * bits), generator=generator).to(torch.int16)


def drawn_table(code: str, seed: int = 0) -> Tensor | None:
    return torch.randn(PAIRS, 2, generator=torch.Generator().manual_seed(seed)).half() if code == "hyb" else None


def pair(state: int, table: Tensor) -> list[float]:
    """What a state of the hybrid code is worth (QTIP, lib/codebook/bitshift.py, quantlut_sym)."""
    h = (state * state + state) % 2**32
    first, second = table[h >> 6 & 511].tolist()
    return [-first if h >> 15 & 1 else first, second]


def read(
    packed: Tensor, bits: int, state_bits: int, code: str, order: str = "rows", table: Tensor | None = None
) -> Tensor:
    """The weight by the definition: a tile is a string of bits, in Python's integers; state i begins at bit k·i, and
    there is none at odd places where a state is two weights.

    In EXL3's order eight weights in a row are those of one thread in a fragment of a tensor core: two by two inputs
    (columns), eight apart, of two outputs, eight apart. QTIP's has the other eight first.
    """
    out, blocks = len(packed), packed.shape[1] // bits
    value = decode_states(code, state_bits).tolist() if table is None else []
    weight = torch.empty(out, 16 * blocks)
    for top, block in product(range(0, out, 16), range(blocks)):
        words = packed[top : top + 16, block * bits : (block + 1) * bits].flatten().tolist()
        string = "".join(f"{word & 0xFFFF:016b}" for word in words)
        for i in range(len(string) // bits):
            begin = i * bits if table is None else (i - i % 2) * bits
            state = int((string + string)[begin : begin + state_bits], 2)
            row, column = i // 16, i % 16
            thread, element = divmod(i, 8)
            if order == "exl3":
                row, column = thread // 4 + (0, 8)[element // 4], thread % 4 * 2 + (0, 1, 8, 9)[element % 4]
            elif order == "fragments":
                row = thread // 4 + (0, 8)[element // 2 % 2]
                column = thread % 4 * 2 + element % 2 + (0, 8)[element // 4]
            weight[top + row, 16 * block + column] = value[state] if table is None else pair(state, table)[i % 2]
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


@pytest.mark.parametrize("code", COMPUTED)
def test_fewer_bits_of_state_are_the_first_states(code: str) -> None:
    assert torch.equal(decode_states(code, 9), decode_states(code, 16)[:512])


# ---- codes to values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_bits", [8, 11, 16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("out", [1, 16, 37])
def test_weights_are_cut_from_the_circle_of_their_tile(out: int, bits: int, state_bits: int) -> None:
    packed = drawn(out, 3, bits)
    for code in CODES:
        if code == "hyb" and state_bits <= 2 * bits:
            continue
        table = drawn_table(code)
        expected = read(packed, bits, state_bits, code, table=table)
        for module in (native, reference):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                got = module.dequantize_trellis(packed, table, bits, state_bits, code, "rows", 0, out, dtype)
                assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("order", ["rows", "exl3", "fragments"])
def test_every_width_and_order_is_read_by_the_definition(order: str, bits: int) -> None:
    out = 37 if order == "rows" else 48
    packed = drawn(out, 3, bits, seed=bits)
    for code, state_bits in (("mul1", 16), ("mcg", 12), *([("hyb", 16), ("hyb", 11)] if bits <= 4 else [])):
        table = drawn_table(code)
        expected = read(packed, bits, state_bits, code, order, table)
        for module in (native, reference):
            got = module.dequantize_trellis(packed, table, bits, state_bits, code, order, 0, out, torch.float32)
            assert torch.equal(got, expected)
            part = module.dequantize_trellis(packed, table, bits, state_bits, code, order, 7, 27, torch.float16)
            assert torch.equal(part, expected[7:27].half())
        x, options = torch.randn(2, 48), (packed, bits, state_bits, code)
        product = multiply_trellis(x, *options, order=order, table=table)
        assert torch.allclose(product, x @ expected.T, atol=1e-4)
        back = multiply_trellis(product, *options, True, order=order, table=table)
        assert torch.allclose(back, product @ expected, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_an_order_changes_where_weights_are_and_not_how_well_they_are_found(bits: int) -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(9))
    packed = encode_trellis(weight, bits, 12, "mul1", "exl3")
    assert torch.equal(packed, reference.encode_trellis(trellis._sequences(weight, "exl3"), None, bits, 12, "mul1"))
    error = (dequantize_trellis(packed, bits, 12, "mul1", order="exl3") - weight).square().mean()
    assert 4.0**-bits < error < 4.0**-bits * (1.6 if bits < 5 else 16)  # the code's range limits more bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_exact_slices(bits: int) -> None:
    packed = drawn(37, 5, bits)
    whole = dequantize_trellis(packed, bits, 12, "3inst")
    for start, stop in ((0, 1), (15, 16), (15, 17), (16, 32), (31, 37), (36, 37), (5, 5)):
        assert torch.equal(dequantize_trellis(packed, bits, 12, "3inst", start, stop), whole[start:stop])
        assert torch.equal(
            reference.dequantize_trellis(packed, None, bits, 12, "3inst", "rows", start, stop, torch.float32),
            whole[start:stop],
        )


def test_strided_tensors_are_read_rightly() -> None:
    packed, x = drawn(24, 8, 2), torch.randn(6, 20).T[:3]
    weight = dequantize_trellis(packed.T.contiguous(), 2, 10, "1mad")
    assert torch.equal(dequantize_trellis(packed.T, 2, 10, "1mad"), weight)
    x = torch.randn(weight.shape[1], 3).T
    assert torch.allclose(multiply_trellis(x, packed.T, 2, 10, "1mad"), x @ weight.T, atol=1e-4)


@pytest.mark.parametrize("code", ["3inst", "hyb"])
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("out", "blocks"), [(1, 1), (19, 3), (33, 40)])
def test_products_equal_the_dense_ones_whatever_the_number_of_threads(
    out: int, blocks: int, tokens: int, code: str
) -> None:
    packed, table = drawn(out, blocks, 2), drawn_table(code)
    weight = dequantize_trellis(packed, 2, 12, code, table=table)
    for transposed in (False, True):
        x = torch.randn(tokens, out if transposed else 16 * blocks)
        truth = x.double() @ (weight if transposed else weight.T).double()
        found = []
        for threads in (1, 3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(native, "_threads", lambda weights, threads=threads: threads)
                found.append(multiply_trellis(x, packed, 2, 12, code, transposed, table=table))
        assert torch.equal(*found)
        assert found[0].shape == truth.shape and torch.allclose(found[0].double(), truth, atol=1e-4)


# ---- values to codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", COMPUTED)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("out", "blocks", "state_bits"), [(21, 2, 8), (3, 1, 9), (16, 1, 10)])
def test_c_and_torch_find_the_same_codes(out: int, blocks: int, state_bits: int, bits: int, code: str) -> None:
    weight = torch.randn(out, 16 * blocks, generator=torch.Generator().manual_seed(1))
    state_bits = max(state_bits, bits + 4)
    assert torch.equal(
        encode_trellis(weight, bits, state_bits, code), reference.encode_trellis(weight, None, bits, state_bits, code)
    )


@pytest.mark.parametrize(("bits", "state_bits"), HYBRID)
@pytest.mark.parametrize(("out", "blocks"), [(21, 2), (1, 1), (16, 1)])
def test_c_and_torch_find_the_same_pairs(out: int, blocks: int, bits: int, state_bits: int) -> None:
    """Of few values, too, where many paths cost the same."""
    generator = torch.Generator().manual_seed(1)
    for weight, table in (
        (torch.randn(out, 16 * blocks, generator=generator), drawn_table("hyb")),
        (torch.randint(-1, 2, (out, 16 * blocks), generator=generator).float(), drawn_table("hyb").round()),
    ):
        found = encode_trellis(weight, bits, state_bits, "hyb", table=table)
        assert torch.equal(found, reference.encode_trellis(weight, table, bits, state_bits, "hyb"))


@pytest.mark.parametrize("bits", WIDTHS)
def test_ties_are_broken_alike(bits: int) -> None:
    """Of few values, so that many paths cost the same; and of zeros."""
    weight = torch.randint(-1, 2, (20, 32), generator=torch.Generator().manual_seed(2)).float()
    options = bits, max(8, bits + 4), "1mad"
    for each in (weight, torch.zeros(20, 16)):
        assert torch.equal(encode_trellis(each, *options), reference.encode_trellis(each, None, *options))


def test_the_search_finds_the_best_free_path() -> None:
    """Of all paths of five weights, by trying them."""
    table, x = decode_states("3inst", 8), torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    paths = torch.arange(2 ** (8 + 4))[:, None] >> torch.arange(4, -1, -1) & 255  # all strings of 12 bits
    path = reference._walk(x[..., None], table[:, None], 1, None)
    assert ((path[:, 1:] >> 1) == (path[:, :-1] & 127)).all()
    for row, found in zip(x, path, strict=True):
        best = (table[paths] - row).square().sum(1).min()
        assert (table[found] - row).square().sum() == pytest.approx(best.item(), rel=1e-5)


def test_the_search_finds_the_best_circle_with_the_joint_that_it_is_held_to() -> None:
    table, x = decode_states("3inst", 8), torch.randn(3, 10, generator=torch.Generator().manual_seed(4))
    joint = torch.tensor([3, 64, 127])
    path = reference._walk(x[..., None], table[:, None], 1, joint)
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


def test_the_search_finds_the_best_free_path_of_pairs() -> None:
    """Exhaustive search over the paths of four pairs at two bits per weight, so four bits per step."""
    table = reference.values("hyb", drawn_table("hyb"), 8, torch.device("cpu"), torch.float32)
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(3))
    paths = torch.arange(2 ** (8 + 12))[:, None] >> torch.arange(12, -1, -4) & 255
    for row, found in zip(x, reference._walk(x, table, 4, None), strict=True):
        best = (table[paths] - row).square().sum((1, 2)).min()
        assert (table[found] - row).square().sum() == pytest.approx(best.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("bits", "state_bits", "most"), [(1, 10, 1.2), (2, 10, 1.35), (3, 11, 1.45), (4, 12, 1.75)], ids=str
)
def test_the_fitted_table_suits_gaussian_weights(bits: int, state_bits: int, most: float) -> None:
    """In a tile of fewer rows as well; better than drawn pairs."""
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(5))
    errors = []
    for table in (fitted_table(bits, state_bits), trellis.hybrid._drawn_pairs(torch.Generator().manual_seed(2)).half()):
        options = bits, state_bits, "hyb"
        values = dequantize_trellis(encode_trellis(weight, *options, table=table), *options, table=table)
        errors.append((values - weight).square())
    for rows in (slice(32), slice(32, 40)):
        assert 4.0**-bits < errors[0][rows].mean() < 4.0**-bits * most
    assert errors[0].mean() < errors[1].mean()


def test_the_fitted_table_is_the_same_whatever_the_number_of_threads() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(fitted_table.__wrapped__(2, 8))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found) and torch.equal(found[0], fitted_table(2, 8))


@pytest.mark.parametrize("order", ["rows", "fragments"])
def test_a_table_in_float32_is_not_rounded(order: str) -> None:
    """As it has not to be while it is trained."""
    packed, table = drawn(32, 5, 3), torch.randn(PAIRS, 2)
    expected = read(packed, 3, 13, "hyb", order, table)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(
            dequantize_trellis(packed, 3, 13, "hyb", dtype=dtype, order=order, table=table), expected.to(dtype)
        )


@pytest.mark.parametrize("order", ["rows", "fragments"])
@pytest.mark.parametrize("bits", [1, 3])
def test_the_gradient_in_the_table_is_autograds(bits: int, order: str) -> None:
    packed, table = drawn(32, 3, bits), drawn_table("hyb").float().requires_grad_()
    x = torch.randn(25, 48)
    (found,) = torch.autograd.grad(
        dequantize_trellis(packed, bits, 12, "hyb", 5, 30, order=order, table=table), table, x
    )
    (truth,) = torch.autograd.grad(
        reference.dequantize_trellis(packed, table, bits, 12, "hyb", order, 5, 30, torch.float32), table, x
    )
    assert truth.any() and torch.allclose(found, truth, atol=1e-5)


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
        ((2, 12, "2mad"), "2mad"),
        ((2, 12, "hyb"), "code=hyb; hyb alone has a table, and needs it"),
        ((5, 12, "hyb"), "bits=5 and state_bits=12; hyb has 1 to 4 bits"),
        ((4, 8, "hyb"), "bits=4 and state_bits=8"),
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
    with pytest.raises(InputError, match="code=3inst; hyb alone has a table"):
        multiply_trellis(torch.zeros(1, 48), packed, 2, 12, "3inst", table=torch.zeros(512, 2))
    for table in (torch.zeros(256, 2), torch.zeros(512, 2).int()):
        with pytest.raises(InputError, match="a table of hyb is float"):
            encode_trellis(torch.zeros(2, 16), 2, 12, "hyb", table=table)
    with pytest.raises(InputError, match="do not fit"):
        multiply_trellis(torch.zeros(1, 47), packed, 2, 12, "3inst")
