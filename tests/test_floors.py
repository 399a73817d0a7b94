"""The package is a stack of layers, and imports go down (docs/architecture.md, section 2)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llmtools"

LAYERS = {
    "llms": 12,  # llms and engine are the published import paths: a compatibility layer over all that is below
    "engine": 12,
    "cli": 11,
    "sweep": 10,
    "recipes": 9,
    "train": 8,
    "checkpoint": 7,
    "formats": 6,
    "model": 5,
    "data": 5,
    "nn": 4,
    "quant": 3,
    "kernels": 2,
    "registry": 1,
    "options": 1,
    "limits": 1,
    "errors": 1,
    "document": 1,
    "signals": 1,
    "startup": 1,
    "content": 1,
    "files": 1,
    "progress": 1,
    "pages": 1,
    "ranks": 1,
    "redaction": 1,
    "_hook": 1,
    "_moved": 1,
}
NEEDS: dict[str, set[str]] = {
    "nn": {"torch"},
    "quant": {"torch", "safetensors"},  # the law of the round trip writes a file
    "kernels": {"torch", "triton"},  # triton comes with the CUDA builds of torch; imported where it is there
    "registry": set(),
    "options": set(),
    "limits": {"regex"},
    "errors": set(),
    "document": set(),
    "signals": set(),
    "content": set(),
    "files": set(),
    "pages": set(),
    "ranks": set(),
    "redaction": set(),
    "startup": set(),
    "progress": {"rich"},
    "_hook": set(),
    "_moved": set(),
}
"""Third-party packages that a layer may import, at any depth."""

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The layer of a file: its folder in the package, or its own name."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path, *, top_level: bool = False) -> set[tuple[str, ...]]:
    """The dotted names that a file imports, as tuples; with `top_level`, only those that run when it is imported."""
    found = set()
    for node in _nodes(ast.parse(path.read_text()), enter_functions=not top_level):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, path)
            found |= {(*module, alias.name) for alias in node.names}
    return found


def _nodes(node: ast.AST, *, enter_functions: bool) -> list[ast.AST]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return [inner for child in node.orelse for inner in _nodes(child, enter_functions=enter_functions)]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not enter_functions:
        return []
    below = [inner for child in ast.iter_child_nodes(node) for inner in _nodes(child, enter_functions=enter_functions)]
    return [node, *below]


def _absolute(node: ast.ImportFrom, path: Path) -> tuple[str, ...]:
    named = tuple(node.module.split(".")) if node.module else ()
    if not node.level:
        return named
    package = ("llmtools", *path.relative_to(PACKAGE).parent.parts)
    return (*package[: len(package) - node.level + 1], *named)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    layer = layer_of(path)
    if layer in ("__init__", "__main__"):
        return  # it names things of every layer, lazily (test_imports.py)
    assert layer in LAYERS, f"{path.name}: a new layer; add it to LAYERS"
    for name in imports(path):
        if name[0] == "llmtools" and len(name) > 1 and name[1] in LAYERS:
            same = name[1] == layer
            lower = LAYERS[name[1]] < LAYERS[layer] or LAYERS[layer] == 1 == LAYERS[name[1]]
            assert same or lower, f"{layer} (layer {LAYERS[layer]}) imports {'.'.join(name)} (layer {LAYERS[name[1]]})"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lower_layers_need_torch_alone(path: Path) -> None:
    allowed = NEEDS.get(layer_of(path))
    if allowed is not None:
        outside = {name[0] for name in imports(path)} - sys.stdlib_module_names - {"llmtools"} - allowed
        assert not outside, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(outside))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    """TRL, PEFT, datasets and matplotlib are imported inside a function, never by importing one of our modules."""
    heavy = {name[0] for name in imports(path, top_level=True)} & {"trl", "peft", "datasets", "matplotlib"}
    assert not heavy, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(heavy))} when it is imported itself"
