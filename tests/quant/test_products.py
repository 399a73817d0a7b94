"""How a packed weight is multiplied: every way within one tolerance, chosen by measurement, or by the variable."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmtools.errors import InputError
from llmtools.kernels import build
from llmtools.quant import NF4, RTN, Quantizer, QuIPSharp, products
from llmtools.quant.materialize import multiply_by
from llmtools.quant.products import ALL_TOKENS, VARIABLE, Choice, Way

HALF, WIDE = torch.bfloat16, torch.float32
needs_c = pytest.mark.skipif(build.library("grouped") is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    products.forget()
    yield
    products.forget()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, read and written, with a measurement that takes no time: the first way is slow."""
    monkeypatch.setattr(build, "cache", lambda: tmp_path)
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(products, "_least", lambda ways, repeats: {way: 1.0 / (i + 1) for i, way in enumerate(ways)})
    return tmp_path


# ---- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", [RTN(bits=2, group_size=32), RTN(bits=4), RTN(bits=8), NF4()], ids=str)
def test_every_way_is_as_near_the_truth_as_the_dense_layer(
    quantizer: Quantizer, dtype: torch.dtype, transposed: bool
) -> None:
    packed = quantizer.quantize(torch.randn(200, 200))
    weight = quantizer.dequantize(packed)
    dense = weight if transposed else weight.T
    for tokens in (1, 17, 70):
        x = torch.randn(tokens, 200).to(dtype)
        truth = x.double() @ dense.double()
        allowed = 2 * (x @ dense.to(dtype) - truth).abs().max() + 1e-6 * truth.abs().max()
        for own in {dtype, torch.float32}:
            for few in (0, ALL_TOKENS):
                for as_bytes in (True, False):
                    way = Way(own, 64 * 200 * 4, few, as_bytes)
                    got = multiply_by(way, x, quantizer.grid, packed, transposed)  # type: ignore[attr-defined]
                    assert got.dtype == dtype
                    assert (got - truth).abs().max() <= allowed, (tokens, way)


def test_a_kernel_for_few_tokens_is_not_given_many() -> None:
    grid = QuIPSharp().grid
    assert grid.multiply_tokens < RTN().grid.multiply_tokens == ALL_TOKENS


# ---- the choice ----------------------------------------------------------------------------------------------------


@needs_c
def test_what_is_faster_by_a_margin_is_chosen_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = products.default(HALF)
    assert not products.find(HALF).final and products.find(HALF).choice == default
    found = products.find(HALF, measured=True)
    # The last of the ways is the fastest: of the types the other one, the last size, blocks rather than the kernel.
    other = HALF if default.forward.dtype == WIDE else WIDE
    assert found.choice.forward[:3] == (other, 8 * 2**20, 0) and found.choice.transposed[:3] == (other, 8 * 2**20, 0)
    assert found.figures and found.final
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    products.forget()
    monkeypatch.setattr(products, "measure", None)
    assert products.find(HALF) == found


@needs_c
def test_a_hair_is_no_margin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_least", lambda ways, repeats: {way: 1.0 - i / 100 for i, way in enumerate(ways)})
    choice = products.find(HALF, measured=True).choice
    default = products.default(HALF)
    assert [way[:2] for way in choice] == [way[:2] for way in default]
    assert choice.forward.few == ALL_TOKENS  # the kernel, unless blocks are faster


@needs_c
@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"ways": {}, "figures": {}}', "\xff", '{"ways": 1}', "DTYPE", "FEW", "[" * 100_000],
    ids=["empty", "cut", "list", "without", "latin", "number", "another-type", "negative", "deep"],
)
def test_a_damaged_or_foreign_file_is_measured_and_written_again(folder: Path, text: str) -> None:
    found = products.find(HALF, measured=True)
    (file,) = folder.iterdir()
    whole = file.read_text()
    stored = json.loads(whole)
    if text == "DTYPE":
        stored["ways"]["forward"]["dtype"] = "float64"
    elif text == "FEW":
        stored["ways"]["transposed"]["few"] = -1
    changed = json.dumps(stored) if text.isalpha() and text.isupper() else text
    file.write_text(changed, encoding="latin-1")
    products.forget()
    assert not products.find(HALF).final
    assert products.find(HALF, measured=True) == found
    assert file.read_text() == whole


@needs_c
def test_a_file_that_others_can_write_is_not_read(folder: Path) -> None:
    products.find(HALF, measured=True)
    (file,) = folder.iterdir()
    file.chmod(0o666)
    products.forget()
    assert not products.find(HALF).final


@needs_c
def test_types_and_threads_are_measured_apart(folder: Path) -> None:
    products.find(HALF, measured=True)
    assert not products.find(torch.float16).final
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert not products.find(HALF).final
    finally:
        torch.set_num_threads(before)


@needs_c
def test_small_weights_and_tensors_without_values_measure_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(products, "measure", None)
    x = torch.zeros(1, 8, dtype=HALF)
    assert products.choice(x, lambda: 2**10) == products.default(HALF)
    with FakeTensorMode() as mode:
        assert products.choice(mode.from_tensor(x), lambda: 2**30) == products.default(HALF)
        assert products.choice(x, lambda: 2**30) == products.default(HALF)
    with pytest.raises(TypeError):  # what would measure is gone
        products.choice(x, lambda: 2**30)


@needs_c
def test_the_real_measurement_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small weight: what is chosen must be one of the ways, and is no test of speed."""
    monkeypatch.setattr(products, "_SIZE", 256)
    state, grad = torch.get_rng_state(), torch.is_grad_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        found = products.measure(HALF)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() == grad
    for way in found.choice:
        stored = {**way._asdict(), "dtype": str(way.dtype).removeprefix("torch.")}
        assert products._way(stored, HALF) == way
    assert all(spent > 0 for times in found.figures.values() for spent in times.values())


# ---- the variable --------------------------------------------------------------------------------------------------


def test_the_variable_sets_parts_for_one_direction_or_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_read", lambda dtype: None)
    monkeypatch.setenv(VARIABLE, "dtype=float32, few=all, bytes=no, transposed.few=7,forward.block_mib=3")
    _, block, _, _ = products.default(HALF).transposed
    expected = Choice(Way(WIDE, 3 * 2**20, ALL_TOKENS, False), Way(WIDE, block, 7, False))
    assert products.find(HALF).choice == expected


@pytest.mark.parametrize(
    "value",
    ["fast", "dtype=int8", "few=-1", "few=some", "bytes=1", "block_mib=0", "sideways.few=3", "few", "default,few=3"],
)
def test_a_value_that_means_nothing_is_one_clear_line(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(InputError, match=VARIABLE) as raised:
        products.find(HALF)
    assert "\n" not in str(raised.value)


def test_tests_measure_nothing() -> None:
    assert os.environ[VARIABLE] == "default" and products.find(HALF, measured=True).figures == {}
