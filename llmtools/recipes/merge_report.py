"""What a merged model keeps of its adapter: base, base with adapter and merged model, on held-out text or on a task."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError

if TYPE_CHECKING:
    from .merge import Merge


@dataclass(frozen=True)
class Comparison:
    """Base, adapter (base with adapter) and merged model."""

    measure: str
    """What was measured: perplexity, or the task's main metric."""
    values: dict[str, float]
    """Its values of base, adapter and merged."""
    recovered: float | None
    """Share of the adapter's gain that the merged model keeps, of perplexity in its logarithm; None without gain."""
    kl: float | None = None
    """KL divergence of the merged model from base with adapter, in nats per token; None on a task."""

    def __str__(self) -> str:
        found = ", ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        kl = "" if self.kl is None else f"; KL from base with adapter {self.kl:.4f} nats per token"
        share = "" if self.recovered is None else f"\nrecovered share of the adapter's gain: {self.recovered:.2f}"
        return f"{self.measure} on held-out data: {found}{kl}{share}"


class Comparing(Protocol):
    """Measures a PEFT model, before it is merged, and what was made of it."""

    def before(self, model: Any, tokenizer: Any) -> None: ...

    def after(self, model: Any) -> Comparison: ...


def comparing(recipe: Merge, folder: Path) -> Comparing | None:
    """What measures by the recipe; None without data. folder: for temporary files.

    Raises InputError for a task, options or data that cannot be, `before` for too little text.
    """
    if recipe.data is None:
        return None
    return OnText(recipe, folder) if recipe.task is None else OnTask(recipe)


class OnText:
    """Perplexity in windows of `max_length` tokens, and the divergence from base with adapter."""

    def __init__(self, recipe: Merge, folder: Path) -> None:
        from ..data.calibration import HUB
        from ..data.text_io import existing_file

        assert recipe.data is not None
        if recipe.data not in HUB:
            existing_file(recipe.data)
        self.data, self.context, self.windows, self.folder = recipe.data, recipe.max_length, recipe.windows, folder
        self.nll: dict[str, float] = {}

    def before(self, model: Any, tokenizer: Any) -> None:
        from ..data.calibration import text_ids
        from ..model.recover import Targets
        from ..progress import progress

        ids = text_ids(self.data, tokenizer)
        if ids.shape[1] < self.context:
            raise InputError(f"{self.data} has {ids.shape[1]} tokens, fewer than one window of {self.context}")
        self.ids = ids[:, : min(self.windows, ids.shape[1] // self.context) * self.context]
        with model.disable_adapter():
            self.nll["base"] = self._nll(model)
        self.nll["adapter"] = self._nll(model)
        with progress("base with adapter", unit="windows") as step:
            self.targets = Targets.of(model, self._texts(), self.folder, 64, on_step=step)

    def after(self, model: Any) -> Comparison:
        from ..model.recover import mean_kl_divergence

        self.nll["merged"] = self._nll(model)
        kl = mean_kl_divergence(model, self._texts(), self.targets)
        recovered = share({name: -value for name, value in self.nll.items()})
        return Comparison("perplexity", {name: math.exp(value) for name, value in self.nll.items()}, recovered, kl)

    def _nll(self, model: Any) -> float:
        from ..data.metrics import perplexity

        return perplexity(model, self.ids, context=self.context).nll

    def _texts(self) -> Any:
        return self.ids.split(self.context, dim=1)


class OnTask:
    """The main metric of a task on its held-out examples."""

    def __init__(self, recipe: Merge) -> None:
        from .evaluate import Evaluate, evaluator_of

        self.evaluator = evaluator_of(
            Evaluate(
                adapter=recipe.adapter,
                task=str(recipe.task),
                data=recipe.data,
                num_samples=recipe.examples,
                batch_size=recipe.batch_size,
                options=recipe.options,
            )
        )
        self.values: dict[str, float] = {}

    def before(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        with model.disable_adapter():
            self._measure("base", model)
        self._measure("adapter", model)

    def after(self, model: Any) -> Comparison:
        measure = self._measure("merged", model)
        falling = "perplexity" in measure  # the less the better
        return Comparison(
            measure, self.values, share({name: -math.log(v) if falling else v for name, v in self.values.items()})
        )

    def _measure(self, name: str, model: Any) -> str:
        details = self.evaluator(model.eval(), self.tokenizer)
        measure = next(iter(details))
        self.values[name] = float(details[measure])
        return measure


def share(scores: dict[str, float]) -> float | None:
    """Share of the adapter's gain over the base that the merged model keeps; scores are the better the higher."""
    gain = scores["adapter"] - scores["base"]
    return (scores["merged"] - scores["base"]) / gain if gain > 0 else None
