"""Instructions with answers, in Stanford Alpaca's prompt template.

Source: Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca. There are two templates, for instructions with an input
and without. The answer follows "### Response:" directly, as in Stanford's training script.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..metrics import rouge
from ..text_io import Row
from .base import Template, tasks
from .dataset_task import DataTask, Split

ALONE = Template(
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
    "{output}",
)
WITH_INPUT = Template(
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "{output}",
)


@tasks.register("alpaca")
@dataclass(frozen=True)
class Alpaca(DataTask):
    """Stanford Alpaca's 52 thousand instructions; answers are scored by ROUGE. (Papers report its models on bbh.)"""

    max_new_tokens: int = 256
    """Maximum number of tokens of an answer."""

    hub: ClassVar[str] = "tatsu-lab/alpaca"
    template: ClassVar[Template] = ALONE
    splits: ClassVar[dict[str, Split]] = {"train": Split("*alpaca*", "train")}

    shorten: ClassVar[tuple[str, ...]] = ("input",)

    def row(self, record: Row, where: str = "row") -> Row:
        given = record.get("with_input", bool(str(record.get("input") or "").strip()))  # even if shortened to nothing
        return {**record, "with_input": given, **(WITH_INPUT if given else ALONE).fill(record, where)}

    def score(self, outputs: list[str], rows: list[Row]) -> dict[str, float]:
        return rouge(outputs, [str(row["output"]) for row in rows])


@tasks.register("code_alpaca")
@dataclass(frozen=True)
class CodeAlpaca(Alpaca):
    """Code Alpaca's instructions to write or fix code, in the same prompt template (Chaudhary 2023)."""

    hub: ClassVar[str] = "sahil2801/CodeAlpaca-20k"
