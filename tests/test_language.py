"""The package uses the field's terms: attribute docstrings are noun phrases, and no private dialect is left in texts.

Help texts of options come from attribute docstrings, so these are held to one form. The rules hold for the packages in
`CONVERTED`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llmtools"

CONVERTED = ("model", "nn", "quant", "kernels", "llms", "engine")
"""Names of the packages that the rules apply to; top-level modules are always included."""

FILES = sorted([*PACKAGE.glob("*.py"), *(path for name in CONVERTED for path in (PACKAGE / name).rglob("*.py"))])

NO_FIRST_WORD = re.compile(
    r"(of|to|in|with|by|for|that|which|its?|how|what|where|when|use|run|replace|write|read|show|print)\b", re.IGNORECASE
)
"""Pattern of first words that open no noun phrase."""

DIALECT = [
    r"judged?\b", r"bits a weight", r"few tokens", r"rounded again", r"\bporch\b", r"\bfloors?\b", r"\brooms\b",
    r"foreign (checkpoint|format|file)s?", r"(checkpoint|format)s? of others", r"\bstrangers?\b", r"likeliest",
    r"\bchances\b", r"left over", r"start values", r"\blessons?\b", r"\bteach(e[rs]|ers)?\b",
    r"\bwish(es)?\b",
    r"\bcomplaints?\b", r"in words of their own", r"somebody", r"\bhungry\b", r"the way out", r"is told by",
    r"model (write|speak)s? on", r"\bfilled up\b",
]  # fmt: skip
"""Patterns of private terms for which the field has others."""


def documented_attributes(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """(name, line, docstring) of attributes of classes and modules."""
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef | ast.Module):
            continue
        for before, node in zip(owner.body, owner.body[1:], strict=False):
            text = _text(node)
            if text is not None and isinstance(before, ast.Assign | ast.AnnAssign):
                target = before.targets[0] if isinstance(before, ast.Assign) else before.target
                yield ast.unparse(target), node.lineno, text


def mistakes(text: str) -> Iterator[str]:
    """How an attribute docstring is no noun phrase, as messages."""
    if (first := NO_FIRST_WORD.match(text)) is not None:
        yield f"opens with {first[0]!r}"
    if text[0].islower():
        yield "opens with a small letter"
    if not text.rstrip().endswith((".", "…")):
        yield "ends without a period"


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of all string constants: docstrings, messages, help."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def dialect(text: str) -> list[str]:
    """The private terms in a text; a line break counts as a space."""
    plain = " ".join(text.split())
    return [found[0] for pattern in DIALECT if (found := re.search(pattern, plain, re.IGNORECASE))]


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return None


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_attribute_docstrings_are_noun_phrases(path: Path) -> None:
    found = [
        f"{_name(path)}:{line} {name}: {mistake}"
        for name, line, text in documented_attributes(ast.parse(path.read_text(encoding="utf-8")))
        for mistake in mistakes(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_texts_use_the_terms_of_the_field(path: Path) -> None:
    found = [
        f"{_name(path)}:{line}: {', '.join(terms)}"
        for line, text in texts(ast.parse(path.read_text(encoding="utf-8")))
        if (terms := dialect(text))
    ]
    assert not found, "\n".join(found)


def test_the_rules_find_what_they_are_for() -> None:
    source = 'class A:\n    seed: int = 0\n    """of the adapter\'s start"""\n    rank: int = 8\n    """Rank r."""\n'
    assert [name for name, _, _ in documented_attributes(ast.parse(source))] == ["seed", "rank"]
    assert len(list(mistakes("of the adapter's start"))) == 3
    assert not list(mistakes("Number of optimizer steps between checkpoints."))
    assert dialect("stored at 3 bits a\n    weight") == ["bits a weight"] and not dialect("3 bits per weight")
