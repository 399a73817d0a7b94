"""MultiNLI: does a premise entail a hypothesis, contradict it, or neither? (Williams et al. 2018, arXiv:1704.05426)

`mnli_genre` asks for the genre of a snippet instead, the text classification of ModuLoRA's paper (table 1).

The prompt template is that of ModuLoRA's scripts (arXiv:2309.16119), which strip premise, hypothesis and genre of white
space and write the label as a digit: `digits`. Answers are scored twice: by the label with the largest likelihood, and
by the generated text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import InputError
from ..generation import choose
from ..metrics import OnStep
from ..text_io import Row
from .base import Template, answer, tasks
from .dataset_task import DataTask, Split, stripped

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

GENRES = ("fiction", "government", "slate", "telephone", "travel")
LABELS = ("entailment", "neutral", "contradiction")
WITHOUT_GENRE = Template("### Premise: {premise}\n ### Hypothesis: {hypothesis}\n ### Label:", " {answer}")


@tasks.register("mnli")
@dataclass(frozen=True)
class Mnli(DataTask):
    """Entailment, neutral or contradiction: accuracy by likelihood and by generation, recall of each label."""

    source_tokens: int | None = 64
    """Maximum number of tokens of a prompt; in longer ones the end of the premise is truncated, then the hypothesis."""
    max_new_tokens: int = 4
    """Maximum number of tokens of a label."""
    digits: bool = False
    """Whether labels are written as 0, 1 and 2 (entailment, neutral, contradiction), as in the published scripts."""

    labels: ClassVar[tuple[str, ...]] = LABELS
    """Names of the classes; the index of a name is its digit."""
    hub: ClassVar[str] = "nyu-mll/multi_nli"
    template: ClassVar[Template] = Template(
        "### Premise: {premise}\n ### Hypothesis: {hypothesis}\n ### Genre: {genre} ### Label:", " {answer}"
    )
    splits: ClassVar[dict[str, Split]] = {
        "train": Split("*train*", "train"),
        "test": Split("*_matched*", "validation_matched"),
    }
    shorten: ClassVar[tuple[str, ...]] = ("premise", "hypothesis")

    def records(self, split: str) -> list[Row]:
        return [record for record in super().records(split) if record.get("label") not in (-1, "-")]  # no gold label

    def row(self, record: Row, where: str = "row") -> Row:
        label = record.get("label")
        if isinstance(label, int) and 0 <= label < len(LABELS):
            label = LABELS[label]
        if label not in LABELS:
            raise InputError(f"{where}: the label is {label!r}; {', '.join(LABELS)} (or 0, 1, 2) are expected")
        record = stripped({**record, "label": label, "answer": self._answer(label)}, "premise", "hypothesis", "genre")
        template = self.template if record.get("genre") else WITHOUT_GENRE
        return {**record, **template.fill(record, where)}

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int | None = None,
        batch_size: int = 1,
        on_step: OnStep | None = None,
    ) -> dict[str, Any]:
        rows, shortened = self.test_rows(model, tokenizer, limit)

        def halves(first: int) -> OnStep | None:
            return on_step and (lambda done, total: on_step(first + done, 2 * total))

        choices = [" " + self._answer(label) for label in self.labels]
        chosen = choose(
            model, tokenizer, [row["prompt"] for row in rows], choices, batch_size=batch_size, on_step=halves(0)
        )
        generated = super().evaluate(model, tokenizer, limit=limit, batch_size=batch_size, on_step=halves(len(rows)))
        likely = self.score([choices[index] for index in chosen], rows)
        return {
            **likely,
            "accuracy_generated": generated["accuracy"],
            **{f"{key}_generated": value for key, value in generated.items() if key.startswith("recall_")},
            **self.counts(rows, shortened),
        }

    def score(self, outputs: list[str], rows: list[Row]) -> dict[str, float]:
        """Accuracy, and the recall of each label."""
        predicted = [(output.split() or [""])[0].strip(".,").lower() for output in outputs]
        hits = [label == answer(row).strip() for label, row in zip(predicted, rows, strict=True)]
        scores = {"accuracy": sum(hits) / len(hits)}
        for label in self.labels:
            of_label = [hit for hit, row in zip(hits, rows, strict=True) if row["label"] == label]
            if of_label:
                scores[f"recall_{label}"] = sum(of_label) / len(of_label)
        return scores

    def _answer(self, label: str) -> str:
        return str(self.labels.index(label)) if self.digits else label


@tasks.register("mnli_genre")
@dataclass(frozen=True)
class MnliGenre(Mnli):
    """The genre of a snippet of MultiNLI's (a pair's premise): accuracy by likelihood and by generation.

    The five genres of the training set, which are those of dev-matched. The prompt template is ours: the paper prints
    none for this task. Rows without a genre are left out.
    """

    digits: bool = False
    """Whether genres are written as 0 … 4 (fiction, government, slate, telephone, travel)."""

    labels: ClassVar[tuple[str, ...]] = GENRES
    template: ClassVar[Template] = Template("### Text: {premise}\n ### Genre:", " {answer}")
    shorten: ClassVar[tuple[str, ...]] = ("premise",)

    def records(self, split: str) -> list[Row]:
        """The records with a genre; a premise occurs in three pairs, and is taken once."""
        records = DataTask.records(self, split)
        first: dict[Any, Row] = {}
        for record in records:
            if record.get("genre"):
                first.setdefault(record.get("premise"), record)
        return list(first.values())

    def row(self, record: Row, where: str = "row") -> Row:
        genre = record.get("genre")
        if genre not in GENRES:
            raise InputError(f"{where}: the genre is {genre!r}; {', '.join(GENRES)} are expected")
        record = stripped({**record, "label": genre, "answer": self._answer(genre)}, "premise")
        return {**record, **self.template.fill(record, where)}
