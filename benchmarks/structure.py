"""What the source tree of the package looks like, in figures: sizes, functions, docstrings with shapes, repeated lines.

    python -m benchmarks.structure                       # this checkout
    python -m benchmarks.structure --tree ../before      # another one, to compare

The figures are read from the syntax trees; nothing is imported. *Without shapes* counts public functions that have a
docstring and take a Tensor, but give no shape in brackets, neither there nor in the docstring of their module or class.
*Repeated* counts runs of six or more lines of code that occur a second time, names and literals being equal.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN = 6
"""Lines of the shortest run that counts as repeated."""

_SHAPE = re.compile(r"\[[^\]]*\]")


def measure(package: Path) -> dict[str, Any]:
    """The figures of the Python files below `package`."""
    files = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in files.items()}
    lines = sorted(text.count("\n") for text in files.values())
    functions = sorted(_length(node) for tree in trees.values() for node in _functions(tree))
    bare = [f"{path.relative_to(package)}:{node.lineno} {node.name}" for path, node in _without_shapes(trees)]
    return {
        "files": len(files),
        "lines": sum(lines),
        "file_median": int(statistics.median(lines)),
        "file_largest": lines[-1],
        "function_median": int(statistics.median(functions)),
        "function_p95": functions[int(0.95 * (len(functions) - 1))],
        "function_max": functions[-1],
        "without_shapes": bare,
        "repeated_runs": _repeated(files),
    }


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _length(node: ast.FunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _without_shapes(trees: dict[Path, ast.Module]) -> Iterator[tuple[Path, ast.FunctionDef]]:
    """Public, documented functions that take tensors and say no shape."""
    for path, tree in trees.items():
        module = ast.get_docstring(tree) or ""
        for owner in ast.walk(tree):
            if not isinstance(owner, ast.Module | ast.ClassDef):
                continue
            around = module + (ast.get_docstring(owner) or "")
            for node in owner.body:
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                    continue
                doc = ast.get_docstring(node)
                takes = [
                    ast.unparse(each.annotation) for each in node.args.args + node.args.kwonlyargs if each.annotation
                ]
                tensors = any(re.search(r"\bTensor\b|\bPacked\b", each) for each in takes)
                if doc and tensors and not _SHAPE.search(doc + around):
                    yield path, node


def _repeated(files: dict[Path, str]) -> int:
    """The number of maximal runs of at least `RUN` equal lines of code that stand in a second place."""
    stripped = {
        path: [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
        for path, text in files.items()
    }
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = {}
    for path, lines in stripped.items():
        for start in range(len(lines) - RUN + 1):
            window = tuple(lines[start : start + RUN])
            if not all(line.startswith(("from ", "import ")) for line in window):
                places.setdefault(window, []).append((path, start))
    again = {place for found in places.values() for place in found[1:]}
    return sum((path, start - 1) not in again for path, start in again)


def main() -> None:
    """Prints the figures, as a table or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="root of the checkout")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    figures = measure(options.tree / "llmtools")
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    bare = figures.pop("without_shapes")
    for name, value in {**figures, "without_shapes": len(bare)}.items():
        print(f"{name:<16} {value:>7}")
    print(*(f"  {each}" for each in bare), sep="\n")


if __name__ == "__main__":
    main()
