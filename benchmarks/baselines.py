"""Other libraries' quantizers, each run as its users run it, on the same model and the same calibration text as ours.

A baseline returns the model with the weights that it stored, dequantized by its own code to float32, and the bits that
it stores for a weight: codes, scales, zero points and, where there is one, the order of the columns. So all rows of a
table are computed in one arithmetic, and only the weights differ. A baseline that is not installed, or that cannot take
a model's shapes, raises an error, which the caller records.

Known to work together on a CPU: GPTQModel 7.7, auto-round 0.16, HQQ 0.2.8, bitsandbytes 0.50.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import llmtools
from llmtools.model.allocation import choose_bits
from llmtools.model.options import NO_RECOVERY, BlockTuning, Recovery
from llmtools.recipes.recover import recovering

PACKAGES = {"GPTQModel": "gptqmodel", "auto-round": "auto-round", "HQQ": "hqq", "bitsandbytes": "bitsandbytes"}


class Made(NamedTuple):
    """A quantized model, ready to be measured."""

    model: nn.Module
    bits_per_weight: float
    """all that is stored for the linears, by the number of their weights"""


class Source(NamedTuple):
    """Inputs of every quantizer in one table."""

    folder: Path
    """the model"""
    calibration: list[Tensor]
    """token ids [1, t] each"""
    dtype: torch.dtype | str = torch.float32
    """to load the model in: a torch dtype, or "auto" for that of its files"""

    def model(self) -> nn.Module:
        """The model, fresh from the files."""
        from transformers import AutoModelForCausalLM

        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
        return loaded.eval()

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)


class Case(NamedTuple):
    """One row to be: who quantizes, how, and the call that does it."""

    by: str
    """llmtools, or the name of the other library"""
    method: str
    bits: int
    group_size: int | None
    options: dict[str, Any]
    make: Callable[[Source], Made]

    @property
    def label(self) -> str:
        group = f" g{self.group_size}" if self.group_size else ""
        group = " rows" if self.group_size == -1 else group
        return f"{self.by} {self.method} {self.bits}-bit{group}{shown(self.options)}"


def shown(options: dict[str, Any]) -> str:
    """Options as the end of a label: ``, passes 10, act_order, no clip``."""
    formats = {True: "{}", False: "no {}"}
    return "".join(", " + (formats[v].format(k) if isinstance(v, bool) else f"{k} {v}") for k, v in options.items())


def installed() -> dict[str, str]:
    """Name and version of each installed baseline."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cases(bits: int, group_size: int, iterations: int) -> Iterator[Case]:
    """Every baseline's rows at this width: its defaults where they are best, and each option that may be better."""
    for options in (
        {"mse": 2.4, "damp_percent": 0.01, "act_group_aware": False},  # the settings of our `optq`
        {"mse": 2.4, "act_group_aware": True},  # its default order of columns, with clip search
        {"mse": 2.4, "desc_act": True},
        {"mse": 2.4, "act_group_aware": True, "gptaq": 0.25},  # GPTAQ, arXiv:2504.02692
    ):
        yield _case("GPTQModel", "gptq", bits, group_size, options, _gptqmodel)
    if bits == 4:
        yield _case("GPTQModel", "awq", bits, group_size, {}, _gptqmodel)
    yield _case("auto-round", "signround", bits, group_size, {"iters": iterations}, _auto_round)
    yield _case("auto-round", "signround", bits, group_size, {"iters": iterations, "enable_neuqi": True}, _auto_round)
    for axis in (1, 0):
        yield _case("HQQ", "hqq", bits, group_size, {"axis": axis}, _hqq)
    if bits == 4:
        for nested in (False, True):
            yield _case("bitsandbytes", "nf4", bits, 64, {"compress_statistics": nested}, _bitsandbytes)


def _case(
    by: str,
    method: str,
    bits: int,
    group_size: int,
    options: dict[str, Any],
    make: Callable[[Source, str, int, int, dict[str, Any]], Made],
) -> Case:
    return Case(by, method, bits, group_size, options, lambda source: make(source, method, bits, group_size, options))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that are quantized, by everyone: those of the blocks, not the head."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in path
    }


def _weights(model: nn.Module) -> int:
    return sum(linear.weight.numel() for linear in linears(model).values())


# ---------------------------------------------------------------------------------------------------------------------
# GPTQModel: quantized, saved, and read again by its own reader, since the model in memory is not fit to be run


