"""The report of a quantization: what was quantized, how well, and what was not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..nn.linear import QuantizedLinear
from ..nn.lora_init import LoraInit
from ..quant import proxy_loss
from .mixtures import tokens_per_expert
from .reconstruct import BlockLoss
from .targets import NotQuantized, any_index


@dataclass(frozen=True)
class ModuleReport:
    """How one linear was quantized, and how well."""

    path: str
    """Path of the linear."""
    quantizer: dict[str, Any]
    """The quantizer's name and options."""
    shape: tuple[int, int]
    """Shape of the weight, [out, in]."""
    packed_bytes: int
    """Size of all packed tensors, in bytes."""
    bits_per_weight: float
    """Bits stored per weight, scales included."""
    relative_error: float
    """Relative error of the weight, |E| / |W|, Frobenius norms."""
    proxy_loss: float | None
    """Proxy loss tr(E H Eᵀ), E the error of W: the sum of the outputs' mean squared errors; None without
    calibration."""
    relative_proxy_loss: float | None
    """Proxy loss relative to the outputs' power, tr(E H Eᵀ) / tr(W H Wᵀ)."""
    tokens: int | None
    """Number of tokens in H; None without calibration."""
    seconds: float
    """Time for quantizing, in seconds."""


@dataclass
class Report:
    """What was quantized, how well, and what was not."""

    rows: list[ModuleReport] = field(default_factory=list)
    """Quantized linears, in the order of the work."""
    not_quantized: list[NotQuantized] = field(default_factory=list)
    """Weights that stay dense."""
    reconstruction: dict[str, list[BlockLoss]] = field(default_factory=dict)
    """Block → loss before and after each block-wise reconstruction, if there was any."""
    lora_init: dict[str, LoraInit] = field(default_factory=dict)
    """Module → LoRA initialisation, where `adapter_rank` asked for it."""

    @property
    def left(self) -> list[NotQuantized]:
        """`not_quantized`, by the name of earlier versions."""
        return self.not_quantized

    @property
    def taught(self) -> dict[str, list[BlockLoss]]:
        """`reconstruction`, by the name of earlier versions."""
        return self.reconstruction

    @property
    def starts(self) -> dict[str, LoraInit]:
        """`lora_init`, by the name of earlier versions."""
        return self.lora_init

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def packed_bytes(self) -> int:
        return sum(row.packed_bytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.packed_bytes / max(1, self.weights)

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def relative_error(self) -> float:
        """Mean over modules."""
        return sum(row.relative_error for row in self.rows) / max(1, len(self.rows))

    @property
    def relative_proxy_loss(self) -> float | None:
        """Mean over modules; None without calibration."""
        return _mean([row.relative_proxy_loss for row in self.rows])

    def to_json(self) -> dict[str, Any]:
        """The whole report as plain data, ready for `json.dump`."""
        return {
            "modules": [dataclasses.asdict(row) | {"shape": list(row.shape)} for row in self.rows],
            "not_quantized": [each._asdict() | {"shape": list(each.shape)} for each in self.not_quantized],
            "reconstruction": {
                path: [each._asdict() for each in losses] for path, losses in self.reconstruction.items()
            },
            "totals": {
                "modules": len(self.rows),
                "weights": self.weights,
                "packed_bytes": self.packed_bytes,
                "bits_per_weight": self.bits_per_weight,
                "relative_error": self.relative_error,
                "relative_proxy_loss": self.relative_proxy_loss,
                "seconds": self.seconds,
            },
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Report:
        """The report that `to_json` gave, as in the ``llmtools.json`` of a checkpoint, but for the LoRA initialisation.

        Earlier versions wrote other names (`_FORMER_KEYS`). Raises CheckpointError where it is damaged.
        """
        plain = {_FORMER_KEYS.get(key, key): value for key, value in plain.items()}
        try:
            return cls(
                [ModuleReport(**row | {"shape": tuple(row["shape"])}) for row in plain["modules"]],
                [NotQuantized(**each | {"shape": tuple(each["shape"])}) for each in plain["not_quantized"]],
                {path: [BlockLoss(**each) for each in losses] for path, losses in plain["reconstruction"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the report of the quantization is damaged ({error!r})") from error

    def table(self) -> str:
        """The report as text: one line for the modules of the same name and quantizer in all blocks, then the total."""
        kinds: dict[tuple[str, str], list[ModuleReport]] = {}
        for row in self.rows:
            kinds.setdefault((any_index(row.path), _short(row.quantizer)), []).append(row)
        lines: list[tuple[str, ...]] = [
            ("modules", "n", "quantizer", "bits/weight", "weight error", "output error", "seconds")
        ]
        lines += [_line(name, quantizer, Report(rows)) for (name, quantizer), rows in kinds.items()]
        if len(kinds) != 1:
            lines.append(_line("all", "", self))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join(
                text.ljust(width) if column in (0, 2) else text.rjust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        if experts := tokens_per_expert([(row.path, row.tokens, row.shape[1]) for row in self.rows]):
            shown.append(experts)
        reasons: dict[tuple[str, str], int] = {}
        for each in self.not_quantized:
            key = (any_index(each.path), each.reason)
            reasons[key] = reasons.get(key, 0) + 1
        shown += [f"not quantized: {path} ({count}): {reason}" for (path, reason), count in reasons.items()]
        if losses := [loss for losses in self.reconstruction.values() for loss in losses]:
            before, after = (sum(errors) / len(losses) for errors in zip(*losses, strict=True))
            shown.append(f"{len(losses)} block reconstructions: mean output error from {before:.4f} to {after:.4f}")
        return "\n".join(shown)


_FORMER_KEYS = {"left": "not_quantized", "taught": "reconstruction"}
"""Keys of a report in files of earlier versions → today's."""


def _line(name: str, quantizer: str, report: Report) -> tuple[str, ...]:
    loss = report.relative_proxy_loss
    return (
        name,
        str(len(report.rows)),
        quantizer,
        f"{report.bits_per_weight:.2f}",
        f"{report.relative_error:.4f}",
        "-" if loss is None else f"{loss:.5f}",
        f"{report.seconds:.1f}",
    )


def _short(spec: Mapping[str, Any]) -> str:
    width = f" {spec['bits']}-bit" if "bits" in spec else ""
    group = spec.get("group_size")
    return f"{spec['name']}{width}" + (f" g{group}" if isinstance(group, int) and group > 0 else "")


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def module_report(
    path: str, packed: QuantizedLinear, weight: Tensor, hessian: Tensor | None, tokens: int, seconds: float
) -> ModuleReport:
    """The report of one linear: weight [out, in] before, hessian [in, in] over that many tokens, if there is one."""
    approx = packed.dequantize(dtype=torch.float32)
    size = sum(tensor.numel() * tensor.element_size() for tensor in packed.packed.values())
    loss = None if hessian is None else proxy_loss(weight, approx, hessian)
    signal = None if hessian is None else proxy_loss(weight, torch.zeros_like(weight), hessian)
    return ModuleReport(
        path=path,
        quantizer=packed.quantizer.spec(),
        shape=(packed.out_features, packed.in_features),
        packed_bytes=size,
        bits_per_weight=8 * size / weight.numel(),
        relative_error=_ratio(float((approx - weight).norm()), float(weight.norm())),
        proxy_loss=loss,
        relative_proxy_loss=None if loss is None or signal is None else _ratio(loss, signal),
        tokens=tokens if hessian is not None else None,
        seconds=seconds,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
