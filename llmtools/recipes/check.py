"""Check that a quantizer conforms to the laws (`quant.laws`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class Check:
    """Run the conformance checks (laws) of a quantizer on random weights: layout, determinism, gradients, …"""

    quantizer: str
    """Name of a quantizer, or module:Class of your own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the quantizer, such as --options.bits 3."""
    seed: int = 0
    """Seed of the random weights."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of one law on all problems."""

    law: str
    """Name of the law."""
    statement: str
    """Statement of the law."""
    problems: int
    """Number of problems that it was checked on."""
    errors: dict[str, str]
    """Problem → error, of the problems where the law is broken."""

    def __str__(self) -> str:
        if not self.errors:
            return f"ok    {self.law:<18} {self.statement}"
        problem, error = next(iter(self.errors.items()))
        return f"FAIL  {self.law:<18} {problem}: {error} ({len(self.errors)} of {self.problems} problems)"


@dataclass(frozen=True)
class CheckResult:
    """Outcomes of all laws."""

    quantizer: dict[str, Any]
    """Specification of the quantizer: its name and options."""
    passed: bool
    """Whether every law holds on every problem."""
    verdicts: list[Verdict]
    """Outcome of each law."""

    def __str__(self) -> str:
        failed = sum(bool(verdict.errors) for verdict in self.verdicts)
        end = f"{failed} of {len(self.verdicts)} laws broken" if failed else f"all {len(self.verdicts)} laws hold"
        return "\n".join([*map(str, self.verdicts), f"{self.quantizer}: {end}"])

    @property
    def exit_code(self) -> int:
        return 0 if self.passed else 1


def check(recipe: Check) -> CheckResult:
    """Runs every law on every problem. Raises InputError where the options do not fit the quantizer."""
    from ..checkpoint.loading import with_current_folder
    from ..progress import progress
    from ..quant import quantizer
    from ..quant.laws import LAWS, problems
    from ..quant.laws import check as outcomes

    if ":" in recipe.quantizer:
        with_current_folder()
    try:
        candidate = quantizer(recipe.quantizer, **recipe.options)
    except TypeError as error:
        raise InputError(
            f"{recipe.quantizer} cannot be created with {recipe.options or 'no options'} ({error}); a quantizer is a "
            f"frozen dataclass with layout, quantize and dequantize"
        ) from error
    counts = dict.fromkeys(LAWS, 0)
    errors: dict[str, dict[str, str]] = {law: {} for law in LAWS}
    total = len(LAWS) * sum(1 for _ in problems(recipe.seed))
    with progress(f"check {recipe.quantizer}", unit="checks") as step:
        for done, outcome in enumerate(outcomes(candidate, recipe.seed), start=1):
            counts[outcome.law] += 1
            if outcome.error:
                errors[outcome.law][outcome.problem] = " ".join(outcome.error.split())
            step(done, max(total, done), outcome.law)
    verdicts = [Verdict(law, _statement(LAWS[law]), counts[law], errors[law]) for law in LAWS]
    return CheckResult(candidate.spec(), not any(verdict.errors for verdict in verdicts), verdicts)


def _statement(law: Any) -> str:
    return (law.__doc__ or "").strip().splitlines()[0] if law.__doc__ else ""