def _gptqmodel(source: Source, method: str, bits: int, group_size: int, options: dict[str, Any]) -> Made:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own count fails on small machines
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    for path, linear in linears(source.model()).items():  # what it does not take ends the program, from a thread
        if linear.in_features % 32 or linear.out_features % 32:
            raise ValueError(f"{path}: sizes must be multiples of 32")
        if method == "awq" and linear.in_features % group_size:
            raise ValueError(f"{path}: awq takes no short groups")
    options = dict(options)
    if "gptaq" in options:
        options["gptaq"] = GPTAQConfig(alpha=options["gptaq"])
    config = QuantizeConfig(
        bits=bits, group_size=group_size, sym=False, quant_method=method, offload_to_disk=False, **options
    )
    text = [{"input_ids": ids[0].tolist(), "attention_mask": [1] * ids.shape[1]} for ids in source.calibration]
    dtype = torch.float16 if method == "awq" else source.dtype  # awq packs nothing wider, and ends the program
    worker = GPTQModel.load(str(source.folder), config, device="cpu", dtype=dtype)
    worker.quantize(text, batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        worker.save(folder)
        return _read_gptqmodel(source, Path(folder), ordered=bool(options.get("desc_act")))


def _read_gptqmodel(source: Source, folder: Path, ordered: bool) -> Made:
    from gptqmodel import BACKEND, GPTQModel
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    model = source.model()
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in stored.items():  # what a method changes beside the linears, such as AWQ the norms
            if name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)
    quantized = {name.rpartition(".")[0] for name in stored if name.endswith(".qweight")}
    awq = not any(name.endswith(".g_idx") for name in stored)
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    reader = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model
    for path in quantized:
        layer, weight = reader.get_submodule(path), model.get_submodule(path).weight
        with torch.no_grad():
            if awq:  # reads the weight as what it makes of the unit vectors
                unit = torch.eye(weight.shape[1], dtype=torch.float16)
                weight.copy_(layer(unit).T.float())
            else:
                layer.scales = layer.scales.float()
                weight.copy_(layer.dequantize_weight().T)
    parts = ("qweight", "qzeros", "scales", *(("g_idx",) if ordered else ()))
    size = sum(tensor.nbytes for name, tensor in stored.items() if name.rpartition(".")[2] in parts)
    return Made(model, 8 * size / _weights(model))


# ---------------------------------------------------------------------------------------------------------------------
# auto-round


def _auto_round(source: Source, method: str, bits: int, group_size: int, options: dict[str, Any]) -> Made:
    from auto_round import AutoRound

    model = source.model()
    for path, linear in linears(model).items():
        if linear.in_features % 32 or linear.out_features % 32:
            raise ValueError(f"{path}: sizes must be multiples of 32; others are left as they are")
    rows = torch.cat(source.calibration)
    text = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(8)]
    worker = AutoRound(
        model,
        source.tokenizer(),
        scheme=f"W{bits}A16",
        group_size=group_size,
        sym=False,
        dataset=text,
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=8,
        device_map="cpu",
        amp=source.dtype != torch.float32,
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
        **options,
    )
    done, _ = worker.quantize()
    fresh = source.model()
    stored = 0.0
    with torch.no_grad():
        for path, linear in linears(fresh).items():
            linear.weight.copy_(done.get_submodule(path).weight.float())
            groups = -(-linear.in_features // group_size)
            stored += bits * linear.weight.numel() + (16 + bits) * groups * linear.out_features  # packed as GPTQ's
    return Made(fresh, stored / _weights(fresh))


# ---------------------------------------------------------------------------------------------------------------------
# HQQ and bitsandbytes: no data, one linear after the other


def _hqq(source: Source, method: str, bits: int, group_size: int, options: dict[str, Any]) -> Made:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, **options)
    model = source.model()
    stored = 0.0
    for linear in linears(model).values():
        count = linear.weight.numel()
        layer = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        with torch.no_grad():
            linear.weight.copy_(layer.dequantize().float())
        stored += bits * count + 16 * (layer.meta["scale"].numel() + layer.meta["zero"].numel())
    return Made(model, stored / _weights(model))


def _bitsandbytes(source: Source, method: str, bits: int, group_size: int, options: dict[str, Any]) -> Made:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = source.model()
    size = 0
    for linear in linears(model).values():
        packed, state = quantize_4bit(linear.weight.data, blocksize=group_size, quant_type=method, **options)
        with torch.no_grad():
            linear.weight.copy_(dequantize_4bit(packed, state))
        size += packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return Made(model, 8 * size / _weights(model))


# ---------------------------------------------------------------------------------------------------------------------
# Ours, through the same door


def ours(
    name: str,
    options: dict[str, Any],
    tuning: BlockTuning | None = None,
    recovery: Recovery = NO_RECOVERY,
    error_propagation: float = 0.0,
    bits_per_weight: float | None = None,
    rounding: str = "one_sided",
) -> Case:
    """Our quantizer `name` with these options; those it does not have are left out.

    bits_per_weight: widths are chosen for each linear, within these stored bits.
    """
    factory = llmtools.quantizers.get(name)
    known = {field.name for field in dataclasses.fields(factory)}  # type: ignore[arg-type]
    options = {key: value for key, value in options.items() if key in known}

    def make(source: Source) -> Made:
        model = source.model()
        text = source.calibration if factory.needs_hessian or tuning is not None or error_propagation else None
        overrides = {}
        if bits_per_weight is not None:
            overrides = choose_bits(model, factory(**options), source.calibration, bits_per_weight).overrides
        with recovering(model, source.calibration, recovery, seed=0) as recover:
            report = llmtools.quantize(
                model, name, text, tuning=tuning, error_propagation=error_propagation, overrides=overrides,
                rounding=rounding, **options,
            )  # fmt: skip
            recover({})
        return Made(model, report.bits_per_weight)

    shown = {key: value for key, value in options.items() if key not in ("bits", "group_size")}
    if tuning is not None:
        shown["tuned"] = True
    if bits_per_weight is not None:
        shown["bits_per_weight"] = bits_per_weight
    if error_propagation:
        shown["error_propagation"] = error_propagation
    if rounding != "one_sided":
        shown["rounding"] = rounding
    if recovery.steps:
        shown["recovered"] = True
    return Case("llmtools", name, options.get("bits", 4), options.get("group_size"), shown, make)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what a baseline prints, to either stream, from native code too."""
    import sys

    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        for descriptor, saved in enumerate(kept, 1):
            os.dup2(saved, descriptor)
            os.close(saved)
