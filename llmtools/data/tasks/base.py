"""The interface of a task: examples, a prompt template, and a score.

A task is a frozen dataclass; its fields are its options. A new one is a file like this, and an entry point in the group
``llmtools.tasks`` if it is in another package:

    @tasks.register("capitals")
    @dataclass(frozen=True)
    class Capitals(Task):
        \"\"\"The capital of a country, scored by exact match.\"\"\"

        data: str
        template: ClassVar[Template] = Template("The capital of {country} is", " {capital}")

        def train(self) -> list[Row]:
            return [self.template.fill(fields) for fields in read_rows(self.data)]

        def validation(self) -> list[Row]:
            return self.train()

A row has one of TRL's three formats: ``{"text"}`` (loss on every token), ``{"prompt", "completion"}`` and
``{"messages"}``, a chat in the tokenizer's own template; it may have further fields for the score. There are three
splits: `train`, `validation` for the choice of a checkpoint, and `test`, which is reported and takes no part in any
choice. `score` compares the outputs with the rows; the default is exact match. `evaluate` generates greedily and
scores; a task evaluated otherwise (perplexity) overrides it.

A task over the records of a published data set is shorter still: see `dataset_task.DataTask`.
"""

from __future__ import annotations

import dataclasses
import string
from abc import ABC
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ...errors import InputError, did_you_mean
from ...limits import TEMPLATE_SECONDS, bounded
from ...options import built
from ...registry import Registry
from ..calibration import HUB
from ..generation import complete
from ..metrics import OnStep, model_positions
from ..text_io import Row, existing_file

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

tasks: Registry[Task] = Registry("task", "llmtools.tasks")


class NullField(InputError):
    """A row has null where its prompt template needs a text; it must not become the text "None"."""


class Template(NamedTuple):
    """A prompt template: ``Template("Q: {question}\\nA:", " {answer}")``. Saved beside an adapter."""

    prompt: str
    """Format string of the prompt over a row's fields."""
    completion: str
    """Format string of the completion."""

    def fill(self, fields: Row, where: str = "row") -> Row:
        """The row ``{"prompt", "completion"}``. Raises InputError, led by `where`, for a missing field."""
        return {
            "prompt": _filled(self.prompt, fields, where),
            "completion": _filled(self.completion, fields, where),
        }


class Task(ABC):
    """A task: examples, template and score. Subclasses are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]
    """Name in the registry."""
    template: ClassVar[Template | None] = None
    """Prompt template; None for tasks without one."""
    stop: ClassVar[tuple[str, ...]] = ()
    """Stop strings; an answer ends before the first of them."""
    max_new_tokens: int = 64
    """Maximum number of tokens of an answer."""
    has_answers: ClassVar[bool] = True
    """Whether `evaluate` generates answers to the test rows that `score` compares; false for perplexity."""
    reads_file: ClassVar[bool] = False
    """Whether `data` is one file (or wikitext2, c4), not a folder of splits or another name on the hub."""
    validates_on_data: ClassVar[bool] = False
    """Whether `evaluate` takes all of the data that it is given, as `validation_data`: the user's own."""

    def train(self) -> list[Row]:
        """The rows to train on."""
        raise InputError(f"task {self.name!r} has nothing to train on; it only evaluates")

    def validation(self) -> list[Row]:
        """Rows held out of training, for the choice of a checkpoint; none by default."""
        return []

    def test(self) -> list[Row]:
        """Rows for the reported measures; the validation rows where a task has no test split."""
        return self.validation()

    def fitted(self, row: Row, tokenizer: PreTrainedTokenizerBase, room: int | None = None) -> Row:
        """The row, its prompt truncated to the task's own limit and to `room` tokens where the task can do that.

        A task that knows which part of a prompt may be truncated overrides this. The answer is never truncated.
        """
        return row

    def max_length(self) -> int | None:
        """Maximum number of tokens of a training example, if the task has limits of its own."""
        return None

    def score(self, outputs: list[str], rows: list[Row]) -> dict[str, float]:
        """Measures of `outputs[i]`, the model's answer to `rows[i]`; the main measure comes first."""
        hits = [output.strip() == answer(row).strip() for output, row in zip(outputs, rows, strict=True)]
        return {"exact_match": sum(hits) / len(hits)}

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int | None = None,
        batch_size: int = 1,
        on_step: OnStep | None = None,
    ) -> dict[str, Any]:
        """Measures of `model` on (`limit` of) the test rows, the main one first, JSON-ready.

        Raises InputError where there are no test rows, or a prompt does not fit into the model's positions.
        """
        rows, shortened = self.test_rows(model, tokenizer, limit)
        outputs = complete(
            model,
            tokenizer,
            [prompt_text(row, tokenizer, where=f"row {index + 1}") for index, row in enumerate(rows)],
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            chat="prompt" not in rows[0],
            batch_size=batch_size,
            on_step=on_step,
        )
        return {**self.score(outputs, rows), **self.counts(rows, shortened)}

    def counts(self, rows: list[Row], shortened: int) -> dict[str, int]:
        """Number of evaluated examples, and of those with a truncated prompt, if any."""
        return {"examples": len(rows), **({"shortened_prompts": shortened} if shortened else {})}

    def test_rows(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
    ) -> tuple[list[Row], int]:
        """The rows to evaluate, and the number of those with a truncated prompt.

        They are spread evenly over the test split if `limit` is below its size.
        """
        rows = self.test()
        if not rows:
            raise InputError(f"task {self.name!r} has no rows to evaluate on; name some, or use --task perplexity")
        positions = model_positions(model)
        room = None if positions is None else positions - self.max_new_tokens
        whole = spread(rows, limit)
        fitted = [self.fitted(row, tokenizer, room) for row in whole]
        return fitted, sum(
            row["prompt"] != short["prompt"] for row, short in zip(whole, fitted, strict=True) if "prompt" in row
        )


