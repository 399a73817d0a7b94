"""Answers that are JSON objects, such as records read out of a text.

The rows are the user's own, as for the task ``text``: prompts with completions, or chats. Answers are compared as JSON,
so spaces and the order of the keys do not count; an answer with anything around the object is no JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ...errors import InputError
from ..text_io import Row
from .base import answer, tasks
from .text import TextTask


@tasks.register("json")
@dataclass(frozen=True)
class JsonTask(TextTask):
    """Your own file whose answers are JSON objects: exact match, and the share of fields that are right."""

    max_new_tokens: int = 128
    """Maximum number of tokens of an answer."""

    def _rows(self, path: str) -> list[Row]:
        rows = super()._rows(path)
        for number, row in enumerate(rows, start=1):
            if not json_object(text := answer(row)):
                raise InputError(
                    f"{path}, row {number}: the answer {text[:60]!r} is not a JSON object with fields, as --task json "
                    f"expects; --task text compares answers of any form"
                )
        return rows

    def score(self, outputs: list[str], rows: list[Row]) -> dict[str, float]:
        """Shares of the objects that are right as a whole, of their fields, and of the answers that are an object.

        A field is right where the answer has its key with the same value. Raises nothing for any output.
        """
        given = [json_object(output) for output in outputs]
        expected = [json_object(answer(row)) or {} for row in rows]
        pairs = list(zip(given, expected, strict=True))
        fields = [field in (found or {}).items() for found, row in pairs for field in row.items()]
        return {
            "exact_match": sum(found == row for found, row in pairs) / len(pairs),
            "fields": sum(fields) / len(fields),
            "valid": sum(found is not None for found in given) / len(given),
        }


def json_object(text: str) -> dict[str, Any] | None:
    """The object that a text is, with comparable values; None for a text that is no JSON object.

    A number is ``("number", Decimal)``: 2 equals 2.0, and neither 1 nor 1.0 equals true, as they would in Python.
    """

    def number(digits: str) -> tuple[str, Decimal]:
        return "number", Decimal(digits)

    try:
        found = json.loads(text, parse_int=number, parse_float=number, parse_constant=_refuse)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
