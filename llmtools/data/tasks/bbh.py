"""BIG-Bench-Hard: 27 tasks on which models were behind people (Suzgun et al. 2022, arXiv:2210.09261).

Three published ways of asking, each with three worked examples before the question:

    bbh         the first three examples of a task, "… Answer: …", and the others are judged: InstructEval
                (arXiv:2306.04757), in which ModuLoRA (arXiv:2309.16119) reports its instruction-tuned models
    bbh_direct  the authors' three examples with their answers alone
    bbh_cot     the authors' three examples with the reasoning that leads to the answer (chain of thought)

The last two read the authors' files, byte for byte. Reported is exact match, the mean over tasks (the published
average), over all examples, and each task's own; `prefix_match` is InstructEval's milder rule, that the output begins
with the answer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError, did_you_mean
from ..reading import Row, read_rows
from .base import Task, tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOTS = 3


@tasks.register("bbh")
@dataclass(frozen=True)
class Bbh(Task):
    """BIG-Bench-Hard with three answered examples of the set (InstructEval): exact match, a task at a time."""

    data: str
    """folder with bbh.jsonl (task, input, target; .gz, .xz too) or bbh/*.json, and cot-prompts/*.txt: a checkout of
    github.com/suzgunmirac/BIG-Bench-Hard"""
    only: str | None = None
    """some of the tasks: boolean_expressions,snarks"""
    max_new_tokens: int = 32
    """tokens of an answer"""

    stop: ClassVar[tuple[str, ...]] = ("\n\n",)
    given: ClassVar[int] = SHOTS
    """The first so many examples of each task are given, not asked."""

    def test(self) -> list[Row]:
        rows = []
        for task, examples in self._examples().items():
            shots = self.shots(task, examples[: self.given])
            for example in examples[self.given :]:
                row = {**example, "shots": shots, "completion": f" {example['target']}"}
                rows.append({**row, "prompt": self.prompt(row)})
        return rows

    def shots(self, task: str, examples: list[Row]) -> list[str]:
        """What is written before the question: the examples, each with the blank line after it."""
        return [f"{example['input']}\nAnswer: {example['target']}\n\n" for example in examples]

    def prompt(self, row: Row) -> str:
        return "".join(row["shots"]) + f"{row['input']}\nAnswer:"

    def answer_in(self, output: str) -> str:
        """The answer that an output gives: its first line."""
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
        """With fewer examples before the question where the model has no room for all (InstructEval does the same)."""
        while room is not None and len(tokenizer(row["prompt"], verbose=False)["input_ids"]) > room:
            if not row["shots"]:
                raise InputError(
                    f"task {row['task']!r}: a question alone has more tokens than the model has room for ({room}); "
                    f"name the tasks that fit with --options.only, or take a model with more positions"
                )
            row = {**row, "shots": row["shots"][:-1]}
            row["prompt"] = self.prompt(row)
        return row

    def _examples(self) -> dict[str, list[Row]]:
        """Each task's examples, {task, input, target}, in the order of the files."""
        folder = self._folder()
        found: dict[str, list[Row]] = {}
        for file in sorted(folder.glob("bbh.jsonl*")):
            for row in read_rows(file):
                found.setdefault(row["task"], []).append(row)
        for file in sorted((folder / "bbh").glob("*.json")):
            examples = json.loads(file.read_text(encoding="utf-8"))["examples"]
            found[file.stem] = [{"task": file.stem, **example} for example in examples]
        if not found:
            raise InputError(f"{folder} holds neither bbh.jsonl (or .gz, .xz of it) nor bbh/*.json")
        if self.only is None:
            return found
        names = [name.strip() for name in self.only.split(",")]
        for name in names:
            if name not in found:
                raise InputError(f"bbh has no task {name!r}; {did_you_mean(name, found)}")
        return {name: found[name] for name in names}

    def _folder(self) -> Path:
        folder = Path(self.data).expanduser()
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; git clone https://github.com/suzgunmirac/BIG-Bench-Hard")
        return folder


@tasks.register("bbh_cot")
@dataclass(frozen=True)
class BbhCot(Bbh):
    """BIG-Bench-Hard with the authors' chain-of-thought prompts: exact match of what follows "the answer is"."""

    max_new_tokens: int = 512
    """tokens of the reasoning and the answer"""

    stop: ClassVar[tuple[str, ...]] = ("\n\nQ:",)
    given: ClassVar[int] = 0
    opening: ClassVar[str] = "A: Let's think step by step."

    def shots(self, task: str, examples: list[Row]) -> list[str]:
        """The authors' file: what the task is and the first example, then each further example."""
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

    max_new_tokens: int = 32
    """tokens of an answer"""

    opening: ClassVar[str] = "A:"

    def shots(self, task: str, examples: list[Row]) -> list[str]:
        return [without_reasoning(shot) for shot in super().shots(task, examples)]

    def answer_in(self, output: str) -> str:
        return output.strip().partition("\n")[0].strip()


def examples_of(file: str) -> list[str]:
    """The examples in an authors' file, the first with the description before it.

    The file is ``"<warning>\\n-----\\n" + "\\n\\n".join(examples)`` with a description before the first; joined, these
    are its bytes after the dashes.
    """
    _, _, prompts = file.partition("-----\n")
    first, *rest = re.split(r"\n\n(?=Q: )", prompts)
    return [f"{first}\n\n{rest[0]}", *rest[1:]] if rest else [first]


def without_reasoning(shot: str) -> str:
    """``"Q: …\\nA: Let's think step by step.\\n… So the answer is X."`` to ``"Q: …\\nA: X"``."""
    question, _, reasoning = shot.partition("\nA: Let's think step by step.")
    return f"{question}\nA: {reasoning.rpartition('the answer is ')[2].strip().removesuffix('.')}"
