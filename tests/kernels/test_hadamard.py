"""The rotation: its matrices are Hadamard, its tables the published ones, its products the dense ones."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtools.errors import InputError
from llmtools.kernels import hadamard as package
from llmtools.kernels.hadamard import hadamard, matrix, rotate, rule_for
from llmtools.kernels.hadamard.matrices import order, prime_power
from llmtools.kernels.hadamard.rules import MAX_FACTOR, factors

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# QuIP#'s twelve tables: name and the first 16 hex digits of the SHA-256 of the int8 matrix, row by row.
PUBLISHED = {
    "paley1:11": "67507aecbe2abee5",
    "paley1:19": "f54960fecf1ccf70",
    "paley1:59": "091e76fba0aef583",
    "paley1:107": "690a34c6c9ed2f0e",
    "paley1:139": "b9ff01506ffe4db5",
    "paley2:13": "a6cb994c78f9acd4",
    "paley2:17": "d674d8240e6b622b",
    "williamson:52": "9ee082772819b105",
    "williamson:116": "e35aecfbc1d95799",
    "williamson:124": "9b41cf5242a1dd12",
    "williamson:156": "99a1b852ce559ffd",
    "williamson:172": "378ef12c7cc31f3e",
}

# Feature sizes of released models -> the order of the factor beside Sylvester's matrix. The first group is QuIP#'s.
MODEL_SIZES = {
    4096: 1, 8192: 1, 11008: 172, 12288: 12, 22016: 172, 5120: 20, 13824: 108, 15360: 60, 27648: 108, 6656: 52,
    17920: 140, 19968: 156, 35840: 140, 24576: 12, 44032: 172, 28672: 28, 10240: 20, 57344: 28, 14336: 28, 6144: 12,
    768: 12, 3072: 12, 2560: 20, 20480: 20, 7168: 28, 9216: 36, 36864: 36, 49152: 12, 896: 28, 1536: 12, 8960: 140,
    3584: 28, 960: 60, 576: 36, 43008: 84, 4864: 76, 9728: 76, 18944: 148, 37888: 148, 29568: 924, 59136: 924,
    17408: 68, 25600: 100, 5632: 44, 1600: 100, 6400: 100, 4800: 300, 4544: 284, 18176: 284,
}  # fmt: skip


def dense(rule: str, n: int) -> torch.Tensor:
    """The rule's matrix written out, float64 [n, n]."""
    block = torch.ones(1, 1, dtype=torch.float64)
    for name in factors(rule, n):
        block = torch.kron(block, matrix(name).double())
    return torch.block_diag(*[block] * (n // len(block))) / math.sqrt(len(block))


def assert_hadamard(name: str) -> None:
    m = matrix(name).double()
    assert set(m.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(m @ m.T, order(name) * torch.eye(order(name), dtype=torch.float64))


@pytest.mark.parametrize(("name", "digest"), PUBLISHED.items())
def test_published_tables_are_regenerated(name: str, digest: str) -> None:
    assert hashlib.sha256(matrix(name).contiguous().numpy().tobytes()).hexdigest()[:16] == digest
    assert rule_for(order(name)) == rule_for(8 * order(name)) == name


@pytest.mark.parametrize("name", [*PUBLISHED, "sylvester:1", "sylvester:2", "sylvester:256"])
def test_named_matrices_are_hadamard(name: str) -> None:
    assert_hadamard(name)


@pytest.mark.parametrize("q", [q for q in range(3, 150, 2) if prime_power(q)] + [243, 343, 461])
def test_paley_matrices_exist_for_every_odd_prime_power(q: int) -> None:
    assert_hadamard(f"paley1:{q}" if q % 4 == 3 else f"paley2:{q}")


@pytest.mark.parametrize("n", range(1, 301))
def test_every_small_size_has_an_orthogonal_rule(n: int) -> None:
    rule = rule_for(n)
    q = dense(rule, n)
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x, rule), x @ q.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard(x, rule, transpose=True), x @ q, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard(hadamard(x, rule, transpose=True), rule), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "k"), MODEL_SIZES.items())
def test_model_sizes_have_one_small_factor_and_are_inverted_by_the_transpose(n: int, k: int) -> None:
    rule = rule_for(n)
    *small, _ = factors(rule, n)
    assert [order(name) for name in small] == ([k] if k > 1 else [])
    x = torch.randn(2, n)
    y = hadamard(x, rule)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(hadamard(y, rule, transpose=True), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("n", "rule"),
    [
        (1, "sylvester"), (2, "sylvester"), (4096, "sylvester"), (9, "blocks:1"), (6, "blocks:2"), (28, "paley2:13"),
        (4672, "blocks:64"), (292 * 3, "blocks:12:paley1:11"), (25600, "paley2:49"), (151936, "blocks:128"),
    ],
)  # fmt: skip
def test_rules_are_what_checkpoints_store(n: int, rule: str) -> None:
    assert rule_for(n) == rule


