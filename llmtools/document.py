"""A report as a list of blocks, written as Markdown, as one HTML file, or for the terminal.

Sweep, demo and benchmarks use it for their reports, so that tables, sizes and numbers look the same in each.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple


class Block(NamedTuple):
    """One element of a report."""

    kind: str
    """Kind: title, section, paragraph, code, list (an item per line), table, or image (`text` describes it)."""
    text: str = ""
    """Text of all kinds but tables."""
    header: tuple[str, ...] = ()
    """Column titles of a table."""
    rows: tuple[tuple[str, ...], ...] = ()
    """Cells of a table, row by row."""
    source: str = ""
    """Address of an image: a file beside the report, or a data: address."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Block:
    """A table; all columns but the first hold numbers."""
    return Block("table", "", tuple(header), tuple(map(tuple, rows)))


def figure(value: float, beside: float | None = None) -> str:
    """A number with three or four digits; with `beside`, as many decimals as that number has."""
    most = abs(value if beside is None else beside)
    decimals = 3 if most < 10 else 2 if most < 100 else 1 if most < 10_000 else 0
    return f"{value:.{decimals}f}"


def size(count: float) -> str:
    """Bytes in decimal units: 12.3 KB, 4.56 MB, 7.89 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.1f} KB"


# ------------------------------------------------------------------------------------------------------------- Markdown


def markdown(blocks: Sequence[Block]) -> str:
    """The report as Markdown."""
    return "\n".join(_as_markdown(block) for block in blocks)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table alone; empty without rows."""
    return _as_markdown(table(header, rows)).rstrip("\n") if rows else ""


def _as_markdown(block: Block) -> str:
    match block.kind:
        case "title":
            return f"# {block.text}\n"
        case "section":
            return f"## {block.text}\n"
        case "code":
            return "\n".join(f"    {line}" for line in block.text.splitlines()) + "\n"
        case "table":
            rule = ("---", *["---:"] * (len(block.header) - 1))
            return "\n".join(f"| {' | '.join(row)} |" for row in (block.header, rule, *block.rows)) + "\n"
        case "list":
            return "\n".join(f"* {line}" for line in block.text.splitlines()) + "\n"
        case "image":
            return f"![{block.text}]({block.source})\n"
    return f"{block.text}\n"


# ------------------------------------------------------------------------------------------------------------- terminal


def plain_table(block: Block) -> str:
    """A table for the terminal: columns of equal width."""
    lines = (block.header, *block.rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(block.header))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


# ----------------------------------------------------------------------------------------------------------------- HTML

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 14px; margin: 1rem 0; display: block; overflow-x: auto }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #e3e5e8 }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
pre { background: #f5f6f7; padding: .7rem; overflow-x: auto; font-size: 13px }
img { max-width: 100%; display: block; margin: 1rem 0 }
"""


def page(blocks: Sequence[Block]) -> str:
    """The report as one HTML file that loads nothing but images beside it."""
    title = next((block.text for block in blocks if block.kind == "title"), "report")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n" + "\n".join(map(_as_html, blocks)) + "\n</html>\n"
    )


def _as_html(block: Block) -> str:
    if block.kind == "table":
        head, *body = (
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in (("th", block.header), *(("td", row) for row in block.rows))
        )
        return f"<table><tr>{head}</tr>\n" + "\n".join(f"<tr>{row}</tr>" for row in body) + "</table>"
    if block.kind == "list":
        return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in block.text.splitlines()) + "</ul>"
    if block.kind == "image":
        return f'<img alt="{html.escape(block.text)}" src="{html.escape(block.source)}">'
    tag = {"title": "h1", "section": "h2", "code": "pre"}.get(block.kind, "p")
    return f"<{tag}>{html.escape(block.text)}</{tag}>"