def held_out(count: int, share: float, seed: int) -> set[int]:
    """Indices of the training rows held out for validation: a random fraction `share` of `count`, fixed by the seed."""
    if not 0 <= share < 1:
        raise InputError(f"validation={share}: a fraction of the rows from 0 to below 1 is expected, or a file")
    held = round(share * count)
    if share > 0 and not 0 < held < count:
        raise InputError(
            f"validation={share} of {count} rows leaves {held} to validate on and {count - held} to train on; both are "
            f"needed"
        )
    return set(Random(seed).sample(range(count), held))


def spread(rows: list[Row], limit: int | None) -> list[Row]:
    """`limit` rows at even distances, so that a sorted file is sampled throughout; all for None."""
    if limit is None or limit >= len(rows):
        return rows
    if limit < 1:
        raise InputError(f"limit={limit}: at least one example is needed")
    return [rows[index * len(rows) // limit] for index in range(limit)]


def make_task(name: str, **options: Any) -> Task:
    """The task `name` with these options. Raises InputError for an unknown name or option, or a missing option."""
    cls = tasks.get(name)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in options:
        if key not in fields:
            raise InputError(f"task {name!r} has no option {key!r}; {did_you_mean(key, fields)}")
    for key, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and options.get(key) is None:
            raise InputError(f"task {name!r} needs {key!r}: pass --{key} (a field of the recipe or one of its options)")
    return built(f"task {name!r}", cls, options)


def check_data(task: type[Task], *data: Any) -> None:
    """Raises InputError where a task's data are a path that does not exist. Nothing is read."""
    for each in data:
        if not isinstance(each, str) or each in HUB:
            continue
        if task.reads_file:
            existing_file(each)
        elif each.startswith((".", "/", "~")) and not Path(each).expanduser().exists():
            raise InputError(f"there is no file or folder {each} (looked in {Path.cwd()})")


def answer(row: Row) -> str:
    """The reference answer of a row. Raises InputError for plain text, or a chat without an answer."""
    if "completion" in row:
        return str(row["completion"])
    if "messages" in row:
        return str(row["messages"][_last_answer(row["messages"], "row")]["content"])
    raise InputError("a row of plain text has no answer to compare with; use --task perplexity")


def prompt_text(row: Row, tokenizer: PreTrainedTokenizerBase, *, where: str = "row") -> str:
    """The model's input: the prompt, or the chat up to the last answer in the tokenizer's template.

    Raises InputError for plain text, a chat without an answer, or one that the template rejects.
    """
    if "prompt" in row:
        return str(row["prompt"])
    if "messages" in row:
        chat = row["messages"][: _last_answer(row["messages"], where)]
        return str(in_chat_template(chat, tokenizer, where=where, tokenize=False, add_generation_prompt=True))
    raise InputError(f"{where}: plain text has no prompt; use --task perplexity")


def _last_answer(messages: list[Row], where: str) -> int:
    """Index of the last answer of a chat."""
    for index in range(len(messages) - 1, 0, -1):
        if messages[index]["role"] == "assistant":
            return index
    raise InputError(f"{where}: no message of the role 'assistant' after another one, there is no answer to evaluate")


def in_chat_template(
    messages: list[Row], tokenizer: PreTrainedTokenizerBase, *, where: str = "row", **options: Any
) -> Any:
    """`tokenizer.apply_chat_template` of a chat. Raises InputError if there is no template, or it rejects the chat."""
    from jinja2 import TemplateError

    needs_chat_template(tokenizer)
    try:
        with bounded(TEMPLATE_SECONDS):
            return tokenizer.apply_chat_template(messages, **options)
    except (TimeoutError, MemoryError, OverflowError) as error:
        raise InputError(f"{where}: the model's chat template does not terminate ({error})") from error
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise InputError(f"{where}: the model's chat template rejects the roles {roles}: {error}") from error


def needs_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise InputError(
            "the data are chats (messages), but the model's tokenizer has no chat template; use a model that has one "
            '(often called "instruct" or "chat"), or write the data as "prompt" and "completion"'
        )


def template_fields(template: str, where: str = "template") -> list[str]:
    """The names of a template's fields, in order. Raises InputError unless each is a plain ``{name}``.

    A template may come from a file, and Python's format strings can do more than substitution: access attributes, or
    request a width of gigabytes.
    """
    try:
        parts = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(f"{where}: the template {template!r} is damaged ({error}); fields are {{name}}") from error
    for name, spec, how in parts:
        if spec or how or not name or set(name) & set(".["):
            raise InputError(f"{where}: {{{name}}} in the template {template!r} is no plain field such as {{question}}")
    return [name for name, _, _ in parts]


def _filled(template: str, fields: Row, where: str) -> str:
    names = template_fields(template, where)
    for name in names:
        if name not in fields:
            raise InputError(f"{where}: no field {name!r} for the template {template!r}; {did_you_mean(name, fields)}")
        if fields[name] is None:
            raise NullField(f"{where}: {name!r} is null; remove the row, or give it a text")
    return template.format_map({name: fields[name] for name in names})