def test_a_product_of_small_matrices_stands_in_for_a_missing_one() -> None:
    sizes = [n for n in range(4, 4097, 4) if "*" in rule_for(n)]
    assert sizes
    for n in sizes[:5]:
        x = torch.randn(2, n, dtype=torch.float64)
        rule = rule_for(n)
        torch.testing.assert_close(hadamard(x, rule), x @ dense(rule, n).T, rtol=0, atol=1e-10)
        torch.testing.assert_close(hadamard(hadamard(x, rule), rule, transpose=True), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rule", "n"), [("paley1:11*paley1:19", 480), ("paley1:3*paley1:11*paley2:5", 1152)])
def test_written_products_are_the_kronecker_product(rule: str, n: int) -> None:
    x = torch.randn(2, n, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x, rule), x @ dense(rule, n).T, rtol=0, atol=1e-10)
    torch.testing.assert_close(hadamard(x, rule, transpose=True), x @ dense(rule, n), rtol=0, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60000))
def test_every_size_has_a_rule_that_fits(n: int) -> None:
    names = factors(rule_for(n), n)
    assert n % math.prod(order(name) for name in names) == 0
    assert max(order(name) for name in names[:-1] or ["sylvester:1"]) <= MAX_FACTOR


@pytest.mark.parametrize(
    "rule",
    ["", "paley1:13", "paley1:11", "paley2:11", "williamson:92", "sylvester:3", "blocks:5", "blocks:0", "blocks:x",
     "sylvester", "paley1:11*", "paley1:" + "9" * 40, "blocks:-64", "nonsense"],
)  # fmt: skip
def test_rules_that_do_not_fit_are_refused(rule: str) -> None:
    with pytest.raises(InputError):
        hadamard(torch.zeros(4672), rule)


def test_factors_too_large_to_write_down_are_refused() -> None:
    with pytest.raises(InputError, match="at most 2048"):
        hadamard(torch.zeros(2084), "paley1:2083")


def test_integers_are_refused() -> None:
    with pytest.raises(InputError, match="int64"):
        hadamard(torch.arange(8), "sylvester")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 64, 76, 96, 172 * 4, 1024, 4096, 8192])
def test_results_are_as_exact_as_the_type_allows(n: int, dtype: torch.dtype, device: str) -> None:
    rule = rule_for(n)
    x = torch.randn(3, 2, n).to(dtype)
    for transpose in (False, True):
        truth = hadamard(x.double(), rule, transpose)
        y = hadamard(x.to(device), rule, transpose)
        assert y.dtype == dtype and y.shape == x.shape
        rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 2e-7
        error = (y.cpu().double() - truth).abs()
        assert (error <= rounding * truth.abs() + 2e-6).all()


@pytest.mark.parametrize("shape", [(0, 24), (24,), (2, 3, 4, 24), (2, 0, 24)], ids=str)
def test_any_leading_dimensions_are_allowed_and_rows_are_independent(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    before = x.clone()
    y = hadamard(x, "paley1:11")
    assert y.shape == x.shape
    assert torch.equal(x, before)
    torch.testing.assert_close(y, (x.double() @ dense("paley1:11", 24).T).float(), rtol=0, atol=1e-5)


def test_strided_vectors_are_read_rightly() -> None:
    x = torch.randn(24, 5).T
    torch.testing.assert_close(hadamard(x, "paley1:11"), hadamard(x.contiguous(), "paley1:11"))


def test_sixteen_bit_results_do_not_overflow_on_the_way() -> None:
    x = torch.full((4096,), 1000.0, dtype=torch.float16)
    assert hadamard(x, "sylvester")[0] == 64000


@pytest.mark.parametrize("n", [8, 12, 40, 3])
def test_gradients_are_the_transposed_transform(n: int) -> None:
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    for transpose in (False, True):
        assert torch.autograd.gradcheck(lambda x, t=transpose: hadamard(x, rule_for(n), t), x)
        assert torch.autograd.gradgradcheck(lambda x, t=transpose: hadamard(x, rule_for(n), t), x)


def test_the_operator_keeps_its_promises_to_torch() -> None:
    for x in (
        torch.randn(3, 48),
        torch.randn(3, 48, requires_grad=True),
        torch.randn(48, 3).T,
        torch.randn(1, 1).half(),
    ):
        torch.library.opcheck(torch.ops.llmtools.hadamard.default, (x, rule_for(x.shape[-1]), False))


def test_it_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(lambda x: hadamard(2 * x, "paley1:11").sum(), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24, requires_grad=True)
    compiled(x).backward()
    expected = hadamard(torch.full((3, 24), 2.0), "paley1:11", transpose=True)
    torch.testing.assert_close(x.grad, expected)


def test_factors_first_built_in_inference_mode_serve_training_later() -> None:
    with torch.inference_mode(), torch.device("meta"):
        hadamard(torch.randn(84, device="cpu"), "paley1:83")
    x = torch.randn(84, requires_grad=True)
    hadamard(x, "paley1:83").sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("given", "size", "length"), [(93, 96, 96), (768, 768, 761), (33, 40, 12), (4096, 4096, 4096)])
