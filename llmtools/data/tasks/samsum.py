"""SAMSum: summaries of chats (Gliwa et al. 2019, arXiv:1911.12237), in ModuLoRA's prompt template (arXiv:2309.16119).

Chat and summary are stripped of white space at their ends, as in the published script. The space before the summary
belongs to the completion, not to the prompt: most tokenizers encode it in one token with the word that follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..metrics import rouge
from ..text_io import Row
from .base import Template, tasks
from .dataset_task import DataTask, stripped


@tasks.register("samsum")
@dataclass(frozen=True)
class Samsum(DataTask):
    """Summaries of everyday chats, scored by ROUGE-1, 2, L and Lsum."""

    source_tokens: int | None = 255
    """Maximum number of tokens of a prompt; the end of a longer chat is truncated."""
    max_new_tokens: int = 50
    """Maximum number of tokens of a summary."""

    hub: ClassVar[str] = "knkarthick/samsum"
    template: ClassVar[Template] = Template("### Summarize this: {dialogue}\n ### Output:", " {summary}")
    shorten: ClassVar[tuple[str, ...]] = ("dialogue",)

    def row(self, record: Row, where: str = "row") -> Row:
        return super().row(stripped(record, "dialogue", "summary"), where)

    def score(self, outputs: list[str], rows: list[Row]) -> dict[str, float]:
        return rouge(outputs, [str(row["summary"]) for row in rows])
