"""The conformance checks of a quantizer, called laws. The tests and ``llmtools check NAME`` run every one.

A law is ``law(quantizer, weight, hessian) -> None`` that raises `LawBroken` with numbers; weight is [out, in] float,
hessian [in, in] float32. `check` samples the problems: odd sizes, constant and zero rows, one huge outlier, dead
columns, bfloat16 weights.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .base import Packed, Quantizer
from .hessian import proxy_loss
from .materialize import materialize_budget
from .shift import group_means

Law = Callable[[Quantizer, Tensor, Tensor], None]


class LawBroken(AssertionError):
    """A quantizer fails a conformance check; the message has the numbers."""


class Outcome(NamedTuple):
    """Result of one law on one sampled problem."""

    law: str
    """Name of the law."""
    problem: str
    """Description of the problem."""
    error: str
    """Message of the failure; empty where the law holds."""


def layout(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """`quantize` gives exactly the names, shapes and types of `layout`, and `out_features` reads the rows off them."""
    packed, expected = _quantize(quantizer, weight, hessian), quantizer.layout(*weight.shape)
    got = {name: (tuple(t.shape), t.dtype) for name, t in packed.items()}
    want = {name: (tuple(spec.shape), spec.dtype) for name, spec in expected.items()}
    _require(got == want, f"quantize gave {got}, layout says {want}")
    _require(list(packed) == list(expected), f"quantize orders {list(packed)}, layout {list(expected)}")
    rows = quantizer.out_features(packed)
    _require(rows == weight.shape[0], f"out_features(packed) is {rows}, the weight has {weight.shape[0]} rows")


def rows(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """``dequantize(p, a:b)`` equals ``dequantize(p)[a:b]`` bit for bit, in every type.

    Also where a or b lies within rows that share a code, or the piece runs over several of such tiles.
    """
    packed, out = _quantize(quantizer, weight, hessian), weight.shape[0]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = quantizer.dequantize(packed, dtype=dtype)
        _require(whole.dtype == dtype, f"asked for {dtype}, got {whole.dtype}")
        _require(whole.shape == weight.shape, f"dequantize gives {list(whole.shape)}, weight {list(weight.shape)}")
        for piece in (
            slice(0, 1),
            slice(out // 3, out // 3 + 2),
            slice(1, out - 1),
            slice(out - 1, out),
            slice(0, out),
        ):
            same = torch.equal(quantizer.dequantize(packed, piece, dtype), whole[piece])
            _require(same, f"rows {piece.start}:{piece.stop} in {dtype} differ from the same rows of the whole")


def determinism(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """Two calls give the same bits, also with another number of threads."""
    first, threads = _quantize(quantizer, weight, hessian), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        second = _quantize(quantizer, weight, hessian)
    finally:
        torch.set_num_threads(threads)
    for name in first:
        _require(torch.equal(first[name], second[name]), f"{name} differs between two calls")


def meta(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """`layout` needs only sizes: tensors made from it on the meta device fit what `quantize` gives."""
    packed = _quantize(quantizer, weight, hessian)
    for name, spec in quantizer.layout(*weight.shape).items():
        empty = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        _require(empty.shape == packed[name].shape, f"{name}: {list(empty.shape)} against {list(packed[name].shape)}")


def linear(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """`linear` and its gradient equal the dense layer's, within twice what float32 itself is off by from float64."""
    packed = _quantize(quantizer, weight, hessian)
    dense = quantizer.dequantize(packed)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, weight.shape[1], generator=generator).requires_grad_()
    grad = torch.randn(3, 5, weight.shape[0], generator=generator)
    y = quantizer.linear(x, packed)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    x64, w64 = x.detach().double(), dense.double()
    for what, got, plain, truth, scale in (
        ("linear", y, x.detach() @ dense.T, x64 @ w64.T, x64.abs() @ w64.abs().T),
        ("its gradient", grad_x, grad @ dense, grad.double() @ w64, grad.double().abs() @ w64.abs()),
    ):
        off, reference = (got - truth).abs().max(), (plain - truth).abs().max()
        allowed = 2 * reference + 4 * torch.finfo(torch.float32).eps * scale.max()
        _require(bool(off <= allowed), f"{what} is off by {off:.3g}, allowed {allowed:.3g}")


