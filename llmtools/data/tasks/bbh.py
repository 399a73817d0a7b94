"""BIG-Bench-Hard: 27 tasks on which models were behind human raters (Suzgun et al. 2022, arXiv:2210.09261).

Three published few-shot prompts, each with three examples before the question:

    bbh         the first three examples of a task, "… Answer: …"; the others are evaluated: InstructEval
                (arXiv:2306.04757), with which ModuLoRA (arXiv:2309.16119) evaluates its instruction-tuned models
    bbh_direct  the authors' three examples with their answers alone
    bbh_cot     the authors' three examples with the reasoning that leads to the answer (chain of thought)

The last two read the authors' prompt files; the first needs the examples alone, which are on the hub, too. The measures
are exact match as the mean over tasks (the published average), over all examples, and of each task; `prefix_match` is
InstructEval's more lenient rule: the output begins with the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError, did_you_mean
from ...files import read_json
from ..text_io import Row, enumerate_rows
from .base import Task, tasks
from .dataset_task import hub_configs, hub_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOTS = 3
"""Number of few-shot examples."""


@tasks.register("bbh")
@dataclass(frozen=True)
class Bbh(Task):
    """BIG-Bench-Hard with three answered examples of the set (InstructEval): exact match, a task at a time."""

    data: str
    """Folder with bbh.jsonl (task, input, target; .gz, .xz too) or bbh/*.json, and cot-prompts/*.txt: a checkout of
    github.com/suzgunmirac/BIG-Bench-Hard; for bbh, which needs no prompts, also bbh: lukaemon/bbh from the hub."""
    only: str | None = None
    """Names of the tasks to evaluate, such as boolean_expressions,snarks; all by default."""
    max_new_tokens: int = 32
    """Maximum number of tokens of an answer; 32 is the published setting, though some answers (of word_sorting) are
    longer."""

    hub: ClassVar[str | None] = "lukaemon/bbh"
    """Name of the data set on the hub; None for none."""
    stop: ClassVar[tuple[str, ...]] = ("\n\n",)
    given: ClassVar[int] = SHOTS
    """Number of each task's first examples that serve as few-shot examples, and are not evaluated."""

    def test(self) -> list[Row]:
        rows = []
        for task, examples in self._examples().items():
            shots = self.shots(task, examples[: self.given])
            for example in examples[self.given :]:
                row = {**example, "shots": shots, "completion": f" {example['target']}"}
                rows.append({**row, "prompt": self.prompt(row)})
        return rows

    def shots(self, task: str, examples: list[Row]) -> list[str]:
        """The few-shot examples before the question, each with the blank line after it."""
        return [f"{example['input']}\nAnswer: {example['target']}\n\n" for example in examples]

    def prompt(self, row: Row) -> str:
        return "".join(row["shots"]) + f"{row['input']}\nAnswer:"

    def answer_in(self, output: str) -> str:
        """The answer in an output: its first line."""
        return output.strip().partition("\n")[0].strip()

    def score(self, outputs: list[str], rows: list[Row]) -> dict[str, float]:
        hits: dict[str, list[bool]] = {}
        prefixes = []
        for output, row in zip(outputs, rows, strict=True):
            hits.setdefault(row["task"], []).append(self.answer_in(output) == row["target"].strip())
            prefixes.append(self.answer_in(output).startswith(row["target"].strip()))
        per_task = {f"exact_match/{task}": sum(each) / len(each) for task, each in hits.items()}
        return {
            "exact_match": sum(per_task.values()) / len(per_task),
            "exact_match_examples": sum(map(sum, hits.values())) / len(rows),
            "prefix_match": sum(prefixes) / len(rows),
            **per_task,
        }

    def fitted(self, row: Row, tokenizer: PreTrainedTokenizerBase, room: int | None = None) -> Row:
        """The row with fewer few-shot examples where the prompt has more than `room` tokens (as in InstructEval)."""
        while room is not None and len(tokenizer(row["prompt"], verbose=False)["input_ids"]) > room:
            if not row["shots"]:
                raise InputError(
                    f"task {row['task']!r}: a question alone has more tokens than the model's positions leave for it "
                    f"({room}); name the tasks that fit with --options.only, or take a model with more positions"
                )
            row = {**row, "shots": row["shots"][:-1]}
            row["prompt"] = self.prompt(row)
        return row

    def _examples(self) -> dict[str, list[Row]]:
        """Each task's examples, {task, input, target}, in the order of the files."""
        if self.hub is not None and self.data in (self.name, self.hub) and not Path(self.data).is_dir():
            selected = self._selected(hub_configs(self.hub))
            return {task: [{"task": task, **row} for row in hub_rows(self.hub, "test", task)] for task in selected}
        folder = self._folder()
        found: dict[str, list[Row]] = {}
        for file in sorted(folder.glob("bbh.jsonl*")):
            for number, row in enumerate_rows(file):
                found.setdefault(_checked(row, f"{file}:{number}")["task"], []).append(row)
        for file in sorted((folder / "bbh").glob("*.json")):
            examples = read_json(file).get("examples")
            if not isinstance(examples, list) or not all(isinstance(example, dict) for example in examples):
                raise InputError(f'{file}: "examples" is expected, a list of {{"input": …, "target": …}}')
            rows = [{"task": file.stem, **example} for example in examples]
            found[file.stem] = [_checked(row, f"{file}, example {at}") for at, row in enumerate(rows, start=1)]
        if not found:
            raise InputError(f"{folder} holds neither bbh.jsonl (or .gz, .xz of it) nor bbh/*.json")
        return {task: found[task] for task in self._selected(found)}

    def _selected(self, known: Iterable[str]) -> list[str]:
        """The names of the tasks to evaluate: all of the data's, or those in `only`."""
        known = list(known)
        if self.only is None:
            return known
        names = [name.strip() for name in self.only.split(",")]
        for name in names:
            if name not in known:
                raise InputError(f"bbh has no task {name!r}; {did_you_mean(name, known)}")
        return names

    def _folder(self) -> Path:
        folder = Path(self.data).expanduser()
        if not folder.is_dir():
            hub = "the authors' prompts are not on the hub" if self.hub is None else f"or --data {self.name} (the hub)"
            raise InputError(
                f"there is no folder {folder}; git clone https://github.com/suzgunmirac/BIG-Bench-Hard ({hub})"
            )
        return folder


def _checked(row: Row, where: str) -> Row:
    for key in ("task", "input", "target"):
        if not isinstance(row.get(key), str):
            raise InputError(f'{where}: "task", "input" and "target" are expected as strings; {key!r} is not there')
    return row


@tasks.register("bbh_cot")
@dataclass(frozen=True)
class BbhCot(Bbh):
    """BIG-Bench-Hard with the authors' chain-of-thought prompts: exact match of what follows "the answer is"."""

    max_new_tokens: int = 512
    """Maximum number of tokens of the reasoning and the answer."""

    hub: ClassVar[str | None] = None  # which has no copy of the authors' prompts
    stop: ClassVar[tuple[str, ...]] = ("\n\nQ:",)
    given: ClassVar[int] = 0
    opening: ClassVar[str] = "A: Let's think step by step."
    """Text after the question, with which the answer begins."""

    def shots(self, task: str, examples: list[Row]) -> list[str]:
        """The examples in the authors' file, the first with the description of the task before it."""
        file = self._folder() / "cot-prompts" / f"{task}.txt"
        if not file.exists():
            raise InputError(f"there is no {file}, the authors' examples for the task")
        return examples_of(file.read_bytes().decode("utf-8"))

    def prompt(self, row: Row) -> str:
        return "".join(f"{shot}\n\n" for shot in row["shots"]) + f"Q: {row['input']}\n{self.opening}"

    def answer_in(self, output: str) -> str:
        found = re.findall(r"the answer is (.*?)\.?(?:\n|$)", output)
        return str(found[-1]).strip() if found else ""


@tasks.register("bbh_direct")
@dataclass(frozen=True)
class BbhDirect(BbhCot):
    """BIG-Bench-Hard with the authors' three examples, answers alone: exact match."""

    max_new_tokens: int = 128
    """Maximum number of tokens of an answer."""

    opening: ClassVar[str] = "A:"

    def shots(self, task: str, examples: list[Row]) -> list[str]:
        return [without_reasoning(shot) for shot in super().shots(task, examples)]

    def answer_in(self, output: str) -> str:
        return output.strip().partition("\n")[0].strip()


def examples_of(file: str) -> list[str]:
    """The examples in a prompt file of the authors, the first with the description before it.

    The file is ``"<warning>\\n-----\\n" + description + "\\n\\n" + "\\n\\n".join(examples)``; the result, joined by
    blank lines, is its text after the dashes.
    """
    _, _, prompts = file.partition("-----\n")
    first, *rest = re.split(r"\n\n(?=Q: )", prompts)
    return [f"{first}\n\n{rest[0]}", *rest[1:]] if rest else [first]


def without_reasoning(shot: str) -> str:
    """``"Q: …\\nA: Let's think step by step.\\n… So the answer is X."`` to ``"Q: …\\nA: X"``."""
    question, _, reasoning = shot.partition("\nA: Let's think step by step.")
    return f"{question}\nA: {reasoning.rpartition('the answer is ')[2].strip().removesuffix('.')}"