def test_a_rotation_is_the_transform_between_two_products(
    given: int, size: int, length: int, dtype: torch.dtype
) -> None:
    x, before, after = torch.randn(2, 3, given).to(dtype), torch.randn(given).half(), torch.randn(length).bfloat16()
    q = dense(rule_for(size), size)
    for transpose in (False, True):
        right = q if transpose else q.T
        for left, last in ((before, after), (before, None), (None, after), (None, None)):
            truth = x.double() * (1 if left is None else left.double()) @ right[:given, :length]
            truth = 0.25 * truth * (1 if last is None else last.double()) if last is not left else truth
            y = rotate(
                x, rule_for(size), size, before=left, after=last, length=length,
                factor=1.0 if last is left else 0.25, transpose=transpose,
            )  # fmt: skip
            assert y.dtype == dtype and y.shape == (2, 3, length)
            rounding = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
            torch.testing.assert_close(y.double(), truth, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("given", "length"), [(11, 12), (13, 12), (12, 11), (12, 13)])
def test_vectors_that_do_not_fit_a_rotation_are_refused(given: int, length: int) -> None:
    with pytest.raises(InputError, match="do not fit a rotation of 12 features"):
        rotate(torch.randn(2, 12), rule_for(12), 12, before=torch.ones(given), after=torch.ones(12), length=length)


def test_gradients_of_a_rotation_are_those_of_its_parts() -> None:
    before, after = torch.randn(10, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)

    def rotated(x: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return rotate(x, rule_for(12), 12, before=before, after=after, length=9, factor=0.5, transpose=True)

    assert torch.autograd.gradcheck(lambda x: rotated(x, before, after), x)
    assert torch.autograd.gradgradcheck(lambda x: rotated(x, before, after), x)
    trained = (before.requires_grad_(), after.requires_grad_())
    assert torch.autograd.gradcheck(rotated, (x, *trained))


def test_a_rotation_keeps_nothing_for_backward() -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda _: torch.empty(0)):
        rotate(torch.randn(2, 12, requires_grad=True), rule_for(12), 12, before=torch.ones(12)).sum()
    assert not kept


def test_a_rotation_does_not_depend_on_its_neighbours_or_the_number_of_threads() -> None:
    x, before, threads = torch.randn(70, 768).bfloat16(), torch.randn(768), torch.get_num_threads()
    whole = rotate(x, rule_for(768), 768, before=before)
    assert torch.equal(whole[3:4], rotate(x[3:4], rule_for(768), 768, before=before))
    try:
        torch.set_num_threads(2)
        assert torch.equal(whole, rotate(x, rule_for(768), 768, before=before))
    finally:
        torch.set_num_threads(threads)


def test_meta_tensors_give_shapes() -> None:
    assert hadamard(torch.empty(3, 24, device="meta"), "paley1:11").shape == (3, 24)


@pytest.mark.skipif(package.native._library() is None, reason="no C compiler")
@pytest.mark.parametrize("n", [1, 2, 8, 32, 512, 8192, 12, 96, 172 * 4, 480, 4672])
def test_c_and_reference_are_equally_exact(n: int) -> None:
    x = torch.randn(5, n)
    rule = "paley1:11*paley1:19" if n == 480 else rule_for(n)
    for transpose in (False, True):
        truth = hadamard(x.double(), rule, transpose)
        c = (package.native.hadamard(x, rule, transpose) - truth).abs().max()
        plain = (package.reference.hadamard(x, rule, transpose) - truth).abs().max()
        assert c <= 2 * plain + 1e-6


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(64, 4096)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(hadamard(x, "sylvester"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