def trained(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """The gradients of `linear` in its tunable tensors equal autograd's through the whole weight of `tuning_linear`."""
    stored = _quantize(quantizer, weight, hessian)
    packed = quantizer.unpacked(stored)
    again = quantizer.repacked(packed)
    _require(stored.keys() == again.keys() and all(map(torch.equal, stored.values(), again.values())),
             "repacked(unpacked(packed)) is not packed")  # fmt: skip
    _require(torch.equal(quantizer.dequantize(packed), quantizer.dequantize(stored)), "unpacked decodes differently")
    floats = {name: packed[name].float().requires_grad_() for name in quantizer.tunable(packed)}
    if not floats:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, weight.shape[1], generator=generator)
    grad = torch.randn(3, 5, weight.shape[0], generator=generator)
    output = quantizer.tuning_linear(x, packed | floats)
    if not output.requires_grad:
        return  # codes alone decide; there is nothing to tune
    whole = torch.autograd.grad(output, list(floats.values()), grad)
    with materialize_budget(16 * weight.shape[1] * 3):  # three rows at a time
        rowwise = torch.autograd.grad(quantizer.linear(x, packed | floats), list(floats.values()), grad)
    for name, got, truth in zip(floats, rowwise, whole, strict=True):
        allowed = 1e-4 * float(truth.abs().max()) + 1e-6
        off = float((got - truth).abs().max())
        _require(off <= allowed, f"the gradient of {name} is off by {off:.3g}, allowed {allowed:.3g}")


def in_place(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """The result of `linear` may be modified in place, with autograd and after it was off, as that of `F.linear`."""
    packed = _quantize(quantizer, weight, hessian)
    x = torch.ones(2, 3, weight.shape[1], requires_grad=True)
    shift = torch.ones(weight.shape[0], requires_grad=True)
    with torch.no_grad():
        quiet = quantizer.linear(x, packed)
    for y in (quantizer.linear(x, packed), quantizer.linear(x[0], packed), quiet):
        expected = y.detach() + 1
        try:
            y += shift
        except RuntimeError as error:
            raise LawBroken(f"the result of linear is a view, which autograd keeps: {error}") from error
        _require(torch.equal(y, expected), "adding to the result of linear in place gives another sum")


def requantized(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """A weight on the grid keeps its values when it is encoded on its own scales, alone and with an update of zeros."""
    packed = _quantize(quantizer, weight, hessian)
    dense = quantizer.dequantize(packed)
    try:
        made = quantizer.requantize(dense, packed)
    except InputError:
        return  # the method is optional
    _fits(made, packed)
    _require(torch.equal(quantizer.dequantize(packed | made), dense), "a weight on its own grid has changed")
    nothing = quantizer.updated(packed, weight.new_zeros(len(weight), 2).float(), torch.ones(2, weight.shape[1]))
    _fits(nothing, packed)
    _require(torch.equal(quantizer.dequantize(nothing), dense), "an update of zeros has changed the weight")


def shifted(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """A change that is constant in each row and group of columns is added to the weight, up to the rounding of its zero
    points or minima; a change of nothing changes nothing."""
    if (size := quantizer.shift_group(weight.shape[1])) is None:
        return  # the method is optional
    packed = _quantize(quantizer, weight, hessian)
    dense = quantizer.dequantize(packed)
    groups = group_means(dense.abs(), size)
    nothing = quantizer.shift(packed, torch.zeros_like(groups))
    _fits(nothing, packed)
    _require(torch.equal(quantizer.dequantize(nothing), dense), "a change of nothing has changed the weight")
    change = groups * torch.randn(groups.shape, generator=torch.Generator().manual_seed(0))
    made = quantizer.shift(packed, change)
    _fits(made, packed)
    error = quantizer.dequantize(made) - dense - change.repeat_interleave(size, 1)[:, : weight.shape[1]]
    largest = dense.abs().amax(1, keepdim=True) + change.abs().amax(1, keepdim=True)
    _require(bool((error.abs() <= largest * 2**-7).all()), f"the change of a group is off by {error.abs().max():.4g}")


def updated(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """An update b a moves the weight along b a, and no farther in the mean, since the outer codes cannot move outwards;
    without `dither` the codes are no farther from Ŵ + b a than the former ones. All else is kept; the same update gives
    the same codes."""
    packed = _quantize(quantizer, weight, hessian)
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(len(weight), 2, generator=generator), torch.randn(2, weight.shape[1], generator=generator)
    b *= 0.1 * (weight.float().norm(dim=1) / (b @ a).norm(dim=1).clamp_min(1e-30))[:, None]  # of the size of each row
    try:
        made = quantizer.updated(packed, b, a)
    except InputError:
        return  # the method is optional
    _fits(made, packed)
    change, former, now = b @ a, *(quantizer.dequantize(each) for each in (packed, made))
    before, after = float(change.norm()), float((now - former - change).norm())
    nearest = after <= before * (1 + 1e-4) + 1e-6 * float((former + change).norm())
    share = float(((now - former) * change).sum() / change.square().sum().clamp_min(1e-30))
    spread = 4 * float(((now - former) * change).norm() / change.square().sum().clamp_min(1e-30))
    _require(
        nearest or weight.numel() < 512 or 0.1 - spread < share < 1.3 + spread,  # the mean of a few is anything
        f"of the update {100 * share:.0f} % is in the updated weight, which is off by {after:.4g} of {before:.4g}",
    )
    again = quantizer.updated(packed, b, a)
    _require(all(torch.equal(made[name], again[name]) for name in made), "the same update gives other codes")


def _fits(made: Packed, packed: Packed) -> None:
    """Whether tensors can stand in place of those of the same names."""
    _require(set(made) <= set(packed), f"tensors {sorted(made)}; the weight has {sorted(packed)}")
    for name, tensor in made.items():
        got, want = (tensor.shape, tensor.dtype), (packed[name].shape, packed[name].dtype)
        _require(got == want, f"{name} is {got}, the weight has {want}")


def round_trip(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """A safetensors file gives the same bits back, and the configuration is JSON that makes the same quantizer."""
    import json

    from safetensors.torch import load_file, save_file

    packed = _quantize(quantizer, weight, hessian)
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: v.contiguous() for k, v in packed.items()}, Path(folder) / "packed.safetensors")
        back = load_file(Path(folder) / "packed.safetensors")
    for name in packed:
        _require(torch.equal(packed[name], back[name]), f"{name} differs after a safetensors round trip")
    spec = json.loads(json.dumps(quantizer.spec()))
    options = {key: value for key, value in spec.items() if key != "name"}
    again = type(quantizer)(**options)
    _require(again == quantizer, f"{quantizer} came back as {again} through its spec {spec}")


def calibration_helps(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """Over sampled problems of this width, the proxy loss is smaller with the Hessian than with the identity."""
    if not quantizer.needs_hessian:
        return
    generator = torch.Generator().manual_seed(0)
    with_data = without = 0.0
    for _ in range(4):
        weight, hessian = _sample(
            (max(64, weight.shape[0]), weight.shape[1]), generator
        )  # with few rows the result is noise
        scale = proxy_loss(weight, torch.zeros_like(weight), hessian)
        informed, blind = quantizer.quantize(weight, hessian), quantizer.quantize(weight, torch.eye(weight.shape[1]))
        with_data += proxy_loss(weight, quantizer.dequantize(informed), hessian) / scale
        without += proxy_loss(weight, quantizer.dequantize(blind), hessian) / scale
    _require(
        with_data <= without + 1e-9, f"mean relative proxy loss {with_data / 4:.6g} with, {without / 4:.6g} without"
    )


def two_sides_help(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """`quantize_two_sided`, where it is there, stores what `layout` says, and tr(G E H Eᵀ) is not larger by more than a
    quarter with it than without, over sampled problems of this width: it is smaller, but for grids so coarse that the
    feedback of rows leaves their range."""
    if not quantizer.rounds_two_sided():
        return
    generator = torch.Generator().manual_seed(0)
    with_rows = without = 0.0
    for _ in range(2):
        weight, hessian = _sample((max(128, weight.shape[0]), weight.shape[1]), generator)
        outputs = _sample((1, len(weight)), generator)[1]
        both = quantizer.quantize_two_sided(weight, hessian, outputs)
        got = {name: (tuple(t.shape), t.dtype) for name, t in both.items()}
        want = {name: (tuple(spec.shape), spec.dtype) for name, spec in quantizer.layout(*weight.shape).items()}
        _require(got == want, f"quantize_two_sided gave {got}, layout says {want}")
        errors = [weight - quantizer.dequantize(packed) for packed in (both, quantizer.quantize(weight, hessian))]
        scale = float(((outputs @ weight @ hessian) * weight).sum())
        losses = [float(((outputs @ error @ hessian) * error).sum()) / scale for error in errors]
        with_rows, without = with_rows + losses[0], without + losses[1]
    _require(
        with_rows <= 1.25 * without, f"mean relative loss {with_rows / 2:.6g} two-sided, {without / 2:.6g} one-sided"
    )


def monotone(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """More bits, no larger proxy loss over a sampled problem of this width (for quantizers that have `bits`)."""
    if not any(field.name == "bits" for field in dataclasses.fields(quantizer)):  # type: ignore[arg-type]
        return
    weight, hessian = _sample((max(64, weight.shape[0]), weight.shape[1]), torch.Generator().manual_seed(0))
    losses = {}
    for bits in (2, 3, 4, 8):
        try:
            finer = dataclasses.replace(quantizer, bits=bits)  # type: ignore[type-var]
        except ValueError:
            continue  # not a width of this quantizer
        losses[bits] = proxy_loss(weight, finer.dequantize(_quantize(finer, weight, hessian)), hessian)
    fine = all(b <= a * 1.001 + 1e-12 for a, b in pairwise(losses.values()))
    _require(fine, f"proxy loss by bits: {losses}")


def degenerate(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> None:
    """A zero matrix comes back as exact zeros; zero rows and constant rows within a matrix as finite numbers."""
    odd = weight.clone()
    odd[0] = 0
    odd[-1] = 0.25
    values = quantizer.dequantize(_quantize(quantizer, odd, hessian))
    _require(bool(torch.isfinite(values).all()), "constant or zero rows give NaN or inf")
    nothing = quantizer.dequantize(_quantize(quantizer, torch.zeros_like(weight), hessian))
    _require(bool((nothing == 0).all()), f"a zero matrix comes back as up to {nothing.abs().max():.3g}")


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        layout,
        rows,
        determinism,
        meta,
        linear,
        trained,
        in_place,
        requantized,
        updated,
        shifted,
        round_trip,
        calibration_helps,
        two_sides_help,
        monotone,
        degenerate,
    )
}
_STATISTICAL = (
    "calibration_helps",
    "two_sides_help",
    "monotone",
    "updated",
)  # hold over ordinary problems, not for every adversarial matrix


def problems(seed: int = 0) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Sampled problems: (what, weight [out, in], hessian [in, in]). Inputs are correlated, as real activations are."""
    generator = torch.Generator().manual_seed(seed)
    for shape in ((16, 64), (24, 96), (7, 33), (3, 8), (40, 172)):
        yield f"{shape[0]}×{shape[1]}", *_sample(shape, generator)
    weight, hessian = _sample((16, 64), generator)
    outlier = weight.clone()
    outlier[3, 5] = 300
    yield "16×64 with an outlier", outlier, hessian
    dead = hessian.clone()
    dead[:, 10:20] = 0
    dead[10:20] = 0
    yield "16×64 with dead columns", weight, dead
    yield "16×64 bfloat16", weight.bfloat16(), hessian


def check(quantizer: Quantizer, seed: int = 0, every: int = 1) -> Iterator[Outcome]:
    """Every law on every sampled problem (or every so many-th, beginning with number `seed`), one outcome each.

    Problems of a shape that the quantizer's `layout` rejects, such as 33 columns for blocks of 32, are skipped; a
    quantizer that rejects every shape breaks the law of the layout.
    """
    supported = False
    for what, weight, hessian in islice(problems(seed), seed % every, None, every):
        try:
            quantizer.layout(*weight.shape)
        except InputError:
            continue
        supported = True
        ordinary = "with" not in what
        for name, law in LAWS.items():
            if name in _STATISTICAL and not ordinary:
                continue
            try:
                law(quantizer, weight, hessian)
                yield Outcome(name, what, "")
            except Exception as error:  # third-party code may raise anything; it becomes the outcome
                text = str(error) if isinstance(error, LawBroken) else f"{type(error).__name__}: {error}"
                yield Outcome(name, what, text)
    if not supported:
        yield Outcome("layout", "every problem", "layout rejects every sampled shape")


def _sample(shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A weight with uneven rows and columns, and the second moment of correlated inputs."""
    out, n = shape
    weight = torch.randn(out, n, generator=generator) * torch.rand(out, 1, generator=generator).add(0.1) * 0.1
    mix = torch.randn(n, n, generator=generator) * torch.rand(n, generator=generator).add(0.05)
    x = torch.randn(4 * n, n, generator=generator) @ mix
    return weight, x.T @ x / x.shape[0]


def _quantize(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> Packed:
    return quantizer.quantize(weight, hessian if quantizer.needs_hessian else None)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise LawBroken(message)
